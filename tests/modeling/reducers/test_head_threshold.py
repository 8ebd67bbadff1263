"""Head threshold's promises: heads vote with equal weight, and a percentile says how many stay."""

import numpy as np
import pytest
import torch

from adavtp.modeling.reducers.head_threshold import HeadThresholdReducer
from tiny_decoder_views import deep_config, tiny_view


def importance(attention: torch.Tensor, is_visual: torch.Tensor) -> list[float]:
    """Of the last row `[heads, n]`: each head's share of what it gives visual tokens, mean over heads."""
    columns = is_visual.nonzero()[:, 0].tolist()
    shares = []
    for column in columns:
        votes = [float(head[column]) / sum(float(head[other]) for other in columns) for head in attention]
        shares.append(sum(votes) / len(votes))
    return shares


@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_every_head_votes_with_the_same_weight(text: str) -> None:
    view, attentions = tiny_view(text=text)
    scores = HeadThresholdReducer(deep_config(3)).scores(view, 0)
    for row in range(2):
        expected = importance(attentions[0][row, :, 12], view.is_visual[row])
        assert scores[row, view.is_visual[row]].tolist() == pytest.approx(expected, abs=1e-5)
        assert sum(expected) == pytest.approx(1.0, abs=1e-4)
    assert (scores[~view.is_visual] == 0).all()


def test_a_head_that_hardly_looks_at_the_image_counts_as_much() -> None:
    view, attentions = tiny_view()
    mean = attentions[0][0, :, 12].mean(dim=0)[view.is_visual[0]]
    scores = HeadThresholdReducer(deep_config(3)).scores(view, 0)[0, view.is_visual[0]]
    assert not torch.allclose(scores, mean / mean.sum(), atol=1e-3)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 33.3, 50.0, 75.0, 99.0, 100.0])
def test_as_many_stay_as_lie_above_the_percentile(percentile: float) -> None:
    reducer = HeadThresholdReducer(deep_config(2), percentile=percentile)
    for num_tokens in (1, 2, 3, 16, 17, 576):
        values = np.random.default_rng(num_tokens).permutation(num_tokens).astype(float)
        above = int((values > np.percentile(values, percentile)).sum())
        assert reducer.layer_counts(num_tokens, None, 2) == [num_tokens, above]


def test_what_stays_is_what_lies_above_the_percentile() -> None:
    view, attentions = tiny_view()
    reducer = HeadThresholdReducer(deep_config(3))
    counts = [reducer.layer_counts(num_visual, None, 3)[1] for num_visual in (6, 5)]
    stays, _ = reducer.reduce(view, reducer.scores(view, 0), torch.tensor(counts))
    for row in range(2):
        shares = np.array(importance(attentions[0][row, :, 12], view.is_visual[row]))
        assert stays[row, view.is_visual[row]].tolist() == (shares > np.percentile(shares, 50)).tolist()


def test_a_budget_is_the_mean_over_all_layers() -> None:
    assert HeadThresholdReducer(deep_config(32)).cuts(32) == [2]
    assert HeadThresholdReducer(deep_config(4), layer=2).layer_counts(16, 10, 4) == [16, 16, 4, 4]
    assert HeadThresholdReducer(deep_config(1)).cuts(1) == []
