"""Conversations that a family's own processor makes a batch of: its placeholders, its pixels, its token types.

How many tokens an image or a video has, which marks stand around it and how pixels of several are put together is
different in every family, and its processor knows. What it does not know is which tokens are targets.
"""

from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin

from ...modeling.processing_adavtp import takes_suffix
from ...tasks.stored_videos import Clip, processed_videos
from .chat_template import IGNORED, ConversationText, has_begin, places_shown

# Where the text too is asked for as tensors, InternVL's would make one of where placeholders stood.
_AS_TENSORS = {"images_kwargs": {"return_tensors": "pt"}}


def processed_batch(
    processor: ProcessorMixin,
    conversations: list[ConversationText],
    images: list[list[Image.Image]],
    videos: list[list[Clip]],
) -> dict[str, torch.Tensor]:
    """
    Args:
        processor: a family's, with a fast tokenizer.
        conversations: as [`conversation_text`] gives them.
        images: of each conversation, RGB, in the order of their placeholders.
        videos: of each conversation, likewise.

    Returns:
        What the processor returns, padded on the right, and `labels` `[batch, sequence]`, -100 except on the
        assistant's turns.

    Raises:
        ValueError: if a conversation has another number of images or videos than it shows, the processor cannot put
            these videos into a batch, or it writes more text than it is given, so that turns cannot be
            found.
    """
    for conversation, *given in zip(conversations, images, videos, strict=True):
        # One with an image too many beside one with one too few would pass for right: the sums agree.
        for (kind, shown), own in zip(places_shown(processor, conversation.text).items(), given, strict=True):
            if shown != len(own):
                raise ValueError(
                    f"{conversation.text!r} shows {shown} {kind}(s) and `{kind}s` has {len(own)}; every {kind} needs "
                    f"one entry of type '{kind}' in its row's messages."
                )
    if takes_suffix(processor):
        return _suffixed_batch(processor, conversations, images)
    batch = processed_videos(
        processor,
        [clip for own in videos for clip in own],
        images=images if any(images) else None,
        text=[conversation.text for conversation in conversations],
        add_special_tokens=not has_begin(processor, conversations[0].text),
        padding=True,
        padding_side="right",
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
        **_AS_TENSORS,
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


def _suffixed_batch(
    processor: ProcessorMixin, conversations: list[ConversationText], images: list[list[Image.Image]]
) -> dict[str, torch.Tensor]:
    """The same of a processor that knows which tokens are targets: those of the suffix, whose token type is 1."""
    begins = [conversation.turns[0][0] for conversation in conversations]
    pairs = [(text[:begin], text[begin:]) for (text, _), begin in zip(conversations, begins, strict=True)]
    prefixes, suffixes = map(list, zip(*pairs, strict=True))
    batch = processor(images=images, text=prefixes, suffix=suffixes, padding=True, padding_side="right", **_AS_TENSORS)
    return {name: torch.as_tensor(value) for name, value in batch.items()}


def _moved(place: int, spans: list[dict]) -> int:
    """Where a character stands once the placeholders before it are written out."""
    before = [span for span in spans if span["span"][1] <= place]
    return place + (before[-1]["new_span"][1] - before[-1]["span"][1] if before else 0)


def processed_lengths(
    processor: ProcessorMixin, sizes: tuple[tuple[int, int], ...], clips: list[Clip] | None = None
) -> tuple[int, int]:
    """
    How many tokens a prompt's images of these sizes, (width, height), and its videos are: of marks around them, which
    stay at any budget, and placeholders. They depend on sizes and times alone, so that the processor is asked with
    images and videos of nothing.
    """
    of_images = of_videos = (0, 0)
    if sizes:
        nothing = [Image.new("RGB", size) for size in sizes]
        of_images = _num_tokens(processor, "image", len(sizes), [], images=[nothing])
    if clips:
        of_videos = _num_tokens(processor, "video", len(clips), clips)
    return of_images[0] + of_videos[0], of_images[1] + of_videos[1]


def _num_tokens(processor: ProcessorMixin, kind: str, number: int, clips: list[Clip], **given: Any) -> tuple[int, int]:
    """Of so many images or videos, and nothing else: the tokens that are no placeholders, and those that are."""
    text = getattr(processor, f"{kind}_token") * number
    batch = processed_videos(processor, clips, text=[text], add_special_tokens=False, **given, **_AS_TENSORS)
    ids = list(batch["input_ids"][0])
    # What stands for an image in the text need not be what stands for its tokens; frames have the images' in some.
    holders = ((processor, "image"), (processor, "video"), (processor.tokenizer, "image"))
    num_visual = max(ids.count(getattr(holder, f"{name}_token_id", None)) for holder, name in holders)
    return len(ids) - num_visual, num_visual
