"""How many visual tokens each decoder layer sees: whole counts that never rise, with exactly the mean asked for."""

import random
from collections.abc import Callable

import pytest

from adavtp.modeling.decoder.layer_counts import (
    distinct_cuts,
    exact_counts,
    in_proportion,
    shares_behind,
    solved_counts,
    unreachable,
)
from adavtp.modeling.decoder.reducer import DecoderReducer
from adavtp.modeling.reducers.aim import AimPrune
from adavtp.modeling.reducers.apet import ApETLayerReducer
from adavtp.modeling.reducers.autoprune import AutoPruneReducer
from adavtp.modeling.reducers.depth import DepthReducer
from adavtp.modeling.reducers.fastv import FastVReducer
from adavtp.modeling.reducers.head_threshold import HeadThresholdReducer
from adavtp.modeling.reducers.priortr import PriorTRReducer
from adavtp.modeling.reducers.pyramiddrop import PyramidDropReducer
from adavtp.modeling.reducers.random_layer import RandomLayerReducer
from adavtp.modeling.reducers.sparsevlm import SparseVLMReducer
from adavtp.modeling.reducers.vtw import VTWReducer
from tiny_decoder_views import deep_config

# Each with parameters that need deep decoders only where the defaults do.
REDUCERS: dict[str, Callable[[int], DecoderReducer]] = {
    "fastv": lambda layers: FastVReducer(deep_config(layers)),
    "vtw": lambda layers: VTWReducer(deep_config(layers)),
    "pyramiddrop": lambda layers: PyramidDropReducer(deep_config(layers)),
    "pyramiddrop, other ratios": lambda layers: PyramidDropReducer(deep_config(layers), ratios=[0.9, 0.3, 0.29]),
    "sparsevlm": lambda layers: SparseVLMReducer(deep_config(layers)),
    "sparsevlm 64": lambda layers: SparseVLMReducer(deep_config(layers), tokens=64),
    "sparsevlm v2": lambda layers: SparseVLMReducer(deep_config(layers), version="v2"),
    "depth": lambda layers: DepthReducer(deep_config(layers)),
    "depth, a line": lambda layers: DepthReducer(deep_config(layers), first_drop=0.0, further_drop=1.0),
    "depth, a step": lambda layers: DepthReducer(deep_config(layers), first_drop=1.0, further_drop=0.0),
    "head_threshold": lambda layers: HeadThresholdReducer(deep_config(layers)),
    "aim_prune": lambda layers: AimPrune(deep_config(layers)),
    "autoprune": lambda layers: AutoPruneReducer(deep_config(layers)),
    "apet_layer": lambda layers: ApETLayerReducer(deep_config(layers)),
    "priortr": lambda layers: PriorTRReducer(deep_config(layers)),
    "random_layer": lambda layers: RandomLayerReducer(deep_config(layers)),
}
DEPTHS = [1, 2, 3, 4, 7, 24, 32]


def budgets(num_visual: int) -> list[int]:
    """All budgets of few tokens, some of many."""
    some = random.Random(num_visual).sample(range(num_visual), min(num_visual, 8))
    return sorted({0, num_visual, *some})


# Every method


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("name", REDUCERS)
def test_cuts_are_layers_behind_the_first_and_ascend(name: str, num_layers: int) -> None:
    cuts = REDUCERS[name](num_layers).cuts(num_layers)
    assert cuts == sorted(set(cuts))
    assert set(cuts) <= set(range(1, num_layers))


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("name", REDUCERS)
def test_a_budget_is_met_exactly_or_refused(name: str, num_layers: int) -> None:
    reducer = REDUCERS[name](num_layers)
    for num_visual in (0, 1, 2, 5, 16, 576):
        refused = []
        for num_keep in budgets(num_visual):
            try:
                counts = reducer.layer_counts(num_visual, num_keep, num_layers)
            except ValueError as error:
                assert f"a mean of {num_keep} of {num_visual} visual tokens" in str(error)
                refused.append(num_keep)
                continue
            assert sum(counts) == num_keep * num_layers
            assert_falling_from(num_visual, counts, reducer.cuts(num_layers))
            # Whatever is above a budget that can be reached can be reached.
            assert not refused or num_keep > max(refused)
        assert num_visual not in refused


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("name", REDUCERS)
def test_the_own_schedule_falls_too(name: str, num_layers: int) -> None:
    reducer = REDUCERS[name](num_layers)
    for num_visual in (0, 1, 2, 16, 100, 576):
        counts = reducer.layer_counts(num_visual, None, num_layers)
        assert_falling_from(num_visual, counts, reducer.cuts(num_layers))


