"""The processor of the reference model: digit scenes and the words that are asked about them.

The tokenizer knows whole words, those of `VOCABULARY`, so that every answer is one token and a prompt is as short as
its question. Spelling is forgiving: "What colour is the 7?" and "what colour is the 7 ?" are the same ids.
"""

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Punctuation, Sequence, WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ...modeling.processing_adavtp import AdaVTPProcessor
from .questions import VOCABULARY

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "USER:", "ASSISTANT:"

# LLaVA-1.5's form. The template writes <s> and the tokenizer adds nothing, so that there is always exactly one. Turns
# other than the assistant's count as the user's: a system prompt is no word of the vocabulary anyway.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ASSISTANT:' }}{% else %}{{ 'USER:' }}{% endif %}"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% for part in parts if part['type'] == 'image' %}{{ ' <image>' }}{% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}"
    "{{ ' ' }}{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] }}{% endgeneration %}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def build_digit_processor(image_size: int = 96, patch_size: int = 8) -> AdaVTPProcessor:
    """
    The processor for models of digit scenes.

    Args:
        image_size: side in pixels of the square that the model sees, a multiple of `patch_size`.
        patch_size: side in pixels of the vision tower's patches.

    Returns:
        A processor whose prompts are `<s>USER: <image> question ASSISTANT: answer</s>`, for a CLIP tower whose CLS
        token is cut off.

    Raises:
        ValueError: if `image_size` is no multiple of `patch_size`.
    """
    if patch_size < 1 or image_size < patch_size or image_size % patch_size:
        raise ValueError(
            f"`image_size` is {image_size} and `patch_size` is {patch_size}; the first must be a multiple of the "
            "second, and both at least 1."
        )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        # Scenes are not photographs: all three channels use the whole range alike.
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return AdaVTPProcessor(
        image_processor,
        build_digit_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def build_digit_tokenizer() -> PreTrainedTokenizerFast:
    """
    The word-level tokenizer over `VOCABULARY`. It ignores case and spaces around punctuation, pads on the left, and
    adds no token by itself. Ids are fixed: special tokens first, `<pad>` is 0, then the vocabulary in its order.
    """
    special = (PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT)
    ids = {word: number for number, word in enumerate((*special, *VOCABULARY))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Punctuation()])
    # Unnormalized: they are found before lower case makes "USER:" something else.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
