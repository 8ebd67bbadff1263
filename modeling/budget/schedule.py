"""Reducers one after another, under one budget.

Every reducer of a stack gets the tokens that the one before left. A single budget is the budget of the whole stack: of
n reducers each leaves the same share of what it gets, and the last makes the number exact. A dictionary of budgets
says the share, or the number, of every reducer by name.
"""

from collections.abc import Mapping

import torch

from ..reducers.bank import Step
from ..reducers.base import require_choice
from .token_budget import TokenBudget, budget_values, num_tokens_to_keep, shared_by_units

# By what the units of a prompt can share its tokens.
UNIT_WEIGHTS = ("size", "attention", "novelty")
_OF_PROMPT = {"prompt", "unit_weights"}

StackBudget = TokenBudget | Mapping[str, TokenBudget | None]


class BudgetSchedule:
    """
    A caller's budget for a stack of reducers, read once.

    Args:
        token_budget: one budget for the whole stack; or a mapping: from reducers' names to theirs, where a reducer
            that is not named leaves everything, or `{"prompt": n}`, at most n visual tokens for all units of a prompt
            together, which may say `"unit_weights"` too. `None`, alone or for a reducer, lets a reducer decide by its
            own rule.
        steps: of the stack.
        batch_size: number of prompts.
        num_layers: of the decoder.
        unit_weights: by what units share a prompt's tokens where the budget does not say, one of `UNIT_WEIGHTS`.

    Raises:
        ValueError: if a budget is not allowed, is `None` for a reducer without a rule of its own, or names a reducer
            that is not in the stack.
    """

    def __init__(
        self,
        token_budget: StackBudget | None,
        steps: list[Step],
        batch_size: int,
        num_layers: int,
        unit_weights: str = "size",
    ) -> None:
        self.steps, self.batch_size, self.num_layers = steps, batch_size, num_layers
        self.names = list(dict.fromkeys(step.name for step in steps))
        self.is_shared = isinstance(token_budget, Mapping) and {"prompt"} <= set(token_budget) <= _OF_PROMPT
        self.unit_weights = unit_weights
        self.total: torch.Tensor | None = None
        self.own: dict[str, torch.Tensor | None] = dict.fromkeys(self.names)
        if self.is_shared:
            self.total = budget_values(token_budget["prompt"], batch_size)
            if self.total.is_floating_point():
                raise ValueError(f"`token_budget` is {token_budget!r}; for a whole prompt it is a number of tokens.")
            self.unit_weights = token_budget.get("unit_weights", unit_weights)
            require_choice("unit_weights", self.unit_weights, UNIT_WEIGHTS)
        elif isinstance(token_budget, Mapping):
            self.own = self._own_budgets(token_budget)
        elif token_budget is not None:
            self.total = budget_values(token_budget, batch_size)
        for values in (self.total, *self.own.values()):
            if values is not None:
                num_tokens_to_keep(values, 1, batch_size)
        if self.total is None:
            self._require_own_rules()

    def of_units(
        self, sample: torch.Tensor, sizes: torch.Tensor, weights: torch.Tensor | None = None
    ) -> "BudgetOfUnits":
        """
        The budget of the units of a batch, for one pass through the stack.

        Args:
            sample, sizes: of each unit, on the CPU, its prompt and its number of visual tokens, `[num_units]` int64.
            weights: `[num_units]` float64, by what units share the tokens of a prompt; by default their sizes.
        """
        total = None
        if self.is_shared:
            total = shared_by_units(self.total, sample, sizes, weights)
        elif self.total is not None:
            total = num_tokens_to_keep(self.total[sample], sizes, len(sizes))
        return BudgetOfUnits(self, total, sample, sizes)

    def _own_budgets(self, budgets: Mapping[str, TokenBudget | None]) -> dict[str, torch.Tensor | None]:
        unknown = sorted(set(budgets) - set(self.names))
        if unknown:
            raise ValueError(
                f"`token_budget` names {', '.join(map(repr, unknown))}; this stack's reducers: "
                f"{', '.join(self.names)}."
            )
        own = {name: budgets.get(name, 1.0) for name in self.names}
        return {
            name: None if budget is None else budget_values(budget, self.batch_size) for name, budget in own.items()
        }

    def _require_own_rules(self) -> None:
        for name, own in self.own.items():
            first = next(step for step in self.steps if step.name == name)
            if own is None and not (first.divides or first.reducer).has_own_rule:
                raise ValueError(
                    f"`token_budget` is None for {name!r}, which has no rule of its own for how many tokens to keep; "
                    "give it a budget."
                )


class BudgetOfUnits:
    """
    How many tokens of each unit every step leaves, in one pass through a stack. `total` `[num_units]` is what the
    whole stack leaves, or `None` where reducers have their own budgets.
    """

    def __init__(
        self, schedule: BudgetSchedule, total: torch.Tensor | None, sample: torch.Tensor, sizes: torch.Tensor
    ) -> None:
        self.schedule, self.total, self.sample, self.sizes = schedule, total, sample, sizes
        self._settled: dict[str, torch.Tensor | None] = {}

    def of_step(self, step: Step, entering: torch.Tensor) -> torch.Tensor | None:
        """
        The tokens `[num_units]` that the next step leaves of those that enter it, for one inside the decoder as a mean
        over layers; `None` if its own rule decides. Steps are asked about in their order.
        """
        if step.name not in self._settled:
            self._settled[step.name] = self._of_entry(step.name, entering)
        wanted = self._settled[step.name]
        if step.divides is None:
            # Inside the decoder what counts is the prompt's sum, whichever of its units the tokens are of.
            is_sum = wanted is None or step.reducer.stage == "decoder"
            return wanted if is_sum else torch.minimum(wanted, entering)
        wanted = [None] * len(entering) if wanted is None else wanted.tolist()
        pairs, layers = zip(entering.tolist(), wanted, strict=True), self.schedule.num_layers
        return torch.tensor([step.divides.split(tokens, number, layers) for tokens, number in pairs]).long()

    def _of_entry(self, name: str, entering: torch.Tensor) -> torch.Tensor | None:
        names = self.schedule.names
        if self.total is None:
            values = self.schedule.own[name]
            return None if values is None else num_tokens_to_keep(values[self.sample], entering, len(entering))
        place = names.index(name) + 1
        if place == len(names):
            return self.total
        # Of n reducers each leaves the same share of what it gets.
        share = (self.total.double() / self.sizes) ** (place / len(names))
        return torch.maximum((share * self.sizes).round().long(), self.total)
