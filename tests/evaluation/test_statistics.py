"""Intervals, tests and areas, each against its definition worked out here or against SciPy's own."""

import math

import numpy as np
import pytest
from scipy import stats

from adavtp.evaluation import statistics
from adavtp.evaluation.statistics import (
    area_weights,
    bootstrap_means,
    common_range,
    holm,
    interval,
    mean_interval,
    paired_p_value,
    rank_agreement,
)


@pytest.fixture
def scores() -> np.ndarray:
    """`[3, 400]`: two that go together, and one that has nothing to do with them."""
    generator = np.random.default_rng(1)
    first = generator.random(400)
    return np.stack([first, first + 0.05 * generator.standard_normal(400), generator.random(400)])


# Drawing examples anew.


def test_intervals_of_means_and_of_paired_differences_are_those_of_scipy(scores: np.ndarray) -> None:
    draws, how = bootstrap_means(scores), {"n_resamples": 10_000, "method": "percentile"}
    expected = stats.bootstrap((scores[0],), np.mean, **how, rng=np.random.default_rng(2)).confidence_interval
    assert interval(draws[:, 0]) == pytest.approx((expected.low, expected.high), abs=0.002)
    expected = stats.bootstrap(
        *((scores[0], scores[1]), lambda one, other, axis: one.mean(axis) - other.mean(axis)),
        **how | {"paired": True, "rng": np.random.default_rng(2)},
    ).confidence_interval
    assert interval(draws[:, 0] - draws[:, 1]) == pytest.approx((expected.low, expected.high), abs=0.0005)


def test_all_settings_are_scored_on_the_same_draws(scores: np.ndarray) -> None:
    draws = bootstrap_means(np.stack([scores[0], 1 - scores[0], scores[0]]))
    assert np.allclose(draws[:, 0] + draws[:, 1], 1.0)
    assert np.allclose(draws[:, 0], draws[:, 2])


def test_every_draw_has_as_many_examples_as_there_are() -> None:
    draws = bootstrap_means(np.stack([np.ones(7), np.arange(7.0)]), num_draws=300)
    assert np.allclose(draws[:, 0], 1.0)
    assert np.allclose(draws[:, 1] * 7, np.round(draws[:, 1] * 7))
    assert draws[:, 1].min() >= 0 and draws[:, 1].max() <= 6


def test_how_many_draws_are_held_at_once_changes_nothing(scores: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = bootstrap_means(scores, num_draws=50)
    monkeypatch.setattr(statistics, "_CHUNK", 3 * 400)
    assert np.allclose(bootstrap_means(scores, num_draws=50), at_once, rtol=0, atol=1e-12)


def test_draws_come_from_their_seed(scores: np.ndarray) -> None:
    assert np.array_equal(bootstrap_means(scores, 20), bootstrap_means(scores, 20))
    assert not np.array_equal(bootstrap_means(scores, 20), bootstrap_means(scores, 20, seed=1))


def test_no_examples_have_no_mean() -> None:
    with pytest.raises(ValueError, match="`scores` has no examples"):
        bootstrap_means(np.empty((2, 0)))


def test_the_noise_of_arithmetic_is_no_difference() -> None:
    low, high = interval(np.full(100, 3e-17))
    assert low == high == 0


# Single means.


def test_right_and_wrong_answers_have_wilsons_interval() -> None:
    own = np.array([1.0] * 45 + [0.0] * 5)
    low, high = mean_interval(own, bootstrap_means(own[None])[:, 0])
    share, z = 0.9, 1.959964
    centre = (share + z**2 / 100) / (1 + z**2 / 50)
    half = z / (1 + z**2 / 50) * math.sqrt(share * (1 - share) / 50 + z**2 / (4 * 50**2))
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-5)


def test_scores_between_right_and_wrong_have_the_bootstraps(scores: np.ndarray) -> None:
    draws = bootstrap_means(scores[:1])[:, 0]
    assert mean_interval(scores[0], draws) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))


# Tests.


def test_right_against_wrong_is_mcnemars_exact_test() -> None:
    """1 for and 7 against, 20 the same: twice the chance of at most 1 head in 8 throws."""
    differences = np.array([1.0] + [-1.0] * 7 + [0.0] * 20)
    assert paired_p_value(differences) == pytest.approx(2 * (1 + 8) / 2**8)


def test_scores_of_many_sizes_have_the_paired_t_test(scores: np.ndarray) -> None:
    expected = stats.ttest_rel(scores[0], scores[2]).pvalue
    assert paired_p_value(scores[0] - scores[2]) == pytest.approx(expected)


def test_no_differences_are_no_evidence() -> None:
    assert paired_p_value(np.zeros(5)) == 1.0


def test_holm_multiplies_the_smallest_by_all_of_them() -> None:
    """0.01 x 4; 0.02 x 3 = 0.06; 0.025 x 2 = 0.05, which may not be below 0.06; 0.8 x 1."""
    assert holm([0.025, 0.01, 0.8, 0.02]) == pytest.approx([0.06, 0.04, 0.8, 0.06])


def test_holm_stays_a_probability() -> None:
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# Areas.

AREAS = {
    "the middle of a straight line": ([1.0, 2.0, 5.0, 9.0], [1.0, 2.0, 5.0, 9.0], 1.5, 7.5, 4.5),
    "half of a triangle's height": ([0.0, 1.0, 4.0], [0.0, 1.0, 0.0], 0.0, 4.0, 0.5),
    # Of a line from 0 at 0 to 4 at 4, and then flat.
    "between points": ([0.0, 4.0, 8.0], [0.0, 4.0, 4.0], 2.0, 3.0, 2.5),
    "where it is flat": ([0.0, 4.0, 8.0], [0.0, 4.0, 4.0], 5.0, 6.0, 4.0),
    "in another order": ([4.0, 0.0, 1.0], [0.0, 0.0, 1.0], 0.0, 4.0, 0.5),
}


@pytest.mark.parametrize(("cost", "score", "low", "high", "area"), AREAS.values(), ids=AREAS.keys())
def test_an_area_is_the_mean_over_a_range(cost: list, score: list, low: float, high: float, area: float) -> None:
    assert area_weights(cost, low, high) @ np.array(score) == pytest.approx(area)


def test_points_of_one_cost_share_their_place() -> None:
    assert area_weights([1.0, 3.0, 3.0], 1.0, 3.0) == pytest.approx([0.5, 0.25, 0.25])


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (1.0, 4.0), (2.0, 2.0)])
def test_an_area_outside_the_points_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="`low`, `high` are"):
        area_weights([1.0, 3.0], low, high)


def test_the_common_range_is_what_every_curve_covers() -> None:
    assert common_range([[1.0, 5.0], [2.0, 9.0, 3.0]]) == (2.0, 5.0)
    assert common_range([[1.0, 2.0], [3.0, 4.0]]) is None


# Orders.


def test_kendalls_tau_counts_pairs_that_agree() -> None:
    """Of six pairs, five agree and one does not: (5 - 1) / 6."""
    assert rank_agreement([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx(4 / 6)
    assert rank_agreement([1.0], [1.0]) is rank_agreement([1.0, 1.0], [1.0, 2.0]) is None
