"""What follows a prompt: the model's own continuation, or how likely it finds a given one; and what that cost.

Prompts show any number of images, also none, and go through the model in one batch and one setting, padded on the
left. What a prompt cost is counted from the selection that was really made for its images.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin, StoppingCriteria, StoppingCriteriaList
from transformers.image_utils import ImageInput

from ..modeling.budget.selection import Selection
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import readable_images
from ..tasks.stored_videos import Clip, processed_videos
from .prompt_costs import CountedFlops, PromptCost, now, num_new_tokens, prompt_costs, selections_of_prompts
from .settings import Setting

_NO_TARGET = -100


@dataclass(frozen=True)
class Generated:
    """
    A continuation that the model made.

    Attributes:
        text: without special tokens and stop strings.
        cost: what it cost.
        selection: what was chosen of the prompt's images, on the CPU and without features; `None` without images.
    """

    text: str
    cost: PromptCost
    selection: Selection | None


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


@dataclass
class StopsAtText(StoppingCriteria):
    """
    Ends a sequence as soon as its continuation, which begins behind `prompt_length` columns, contains one of the
    strings `stop`. It reads text and not the vocabulary, so it works for any tokenizer; transformers' own needs one
    that can spell any string.
    """

    tokenizer: Any
    stop: Sequence[str]
    prompt_length: int

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.BoolTensor:
        """Whether each sequence of `input_ids` `[sequences, length]` is at its end, `[sequences]`."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        is_done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(is_done, device=input_ids.device)


def generate_continuations(
    model: AdaVTPForConditionalGeneration,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Sequence[ImageInput]],
    setting: Setting,
    stop: Sequence[str] = (),
    videos: Sequence[Sequence[Clip]] | None = None,
    **generation: Any,
) -> list[Generated]:
    """
    Continues every prompt.

    Args:
        model, processor: in evaluation mode.
        prompts: whole, with the placeholder of an image or a video where one goes.
        images: those of each prompt.
        videos: those of each prompt; by default there are none.
        setting: reducer and budget.
        stop: strings, not empty, at which a continuation ends; they are not part of it.
        generation: arguments of `generate`.

    Raises:
        ValueError: if images and placeholders do not agree, the processor cannot put these videos into a batch, or the
            setting is not allowed or cannot be met.
    """
    inputs = _inputs(model, processor, prompts, images, videos)
    flops = CountedFlops(model.config, setting, may_be_unknown=True)
    return continued(model, processor, inputs, flops, stop, **generation)


def continued(
    model: AdaVTPForConditionalGeneration,
    processor: ProcessorMixin,
    inputs: Mapping[str, torch.Tensor],
    flops: CountedFlops,
    stop: Sequence[str] = (),
    **generation: Any,
) -> list[Generated]:
    """
    As [`generate_continuations`], from inputs that are ready: padded on the left, and on the model's device. The clock
    runs around `generate` alone.

    Args:
        model, processor, stop, generation: see there.
        inputs: of one prompt or more.
        flops: of the setting.
    """
    arguments, length = flops.setting.arguments(), inputs["input_ids"].shape[1]
    if stop:
        generation["stopping_criteria"] = StoppingCriteriaList([StopsAtText(processor.tokenizer, stop, length)])
    # A reducer whose parameters differ from those of the last one of its name is made anew, which is no part of this.
    model.prompt_reader.steps(arguments["reducer"])
    started = now(model.device)
    outputs = model.generate(**inputs, **arguments, **generation, return_dict_in_generate=True)
    seconds = now(model.device) - started
    new_ids = outputs.sequences[:, length:].cpu()
    padding = processor.tokenizer.pad_token_id if stop else None
    new_tokens = num_new_tokens(new_ids, model.generation_config.eos_token_id, padding)
    selections = selections_of_prompts(outputs["selection"], len(new_ids))
    costs = prompt_costs(flops, inputs, selections, new_tokens, seconds, outputs["plan"])
    texts = [_cut(text, stop) for text in processor.batch_decode(new_ids, skip_special_tokens=True)]
    return [Generated(*row) for row in zip(texts, costs, selections, strict=True)]


@torch.inference_mode()
def score_continuations(
    model: AdaVTPForConditionalGeneration,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    continuations: Sequence[str],
    images: Sequence[Sequence[ImageInput]],
    setting: Setting,
    videos: Sequence[Sequence[Clip]] | None = None,
) -> list[Scored]:
    """
    Says how likely every continuation is after its prompt. The reducer knows the prompt and not the continuation.

    Args:
        model, processor, prompts, images, videos, setting: see [`generate_continuations`].
        continuations: one for each prompt, with the space in front that belongs there.

    Raises:
        ValueError: if a continuation has no token, or as [`generate_continuations`].
    """
    whole = [prompt + continuation for prompt, continuation in zip(prompts, continuations, strict=True)]
    num_targets = [_num_targets(processor.tokenizer, *pair) for pair in zip(prompts, whole, strict=True)]
    inputs = _inputs(model, processor, whole, images, videos)
    length = inputs["input_ids"].shape[1]
    column = torch.arange(length, device=model.device)
    is_target = column >= length - torch.tensor(num_targets, device=model.device)[:, None]
    labels = inputs["input_ids"].masked_fill(~is_target, _NO_TARGET)
    started = now(model.device)
    given = {**inputs, **setting.arguments(), "labels": labels, "selection_output": "gather", "use_cache": False}
    # What predicts the first target stands one column before it.
    outputs = model(**given, logits_to_keep=max(num_targets) + 1)
    log_likelihood, is_greedy = _log_likelihood(outputs.logits.float()[:, :-1], outputs["labels"][:, 1:])
    seconds = now(model.device) - started
    selections = selections_of_prompts(outputs.get("selection"), len(whole))
    flops = CountedFlops(model.config, setting, may_be_unknown=True)
    costs = prompt_costs(flops, inputs, selections, [0] * len(whole), seconds)
    return [Scored(*row) for row in zip(log_likelihood.tolist(), is_greedy.tolist(), costs, strict=True)]


def _log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The sum of the targets' log-probabilities, and whether all are the likeliest, both `[batch]`; of logits
    `[batch, length, vocabulary]` and the targets `[batch, length]` at the same places, -100 where there is none.
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
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Sequence[ImageInput]],
    videos: Sequence[Sequence[Clip]] | None,
) -> BatchFeature:
    shown = [readable_images(list(group)) if group else [] for group in images]
    inputs = processed_videos(
        processor,
        [clip for group in videos or [] for clip in group],
        images=shown if any(shown) else None,
        text=list(prompts),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    return inputs.to(model.device)


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((text.find(string) for string in stop if string in text), default=len(text))]
