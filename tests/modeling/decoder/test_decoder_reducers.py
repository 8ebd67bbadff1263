"""What reducers inside the decoder are shown: any rows of a layer's attention, as the stock model computes them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adavtp.modeling.decoder import view as decoder_views
from adavtp.modeling.decoder.reducer import DecoderReducer, best_visual, require_layer
from adavtp.modeling.decoder.view import AttentionRows, attention_of_last, marked_columns
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
from tiny_decoder_views import PROMPTS, deep_config, tiny_view, view_of, without_columns

REDUCERS = {
    "fastv": lambda: FastVReducer(deep_config(3)),
    "fastv, all rows": lambda: FastVReducer(deep_config(3), rows="all"),
    "vtw": lambda: VTWReducer(deep_config(3)),
    "pyramiddrop": lambda: PyramidDropReducer(deep_config(3)),
    "sparsevlm": lambda: SparseVLMReducer(deep_config(3)),
    "sparsevlm, official order": lambda: SparseVLMReducer(deep_config(3), order="official"),
    "sparsevlm v2": lambda: SparseVLMReducer(deep_config(3), version="v2", num_heads=2),
    "depth": lambda: DepthReducer(deep_config(3)),
    "head_threshold": lambda: HeadThresholdReducer(deep_config(3)),
    "aim_prune": lambda: AimPrune(deep_config(3)),
    "autoprune": lambda: AutoPruneReducer(deep_config(3)),
    "apet_layer": lambda: ApETLayerReducer(deep_config(3), basis=2),
    "priortr": lambda: PriorTRReducer(deep_config(3)),
    "random_layer": lambda: RandomLayerReducer(deep_config(3)).eval(),
}
LAYERS = {"previous": 0, "next": 1}


# Rows of attention


@pytest.mark.parametrize("of", ["previous", "next"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2", "qwen3"])
def test_rows_of_attention_are_those_of_the_stock_model(text: str, side: str, of: str) -> None:
    view, attentions = tiny_view(text=text, side=side)
    rows = torch.tensor([[5, 12, 7], [4, 9, 4]])
    expected = torch.stack([attentions[LAYERS[of]][row, :, rows[row]] for row in range(2)])
    assert torch.allclose(view.attention_rows(rows, of), expected, atol=1e-5)
    assert expected.max() > 0.2  # not all the same


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen3", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": False}),
    ],
    ids=["mistral", "qwen3", "qwen3, second layer only", "qwen2, switched off"],
)
def test_a_row_sees_no_further_back_than_its_layers_window(text: str, fields: dict) -> None:
    view, attentions = tiny_view(text=text, **fields)
    rows = torch.tensor([[5, 12], [6, 9]])
    for of, layer in LAYERS.items():
        expected = torch.stack([attentions[layer][row, :, rows[row]] for row in range(2)])
        assert torch.allclose(view.attention_rows(rows, of), expected, atol=1e-5)


def test_a_cut_behind_another_sees_what_is_left() -> None:
    view, _ = tiny_view(rows=[0])
    keep = torch.ones(1, 13, dtype=torch.bool)
    keep[0, [4, 6, 7]] = False
    logits = view.attention_logits(view.last[:, None], "next")
    left = without_columns(view, keep).attention_logits(torch.tensor([[9]]), "next")
    assert torch.allclose(left, logits[..., keep[0]], atol=1e-5)


def test_logits_are_minus_infinity_out_of_sight() -> None:
    view, _ = tiny_view()
    logits = view.attention_logits(torch.tensor([[4], [6]]), "previous")
    assert logits.isneginf()[0, :, 0].tolist() == [[column > 4 for column in range(13)]] * 4
    assert logits.isneginf()[1, :, 0].tolist() == [[column < 3 or column > 6 for column in range(13)]] * 4


def test_a_row_of_padding_attends_to_nothing() -> None:
    view, _ = tiny_view()
    assert (view.attention_rows(torch.tensor([[0], [2]]), "previous")[1] == 0).all()


def test_the_last_column_is_read_as_the_mean_over_heads() -> None:
    view, attentions = tiny_view(side="right")
    for of, layer in LAYERS.items():
        row = attention_of_last(view, of)
        assert torch.allclose(row[0], attentions[layer][0, :, 12].mean(dim=0), atol=1e-5)
        assert torch.allclose(row[1], attentions[layer][1, :, 9].mean(dim=0), atol=1e-5)


def test_a_layer_without_projections_is_refused() -> None:
    view, _ = tiny_view()
    view.previous_layer = SimpleNamespace(self_attn=nn.Linear(2, 2), input_layernorm=nn.Identity())
    with pytest.raises(ValueError, match="Linear has no q_proj, whose rows this reducer reads; use a decoder of the"):
        view.attention_rows(view.last[:, None], "previous")


@pytest.mark.parametrize("from_others", [False, True])
def test_what_columns_receive_is_a_weighted_sum_of_rows(monkeypatch: pytest.MonkeyPatch, from_others: bool) -> None:
    monkeypatch.setattr(decoder_views, "_ROWS_AT_ONCE", 2)
    view, attentions = tiny_view()
    rows = torch.tensor([[12, 5, 8, 3, 9], [4, 10, 12, 6, 7]])
    weights = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    received = view.attention(rows, "previous").received(weights, from_others=from_others)
    for row in range(2):
        for head in range(4):
            for column in range(13):
                expected = sum(
                    float(weights[row, head, i]) * float(attentions[0][row, head, source, column])
                    for i, source in enumerate(rows[row].tolist())
                    if not (from_others and source == column)
                )
                assert float(received[row, head, column]) == pytest.approx(expected, abs=1e-5)


def test_a_temperature_divides_the_logits() -> None:
    view, _ = tiny_view()
    rows = view.last[:, None]
    sharp = view.attention(rows, "previous").received(torch.ones(2, 1, 1), temperature=0.5)
    assert torch.allclose(sharp, (view.attention_logits(rows, "previous") * 2).softmax(dim=-1)[:, :, 0], atol=1e-6)


def test_no_more_rows_than_a_block_are_in_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_views, "_ROWS_AT_ONCE", 4)
    shapes, logits = [], AttentionRows.logits

    def watched(self: AttentionRows, *part: slice) -> torch.Tensor:
        shapes.append(logits(self, *part).shape)
        return logits(self, *part)

    monkeypatch.setattr(AttentionRows, "logits", watched)
    for reducer in REDUCERS.values():
        reducer().scores(tiny_view()[0], 0)
    assert max(shape[2] for shape in shapes) == 4


# Columns


def test_the_question_is_the_text_behind_the_last_visual_token() -> None:
    view, _ = tiny_view(prompts=("..##.##...", ".#..", "...."))
    assert ["".join("?" if column else "." for column in row) for row in view.is_question.tolist()] == [
        ".......???",
        "........??",
        "......????",
    ]
    view.last = view.last - 1
    assert view.is_question.sum(dim=-1).tolist() == [2, 1, 3]


def test_of_equal_scores_the_earlier_visual_token_stays_and_text_always_does() -> None:
    is_visual = torch.tensor([[False, True, True, False, True, True]] * 4)
    scores = torch.tensor([[9.0, 1.0, 2.0, 9.0, 2.0, 1.0]] * 4)
    stays = best_visual(is_visual, scores, torch.tensor([0, 1, 3, 4]))
    assert stays.long().tolist() == [[1, 0, 0, 1, 0, 0], [1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]


def test_a_visual_token_of_no_worth_still_counts() -> None:
    is_visual = torch.tensor([[False, True, True, True]])
    scores = torch.tensor([[0.0, -torch.inf, -torch.inf, 0.0]])
    assert best_visual(is_visual, scores, torch.tensor([2])).tolist() == [[True, True, False, True]]


def test_marked_columns_come_side_by_side() -> None:
    marked = torch.tensor([[False, True, False, True, True], [False, False, True, False, False]])
    index, is_there = marked_columns(marked)
    assert index[0].tolist() == [1, 3, 4]
    assert index[1, 0] == 2
    assert is_there.tolist() == [[True, True, True], [True, False, False]]


# All reducers inside the decoder


def scored_and_reduced(
    name: str, num_keep: list[int], **how: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, columns that stay and hidden states of a reducer's first cut."""
    view, _ = tiny_view(**how)
    reducer = REDUCERS[name]()
    scores = reducer.scores(view, 0)
    return scores, *reducer.reduce(view, scores, torch.tensor(num_keep))


