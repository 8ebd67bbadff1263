"""What a training step costs on average over the budgets that it may draw."""

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from ..modeling.budget.token_budget import num_tokens_to_keep
from ..modeling.costs.counting import remembered, weights_on_parabola
from ..modeling.costs.model_costs import FULL, ModelCosts
from ..modeling.costs.training_step import Step, TrainingFlops, count_training_flops


def mean_training_flops(
    config: PreTrainedConfig,
    text_tokens: int,
    step: Step,
    budget_range: tuple[float, float],
    *,
    per: str = "batch",
    rows: int = 1,
    image_size: tuple[int, int] | None = None,
) -> TrainingFlops:
    """
    The mean of a sample over budgets b ~ U[low, high], of the parabola through the counts of three budgets. It is
    exact where the tokens that are kept say no more than how many projector and decoder get.

    A batch is as long as its longest row. With one budget for each of B samples that row keeps K or fewer tokens with
    probability P(floor(b N) <= K)^B: the more samples, the nearer to the highest budget.

    Args:
        text_tokens: of every sample.
        budget_range: low and high, fractions in [0, 1].
        per: `"batch"` or `"sample"`, see `BudgetCollator`.
        rows: samples of a batch.
        config, step, image_size: see [`count_training_flops`].

    Raises:
        ValueError: if the range or `per` is not allowed.
    """
    if per not in ("batch", "sample"):
        raise ValueError(f"`per` is {per!r}; allowed are 'batch' and 'sample'.")
    sizes = unit_sizes(config, image_size)
    counts = list(longest_counts(budget_range, sizes, 1 if per == "batch" else rows))
    places = {counts[number].keep: counts[number] for number in (0, len(counts) // 2, len(counts) - 1)}
    weights = dict.fromkeys(places, 0.0)
    for count in counts:
        for place, weight in zip(places, weights_on_parabola(count.keep, list(places)), strict=True):
            weights[place] += count.probability * float(weight)
    counted = [_of_budget(config, text_tokens, step, place.budget, image_size) for place in places.values()]
    return TrainingFlops.weighted(list(zip(weights.values(), counted, strict=True)))


@remembered
def _of_budget(
    config: PreTrainedConfig, text_tokens: int, step: Step, budget: float, image_size: tuple[int, int] | None
) -> TrainingFlops:
    return count_training_flops(config, [text_tokens], step, token_budget=budget, image_size=image_size)


def unit_sizes(config: PreTrainedConfig, image_size: tuple[int, int] | None = None) -> tuple[int, ...]:
    """Visual tokens of each unit of an image, see [`ModelCosts`]."""
    return ModelCosts.of(config, image_size).visual_tokens(FULL).sizes


class LongestCount(NamedTuple):
    """The visual tokens that the longest row of a batch keeps, with what probability, and a budget that keeps them."""

    keep: int
    probability: float
    budget: float


def longest_counts(budget_range: tuple[float, float], sizes: Sequence[int], draws: int = 1) -> Iterator[LongestCount]:
    """
    The distribution of max_j K(b_j), K(b) = sum of max(1, floor(b N)) over units, over independent b_j ~ U[low, high].

    Args:
        budget_range: low and high.
        sizes: N of each unit.
        draws: how many b_j.

    Yields:
        Each K that has a probability.

    Raises:
        ValueError: if the range is empty or leaves [0, 1].
    """
    low, high = budget_range if len(budget_range) == 2 else (1.0, 0.0)
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"`budget_range` is {budget_range!r}; allowed are two fractions 0 <= low <= high <= 1.")
    if low == high:
        keep = int(num_tokens_to_keep(low, torch.tensor(sizes), len(sizes)).sum())
        yield LongestCount(keep, 1.0, low)
        return
    # Below twice 1 / N a unit keeps one token.
    edges = sorted({Fraction(count, size) for size in set(sizes) for count in range(2, size + 1)} | {Fraction(0), 1})
    for begin, end in itertools.pairwise(edges):
        reached = [min(max((float(edge) - low) / (high - low), 0.0), 1.0) ** draws for edge in (begin, end)]
        if reached[1] > reached[0]:
            budget = (begin + end) / 2
            keep = sum(max(1, int(budget * size)) for size in sizes)
            yield LongestCount(keep, reached[1] - reached[0], float(budget))
