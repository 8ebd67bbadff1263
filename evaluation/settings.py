"""A setting: what chooses the visual tokens, and how many of them it leaves.

Measurements and evaluations are tables with a row for each setting. Beside every registered reducer there is `"full"`:
nothing is chosen and everything is kept, which is what the model would cost as a plain LLaVA.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from ..configuration.configuration_adavtp import reducer_entries
from ..modeling.budget.schedule import StackBudget
from ..modeling.budget.token_budget import num_tokens_to_keep
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration, ReducerSpec

FULL = "full"
FULL_BUDGET = 1.0

# At the full budget a reducer is not asked. This one reads nothing, so that nothing is prepared for it either.
NEVER_ASKED = "grid"


class Setting(NamedTuple):
    """
    A row of a table.

    Attributes:
        reducer: a registered name, a dictionary of `"name"` and parameters, a list of these (a stack), or `"full"`.
        budget: see [`AdaVTPForConditionalGeneration.forward`]; of `"full"` it is 1.0.
    """

    reducer: ReducerSpec
    budget: StackBudget | None = FULL_BUDGET

    @property
    def label(self) -> str:
        """The reducer as it is written on the command line."""
        return reducer_label(self.reducer)

    def arguments(self) -> dict[str, Any]:
        """
        The setting as arguments of `forward`, `generate` and `select_tokens`.

        Raises:
            ValueError: if the reducer is `"full"` and the budget is not 1.0.
        """
        if self.reducer != FULL:
            return {"reducer": self.reducer, "token_budget": self.budget}
        if self.budget != FULL_BUDGET:
            raise ValueError(f"`budget` of {FULL!r} is {self.budget!r}; allowed is {FULL_BUDGET}.")
        return {"reducer": NEVER_ASKED, "token_budget": FULL_BUDGET}


def reducer_label(reducer: ReducerSpec) -> str:
    """
    A reducer as it is written on the command line: `fastv:layer=2`, a stack as `tome, fastv:layer=2`.

    Raises:
        ValueError: if it is no reducer.
    """
    return ", ".join(
        entry
        if isinstance(entry, str)
        else ":".join([entry["name"], *(f"{key}={_written(entry[key])}" for key in entry if key != "name")])
        for entry in reducer_entries(reducer)
    )


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def reason_unreachable(
    model: AdaVTPForConditionalGeneration, inputs: Mapping[str, torch.Tensor], setting: Setting
) -> str | None:
    """
    Why a reducer cannot meet a budget, or `None` if it can.

    Args:
        model: in evaluation mode.
        inputs: `input_ids`, `attention_mask` and `pixel_values` of one prompt or more.
        setting: the reducer and the budget.

    Raises:
        ValueError: if there is no such reducer, or the budget is none.
    """
    arguments = setting.arguments()
    with reducers_left_alone(model):
        model.model.resolve_budget(arguments["token_budget"], arguments["reducer"], len(inputs["input_ids"]))
        try:
            model.select_tokens(**inputs, **arguments)
        except ValueError as error:
            return str(error)
    return None


@contextmanager
def reducers_left_alone(model: AdaVTPForConditionalGeneration) -> Iterator[None]:
    """Takes off the model, at the end, the reducers that calls have put there, and puts back those they replaced."""
    base, config = model.model, model.config
    modules, in_use, trained = dict(base.reducers.items()), list(config.reducers), list(config.trained_reducers)
    try:
        yield
    finally:
        base.reducers.clear()
        base.reducers.update(modules)
        config.reducers, config.trained_reducers = in_use, trained


def num_keep_of(budget: float | int | Fraction, num_patches: int) -> int:
    """
    The number of an image's patches that a budget keeps.

    Raises:
        ValueError: if it is no budget.
    """
    if not isinstance(budget, Fraction):
        return int(num_tokens_to_keep(budget, num_patches, 1))
    if not 0 <= budget <= 1:
        raise ValueError(f"`budgets` has {budget}; as a fraction it is the share of visual tokens kept, from 0 to 1.")
    return max(1, int(budget * num_patches))


def exact_budget(budget: float | int | Fraction, count: int) -> float | int:
    """What the model is asked: of a fraction, the count that it means, for a float beside it may mean one less."""
    if not isinstance(budget, Fraction):
        return budget
    return count if count >= 2 else 0.0
