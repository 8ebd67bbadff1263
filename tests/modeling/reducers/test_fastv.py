"""FastV's promises: one cut, and behind it the visual tokens that the layer before looked at most."""

import pytest

from adavtp.modeling.reducers.fastv import FastVReducer
from tiny_decoder_views import deep_config, tiny_view


def visual_columns(view: object, row: int) -> list[int]:
    """The columns of a prompt's visual tokens."""
    return view.is_visual[row].nonzero()[:, 0].tolist()


def test_the_last_tokens_attention_in_the_layer_before_the_cut_ranks() -> None:
    view, attentions = tiny_view(cut=2)
    scores = FastVReducer(deep_config(3)).scores(view, 0)
    for row in range(2):
        for column in visual_columns(view, row):
            expected = sum(float(attentions[1][row, head, 12, column]) for head in range(4)) / 4
            assert float(scores[row, column]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_all_other_tokens_attention_ranks_if_asked(side: str) -> None:
    view, attentions = tiny_view(side=side)
    scores = FastVReducer(deep_config(3), rows="all").scores(view, 0)
    for row in range(2):
        real = view.is_real[row].nonzero()[:, 0].tolist()
        for column in visual_columns(view, row):
            others = [other for other in real if other != column]
            received = sum(float(attentions[0][row, :, other, column].mean()) for other in others)
            assert float(scores[row, column]) == pytest.approx(received / len(others), abs=1e-5)


def test_the_cut_lies_before_layer_2_of_32() -> None:
    assert FastVReducer(deep_config(32)).cuts(32) == [2]
    assert FastVReducer(deep_config(8)).cuts(8) == [1]
    assert FastVReducer(deep_config(8), layer=3).cuts(8) == [3]
    assert FastVReducer(deep_config(1)).cuts(1) == []


def test_the_own_rule_drops_the_ratio() -> None:
    assert FastVReducer(deep_config(4)).layer_counts(576, None, 4) == [576, 288, 288, 288]
    assert FastVReducer(deep_config(4), layer=2, ratio=0.75).layer_counts(576, None, 4) == [576, 576, 144, 144]
    assert FastVReducer(deep_config(2), ratio=0.9).layer_counts(100, None, 2) == [100, 10]


def test_a_budget_is_the_mean_over_all_layers() -> None:
    # 2 x 576 + 30 x left = 32 x mean: 166.4, 98.1 and 29.9 are left, published as 166, 98 and 30.
    for num_keep, left in ((192, 166), (128, 98), (64, 30)):
        counts = FastVReducer(deep_config(32)).layer_counts(576, num_keep, 32)
        assert set(counts[2:]) in ({left, left + 1}, {left, left - 1})
        assert sum(counts[2:]) == 32 * num_keep - 2 * 576
    assert FastVReducer(deep_config(4)).layer_counts(16, 7, 4) == [16, 4, 4, 4]
    assert FastVReducer(deep_config(4)).layer_counts(16, 8, 4) == [16, 6, 5, 5]
