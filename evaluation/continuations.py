"""What follows a prompt: the model's own continuation, or how likely it finds a given one; and what that cost.

Prompts show any number of images, also none, and go through the model in one batch and one setting, padded on the
left. What a prompt cost is counted from the selection that was really made for its images.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList
from transformers.image_utils import ImageInput
from transformers.utils import logging

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from ..modeling.selection_adavtp import Selection
from .accuracy import visual_tokens_seen
from .flops import count_flops
from .settings import Setting

logger = logging.get_logger(__name__)

_NO_TARGET = -100


@dataclass(frozen=True)
class PromptCost:
    """
    What one prompt of a batch cost.

    Attributes:
        num_images: that it shows.
        num_keep: visual tokens of each of its images that reach the decoder.
        visual_tokens: of an image that a decoder layer saw in prefill, mean over layers and images; 0 without any.
        text_tokens: the other tokens of the prompt.
        new_tokens: generated, the end-of-text token counted; 0 where a given continuation was scored.
        flops: counted for vision tower, reducer, projector, prefill and decoding (convention adavtp); `None` where a
            user's reducer does not say what it costs.
        milliseconds: its share of the time of its batch.
    """

    num_images: int
    num_keep: tuple[int, ...]
    visual_tokens: float
    text_tokens: int
    new_tokens: int
    flops: float | None
    milliseconds: float


@dataclass(frozen=True)
class Generated:
    """A continuation that the model made, without special tokens and stop strings, and what it cost."""

    text: str
    cost: PromptCost


@dataclass(frozen=True)
class Scored:
    """
    A continuation that was given.

    Attributes:
        log_likelihood: natural logarithm of its probability after the prompt, the sum over its tokens.
        is_greedy: whether each of its tokens is the likeliest after those before it.
        cost: of looking at prompt and continuation once.
    """

    log_likelihood: float
    is_greedy: bool
    cost: PromptCost


class StopsAtText(StoppingCriteria):
    """
    Ends a sequence as soon as its continuation contains one of some strings. It reads text and not the vocabulary, so
    it works for any tokenizer; transformers' own needs one that can spell any string.

    Args:
        tokenizer: the model's.
        stop: strings to stop at.
        prompt_length: columns of `input_ids` before the continuation.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        """Whether each sequence of `input_ids` `[sequences, length]` is at its end, `[sequences]`."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        is_done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(is_done, device=input_ids.device)


def generate_continuations(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    prompts: Sequence[str],
    images: Sequence[Sequence[ImageInput]],
    setting: Setting,
    stop: Sequence[str] = (),
    **generation: Any,
) -> list[Generated]:
    """
    Continues every prompt.

    Args:
        model: in evaluation mode.
        processor: the model's.
        prompts: whole, with the image placeholder where an image goes.
        images: those of each prompt.
        setting: reducer and budget.
        stop: strings, not empty, at which a continuation ends; they are not part of it.
        generation: arguments of `generate`.

    Returns:
        For every prompt its continuation.

    Raises:
        ValueError: if images and placeholders do not agree, or the setting is not allowed or cannot be met.
    """
    inputs = _inputs(model, processor, prompts, images)
    length = inputs["input_ids"].shape[1]
    if stop:
        generation["stopping_criteria"] = StoppingCriteriaList([StopsAtText(processor.tokenizer, stop, length)])
    started = _now(model.device)
    outputs = model.generate(**inputs, **setting.arguments(), **generation, return_dict_in_generate=True)
    seconds = _now(model.device) - started
    new_ids = outputs.sequences[:, length:]
    new_tokens = _lengths(new_ids, processor.tokenizer)
    costs = _costs(model.config, setting, inputs, images, outputs["selection"], new_tokens, seconds)
    texts = processor.batch_decode(new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [Generated(_cut(text, stop), cost) for text, cost in zip(texts, costs, strict=True)]


@torch.inference_mode()
def score_continuations(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    prompts: Sequence[str],
    continuations: Sequence[str],
    images: Sequence[Sequence[ImageInput]],
    setting: Setting,
) -> list[Scored]:
    """
    Says how likely every continuation is after its prompt. The reducer knows the prompt and not the continuation.

    Args:
        model: in evaluation mode.
        processor: the model's.
        prompts: whole, with the image placeholder where an image goes.
        continuations: one for each prompt, with the space in front that belongs there.
        images: those of each prompt.
        setting: reducer and budget.

    Returns:
        For every prompt what its continuation gets.

    Raises:
        ValueError: if a continuation has no token, or as [`generate_continuations`].
    """
    whole = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
    num_targets = [_num_targets(processor.tokenizer, *pair) for pair in zip(prompts, whole, strict=True)]
    inputs = _inputs(model, processor, whole, images)
    length = inputs["input_ids"].shape[1]
    column = torch.arange(length, device=model.device)
    is_target = column >= length - torch.tensor(num_targets, device=model.device)[:, None]
    labels = inputs["input_ids"].masked_fill(~is_target, _NO_TARGET)
    started = _now(model.device)
    outputs = model.model(**inputs, **setting.arguments(), labels=labels, selection_output="gather", use_cache=False)
    # What predicts the first target stands one column before it.
    columns = slice(-max(num_targets) - 1, None)
    logits = model.lm_head(outputs.last_hidden_state[:, columns]).float()[:, :-1]
    targets = outputs.labels[:, columns][:, 1:]
    log_likelihood, is_greedy = _log_likelihood(logits, targets)
    seconds = _now(model.device) - started
    costs = _costs(model.config, setting, inputs, images, outputs.selection, [0] * len(whole), seconds)
    return [Scored(*row) for row in zip(log_likelihood.tolist(), is_greedy.tolist(), costs, strict=True)]


def _log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        logits: `[batch, length, vocabulary]`, each of what stands at the same place in `targets`.
        targets: `[batch, length]` int64, -100 where there is none.

    Returns:
        The sum of the targets' log-probabilities, and whether all are the likeliest, both `[batch]`.
    """
    is_target = targets != _NO_TARGET
    index = targets.clamp(min=0)[..., None]
    log_probability = logits.log_softmax(dim=-1).gather(-1, index)[..., 0]
    is_likeliest = logits.argmax(dim=-1) == targets
    return log_probability.masked_fill(~is_target, 0.0).sum(dim=-1), (is_likeliest | ~is_target).all(dim=-1)


