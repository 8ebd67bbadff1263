"""A setting: what chooses, and how much of what it leaves; read once from how people write it.

Measurements and evaluations are tables with a row for each setting. Beside every registered reducer there is `"full"`:
nothing is chosen and everything is kept, which is what the model would cost as a plain LLaVA. A budget is written as a
fraction (0.4), as a number of tokens (57), or as an exact fraction (115/576), which keeps the same share of any number
of tokens: as a float, 115/576 of 576 may come out as 114.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple

import torch

from ..configuration.configuration_adavtp import reducer_entries
from ..modeling.budget.schedule import StackBudget
from ..modeling.budget.token_budget import num_tokens_to_keep
from ..modeling.costs.model_costs import FULL, NEVER_ASKED
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration, ReducerSpec

FULL_BUDGET = 1.0
TOKENS, COMPUTE = "token_budget", "compute_budget"
CONTROLLER = "adaptive"
# What chooses in a family's checkpoint as it was released, which has no weights for anything that has to be trained.
UNTRAINED_REDUCER = "divprune"

WrittenBudget = float | int | Fraction


class Setting(NamedTuple):
    """
    A row of a table.

    Attributes:
        reducer: a registered name, a dictionary of `"name"` and parameters, a list of these (a stack), or `"full"`.
        budget: see [`AdaVTPForConditionalGeneration.forward`]; of `"full"` it is 1.0.
        asked: the budget as a table shows it, where the model is asked for the number that it means.
        num_keep: the number K of an image's tokens that it keeps, where that is the same for all, or `None`.
        dial: what the budget is of, `"token_budget"` or `"compute_budget"`.
        scheduler: what chooses the decoder's units, see there.
    """

    reducer: ReducerSpec
    budget: StackBudget | None = FULL_BUDGET
    asked: float | int | None = None
    num_keep: int | None = None
    dial: str = TOKENS
    scheduler: str | None = None

    @property
    def label(self) -> str:
        """The reducer as it is written on the command line."""
        return reducer_label(self.reducer)

    @property
    def key(self) -> tuple[str, Any]:
        """What answers and rows of tables name the setting by."""
        return self.label, self.budget if self.asked is None else self.asked

    def arguments(self) -> dict[str, Any]:
        """As arguments of `forward`, `generate` and `select_tokens`; `ValueError` if `"full"` is not to keep all."""
        if self.reducer != FULL:
            rule = {} if self.scheduler is None else {"scheduler": self.scheduler}
            return {"reducer": self.reducer, self.dial: self.budget} | rule
        if self.budget != FULL_BUDGET:
            raise ValueError(f"`budget` of {FULL!r} is {self.budget!r}; allowed is {FULL_BUDGET}.")
        return {"reducer": NEVER_ASKED, "token_budget": FULL_BUDGET}

    def unreachable(
        self, model: AdaVTPForConditionalGeneration, inputs: Mapping[str, torch.Tensor] | None
    ) -> str | None:
        """
        Why the model cannot be measured in this setting, or `None` if it can; see
        [`AdaVTPForConditionalGeneration.unreachable`]. Where no prompt shows an image, `inputs` is `None`, and nothing
        is out of reach.
        """
        if self.reducer == FULL or inputs is None:
            return None
        return model.unreachable(**inputs, **self.arguments())


def tokens_per_image(model: AdaVTPForConditionalGeneration) -> int | None:
    """Visual tokens of an image, N, as the model's family says; `None` where images differ."""
    per_image = getattr(model.family, "tokens_per_image", None)
    return None if per_image is None else per_image(model.config)


def asked_settings(
    num_patches: int | None,
    reducers: Sequence[ReducerSpec],
    budgets: Sequence[WrittenBudget],
    dial: str = TOKENS,
    scheduler: str | None = None,
) -> list[Setting]:
    """
    The settings of a run: `"full"` once, and every other reducer at every budget that leaves something out.

    Args:
        num_patches: visual tokens of an image, N; `None` where images differ, or a budget is of compute, and only a
            fraction of 1 keeps all.
        reducers: see [`Setting`]. At a budget that keeps everything all of them are `"full"`.
        budgets: fractions in [0, 1] as floats, numbers of tokens as ints, or exact fractions.
        dial, scheduler: see [`Setting`].

    Raises:
        ValueError: if a budget is none, or nothing is asked.
    """
    counts = {budget: num_keep_of(budget, num_patches) for budget in budgets}
    stacks = {reducer_label(reducer): reducer for reducer in reducers}
    chosen = [stack for label, stack in stacks.items() if label != FULL]
    if not stacks or (chosen and not counts):
        raise ValueError(f"`reducers` is {list(stacks)} and `budgets` {list(budgets)}; each needs one or more.")
    settings = []
    keeps_all = {budget: _keeps_all(budget, count, num_patches) for budget, count in counts.items()}
    if FULL in stacks or any(keeps_all.values()):
        settings.append(Setting(FULL, FULL_BUDGET, FULL_BUDGET, num_patches))
    for reducer, (budget, count) in product(chosen, counts.items()):
        if not keeps_all[budget]:
            written = float(budget) if isinstance(budget, Fraction) else budget
            settings.append(Setting(reducer, exact_budget(budget, num_patches), written, count, dial, scheduler))
    return settings


