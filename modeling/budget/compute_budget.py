"""One budget for all dials: a share of what the full model's decoder computes when it reads a prompt.

The dials share it by a rule. A rule says how far each is turned down; what is left of the budget then goes to visual
tokens, the finest units there are, and behind the last of them to heads and MLP channels. So the budget is never
exceeded, and what is left over is less than one more unit costs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from .token_budget import budget_values, fraction_as_written

ALLOCATIONS = ("tokens", "proportional")


@dataclass(frozen=True)
class PrefillPrice:
    """
    FLOPs of one prompt in a decoder of Llama's kind, two for a multiplication and an addition, as torch counts them:
    every pair of columns, whether a mask hides it or not, and the head on the last column.

    Attributes:
        num_layers: of the decoder.
        num_sets: sets of heads that are chosen together.
        num_groups: of MLP channels.
        set_per_column, set_per_pair: of one set in one layer, for every column and for every pair of columns.
        group_per_column: of one group in one layer.
        head: on the last column.
    """

    num_layers: int
    num_sets: int
    num_groups: int
    set_per_column: int
    set_per_pair: int
    group_per_column: int
    head: int

    @classmethod
    def of_config(cls, text: PreTrainedConfig, num_sets: int, num_groups: int) -> "PrefillPrice":
        """Of a text model, what is chosen of whose layers are so many sets of heads and groups of MLP channels."""
        hidden_size, num_heads = text.hidden_size, text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or hidden_size // num_heads
        # Queries and outputs of all heads, and keys and values of those that share them.
        projections = 2 * (num_heads + text.num_key_value_heads) * head_dim * hidden_size
        return cls(
            text.num_hidden_layers,
            num_sets,
            num_groups,
            2 * projections // num_sets,
            4 * num_heads * head_dim // num_sets,
            # Gate, up and down.
            2 * 3 * hidden_size * text.intermediate_size // num_groups,
            2 * hidden_size * text.vocab_size,
        )

    def of_layer(self, columns: int) -> tuple[int, int]:
        """What one set of heads and one group of channels cost in a layer that sees so many columns."""
        return columns * self.set_per_column + columns**2 * self.set_per_pair, columns * self.group_per_column

    def of_prompt(self, columns: Sequence[int], num_prefix_layers: int, num_sets: int, num_groups: int) -> int:
        """
        What a prompt costs at most.

        Args:
            columns: that each layer sees.
            num_prefix_layers: that run whole.
            num_sets, num_groups: that run behind the prefix, in whichever layers.
        """
        first, behind = columns[:num_prefix_layers], columns[num_prefix_layers:]
        whole = [self.of_layer(number) for number in first]
        prefix = sum(self.num_sets * of_set + self.num_groups * of_group for of_set, of_group in whole)
        # Where layers see different numbers, units may all be in the one that sees most.
        of_set, of_group = self.of_layer(max(behind, default=0))
        return self.head + prefix + num_sets * of_set + num_groups * of_group


@dataclass(frozen=True)
class Split:
    """
    How far each dial is turned, as fractions that calls take: `token_budget`, `depth_budget` and `width_budget`.

    Attributes:
        tokens, depth, width: in [0, 1].
        cost: what it costs at most, as a share of the full model.
    """

    tokens: float
    depth: float
    width: float
    cost: float


@dataclass(frozen=True)
class Dials:
    """
    What can be turned for one prompt.

    Attributes:
        price: of the decoder.
        columns: of a share of the visual tokens the columns that each layer sees.
        num_tokens: visual tokens of the prompt's largest image; 0 without images.
        least_tokens: of these, that the reducer can be asked for.
        num_prefix_layers: that run whatever the budget.
        turns: which of `"depth"` and `"width"` can be turned.
        has_token: whether a compute token goes through the prefix, as one column more.
    """

    price: PrefillPrice
    columns: Callable[[float], Sequence[int]]
    num_tokens: int
    least_tokens: int
    num_prefix_layers: int
    turns: frozenset[str]
    has_token: bool

    def cost(self, tokens: int, layers: int, units: int) -> int:
        """Of so many tokens of an image, of layers, and of units of `num_units` that these have."""
        tokens, prefix = max(tokens, self.least_tokens), self.num_prefix_layers
        columns = list(self.columns(share_of(tokens, self.num_tokens)))
        if self.has_token:
            columns[:prefix] = [number + 1 for number in columns[:prefix]]
        per_layer = self.num_units(1)
        sets, groups = (
            max(0, of_layer * units // per_layer - prefix * of_layer)
            for of_layer in (self.price.num_sets, self.price.num_groups)
        )
        return self.price.of_prompt(columns, prefix, sets, groups)

    def _filled(
        self, layers: int, units: int, allowed: int, allocation: str | Mapping[str, float]
    ) -> tuple[int, int] | None:
        """As many tokens as the cost allows, and behind the last of them units; `None` if it allows not even one."""
        tokens = _last(lambda number: self.cost(number, layers, units) <= allowed, self.num_tokens)
        if tokens is None:
            return None
        tokens = max(tokens, self.least_tokens)
        if allocation == "proportional" and "width" in self.turns:
            units = _last(lambda number: self.cost(tokens, layers, number) <= allowed, self.num_units(layers))
        return tokens, units

    def num_units(self, layers: int) -> int:
        """In how many steps the width of so many layers can be turned."""
        return layers * math.lcm(self.price.num_sets, self.price.num_groups)

    def full(self) -> int:
        """What the model costs with everything, and without a scheduler."""
        price, columns = self.price, self.columns(1.0)
        behind = price.num_layers - self.num_prefix_layers
        return price.of_prompt(columns, self.num_prefix_layers, behind * price.num_sets, behind * price.num_groups)

    def split(self, compute_budget: float, allocation: str | Mapping[str, float]) -> Split:
        """
        Shares a budget among the dials.

        Args:
            compute_budget: of the full model's cost, in [0, 1].
            allocation: `"tokens"` turns the number of visual tokens alone; `"proportional"` all dials to the same
                share; a mapping says `depth` and `width`, and tokens are what is left.

        Raises:
            ValueError: if so little cannot be reached.
        """
        price, full = self.price, self.full()
        allowed = math.floor(compute_budget * full)

        def turned(share: float) -> tuple[int, int, int]:
            """All dials at a share, as far as they are to be turned."""
            of_dial = {"depth": share, "width": share} if allocation == "proportional" else {}
            if isinstance(allocation, Mapping):
                of_dial = dict(allocation)
            of_dial = {dial: value for dial, value in of_dial.items() if dial in self.turns}
            layers = max(self.num_prefix_layers, math.floor(of_dial.get("depth", 1.0) * price.num_layers + 1e-9))
            units = math.floor(of_dial.get("width", 1.0) * self.num_units(layers) + 1e-9)
            return math.floor(share * self.num_tokens), layers, units

        if compute_budget == 1.0 and allocation in ALLOCATIONS:
            return Split(1.0, 1.0, 1.0, 1.0)
        # Of 2^20 steps the last that fits; costs rise with the share.
        steps = 2**20
        best = _last(lambda step: self.cost(*turned(step / steps)) <= allowed, steps)
        if best is None:
            lowest = self.cost(*turned(0.0)) / full
            raise ValueError(
                f"`compute_budget` is {compute_budget}, and with allocation={allocation!r} this prompt takes at least "
                f"{lowest:.4f} of the full model; allowed are budgets from there."
            )
        layers, units = turned(best / steps)[1:]
        tokens, units = self._filled(layers, units, allowed, allocation)
        if allocation == "proportional" and "depth" in self.turns and layers < price.num_layers:
            is_full = tokens == self.num_tokens and units == self.num_units(layers)
            if is_full and (more := self._filled(layers + 1, self.num_units(layers + 1), allowed, allocation)):
                layers, (tokens, units) = layers + 1, more
        cost = self.cost(tokens, layers, units) / full
        width = share_of(units, self.num_units(layers))
        return Split(share_of(tokens, self.num_tokens), share_of(layers, price.num_layers), width, cost)


def compute_shares(compute_budget: float | Sequence[float] | torch.Tensor, batch_size: int) -> list[float]:
    """
    Shares of the full model's cost, one for each sample.

    Raises:
        ValueError: if a value is not in [0, 1], or there are not as many as samples.
    """
    values = budget_values(compute_budget, batch_size, "compute_budget")
    if not values.is_floating_point():
        raise ValueError(f"`compute_budget` is {compute_budget!r}; allowed are floats, fractions of the full cost.")
    return [float(fraction_as_written(value, values.dtype, "compute_budget")) for value in values.tolist()]


def require_allocation(allocation: str | Mapping[str, float]) -> None:
    """
    Raises:
        ValueError: if it is none.
    """
    is_mapping = isinstance(allocation, Mapping) and set(allocation) <= {"depth", "width"}
    if is_mapping and all(isinstance(share, int | float) and 0 <= share <= 1 for share in allocation.values()):
        return
    if not isinstance(allocation, str) or allocation not in ALLOCATIONS:
        raise ValueError(
            f"`allocation` is {allocation!r}; allowed are {', '.join(map(repr, ALLOCATIONS))}, and a dictionary with "
            "fractions for 'depth' and 'width'."
        )


def share_of(number: int, of: int) -> float:
    """The fraction of which a budget makes this number again: halfway to the next, where no rounding matters."""
    return 1.0 if number >= of else (number + 0.5) / of


def _last(fits: Callable[[int], bool], highest: int) -> int | None:
    """The last number from 0 that fits, where all before it do; `None` if none does."""
    if not fits(0):
        return None
    low, high = 0, highest + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
