"""What each prompt of a batch cost, counted from the selection that was really made for its images.

A prompt has text tokens, visual tokens that decoder layers saw, and tokens that followed it; its FLOPs follow from
these three numbers, and are counted once for each combination of them. Time is its share of its batch's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.utils import logging

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.budget.selection import Selection
from ..modeling.costs.model_costs import Costs, ModelCosts
from .settings import Setting

logger = logging.get_logger(__name__)


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


class CountedFlops:
    """
    FLOPs of prompts in one setting.

    Args:
        config: the model's.
        setting: reducer and budget, which the model has taken.
        may_be_unknown: whether a user's reducer that cannot be run to count it leaves the cost unknown, with a
            warning; otherwise that is an error.
    """

    def __init__(self, config: AdaVTPConfig, setting: Setting, may_be_unknown: bool = False) -> None:
        self.costs, self.setting, self.may_be_unknown = ModelCosts.of(config), setting, may_be_unknown
        self.num_layers, self.num_cls = config.text_config.num_hidden_layers, int(config.keep_cls)

    def of(self, text_tokens: int, selection: Selection | None) -> Costs | None:
        """
        What a prompt costs.

        Args:
            text_tokens: of the prompt, placeholders of images not among them.
            selection: of its images, or `None` if it has none.

        Raises:
            ValueError: if the cost is unknown and may not be.
        """
        try:
            return self.costs.of_selection(selection, text_tokens, **self.setting.arguments())
        except ValueError as error:
            if not self.may_be_unknown:
                raise
            logger.warning_once(f"FLOPs are not counted: {error}")
            return None


def prompt_costs(
    flops: CountedFlops,
    attention_mask: torch.Tensor,
    selections: Sequence[Selection | None],
    new_tokens: Sequence[int],
    seconds: float,
) -> list[PromptCost]:
    """
    What every prompt of a batch cost.

    Args:
        flops: of the setting that the batch ran in.
        attention_mask: `[batch, length]`, 1 at text tokens and placeholders of images.
        selections: of each prompt's images, from [`selections_of_prompts`].
        new_tokens: generated after each prompt.
        seconds: that the batch took.
    """
    costs = []
    for length, selection, generated in zip(attention_mask.sum(dim=-1).tolist(), selections, new_tokens, strict=True):
        num_keep = () if selection is None else tuple(selection.num_keep.tolist())
        seen = 0.0 if selection is None else float(visual_tokens_seen(selection, flops.num_layers).mean())
        placeholders = 0 if selection is None else int(selection.sizes.sum()) + len(num_keep) * flops.num_cls
        text_tokens = length - placeholders
        counted = flops.of(text_tokens, selection)
        costs.append(
            PromptCost(
                num_images=len(num_keep),
                num_keep=num_keep,
                visual_tokens=seen,
                text_tokens=text_tokens,
                new_tokens=generated,
                flops=None if counted is None else counted.with_new_tokens(generated),
                milliseconds=1000 * seconds / len(selections),
            )
        )
    return costs


def visual_tokens_seen(selection: Selection, num_layers: int) -> torch.Tensor:
    """
    How many visual tokens of each image a decoder layer sees in prefill, mean over layers.

    Args:
        selection: of `num_images` images.
        num_layers: of the decoder.

    Returns:
        `[num_images]` float64.
    """
    if selection.depth is None:
        return selection.num_keep.double()
    return selection.depth.sum(dim=-1).double() / num_layers


def selections_of_prompts(selection: Selection | None, num_images: Sequence[int]) -> list[Selection | None]:
    """
    What was chosen for each prompt's images; who counts does not need the features.

    Args:
        selection: of all images of a batch, or `None` if there are none.
        num_images: of each prompt.

    Returns:
        For each prompt its images' selection on the CPU, or `None` if it shows none.
    """
    if selection is None:
        return [None] * len(num_images)
    keeps, positions = selection.keep.cpu().split(num_images), selection.positions.cpu().split(num_images)
    sizes = selection.sizes.split(num_images)
    depths = [None] * len(keeps) if selection.depth is None else selection.depth.cpu().split(num_images)
    return [
        Selection(keep, own, depth=depth, sizes=of_units) if len(keep) else None
        for keep, own, depth, of_units in zip(keeps, positions, depths, sizes, strict=True)
    ]


def num_new_tokens(new_ids: torch.Tensor, ends: int | Sequence[int] | None, padding: int | None = None) -> list[int]:
    """
    How many tokens were generated after each prompt, the one that ended the text counted.

    Args:
        new_ids: `[batch, length]`, columns after the prompts.
        ends: tokens that end a text, as `eos_token_id` of a `GenerationConfig`.
        padding: the token that fills rows up, where a row may also have ended without one of `ends`, at a stop string.
    """
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    lengths = []
    for row in new_ids.tolist():
        end = next((place for place, token in enumerate(row) if token in ends or token == padding), len(row))
        lengths.append(end + (end < len(row) and row[end] in ends))
    return lengths


def now(device: torch.device) -> float:
    """Seconds on a clock, when all that was asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