def _keeps_all(budget: WrittenBudget, count: int | None, num_patches: int | None) -> bool:
    return count == num_patches if num_patches is not None else not isinstance(budget, int) and budget == FULL_BUDGET


def reachable_settings(
    model: AdaVTPForConditionalGeneration, inputs: Mapping[str, torch.Tensor] | None, settings: Sequence[Setting]
) -> tuple[list[Setting], list[dict[str, Any]]]:
    """
    The settings that can be measured, and for each other a dictionary of `reducer`, `budget` and `reason`.

    Raises:
        ValueError: if there is no such reducer, or none can be measured.
    """
    reasons = [setting.unreachable(model, inputs) for setting in settings]
    unreachable = [
        {"reducer": setting.label, "budget": setting.key[1], "reason": reason}
        for setting, reason in zip(settings, reasons, strict=True)
        if reason is not None
    ]
    if len(unreachable) == len(settings):
        raise ValueError("; ".join(f"{one['reducer']} at {one['budget']:g}: {one['reason']}" for one in unreachable))
    return [setting for setting, reason in zip(settings, reasons, strict=True) if reason is None], unreachable


def budget_of_text(text: str) -> WrittenBudget:
    """
    `0.4` is a fraction and `57` a number of tokens, as in Python; `115/576` is the fraction that keeps 115 of 576.

    Raises:
        ValueError: if it is no number. Whether a model allows the number, it says itself.
    """
    try:
        if "/" in text:
            return Fraction(text)
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{text!r} is no budget; allowed are a fraction such as 0.4 or 115/576 and a number of tokens such as 57."
        ) from error


def num_keep_of(budget: WrittenBudget, num_patches: int | None) -> int | None:
    """How many of an image's N tokens a budget keeps, if N is known; `ValueError` if it is no budget."""
    if not isinstance(budget, Fraction):
        # Whether it is a budget does not depend on N.
        count = int(num_tokens_to_keep(budget, num_patches or 1, 1))
        return None if num_patches is None else count
    if not 0 <= budget <= 1:
        raise ValueError(f"`budgets` has {budget}; as a fraction it is the share of visual tokens kept, from 0 to 1.")
    return None if num_patches is None else max(1, int(budget * num_patches))


def exact_budget(budget: WrittenBudget, num_patches: int | None) -> float | int:
    """
    What the model is asked: of an exact fraction the count that it means, for a float may mean one less. Where N is
    not known it is the next float that is written as no less than the fraction, and so means no less of any N.
    """
    if not isinstance(budget, Fraction):
        return budget
    if num_patches is None:
        num_keep_of(budget, None)
        near = float(budget)
        return near if Fraction(repr(near)) >= budget else math.nextafter(near, 2.0)
    count = num_keep_of(budget, num_patches)
    return count if count >= 2 else 0.0


def reducer_of_text(text: str) -> ReducerSpec:
    """
    A reducer from its text: a name, a name with parameters as in `fastv:layer=2:rows=last`, or several with commas
    between them, a stack. [`reducer_label`] is the way back.

    Raises:
        ValueError: if it has none of these forms.
    """
    entries = [_entry(part) for part in parts_of_label(text)]
    return entries if len(entries) > 1 or isinstance(entries[0], dict) else entries[0]


def parts_of_label(text: str) -> list[str]:
    """The reducers of a stack that is written with commas; one inside brackets belongs to a parameter."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text)]


def _entry(text: str) -> str | dict[str, Any]:
    name, *parameters = text.split(":")
    pairs = [parameter.partition("=") for parameter in parameters]
    keys = [key for key, _, _ in pairs]
    is_twice = len({"name", *keys}) < 1 + len(keys)
    if not name or is_twice or any(not key or not equals for key, equals, _ in pairs):
        raise ValueError(f"{text!r} is no reducer; write a name, or NAME:PARAMETER=VALUE as in fastv:layer=2.")
    return {"name": name, **{key: _value(value) for key, _, value in pairs}} if pairs else name


def _value(text: str) -> Any:
    """JSON where it is some, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def reducer_label(reducer: ReducerSpec) -> str:
    """
    A reducer as it is written on the command line: `fastv:layer=2`, a stack as `tome, fastv:layer=2`; `ValueError` if
    it is none.
    """
    return ", ".join(
        entry
        if isinstance(entry, str)
        else ":".join([entry["name"], *(f"{key}={_written(entry[key])}" for key in entry if key != "name")])
        for entry in reducer_entries(reducer)
    )


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
