"""Intervals and tests for many settings that answered the same examples.

Examples are drawn anew, and every setting is scored on the same draw: what makes an example hard for all of them drops
out of a difference. A draw is a vector of how often each example comes, so the means of all settings over all draws
are one matrix product. The area under a curve of mean scores is a weighted sum of them: every example has an area of
its own, and an area is one more score with the same intervals and the same tests.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import binomtest, kendalltau, ttest_1samp

NUM_DRAWS = 10_000
SEED = 0

# Sums of the same numbers in another order differ in the last of 16 digits; that is no difference between settings.
_DECIMALS = 12

# Numbers held at once while examples are drawn: 32 MB of them.
_CHUNK = 4_000_000


def bootstrap_means(scores: np.ndarray, num_draws: int = NUM_DRAWS, seed: int = SEED) -> np.ndarray:
    """
    Mean scores `[num_draws, num_settings]` over examples that are drawn anew, with replacement, the same ones for all
    settings. `scipy.stats.bootstrap` would copy every draw for each of 150 settings.

    Args:
        scores: `[num_settings, num_examples]`, any numbers.

    Raises:
        ValueError: if there are no examples.
    """
    num_settings, num_examples = scores.shape
    if num_examples == 0:
        raise ValueError("`scores` has no examples; allowed are one or more.")
    generator = np.random.default_rng(seed)
    means = np.empty((num_draws, num_settings))
    step = max(1, _CHUNK // num_examples)
    for start in range(0, num_draws, step):
        rows = min(step, num_draws - start)
        drawn = generator.integers(num_examples, size=(rows, num_examples))
        drawn += num_examples * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num_examples).reshape(rows, num_examples)
        means[start : start + rows] = counts.astype(np.float64) @ scores.T / num_examples
    return means


def interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends, each `[...]`, of the 95% percentile interval of what was computed on every draw, `[draws, ...]`."""
    low, high = np.percentile(draws, [2.5, 97.5], axis=0).round(_DECIMALS)
    return low, high


def mean_interval(scores: np.ndarray, draws: np.ndarray) -> tuple[float, float]:
    """
    The 95% interval of a mean of scores `[num_examples]`: Wilson's where every score is 0 or 1, else that of the
    bootstrap, from the column `[num_draws]` of [`bootstrap_means`].
    """
    if np.isin(scores, (0, 1)).all():
        wilson = binomtest(int(scores.sum()), len(scores)).proportion_ci(confidence_level=0.95, method="wilson")
        return float(wilson.low), float(wilson.high)
    low, high = interval(draws)
    return float(low), float(high)


def paired_p_value(differences: np.ndarray) -> float:
    """
    Two-sided p-value of the hypothesis that paired differences `[num_examples]` have mean 0. Where all that are not 0
    have one size, as with right and wrong answers, the exact sign test, which is then McNemar's exact test; else the
    paired t test.
    """
    differences = differences.round(_DECIMALS)
    sizes = np.unique(np.abs(differences[differences != 0]))
    if len(sizes) == 0:
        return 1.0
    if len(sizes) == 1:
        return float(binomtest(int((differences > 0).sum()), int((differences != 0).sum())).pvalue)
    return float(ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    P-values corrected for being several, by Holm's step-down rule (Scandinavian Journal of Statistics 6, 1979).

    The i-th smallest of m is multiplied by m - i + 1; none may be below that of a smaller one, or above 1.
    """
    if not p_values:
        return []
    order = np.argsort(p_values, kind="stable")
    multiplied = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(multiplied), 1.0)
    return corrected.tolist()


def difference(differences: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    """
    A paired difference as a report has it: `difference`, its 95% interval `low` and `high`, and `p`; from the
    differences `[num_examples]`, and from their mean on every draw, `[num_draws]`.
    """
    low, high = interval(draws)
    return {
        "difference": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "p": paired_p_value(differences),
    }


def correct(compared: Sequence[dict[str, Any]]) -> None:
    """Puts `p_holm`, corrected for all of them, into each of several differences."""
    for one, corrected in zip(compared, holm([one["p"] for one in compared]), strict=True):
        one["p_holm"] = corrected


def area_weights(cost: Sequence[float], low: float, high: float) -> np.ndarray:
    """
    Weights w so that `w @ score` is the area under the score-against-cost curve from `low` to `high`, divided by
    `high - low`: the mean score over that range of cost. The curve goes straight from point to point.

    Args:
        cost: `[num_points]`, in any order. Points of the same cost share their place on the curve by equal parts.
        low, high: both within the range of `cost`, `low` below `high`.

    Returns:
        `[num_points]` float64 that sum to 1.

    Raises:
        ValueError: if the range is empty or the points do not cover it.
    """
    places, place, shared_by = np.unique(cost, return_inverse=True, return_counts=True)
    if not places[0] <= low < high <= places[-1]:
        raise ValueError(
            f"`low`, `high` are {low:g}, {high:g}; allowed is a range within the costs, {places[0]:g} to "
            f"{places[-1]:g}."
        )
    knots = np.unique([low, *places[(places > low) & (places < high)], high])
    hats = np.stack([np.interp(knots, places, unit) for unit in np.eye(len(places))])
    weights = trapezoid(hats, knots, axis=1) / (high - low)
    return weights[place] / shared_by[place]


def common_range(costs: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The range of cost that every curve covers, or `None` if there is none."""
    low, high = max(min(cost) for cost in costs), min(max(cost) for cost in costs)
    return (low, high) if low < high else None


def rank_agreement(first: Sequence[float], second: Sequence[float]) -> float | None:
    """
    Kendall's tau-b of two lists of scores of the same methods: 1 the same order, -1 the opposite one; `None` where one
    list has no order, as with a single method or with equal scores.
    """
    tau = float(kendalltau(first, second).statistic) if len(first) > 1 else np.nan
    return None if np.isnan(tau) else tau
