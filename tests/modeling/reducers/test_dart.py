"""What DART promises: pivots by their keys, shares by dissimilarity, and exactly as many tokens as were asked for."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaModel

from adavtp import AdaVTPConfig
from adavtp.modeling.decoder.view import DecoderView
from adavtp.modeling.reducers.dart import DARTLayerReducer, DARTReducer
from tiny_features import places_of, tiny_features
from tiny_models import tiny_config, tiny_text_config

CONFIG = tiny_config()


def dart_by_definition(
    tokens: np.ndarray,
    norms: list[float],
    image: list[int],
    question: list[int],
    num_keep: int,
    image_pivots: int,
    text_pivots: int,
) -> list[int]:
    """The image tokens that stay, each cosine worked out alone; of equal ones the first."""

    def cosine(one: int, other: int) -> float:
        lengths = math.sqrt(sum(tokens[one] ** 2) * sum(tokens[other] ** 2))
        return sum(tokens[one] * tokens[other]) / lengths

    pivots = sorted(image, key=lambda column: (-norms[column], column))[: min(image_pivots, num_keep)]
    kept, rest = list(pivots), num_keep - len(pivots)
    pivots += sorted(question, key=lambda column: (-norms[column], column))[:text_pivots]
    for place, pivot in enumerate(pivots):
        share = rest // len(pivots) + int(place < rest % len(pivots))
        pool = [column for column in image if column not in kept]
        kept += sorted(pool, key=lambda column: (cosine(pivot, column), column))[:share]
    return sorted(kept)


# Between projector and decoder


@pytest.mark.parametrize("pivots", [None, 3, 40])
@pytest.mark.parametrize("num_keep", [1, 7, 8, 9, 24])
def test_dart_keeps_pivots_and_what_is_least_like_them_by_definition(num_keep: int, pivots: int | None) -> None:
    features = tiny_features(2, 24)
    keep = DARTReducer(CONFIG, **({} if pivots is None else {"pivots": pivots}))(
        features, torch.full((2,), num_keep)
    ).keep
    for row in range(2):
        keys = features.attention[1].keys[row].double().numpy()
        norms = [abs(keys[:, token]).sum() for token in range(24)]
        tokens = features.patches[row].double().numpy()
        expected = dart_by_definition(tokens, norms, list(range(24)), [], num_keep, pivots or 8, 0)
        assert keep[row].nonzero()[:, 0].tolist() == expected


def test_a_budget_below_the_pivots_keeps_the_largest_keys() -> None:
    features = tiny_features(1, 24)
    features.attention[1].keys = torch.ones(1, 4, 24, 8) * -torch.arange(24).remainder(7)[:, None]
    assert DARTReducer(CONFIG)(features, torch.tensor([4])).positions.tolist() == [[5, 6, 13, 20]]


# Inside the decoder


@cache
def decoder_config(num_layers: int = 4) -> AdaVTPConfig:
    return tiny_config(text_config=tiny_text_config(num_layers=num_layers))


def view_of(rows: list[str], dtype: torch.dtype = torch.float32, seed: int = 0) -> DecoderView:
    """
    A cut before layer 2 with random hidden states.

    Args:
        rows: a letter for each column: "-" padding, "s" system text, "v" visual, "q" text behind the image, "a" text
            behind the column that asks. A row's own states are the same however much padding is before it.
        dtype: of weights and states.
        seed: of the states.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = LlamaModel(tiny_text_config(num_layers=4)).to(dtype)
        for parameter in decoder.norm.parameters():
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    length = max(map(len, rows))
    states = torch.zeros(2, len(rows), length, 32)
    for row, letters in enumerate(rows):
        generator = torch.Generator().manual_seed(seed + row)
        first = len(letters) - len(letters.lstrip("-"))
        states[:, row, first : len(letters)] = torch.randn(2, len(letters) - first, 32, generator=generator)
    is_real = torch.tensor([[letter != "-" for letter in letters] for letters in rows])
    previous, current = states.to(dtype)
    return DecoderView(
        previous_layer=decoder.layers[1],
        next_layer=decoder.layers[2],
        norm=decoder.norm,
        previous_hidden_states=previous,
        hidden_states=current,
        position_embeddings=decoder.rotary_emb(current, is_real.long().cumsum(dim=-1) - 1),
        is_real=is_real,
        is_visual=torch.tensor([[letter == "v" for letter in letters] for letters in rows]),
        last=torch.tensor([max(map(letters.rfind, "svq")) for letters in rows]),
    )


def key_norms_by_definition(view: DecoderView, row: int) -> list[float]:
    """L1 norms of keys with the rotary positions turned in, pair by pair."""
    layer = view.previous_layer
    position, norms = -1, []
    for state, is_real in zip(view.previous_hidden_states[row].double(), view.is_real[row], strict=True):
        position += int(is_real)
        scaled = state / math.sqrt(float((state**2).mean()) + layer.input_layernorm.variance_epsilon)
        key = layer.self_attn.k_proj.weight.double() @ (scaled * layer.input_layernorm.weight.double())
        total = 0.0
        for head in key.reshape(2, 8).tolist():
            for pair in range(4):
                angle = position * 10_000.0 ** (-pair / 4)
                one, other = head[pair], head[pair + 4]
                total += abs(one * math.cos(angle) - other * math.sin(angle))
                total += abs(other * math.cos(angle) + one * math.sin(angle))
        norms.append(total)
    return norms


