"""The tokens of pages: a glyph each, so that an answer is read off the page one glyph at a time."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import Replace
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit

from ...modeling.processing_adavtp import AdaVTPProcessor
from ..processor import SPECIAL_TOKENS, UNKNOWN, build_processor
from .page import GLYPHS
from .questions import WORDS

PUNCTUATION = "?.,"


def build_page_processor(image_size: int = 192, patch_size: int = 8) -> AdaVTPProcessor:
    """The processor for models of pages; see [`build_processor`]."""
    return build_processor(build_page_tokenizer(), image_size, patch_size)


def build_page_tokenizer() -> Tokenizer:
    """
    The tokenizer of pages: "KX" is `K` `##X`, "42" is `4` `##2`, a word of a question is one token. So decoded answers
    have their spaces where the page has them. A question may begin with a capital and need not have a space before its
    question mark. Special tokens come first, then glyphs at the beginning of a word, glyphs further on, punctuation,
    and the words of questions.
    """
    pieces = (*SPECIAL_TOKENS, *GLYPHS, *(f"##{glyph}" for glyph in GLYPHS), *PUNCTUATION)
    tokenizer = Tokenizer(WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    # Keys are capitals, so that only a question's first word may change its case.
    tokenizer.normalizer = NormalizerSequence(
        [Replace(Regex(rf"\b{word.capitalize()}\b"), word) for word in ("what", "which", "how", "read")]
    )
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    # Whole words only: "of" is a word of questions, and "often" is five glyphs.
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in WORDS])
    return tokenizer
