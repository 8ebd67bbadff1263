"""The tokens of digit scenes: whole words, so that every answer is one token."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit

from ...modeling.processing_adavtp import AdaVTPProcessor
from ..processor import SPECIAL_TOKENS, UNKNOWN, build_processor
from .questions import VOCABULARY


def build_digit_processor(image_size: int = 96, patch_size: int = 8) -> AdaVTPProcessor:
    """The processor for models of digit scenes; see [`build_processor`]."""
    return build_processor(build_digit_tokenizer(), image_size, patch_size)


def build_digit_tokenizer() -> Tokenizer:
    """
    The word-level tokenizer over `VOCABULARY`. It ignores case and spaces around punctuation: "What colour is the 7?"
    and "what colour is the 7 ?" are the same ids. Special tokens come first, then the vocabulary in its order.
    """
    ids = {word: number for number, word in enumerate((*SPECIAL_TOKENS, *VOCABULARY))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    return tokenizer
