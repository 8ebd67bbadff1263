"""Depth-based pruning's promises: a step, then a line, by the formula of the notes."""

import pytest
import torch

from adavtp.modeling.reducers.depth import DepthReducer
from tiny_decoder_views import deep_config, tiny_view


def formula(layer: int, num_layers: int, first: int, step: float, slope: float) -> float:
    """1 - H(l - first) P - H(l - first) R'(l), held in [0, 1]."""
    heaviside = 1 if layer >= first else 0
    further = slope * (layer - first) / (num_layers - 1 - first)
    return min(1.0, max(0.0, 1 - heaviside * step - heaviside * further))


@pytest.mark.parametrize(("step", "slope"), [(0.25, 0.5), (0.0, 1.0), (0.5, 0.0), (0.5, 1.0)])
def test_the_own_rule_is_the_formula(step: float, slope: float) -> None:
    counts = DepthReducer(deep_config(32), first_drop=step, further_drop=slope).layer_counts(1000, None, 32)
    for layer, count in enumerate(counts):
        assert count == pytest.approx(1000 * formula(layer, 32, 4, step, slope), abs=0.5 + 1e-6)


def test_layer_4_is_the_first_that_sees_fewer() -> None:
    counts = DepthReducer(deep_config(32)).layer_counts(576, None, 32)
    assert counts[3:5] == [576, 432]
    assert counts[-1] == 144
    assert sum(counts) / 32 / 576 == pytest.approx(0.5625, abs=0.001)


def test_a_budget_scales_both_terms_by_one_factor() -> None:
    # Six layers, the first cut before layer 1: drops 1/4, 3/8, 1/2, 5/8, 3/4 in the own rule, 2.5 together.
    reducer = DepthReducer(deep_config(6), layer=1)
    assert reducer.layer_counts(96, 56, 6) == [96, 72, 60, 48, 36, 24]
    # Half of the drops: 1.25 of 6 together.
    assert reducer.layer_counts(96, 76, 6) == [96, 84, 78, 72, 66, 60]
    # 1.5 times: 3/8, 9/16, 3/4, 15/16, and the last, 9/8, is held at all: 3.625 together.
    assert reducer.layer_counts(96, 38, 6) == [96, 60, 42, 24, 6, 0]


def test_tokens_are_scored_anew_at_the_first_cut_and_at_each_quarter() -> None:
    assert DepthReducer(deep_config(32)).cuts(32) == [4, 8, 16, 24]
    assert DepthReducer(deep_config(32), layer=12).cuts(32) == [12, 16, 24]
    assert DepthReducer(deep_config(8)).cuts(8) == [1, 2, 4, 6]
    assert DepthReducer(deep_config(2)).cuts(2) == [1]
    assert DepthReducer(deep_config(1)).cuts(1) == []


def test_the_last_tokens_attention_in_the_layer_before_the_cut_ranks() -> None:
    view, attentions = tiny_view(cut=2)
    scores = DepthReducer(deep_config(3)).scores(view, 0)
    expected = attentions[1][:, :, 12].mean(dim=1)
    assert torch.allclose(scores, expected, atol=1e-5)


def test_a_line_alone_leaves_its_first_layer_whole() -> None:
    reducer = DepthReducer(deep_config(4), layer=1, first_drop=0.0, further_drop=1.0)
    assert reducer.layer_counts(8, 4, 4) == [8, 8, 0, 0]
    with pytest.raises(ValueError, match="or a `first_drop` above 0"):
        reducer.layer_counts(8, 3, 4)


def test_a_schedule_that_drops_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="`first_drop` and `further_drop` are 0"):
        DepthReducer(deep_config(8), first_drop=0.0, further_drop=0.0)
