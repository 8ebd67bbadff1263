"""Conversations that a family's own processor makes a batch of: its placeholders, its pixels, its token types.

How many tokens an image has, which marks stand around it and how pixels of several are put together is different in
every family, and its processor knows. What it does not know is which tokens are targets.
"""

from collections import Counter

import torch
from PIL import Image
from transformers import ProcessorMixin

from .chat_template import IGNORED, ConversationText, has_begin


def processed_batch(
    processor: ProcessorMixin, conversations: list[ConversationText], images: list[list[Image.Image]]
) -> dict[str, torch.Tensor]:
    """
    Args:
        processor: a family's, with a fast tokenizer.
        conversations: as [`conversation_text`] gives them.
        images: of each conversation, RGB, in the order of their placeholders.

    Returns:
        What the processor returns, padded on the right, and `labels` `[batch, sequence]`, -100 except on the
        assistant's turns.

    Raises:
        ValueError: if a conversation has another number of images than it shows, or the processor writes more text
            than it is given, as PaliGemma's does, so that turns cannot be found.
    """
    for conversation, own in zip(conversations, images, strict=True):
        # One with an image too many beside one with one too few would pass for right: the sums agree.
        if (shown := conversation.text.count(processor.image_token)) != len(own):
            raise ValueError(
                f"{conversation.text!r} shows {shown} image(s) and `images` has {len(own)}; every image needs one "
                "entry of type 'image' in its row's messages."
            )
    batch = processor(
        images=images if any(images) else None,
        text=[conversation.text for conversation in conversations],
        add_special_tokens=not has_begin(processor, conversations[0].text),
        padding=True,
        padding_side="right",
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
        # Where the text too is asked for as tensors, InternVL's would make one of where placeholders stood.
        images_kwargs={"return_tensors": "pt"},
    )
    replaced = batch.pop("text_replacement_offsets", None) or [[]] * len(conversations)
    batch = {name: torch.as_tensor(value) for name, value in batch.items()}
    offsets = batch.pop("offset_mapping")
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, (conversation, spans) in enumerate(zip(conversations, replaced, strict=True)):
        start, stop = offsets[row].unbind(-1)
        if int(stop.max()) > _moved(len(conversation.text), spans):
            raise ValueError(
                f"`processor` is a {type(processor).__name__}, which writes more than the chat template does, so that "
                "answers cannot be found; of conversations it makes no batch to train on."
            )
        for begin, end in conversation.turns:
            is_target = (start >= _moved(begin, spans)) & (stop <= _moved(end, spans)) & (start < stop)
            labels[row, is_target] = batch["input_ids"][row, is_target]
    return {**batch, "labels": labels}


def _moved(place: int, spans: list[dict]) -> int:
    """Where a character stands once the placeholders before it are written out."""
    before = [span for span in spans if span["span"][1] <= place]
    return place + (before[-1]["new_span"][1] - before[-1]["span"][1] if before else 0)


def processed_lengths(processor: ProcessorMixin, sizes: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """
    How many tokens a prompt's images of these sizes, (width, height), are: of marks around them, which stay at any
    budget, and placeholders. They depend on the sizes alone, so that the processor is asked with images of nothing.
    """
    if not sizes:
        return 0, 0
    nothing, text = [Image.new("RGB", size) for size in sizes], processor.image_token * len(sizes)
    ids = processor(images=[nothing], text=[text], add_special_tokens=False)["input_ids"][0]
    # Of all tokens the one that stands there again and again.
    ((_, num_visual),) = Counter(list(ids)).most_common(1)
    return len(ids) - num_visual, num_visual
