"""PyramidDrop's promises: stages of equal depth, each half the tokens of the one before, ranked by the layer ahead."""

import pytest
import torch

from adavtp.modeling.reducers.pyramiddrop import PyramidDropReducer
from tiny_decoder_views import deep_config, tiny_view, without_columns


@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_the_layer_behind_the_cut_ranks(text: str) -> None:
    view, attentions = tiny_view(cut=1, text=text)
    scores = PyramidDropReducer(deep_config(3)).scores(view, 0)
    for row in range(2):
        for column in view.is_visual[row].nonzero()[:, 0].tolist():
            expected = sum(float(attentions[1][row, head, 12, column]) for head in range(4)) / 4
            assert float(scores[row, column]) == pytest.approx(expected, abs=1e-5)


def test_a_second_cut_asks_with_what_is_left() -> None:
    view, _ = tiny_view(cut=2, rows=[0])
    reducer = PyramidDropReducer(deep_config(4))
    stays, _ = reducer.reduce(view, reducer.scores(view, 0), torch.tensor([3]))
    left = without_columns(view, stays)
    assert left.is_visual.sum() == 3
    stays, _ = reducer.reduce(left, reducer.scores(left, 1), torch.tensor([1]))
    weights = view.attention_rows(view.last[:, None], "next")[0, :, 0].mean(dim=0)
    # Fewer columns share the softmax, which changes no order within a head; here, nor of the best by the mean.
    best = max(view.is_visual[0].nonzero()[:, 0].tolist(), key=lambda column: float(weights[column]))
    assert left.hidden_states[0, stays[0] & left.is_visual[0]].equal(view.hidden_states[0, [best]])


def test_the_own_rule_halves_the_tokens_at_each_quarter() -> None:
    reducer = PyramidDropReducer(deep_config(32))
    assert reducer.cuts(32) == [8, 16, 24]
    assert reducer.layer_counts(576, None, 32) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert PyramidDropReducer(deep_config(4)).layer_counts(17, None, 4) == [17, 8, 4, 2]


def test_layers_and_ratios_may_be_said() -> None:
    reducer = PyramidDropReducer(deep_config(8), layers=[2, 5], ratios=[0.29, 0.1])
    assert reducer.cuts(8) == [2, 5]
    assert reducer.layer_counts(100, None, 8) == [100, 100, 29, 29, 29, 10, 10, 10]


def test_in_a_shallow_decoder_cuts_fall_together() -> None:
    reducer = PyramidDropReducer(deep_config(3))
    assert reducer.cuts(3) == [1, 2]
    assert reducer.layer_counts(64, None, 3) == [64, 32, 8]
    assert PyramidDropReducer(deep_config(2)).layer_counts(64, None, 2) == [64, 8]
    assert PyramidDropReducer(deep_config(1)).cuts(1) == []


def test_a_budget_is_reached_by_a_common_factor_from_stage_to_stage() -> None:
    # 1 + 1/2 + 1/4 + 1/8 = 15/8: with the published factor four stages have a mean of 30 of 64 tokens.
    reducer = PyramidDropReducer(deep_config(4))
    assert reducer.layer_counts(64, 30, 4) == [64, 32, 16, 8]
    # 1 + 1/4 + 1/16 + 1/64 = 85/64.
    assert reducer.layer_counts(192, 64, 4)[:2] == [192, 49]  # 48.6
    assert reducer.layer_counts(256, 85, 4) == [256, 64, 16, 4]
    # 1 + 3/4 + 9/16 + 27/64 = 175/64.
    assert reducer.layer_counts(256, 175, 4) == [256, 192, 144, 108]


def test_stages_weigh_as_much_as_they_have_layers() -> None:
    # 2 + 3/2 + 1/4 of 8 layers... 2 layers see all, 3 half and 3 a quarter: 4.25 of 8.
    reducer = PyramidDropReducer(deep_config(8), layers=[2, 5], ratios=[0.5, 0.25])
    assert reducer.layer_counts(64, 34, 8) == [64, 64, 32, 32, 32, 16, 16, 16]


def test_a_budget_keeps_the_shape_that_other_ratios_have() -> None:
    # Shares r^t: with t = 2, 0.8 and 0.4 become 0.64 and 0.16; a mean of 1 + 0.64 + 0.16 over three layers.
    reducer = PyramidDropReducer(deep_config(3), layers=[1, 2], ratios=[0.8, 0.4])
    assert reducer.layer_counts(300, 180, 3) == [300, 192, 48]


@pytest.mark.parametrize("layer", [0, 8])
def test_a_layer_before_which_nothing_can_leave_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"`layers` is {layer}; allowed are whole numbers from 1 to 7"):
        PyramidDropReducer(deep_config(8), layers=sorted([layer, 1, 2]))