@pytest.mark.parametrize("name", REDUCERS)
def test_a_prompt_is_reduced_alone_as_in_a_batch(name: str) -> None:
    scores, stays, hidden_states = scored_and_reduced(name, [4, 3])
    for row, num_keep in enumerate([4, 3]):
        alone = scored_and_reduced(name, [num_keep], rows=[row])
        start = 13 - len(PROMPTS[row])
        is_visual = tiny_view()[0].is_visual[row, start:]
        assert torch.allclose(alone[0][0][is_visual], scores[row, start:][is_visual], atol=1e-6)
        assert torch.equal(alone[1][0], stays[row, start:])
        assert torch.allclose(alone[2][0], hidden_states[row, start:], atol=1e-5)


@pytest.mark.parametrize("name", REDUCERS)
def test_padding_on_the_right_changes_nothing(name: str) -> None:
    _, left, _ = scored_and_reduced(name, [2, 3])
    _, right, _ = scored_and_reduced(name, [2, 3], side="right")
    assert torch.equal(left[0], right[0])
    assert torch.equal(left[1, 3:], right[1, :10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REDUCERS)
def test_exactly_as_many_visual_tokens_stay_as_are_asked_for(name: str, dtype: torch.dtype) -> None:
    view, _ = tiny_view(dtype=dtype)
    for num_keep in [[0, 0], [1, 1], [2, 4], [3, 3], [5, 2], [6, 5]]:
        scores, stays, hidden_states = scored_and_reduced(name, num_keep, dtype=dtype)
        assert (stays & view.is_visual).sum(dim=-1).tolist() == num_keep
        assert stays[~view.is_visual].all()
        assert hidden_states.dtype == dtype
        assert scores.dtype == torch.float32
        if num_keep == [6, 5]:
            assert torch.equal(hidden_states, view.hidden_states)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_prompt_without_images_may_be_in_the_batch(name: str) -> None:
    prompts = ("..####...", "....")
    scores, stays, hidden_states = scored_and_reduced(name, [2, 0], prompts=prompts)
    alone = scored_and_reduced(name, [2], prompts=prompts, rows=[0])
    assert stays[1].all()
    assert torch.equal(stays[0], alone[1][0])
    assert hidden_states.isfinite().all()


@pytest.mark.parametrize("name", REDUCERS)
def test_an_image_may_end_the_prompt(name: str) -> None:
    view, _ = tiny_view(prompts=("..######",))
    _, stays, hidden_states = scored_and_reduced(name, [3], prompts=("..######",))
    assert (stays & view.is_visual).sum() == 3
    assert hidden_states.isfinite().all()


# What a subclass has to write, and what it may check


def test_a_reducer_says_what_it_lacks() -> None:
    reducer = DecoderReducer(deep_config(2))
    for call in (
        lambda: reducer.cuts(2),
        lambda: reducer.layer_counts(1, 1, 2),
        lambda: reducer.scores(None, 0),
    ):
        with pytest.raises(NotImplementedError, match="DecoderReducer has to define"):
            call()


def test_a_reducer_that_only_scores_leaves_hidden_states_alone() -> None:
    view = view_of(torch.randn(1, 4, 2), torch.tensor([[False, True, True, True]]))
    stays, hidden_states = DecoderReducer(deep_config(2)).reduce(
        view, torch.tensor([[0.0, 1.0, 3.0, 2.0]]), torch.tensor([2])
    )
    assert stays.tolist() == [[True, False, True, True]]
    assert hidden_states is view.hidden_states


@pytest.mark.parametrize("layer", [0, 4, -1, 1.5, True, "2"])
def test_a_layer_before_which_nothing_can_leave_is_refused(layer: object) -> None:
    with pytest.raises(ValueError, match=r"`layer` is .*; allowed are whole numbers from 1 to 3"):
        require_layer("layer", layer, deep_config(4))