def assert_falling_from(num_visual: int, counts: list[int], cuts: list[int]) -> None:
    """Counts are whole, never rise, and are all of them before the first cut."""
    before = cuts[0] if cuts else len(counts)
    assert all(isinstance(count, int) for count in counts)
    assert counts[:before] == [num_visual] * before
    assert all(0 <= later <= earlier for earlier, later in zip(counts, counts[1:], strict=False))


@pytest.mark.parametrize("name", [name for name in REDUCERS if name not in ("vtw", "depth, a line")])
def test_a_budget_is_refused_just_where_the_layers_before_the_first_cut_cost_more(name: str) -> None:
    reducer = REDUCERS[name](32)
    least = reducer.cuts(32)[0] * 64 / 32
    lowest = next(budget for budget in range(65) if budget >= least)
    reducer.layer_counts(64, lowest, 32)
    with pytest.raises(ValueError, match=f"cannot go below {least:.2f} \\({least / 64:.3f} of them\\)"):
        reducer.layer_counts(64, lowest - 1, 32)


# Exact counts


def test_exact_counts_give_what_rounding_loses_to_the_earliest_layers() -> None:
    assert exact_counts([16.0, 4.5, 4.5, 4.5, 4.5], 34) == [16, 5, 5, 4, 4]
    assert exact_counts([16.0, 7.25, 7.25, 2.75, 2.75], 36) == [16, 8, 8, 2, 2]
    assert exact_counts([3.0, 2.0, 1.0], 6) == [3, 2, 1]


def test_exact_counts_forgive_errors_of_rounding() -> None:
    assert exact_counts([16.0, 6.9999999999, 7.0000000001], 30) == [16, 7, 7]
    assert exact_counts([4.5, 4.5, 3.9999999999], 13) == [5, 4, 4]


def test_exact_counts_never_rise_and_stay_within_one_of_what_was_wanted() -> None:
    generator = random.Random(0)
    for _ in range(300):
        num_layers = generator.randint(2, 12)
        wanted = sorted((generator.uniform(0, 9) for _ in range(num_layers - 1)), reverse=True)
        total = int(sum(wanted)) + 1
        wanted = [total - sum(wanted), *wanted] if total - sum(wanted) >= wanted[0] else [wanted[0], *wanted]
        scale = int(sum(wanted)) / sum(wanted)
        wanted = [value * scale for value in wanted]
        counts = exact_counts(wanted, round(sum(wanted)))
        assert sum(counts) == round(sum(wanted))
        assert counts == sorted(counts, reverse=True)
        assert all(abs(count - value) < 1 + 1e-6 for count, value in zip(counts, wanted, strict=True))


def test_counts_that_cannot_add_up_are_a_bug_and_say_so() -> None:
    with pytest.raises(ArithmeticError, match="do not add up to 7"):
        exact_counts([3.0, 2.0], 7)


# Schedules


def test_a_family_of_schedules_is_turned_until_its_mean_is_right() -> None:
    # 10 + 10 (1 - s) + 10 (1 - s)^2 = 15 for 1 - s = (sqrt(3) - 1) / 2 = 0.366.
    counts = solved_counts("some", lambda s: [1.0, 1 - s, (1 - s) ** 2], 10, 5, 3, "ask for more.")
    assert counts == [10, 4, 1]


def test_layers_are_in_proportion_to_the_depth() -> None:
    assert [in_proportion(layer, 32) for layer in (1, 2, 15, 24)] == [1, 2, 15, 24]
    assert [in_proportion(layer, 8) for layer in (1, 2, 15, 24)] == [1, 1, 4, 6]
    assert [in_proportion(layer, 2) for layer in (1, 2, 15, 31)] == [1, 1, 1, 1]
    assert in_proportion(14, 28, of=28) == 14


def test_cuts_on_one_layer_act_one_after_another() -> None:
    assert shares_behind([1, 3, 3], [0.5, 0.25, 0.125], 5) == [1.0, 0.5, 0.5, 0.125, 0.125]
    assert distinct_cuts([1, 3, 3], 5) == [1, 3]
    assert distinct_cuts([1, 3, 3], 3) == [1]


def test_the_refusal_says_what_can_be_reached_and_what_to_do() -> None:
    message = str(unreachable("some", 64, 3, 4.0, "set a lower `layer`."))
    assert message == (
        "`token_budget` asks for a mean of 3 of 64 visual tokens over the decoder's layers, and 'some' cannot go "
        "below 4.00 (0.062 of them), because layers before its first cut see all; set a lower `layer`."
    )
