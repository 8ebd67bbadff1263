"""The processor of a reference model: square drawings, and the tokens of its task.

A task brings its tokenizer; the form of a prompt is the same for all.
"""

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..modeling.processing_adavtp import AdaVTPProcessor

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "USER:", "ASSISTANT:"
SPECIAL_TOKENS: tuple[str, ...] = (PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT)
"""The first tokens of every task's tokenizer, in this order: `<pad>` is 0."""

# LLaVA-1.5's form. The template writes <s> and the tokenizer adds nothing, so that there is always exactly one. Turns
# other than the assistant's count as the user's: a system prompt is nothing that a task knows.
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


def build_processor(tokenizer: Tokenizer, image_size: int, patch_size: int) -> AdaVTPProcessor:
    """
    The processor for a new model of a task.

    Args:
        tokenizer: the task's; its first tokens are `SPECIAL_TOKENS`.
        image_size: side in pixels of the square that the model sees, a multiple of `patch_size`.
        patch_size: side in pixels of the vision tower's patches.

    Returns:
        A processor whose prompts are `<s>USER: <image> question ASSISTANT: answer</s>`, for a CLIP tower whose CLS
        token is cut off. It pads on the left.

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
        # Drawings are not photographs: all three channels use the whole range alike.
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return AdaVTPProcessor(
        image_processor,
        _fast_tokenizer(tokenizer),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def _fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    # Unnormalized: they are found before lower case makes "USER:" something else.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
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