@torch.no_grad()
def reduced(view: DecoderView, num_keep: list[int], **parameters: Any) -> torch.Tensor:
    reducer = DARTLayerReducer(decoder_config(), **parameters)
    return reducer.reduce(view, reducer.scores(view, 0), torch.tensor(num_keep))[0]


@pytest.mark.parametrize("parameters", [{}, {"image_pivots": 1, "text_pivots": 2}, {"text_pivots": 0}])
@torch.no_grad()
def test_dart_layer_chooses_by_definition(parameters: dict[str, int]) -> None:
    rows = ["--sss" + 20 * "v" + "qqqqqqq", "ssvvvvvsvvv" + 12 * "v" + "qqqqqqqaa", 10 * "-" + 20 * "v" + "qq"]
    rows += [20 * "v" + "q" + 11 * "a", 20 * "v" + 12 * "a"]
    view = view_of(rows)
    tokens = view.norm(view.hidden_states).double().numpy()
    pivots = ({"image_pivots": 4, "text_pivots": 4} | parameters).values()
    norms = [key_norms_by_definition(view, row) for row in range(5)]
    for num_keep in (0, 1, 3, 4, 5, 12, 19, 20):
        kept = places_of(reduced(view, [num_keep] * 5, **parameters))
        for row, letters in enumerate(rows):
            image, question = ([c for c, letter in enumerate(letters) if letter == kind] for kind in "vq")
            expected = dart_by_definition(tokens[row], norms[row], image, question, num_keep, *pivots)
            others = [column for column, letter in enumerate(letters) if letter != "v"]
            assert kept[row] == sorted(expected + others)


def test_rows_with_fewer_visual_tokens_than_asked_for_keep_all_of_them() -> None:
    view = view_of(["s" + 10 * "v" + "qqq", "s" + 4 * "v" + 9 * "q", 14 * "s"])
    assert reduced(view, [6, 6, 6]).sum(dim=-1).tolist() == [10, 14, 14]


def test_text_pivots_change_the_choice_and_only_the_question_has_them() -> None:
    view = view_of(["sssss" + 30 * "v" + "qqqqq"])
    without = reduced(view, [12], text_pivots=0)
    assert not torch.equal(reduced(view, [12]), without)
    no_question = view_of(["sssss" + 30 * "v"])
    assert torch.equal(reduced(no_question, [12]), reduced(no_question, [12], text_pivots=0))


def test_equal_columns_go_in_the_order_of_the_image() -> None:
    view = view_of(["ss" + 10 * "v" + "qqq"])
    view.hidden_states = torch.ones_like(view.hidden_states)
    view.previous_hidden_states = torch.ones_like(view.hidden_states)
    cos, sin = view.position_embeddings
    view.position_embeddings = (torch.ones_like(cos), torch.zeros_like(sin))
    for num_keep in range(11):
        keep = reduced(view, [num_keep])
        assert keep[0, 2:12].tolist() == [True] * num_keep + [False] * (10 - num_keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dart_layer_keeps_exactly_k_of_every_row_and_the_same_as_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    rows, num_keep = [], []
    for _ in range(12):
        system, visual, question = torch.randint(0, 20, (3,), generator=generator).tolist()
        rows.append("s" + system * "s" + visual * "v" + question * "q")
        num_keep.append(int(torch.randint(0, visual + 1, (1,), generator=generator)))
    padded = [row.rjust(max(map(len, rows)), "-") for row in rows]
    keep = reduced(view_of(padded, dtype), num_keep)
    for row, letters in enumerate(rows):
        own = keep[row, -len(letters) :]
        assert own.sum() == num_keep[row] + letters.count("s") + letters.count("q")
        assert keep[row].sum() - own.sum() == len(padded[row]) - len(letters)
        assert torch.equal(reduced(view_of([letters], dtype, seed=row), num_keep[row : row + 1])[0], own)


def test_the_cut_is_before_layer_2_of_32_in_proportion_or_where_one_says() -> None:
    reducer = DARTLayerReducer(decoder_config())
    assert [reducer.cuts(layers) for layers in (4, 16, 24, 32, 40, 64)] == [[1], [1], [2], [2], [2], [4]]
    assert DARTLayerReducer(decoder_config(), layer=3).cuts(4) == [3]


def test_its_own_schedule_is_128_tokens_from_the_cut_on() -> None:
    assert DARTLayerReducer(decoder_config()).layer_counts(576, None, 32) == [576] * 2 + [128] * 30
    assert DARTLayerReducer(decoder_config(), layer=3, keep=5).layer_counts(16, None, 4) == [16, 16, 16, 5]
    assert DARTLayerReducer(decoder_config()).layer_counts(16, None, 4) == [16] * 4