def _num_targets(tokenizer: Any, prompt: str, whole: str) -> int:
    """Tokens of `whole` that are not the prompt's; one in which the two meet belongs to the continuation."""
    prompt_ids, ids = tokenizer(prompt).input_ids, tokenizer(whole).input_ids
    shared = len(os.path.commonprefix([prompt_ids, ids]))
    if shared == len(ids):
        raise ValueError(f"The continuation {whole[len(prompt) :]!r} has no token of its own after its prompt.")
    return len(ids) - shared


def _inputs(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    prompts: Sequence[str],
    images: Sequence[Sequence[ImageInput]],
) -> BatchFeature:
    shown = [list(group) for group in images]
    inputs = processor(
        images=shown if any(shown) else None,
        text=list(prompts),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return inputs.to(model.device)


def _now(device: torch.device) -> float:
    """Seconds on a clock, when all that was asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _lengths(new_ids: torch.Tensor, tokenizer: Any) -> list[int]:
    """Tokens of each row up to the first end of text, that one counted, or up to padding."""
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    lengths = []
    for row in new_ids.tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        lengths.append(end + (end < len(row) and row[end] == tokenizer.eos_token_id))
    return lengths


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((text.find(string) for string in stop if string in text), default=len(text))]


def _costs(
    config: AdaVTPConfig,
    setting: Setting,
    inputs: BatchFeature,
    images: Sequence[Sequence[ImageInput]],
    selection: Selection | None,
    new_tokens: Sequence[int],
    seconds: float,
) -> list[PromptCost]:
    lengths = inputs["attention_mask"].sum(dim=-1).tolist()
    first, costs = 0, []
    for group, length, tokens in zip(images, lengths, new_tokens, strict=True):
        own = _of_images(selection, slice(first, first + len(group))) if group else None
        first += len(group)
        text_tokens = length - len(group) * config.num_image_tokens
        cost = PromptCost(
            num_images=len(group),
            num_keep=() if own is None else tuple(own.num_keep.tolist()),
            visual_tokens=0.0 if own is None else _visual_tokens(own, config),
            text_tokens=text_tokens,
            new_tokens=tokens,
            flops=_flops(config, setting, text_tokens, len(group), own, tokens),
            milliseconds=1000 * seconds / len(lengths),
        )
        costs.append(cost)
    return costs


def _flops(
    config: AdaVTPConfig,
    setting: Setting,
    text_tokens: int,
    num_images: int,
    selection: Selection | None,
    new_tokens: int,
) -> float | None:
    try:
        flops = count_flops(config, text_tokens, **setting.arguments(), selection=selection, num_images=num_images)
    except ValueError as error:
        # The model has taken the setting, so all that can be missing is what a user's reducer costs.
        logger.warning_once(f"FLOPs are not counted: {error}")
        return None
    return flops.with_new_tokens(new_tokens)


def _visual_tokens(selection: Selection, config: AdaVTPConfig) -> float:
    return float(visual_tokens_seen(selection, config.text_config.num_hidden_layers).mean())


def _of_images(selection: Selection, images: slice) -> Selection:
    """What was chosen for some of the images; who counts does not need the features."""
    depth = None if selection.depth is None else selection.depth[images]
    return replace(Selection.from_keep(selection.keep[images]), depth=depth)
