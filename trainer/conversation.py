"""A conversation as token ids, with targets on the assistant's turns alone."""

from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.processing_adavtp import AdaVTPProcessor

IGNORED = -100


@dataclass
class EncodedConversation:
    """
    Attributes:
        input_ids: token ids, with every image's placeholders.
        labels: the same length; the token where the assistant speaks, -100 elsewhere.
    """

    input_ids: list[int]
    labels: list[int]


def encode_conversation(
    processor: AdaVTPProcessor, messages: list[dict[str, Any]], num_image_tokens: int
) -> EncodedConversation:
    """
    Puts a conversation into the processor's chat template and finds the assistant's turns in it.

    A turn is what the template adds when the assistant's message follows the prompt that asks for it. A template that
    writes no end of sequence behind the last turn gets one here: without it a model does not learn to stop. Where the
    template writes no beginning of sequence either, the tokenizer adds its own, as it does for a prompt.

    Args:
        processor: with a chat template and a fast tokenizer.
        messages: `[{"role": "user" | "assistant" | "system", "content": [...]}, ...]`; a string is one text.
        num_image_tokens: placeholder tokens of one image, 0 where there are no images.

    Returns:
        `EncodedConversation`.

    Raises:
        ValueError: if the conversation is empty or begins with the assistant, shows images without placeholder tokens,
            or has a template that rewrites earlier turns when later ones are added, so that turns cannot be told
            apart.
    """
    if not messages or messages[0]["role"] == "assistant":
        raise ValueError(
            f"`messages` is {messages!r}; a conversation begins with a message of the user's or of the system's."
        )
    messages = [_in_parts(message) for message in messages]
    text = processor.apply_chat_template(messages)
    if processor.image_token in text and num_image_tokens < 1:
        raise ValueError(f"`messages` shows an image and none was given with it: {text!r}.")
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = processor.apply_chat_template(messages[:index], add_generation_prompt=True)
        is_last = index == len(messages) - 1
        through = text if is_last else processor.apply_chat_template(messages[: index + 1])
        if not (text.startswith(through) and through.startswith(before)):
            raise ValueError(
                "`processor.chat_template` rewrites earlier turns when later ones are added, so the assistant's turns "
                "cannot be found; use a template that only appends."
            )
        turns.append((before, through))

    tokenizer = processor.tokenizer
    if messages[-1]["role"] == "assistant" and not text.rstrip().endswith(tokenizer.eos_token or ""):
        before, _ = turns[-1]
        # The space that a template writes behind a turn belongs to the next one, and here there is none.
        text = before + text[len(before) :].rstrip() + tokenizer.eos_token
        turns[-1] = (before, text)

    def with_placeholders(part: str) -> str:
        return part.replace(processor.image_token, processor.image_token * num_image_tokens)

    spans = [(len(with_placeholders(before)), len(with_placeholders(through))) for before, through in turns]
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    tokens = tokenizer(with_placeholders(text), add_special_tokens=not begins, return_offsets_mapping=True)
    labels = [
        token if any(begin <= start and stop <= end for begin, end in spans) and start < stop else IGNORED
        for token, (start, stop) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
    return EncodedConversation(tokens["input_ids"], labels)


def placeholders_per_image(processor: AdaVTPProcessor, pixel_values: torch.Tensor) -> int:
    """
    Placeholder tokens of one image of the size in `pixel_values` `[num_images, channels, height, width]`.

    The rule is [`LlavaProcessor`]'s: one per patch, and the tower's additional tokens unless its CLS is cut off.
    """
    patches = (pixel_values.shape[-2] // processor.patch_size) * (pixel_values.shape[-1] // processor.patch_size)
    without_cls = processor.vision_feature_select_strategy == "default"
    return patches + processor.num_additional_image_tokens - int(without_cls)


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """
    The message with a list of parts as content, and no empty fields in them: LLaVA's template prints nothing of a
    string, and `datasets` gives every part the fields of all, of which a template would print an image's empty text.
    """
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {"role": message["role"], "content": parts}
