"""What each prompt of a batch cost, counted from the selection that was really made for its images.

A prompt has text tokens, visual tokens that decoder layers saw, and tokens that followed it; its FLOPs follow from
these three numbers, and are counted once for each combination of them. Time is its share of its batch's.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.budget.selection import Selection
from ..modeling.costs.model_costs import Costs, ModelCosts
from ..modeling.families.adapters import adapter_of
from ..modeling.families.llava import LLAVA
from .settings import Setting

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PromptCost:
    """
    What one prompt of a batch cost.

    Attributes:
        num_images: that it shows; of other families than LLaVA the units: images, tiles and videos.
        num_keep: visual tokens of each of these that reach the decoder.
        visual_tokens: that a decoder layer saw in prefill, mean over layers: where all images have equally many, those
            of an image, mean over images; elsewhere those of the whole prompt. 0 without any.
        seen_tokens: of the whole prompt, also text and separators, that a decoder layer saw, mean over layers.
        text_tokens: the tokens of the prompt that stand for nothing of an image.
        new_tokens: generated, the end-of-text token counted; 0 where a given continuation was scored.
        flops: counted for vision tower, reducer, projector, prefill and decoding (convention adavtp); `None` where
            they are not counted, see [`CountedFlops`].
        milliseconds: its share of the time of its batch.
    """

    num_images: int
    num_keep: tuple[int, ...]
    visual_tokens: float
    seen_tokens: float
    text_tokens: int
    new_tokens: int
    flops: float | None
    milliseconds: float


class CountedFlops:
    """
    FLOPs of prompts in one setting. They are not counted for families whose units differ, such as Qwen2.5-VL: an image
    of each size would have to be counted by itself.

    Args:
        config: the model's.
        setting: reducer and budget, which the model has taken.
        may_be_unknown: whether a user's reducer that cannot be run to count it leaves the cost unknown, with a
            warning; otherwise that is an error.
    """

    def __init__(self, config: PreTrainedConfig, setting: Setting, may_be_unknown: bool = False) -> None:
        self.setting, self.may_be_unknown = setting, may_be_unknown
        self.images_differ = not isinstance(config, AdaVTPConfig)
        self.family, self.config = adapter_of(config) if self.images_differ else LLAVA, config
        self.costs = None
        if not self.family.units_differ:
            # Of units that are all alike, a prompt's cost is that of as many images of the least size, a unit each.
            self.costs = ModelCosts.of(config, (1, 1) if self.images_differ else None)
        self.num_layers = config.get_text_config().num_hidden_layers

    def text_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[int]:
        """Of each prompt `[batch, length]`, the tokens that are no placeholders."""
        is_text = attention_mask.bool() & ~self.family.placeholders(self.config, input_ids)
        return is_text.sum(dim=-1).tolist()

    def of(self, text_tokens: int, selection: Selection | None) -> Costs | None:
        """
        What a prompt costs.

        Args:
            text_tokens: of the prompt, placeholders of images not among them.
            selection: of its images, or `None` if it has none.

        Raises:
            ValueError: if the cost is unknown and may not be.
        """
        if self.costs is None:
            return None
        try:
            return self.costs.of_selection(selection, text_tokens, **self.setting.arguments())
        except ValueError as error:
            if not self.may_be_unknown:
                raise
            logger.warning_once(f"FLOPs are not counted: {error}")
            return None


def prompt_costs(
    flops: CountedFlops,
    inputs: Mapping[str, torch.Tensor],
    selections: Sequence[Selection | None],
    new_tokens: Sequence[int],
    seconds: float,
) -> list[PromptCost]:
    """
    What every prompt of a batch cost.

    Args:
        flops: of the setting that the batch ran in.
        inputs: `input_ids` and `attention_mask`, both `[batch, length]`.
        selections: of each prompt's images, from [`selections_of_prompts`].
        new_tokens: generated after each prompt.
        seconds: that the batch took.
    """
    costs, lengths = [], inputs["attention_mask"].sum(dim=-1).tolist()
    texts = flops.text_tokens(inputs["input_ids"], inputs["attention_mask"])
    for length, text_tokens, selection, generated in zip(lengths, texts, selections, new_tokens, strict=True):
        num_keep = () if selection is None else tuple(selection.num_keep.tolist())
        seen = torch.zeros(1) if selection is None else visual_tokens_seen(selection, flops.num_layers)
        dropped = 0.0 if selection is None else float(selection.sizes.sum() - seen.sum())
        counted = flops.of(text_tokens, selection)
        costs.append(
            PromptCost(
                num_images=len(num_keep),
                num_keep=num_keep,
                visual_tokens=float(seen.sum() if flops.images_differ else seen.mean()),
                seen_tokens=length - dropped,
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


def selections_of_prompts(selection: Selection | None, num_prompts: int) -> list[Selection | None]:
    """
    What was chosen for each prompt's images; who counts does not need the features.

    Args:
        selection: of all units of a batch, which knows their prompts; or `None` if there are none.
        num_prompts: in the batch.

    Returns:
        For each prompt its units' selection on the CPU, or `None` if it shows none.
    """
    if selection is None:
        return [None] * num_prompts
    rows = [(selection.sample == prompt).nonzero()[:, 0] for prompt in range(num_prompts)]
    keep, positions, depth = selection.keep.cpu(), selection.positions.cpu(), selection.depth
    return [
        Selection(
            keep[own],
            positions[own],
            depth=None if depth is None else depth.cpu()[own],
            sizes=selection.sizes[own],
            grids=selection.grids and [selection.grids[row] for row in own.tolist()],
        )
        if len(own)
        else None
        for own in rows
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
