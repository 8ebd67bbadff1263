"""One budget for all dials: a share of what the full model's decoder computes when it reads a prompt.

The dials share it by a rule, which says how far each is turned down. What is left of the budget then goes to visual
tokens, the finest units there are, and behind the last of them to heads and MLP channels, as far as these are to be
turned. So the budget is never exceeded, and what is left over is less than one more unit costs.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from .token_budget import budget_values, fraction_as_written

PROPORTIONAL = "proportional"
_STEPS = 2**20


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
            allocation: see [`require_allocation`].

        Raises:
            ValueError: if so little cannot be reached.
        """
        price, full, fixed = self.price, self.full(), allocation if isinstance(allocation, Mapping) else {}
        turned, allowed = self._turned(allocation), math.floor(compute_budget * full)
        if compute_budget == 1.0 and not fixed:
            return Split(1.0, 1.0, 1.0, 1.0)

        def at(share: float) -> tuple[int, int, int]:
            """Those that are turned at a share, the others as they are fixed, or full."""
            of_dial = {**dict.fromkeys(("tokens", "depth", "width"), 1.0), **dict.fromkeys(turned, share), **fixed}
            layers = max(self.num_prefix_layers, math.floor(of_dial["depth"] * price.num_layers + 1e-9))
            units = math.floor(of_dial["width"] * self.num_units(layers) + 1e-9)
            return math.floor(of_dial["tokens"] * self.num_tokens), layers, units

        def filled(layers: int, units: int) -> tuple[int, int, int] | None:
            """As many tokens as are allowed, and then units; `None` if not even one is."""
            tokens = self.num_tokens
            if "tokens" in turned:
                tokens = _last(lambda number: self.cost(number, layers, units) <= allowed, tokens)
            if tokens is not None and "width" in turned:
                units = _last(lambda number: self.cost(tokens, layers, number) <= allowed, self.num_units(layers))
            is_one = None not in (tokens, units) and self.cost(tokens, layers, units) <= allowed
            return (max(tokens, self.least_tokens), layers, units) if is_one else None

        # Of 2^20 shares the last that is allowed; costs rise with it.
        share = _last(lambda step: self.cost(*at(step / _STEPS)) <= allowed, _STEPS)
        if share is None:
            raise ValueError(
                f"`compute_budget` is {compute_budget}, and with allocation={allocation!r} this prompt takes at least "
                f"{self.cost(*at(0.0)) / full:.4f} of the full model; allowed are budgets from there."
            )
        _, layers, units = at(share / _STEPS)
        best = filled(layers, units)
        if (
            "depth" in turned
            and layers < price.num_layers
            and best == (self.num_tokens, layers, self.num_units(layers))
        ):
            best = filled(layers + 1, self.num_units(layers + 1)) or best
        tokens, layers, units = best
        shares = share_of(tokens, self.num_tokens), share_of(layers, price.num_layers)
        return Split(*shares, share_of(units, self.num_units(layers)), self.cost(*best) / full)

    def _turned(self, allocation: str | Mapping[str, float]) -> frozenset[str]:
        """The dials that share the budget."""
        if isinstance(allocation, Mapping):
            return frozenset({"tokens"})
        return self.turns | {"tokens"} if allocation == PROPORTIONAL else frozenset(allocation.split("+"))


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


def require_allocation(allocation: str | Mapping[str, float], turns: Collection[str]) -> None:
    """
    Checks how dials are to share a budget: `"tokens"`, `"depth"`, `"width"`, or several with a plus between them, are
    turned to the same share while the others stay full, and `"proportional"` are all that can be turned; a mapping
    fixes `depth` and `width`, and tokens are what is left.

    Args:
        allocation: which is to be checked.
        turns: of depth and width those for which something chooses.

    Raises:
        ValueError: if it is none, or turns what cannot be turned.
    """
    if allocation == PROPORTIONAL:
        return
    is_mapping, known = isinstance(allocation, Mapping), {"tokens", "depth", "width"}
    named = list(allocation) if is_mapping else str(allocation).split("+")
    shares = allocation.values() if is_mapping else []
    is_known = set(named) <= known - ({"tokens"} if is_mapping else set()) and len(set(named)) == len(named)
    if not is_known or not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
        raise ValueError(
            f"`allocation` is {allocation!r}; allowed are {PROPORTIONAL!r}, names out of 'tokens', 'depth' and "
            "'width' with a plus between them, and a dictionary with fractions for 'depth' and 'width'."
        )
    if missing := sorted(set(named) - {"tokens", *turns}):
        raise ValueError(
            f"`allocation` is {allocation!r}, and nothing here chooses what runs under a budget of {missing[0]}. Name "
            "a rule, such as scheduler='even', or train a scheduler for it."
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
