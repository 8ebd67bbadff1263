"""How many layers, attention heads and groups of MLP channels run under the budgets of depth and width.

The first layers, the prefix, always run whole. A depth b runs max(prefix, floor(b * L)) of L layers. A width b runs
floor(b * U) of the U units of the layers that run, those of the prefix among them, and at least these. Where one dial
turns, these are AdaLLaVA's counts (arXiv 2503.10905).
"""

import math
from fractions import Fraction

import torch

from .token_budget import TokenBudget, budget_values, fraction_as_written, require_count


def num_layers_to_run(
    depth_budget: TokenBudget, num_layers: int, num_prefix_layers: int, batch_size: int
) -> torch.Tensor:
    """
    Number of decoder layers that a budget lets run.

    Args:
        depth_budget: float in [0, 1] (a fraction of the layers), int >= 2 (their number), or one of these per sample.
        num_layers: of the decoder.
        num_prefix_layers: that always run.
        batch_size: number of samples.

    Returns:
        `[batch]` int64 on the CPU, in [num_prefix_layers, num_layers].

    Raises:
        ValueError: as for a token budget, and for a number of layers that is smaller than the prefix.
    """
    values, numbers = budget_values(depth_budget, batch_size, "depth_budget"), []
    for value in values.tolist():
        if values.is_floating_point():
            share = fraction_as_written(value, values.dtype, "depth_budget")
            numbers.append(max(num_prefix_layers, math.floor(share * num_layers)))
        elif require_count(value, "depth_budget") < num_prefix_layers:
            raise ValueError(
                f"`depth_budget` is {value} layers, and the first {num_prefix_layers} of this decoder always run; "
                f"allowed are numbers from {num_prefix_layers}."
            )
        else:
            numbers.append(min(value, num_layers))
    return torch.tensor(numbers, dtype=torch.int64)


def width_shares(width_budget: TokenBudget, num_heads: int, batch_size: int) -> list[Fraction]:
    """
    The share of each sample's units that a budget lets run.

    Args:
        width_budget: float in [0, 1] (a fraction of the heads and MLP channels of layers that run), int >= 2 (a
            number of heads of a layer, on average, and the same share of MLP channels), or one of these per sample.
        num_heads: attention heads of a layer.
        batch_size: number of samples.

    Raises:
        ValueError: as for a token budget.
    """
    values = budget_values(width_budget, batch_size, "width_budget")
    if values.is_floating_point():
        return [fraction_as_written(value, values.dtype, "width_budget") for value in values.tolist()]
    return [min(Fraction(require_count(value, "width_budget"), num_heads), Fraction(1)) for value in values.tolist()]


def num_units_to_choose(
    shares: list[Fraction], num_layers: torch.Tensor, num_prefix_layers: int, units_per_layer: int
) -> torch.Tensor:
    """
    Number of units that run behind the prefix, `[batch]` int64 on the CPU.

    Args:
        shares: of the units of all layers that run, see [`width_shares`].
        num_layers: `[batch]` int64, layers that run, see [`num_layers_to_run`].
        num_prefix_layers: that run whole.
        units_per_layer: attention heads, groups of MLP channels, or blocks of both.
    """
    of_prefix = num_prefix_layers * units_per_layer
    numbers = [
        max(of_prefix, math.floor(share * layers * units_per_layer)) - of_prefix
        for share, layers in zip(shares, num_layers.tolist(), strict=True)
    ]
    return torch.tensor(numbers, dtype=torch.int64)
