"""How many visual tokens each decoder layer sees: whole counts whose mean over layers is exactly what was asked.

A method says the shape of its schedule; the budget says the mean. A shape that can be turned up or down, from "drops
nothing" to "drops all it can", is turned until the mean is right ([`solved_counts`]), and the real numbers that come
out are rounded so that their sum is exact ([`exact_counts`]).
"""

import math
from collections.abc import Callable, Sequence


def solved_counts(
    name: str,
    shares: Callable[[float], Sequence[float]],
    num_visual: int,
    num_keep: int,
    num_layers: int,
    advice: str,
) -> list[int]:
    """
    Of a family of schedules from "drops nothing" to "drops all it can" the counts of the one with the wanted mean.

    Args:
        name: of the reducer.
        shares: from a strength in [0, 1] to the share of the visual tokens that each layer sees; continuous, never
            rising with the strength nor from layer to layer, all 1 at strength 0.
        num_visual: visual tokens that enter layer 0.
        num_keep: their mean number over layers.
        num_layers: of the decoder.
        advice: what to do about a budget that cannot be reached.

    Returns:
        `num_layers` counts that never rise, with the sum `num_keep * num_layers`.

    Raises:
        ValueError: if the strongest schedule keeps more.
    """
    total = num_keep * num_layers
    least = num_visual * sum(shares(1.0))
    if total < least - 1e-6:
        raise unreachable(name, num_visual, num_keep, least / num_layers, advice)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if num_visual * sum(shares(middle)) >= total:
            low = middle
        else:
            high = middle
    return exact_counts([num_visual * share for share in shares(low)], total)


def exact_counts(wanted: Sequence[float], total: int) -> list[int]:
    """
    Whole counts as near as can be to real ones that never rise, with an exact sum.

    Every count is rounded down, and what is missing is given, one token a layer, to the earliest layers that lost a
    fraction, so that the counts still never rise.

    Args:
        wanted: one real count for each layer, never rising, with the sum `total` up to rounding.
        total: the sum of the result.

    Returns:
        One count for each layer.
    """
    # Bisection and division leave errors of a millionth, which must not turn 7 into 6.
    floors = [math.floor(value + 1e-6) for value in wanted]
    has_fraction = [value - floor > 1e-6 for value, floor in zip(wanted, floors, strict=True)]
    missing = total - sum(floors)
    for index, lost in enumerate(has_fraction):
        if lost and missing > 0:
            floors[index] += 1
            missing -= 1
    if missing:
        raise ArithmeticError(f"Counts {list(wanted)} do not add up to {total}.")
    return floors


def shares_behind(cuts: Sequence[int], shares: Sequence[float], num_layers: int) -> list[float]:
    """
    The share of tokens that each layer sees, 1 before the first cut and then that of the last cut reached.

    Args:
        cuts: layers, never falling; cuts that fall on one layer act one after another.
        shares: behind each of them.
        num_layers: of the decoder.
    """
    reached = [sum(cut <= layer for cut in cuts) for layer in range(num_layers)]
    return [[1.0, *shares][stage] for stage in reached]


def distinct_cuts(cuts: Sequence[int], num_layers: int) -> list[int]:
    """The layers in `cuts` that a decoder of `num_layers` has, each once, ascending."""
    return sorted({cut for cut in cuts if cut < num_layers})


def in_proportion(layer: int, num_layers: int, of: int = 32) -> int:
    """A paper's layer of a decoder of `of` layers, in proportion for one of `num_layers`; in [1, num_layers - 1]."""
    return min(max(1, round(layer * num_layers / of)), max(1, num_layers - 1))


def unreachable(name: str, num_visual: int, num_keep: int, least: float, advice: str) -> ValueError:
    """The error for a budget below what the layers before the first cut see alone."""
    return ValueError(
        f"`token_budget` asks for a mean of {num_keep} of {num_visual} visual tokens over the decoder's layers, and "
        f"{name!r} cannot go below {least:.2f} ({least / num_visual:.3f} of them), because layers before its first "
        f"cut see all; {advice}"
    )
