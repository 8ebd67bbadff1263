"""What PriorTR promises: visual tokens rank by what the question's attention says beyond that of the column before."""

import math

import pytest

from adavtp.modeling.reducers.priortr import PriorTRReducer
from tiny_decoder_views import deep_config, tiny_view


def normalised(values: list[float]) -> list[float]:
    return [value / (sum(values) + 1e-10) for value in values]


@pytest.mark.parametrize("rows", ["question", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_token_is_worth_its_part_of_what_the_question_says_beyond_the_prior(side: str, rows: str) -> None:
    # In the second prompt an image stands before the other; the prior is the column behind both.
    view, attentions = tiny_view(cut=2, prompts=("...######....", ".##.####.."), side=side)
    scores = PriorTRReducer(deep_config(3), rows=rows).scores(view, 0)
    for row in range(2):
        attention = attentions[1][row].double().mean(dim=0)
        visual, real = (marked[row].nonzero()[:, 0].tolist() for marked in (view.is_visual, view.is_real))
        behind = [column for column in real if column > visual[-1]]
        assert len(behind) == (4, 2)[row]
        asking = behind if rows == "question" else behind[-1:]
        asked = normalised([sum(float(attention[a, v]) for a in asking) / len(asking) for v in visual])
        prior = normalised([float(attention[behind[0], v]) for v in visual])
        for column, p, q in zip(visual, asked, prior, strict=True):
            expected = p * math.log((p + 1e-10) / (q + 1e-10))
            assert float(scores[row, column]) == pytest.approx(expected, abs=1e-6)


def test_what_is_seen_anyway_is_worth_nothing() -> None:
    # One word behind the image is the question and the prior.
    view, _ = tiny_view(prompts=("..######.",))
    scores = PriorTRReducer(deep_config(3)).scores(view, 0)
    assert scores[view.is_visual].abs().max() < 1e-6


def test_the_published_cut_is_before_layer_3_and_leaves_192() -> None:
    reducer = PriorTRReducer(deep_config(32))
    assert reducer.layer_counts(576, None, 32) == [576] * 3 + [192] * 29
    assert PriorTRReducer(deep_config(32), keep=64).layer_counts(50, None, 32) == [50] * 32
