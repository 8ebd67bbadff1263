"""The settings that an evaluation is asked for: every reducer at every budget, and everything kept, once.

A budget is written as a fraction, as a number of tokens, or as an exact fraction such as 115/576. The last keeps the
same share of any number of patches: as a float, 115/576 of 576 may come out as 114.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration, ReducerSpec
from .comparison import reason_not_to_measure
from .settings import FULL, FULL_BUDGET, Setting, exact_budget, num_keep_of, reducer_label


@dataclass(frozen=True)
class AskedSetting:
    """
    A setting as a run knows it.

    Attributes:
        reducer: label of what chooses, or `"full"`.
        budget: as it was asked for: a fraction, or an int, a number of tokens.
        num_keep: the number K that it means.
        setting: the same for the model, whose budget is exact.
    """

    reducer: str
    budget: float | int
    num_keep: int
    setting: Setting

    @property
    def key(self) -> tuple[str, float | int]:
        """What lines of answers name it by."""
        return self.reducer, self.budget

    def as_dict(self) -> dict[str, Any]:
        """What the run's header says of it."""
        return {"reducer": self.reducer, "budget": self.budget, "num_keep": self.num_keep}


def asked_settings(
    config: AdaVTPConfig, reducers: Sequence[ReducerSpec], budgets: Sequence[float | int | Fraction]
) -> list[AskedSetting]:
    """
    The settings of a run: `"full"` once, and every other reducer at every budget that leaves something out.

    Args:
        config: the model's.
        reducers: each a registered name, a dictionary of `"name"` and parameters, a list of these (a stack), or
            `"full"`. At a budget that keeps everything all of them are `"full"`.
        budgets: fractions in [0, 1] as floats, numbers of tokens as ints, or exact fractions such as 115/576, which
            keep the same share of any number of patches.

    Raises:
        ValueError: if a budget is none, or nothing is asked.
    """
    counts = {budget: num_keep_of(budget, config.num_patches) for budget in budgets}
    stacks = {reducer_label(reducer): reducer for reducer in reducers}
    chosen = [label for label in stacks if label != FULL]
    if not stacks or (chosen and not counts):
        raise ValueError(f"`reducers` is {list(stacks)} and `budgets` {list(budgets)}; each needs one or more.")
    settings = []
    if FULL in stacks or config.num_patches in counts.values():
        settings.append(AskedSetting(FULL, FULL_BUDGET, config.num_patches, Setting(FULL)))
    settings += [
        AskedSetting(label, _as_number(budget), count, Setting(stacks[label], exact_budget(budget, count)))
        for label in chosen
        for budget, count in counts.items()
        if count < config.num_patches
    ]
    return settings


def _as_number(budget: float | int | Fraction) -> float | int:
    return float(budget) if isinstance(budget, Fraction) else budget


def reachable_settings(
    model: AdaVTPForConditionalGeneration, inputs: Mapping[str, torch.Tensor] | None, settings: Sequence[AskedSetting]
) -> tuple[list[AskedSetting], list[dict[str, Any]]]:
    """
    Tells settings that can be measured from those that cannot.

    Args:
        model: in evaluation mode.
        inputs: of one question with an image; `None` if there is none, and nothing is out of reach.
        settings: all of them.

    Returns:
        Those that can be measured, and for each other a dictionary of `reducer`, `budget` and `reason`.

    Raises:
        ValueError: if there is no such reducer.
    """
    reasons = {
        asked.key: reason_not_to_measure(model, inputs, asked.setting.reducer, asked.setting.budget)
        for asked in settings
        if inputs is not None and asked.reducer != FULL
    }
    unreachable = [
        {"reducer": reducer, "budget": budget, "reason": reason}
        for (reducer, budget), reason in reasons.items()
        if reason is not None
    ]
    return [asked for asked in settings if reasons.get(asked.key) is None], unreachable
