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
from ..modeling.budget.schedule import StackBudget
from ..modeling.budget.selection import Selection
from ..modeling.costs.decoder import UnitShares
from ..modeling.costs.model_costs import Costs, ImageSizes, ModelCosts
from ..modeling.decoder.execution_plan import ExecutionPlan
from ..modeling.families.adapters import adapter_of
from ..modeling.families.base import has_recurrent_layers
from ..modeling.families.llava import LLAVA
from .settings import TOKENS, Setting

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
    FLOPs of prompts in one setting, those of images of each size counted once. Of videos they are not counted, nor of
    families without an adapter of their own.

    Args:
        config: the model's.
        setting: reducer and budget, which the model has taken.
        may_be_unknown: whether a user's reducer that cannot be run to count it leaves the cost unknown, with a
            warning, as a decoder with linear attention always may; otherwise that is an error.
    """

    def __init__(self, config: PreTrainedConfig, setting: Setting, may_be_unknown: bool = False) -> None:
        # Kernels for GPUs may stand in for torch's code, which alone can be counted.
        self.setting, self.may_be_unknown = setting, may_be_unknown or has_recurrent_layers(config)
        self.is_llava, self.config = isinstance(config, AdaVTPConfig), config
        self.family = LLAVA if self.is_llava else adapter_of(config)
        # Of units that are all alike, a prompt's cost is that of as many images of the least size, a unit each.
        self.costs = ModelCosts.of(config, None if self.family.units_differ or self.is_llava else (1, 1))
        self.num_layers = config.get_text_config().num_hidden_layers

    def text_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[int]:
        """Of each prompt `[batch, length]`, the tokens that are no placeholders."""
        is_text = attention_mask.bool() & ~self.family.placeholders(self.config, input_ids)
        return is_text.sum(dim=-1).tolist()

    def image_sizes(self, inputs: Mapping[str, torch.Tensor]) -> list[ImageSizes | None]:
        """Of the images of each prompt of a batch where they differ and it is known; see [`ModelCosts`]."""
        return self.costs.image_sizes_of(inputs) if self.family.units_differ else [None] * len(inputs["input_ids"])

    def of(
        self,
        text_tokens: int,
        selection: Selection | None,
        image_sizes: ImageSizes | None = None,
        plan: UnitShares | None = None,
    ) -> Costs | None:
        """
        What a prompt costs.

        Args:
            text_tokens: of the prompt, placeholders of images not among them.
            selection: of its images, or `None` if it has none.
            image_sizes: see [`CountedFlops.image_sizes`].
            plan: the decoder's units that ran; by default all.

        Raises:
            ValueError: if the cost is unknown and may not be.
        """
        if image_sizes is None and self.family.units_differ:
            return None
        try:
            asked = {"reducer": self.setting.arguments()["reducer"], "token_budget": self._token_budget(selection)}
            return self.costs.of_selection(selection, text_tokens, **asked, image_sizes=image_sizes, plan=plan)
        except ValueError as error:
            if not self.may_be_unknown:
                raise
            logger.warning_once(f"FLOPs are not counted: {error}")
            return None

    def _token_budget(self, selection: Selection | None) -> StackBudget | None:
        """With which a selection was made. A compute budget comes to another in each prompt: as many as were kept."""
        if self.setting.dial == TOKENS:
            return self.setting.arguments()["token_budget"]
        kept = set() if selection is None else set(selection.num_keep.tolist())
        return kept.pop() if len(kept) == 1 and min(kept) > 1 else None


def prompt_costs(
    flops: CountedFlops,
    inputs: Mapping[str, torch.Tensor],
    selections: Sequence[Selection | None],
    new_tokens: Sequence[int],
    seconds: float,
    plan: ExecutionPlan | None = None,
) -> list[PromptCost]:
    """
    What every prompt of a batch cost.

    Args:
        flops: of the setting that the batch ran in.
        inputs: `input_ids` and `attention_mask`, both `[batch, length]`, and what the images are, as the processor
            returns it.
        selections: of each prompt's images, from [`selections_of_prompts`].
        new_tokens: generated after each prompt.
        seconds: that the batch took.
        plan: which of the decoder's units ran, with a row for each prompt; `None` for all.
    """
    costs, lengths = [], inputs["attention_mask"].sum(dim=-1).tolist()
    texts = flops.text_tokens(inputs["input_ids"], inputs["attention_mask"])
    columns = (lengths, texts, flops.image_sizes(inputs), selections, new_tokens)
    for row, (length, text_tokens, image_sizes, selection, generated) in enumerate(zip(*columns, strict=True)):
        num_keep = () if selection is None else tuple(selection.num_keep.tolist())
        seen = torch.zeros(1) if selection is None else visual_tokens_seen(selection, flops.num_layers)
        dropped = 0.0 if selection is None else float(selection.sizes.sum() - seen.sum())
        counted = flops.of(text_tokens, selection, image_sizes, None if plan is None else plan.shares(row))
        costs.append(
            PromptCost(
                num_images=len(num_keep),
                num_keep=num_keep,
                visual_tokens=float(seen.mean() if flops.is_llava else seen.sum()),
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
