"""SparseVLM's promises: words that have to do with the image rate its tokens; the best of what leaves is recycled."""

import math
from decimal import Decimal

import pytest
import torch

from adavtp.modeling.decoder.view import DecoderView
from adavtp.modeling.reducers.sparsevlm import SparseVLMReducer, density_peaks, gravity, text_raters
from tiny_decoder_views import deep_config, tiny_view, view_of, without_columns


def columns(mask: torch.Tensor) -> list[int]:
    """The columns that are marked in `[n]`."""
    return mask.nonzero()[:, 0].tolist()


def raters_of(view: DecoderView, row: int) -> list[int]:
    """The definition: words whose mean softmax over words of h_v . h_q, over visual tokens, is above the mean."""
    embeds, words = view.inputs_embeds[row].double(), columns(view.is_question[row])
    ratings = dict.fromkeys(words, 0.0)
    for token in columns(view.is_visual[row]):
        affinities = [math.exp(float(embeds[token] @ embeds[word])) for word in words]
        for word, affinity in zip(words, affinities, strict=True):
            ratings[word] += affinity / sum(affinities) / int(view.is_visual[row].sum())
    return [word for word in words if ratings[word] > sum(ratings.values()) / len(words)]


# Raters


@pytest.mark.parametrize("seed", range(4))
def test_raters_are_the_words_nearest_to_the_image(seed: int) -> None:
    view, _ = tiny_view(prompts=("...######......", "..#####.#...."), seed=seed)
    raters = text_raters(view)
    for row in range(2):
        assert columns(raters[row]) == raters_of(view, row)
        assert 0 < raters[row].sum() < view.is_question[row].sum()


def test_words_before_the_image_are_no_raters() -> None:
    view, _ = tiny_view(prompts=("........##..",))
    view.inputs_embeds = view.inputs_embeds.clone()
    view.inputs_embeds[0, 3] = 9 * view.inputs_embeds[0, 8]
    assert set(columns(text_raters(view)[0])) <= {10, 11}


def test_where_no_word_stands_out_all_rate_and_where_there_is_none_the_last_token() -> None:
    view, _ = tiny_view(prompts=("...###.", "..####", ".##...", "......"))
    view.inputs_embeds = view.inputs_embeds.clone()
    view.inputs_embeds[2, 4:] = 0.0
    raters = text_raters(view)
    assert [columns(row) for row in raters[:3]] == [[6], [6], [4, 5, 6]]
    assert columns(raters[3])


def test_raters_are_chosen_once() -> None:
    view, _ = tiny_view(rows=[0], prompts=("...######......",))
    reducer = SparseVLMReducer(deep_config(4))
    stays, _ = reducer.reduce(view, reducer.scores(view, 0), torch.tensor([2]))
    left = without_columns(view, stays)
    left.inputs_embeds = None
    expected = left.attention_rows(torch.tensor([[column - 4 for column in raters_of(view, 0)]]), "previous")
    assert torch.allclose(reducer.scores(left, 1), expected.mean(dim=(1, 2)), atol=1e-6)


# Scores


def test_version_1_ranks_by_the_mean_over_raters_and_heads() -> None:
    view, attentions = tiny_view(cut=2)
    scores = SparseVLMReducer(deep_config(3)).scores(view, 0)
    for row in range(2):
        raters = raters_of(view, row)
        for column in columns(view.is_visual[row]):
            seen = [float(attentions[1][row, head, rater, column]) for head in range(4) for rater in raters]
            assert float(scores[row, column]) == pytest.approx(sum(seen) / len(seen), abs=1e-5)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 14])
def test_version_2_divides_by_gravity_and_takes_the_heads_that_look_at_the_image(num_heads: int) -> None:
    view, attentions = tiny_view(prompts=("...######....", "..#####..."), side="right")
    scores = SparseVLMReducer(deep_config(3), version="v2", num_heads=num_heads).scores(view, 0)
    for row in range(2):
        raters, visual = raters_of(view, row), columns(view.is_visual[row])
        heads = []
        for head in range(4):
            seen = [
                sum(float(attentions[0][row, head, rater, column]) / pull(rater - column, 8) for rater in raters)
                / len(raters)
                for column in visual
            ]
            heads.append(seen)
        best = sorted(heads, key=lambda seen: -sum(seen))[:num_heads]
        expected = [sum(seen) / len(best) for seen in zip(*best, strict=True)]
        assert scores[row, visual].tolist() == pytest.approx(expected, abs=1e-5)


def pull(distance: int, head_dim: int) -> float:
    """The logit of ones with ones so far apart: sum_f 2 cos(distance / 10000^(2 f / d)) / sqrt(d)."""
    return sum(2 * math.cos(distance / 10000 ** (2 * f / head_dim)) for f in range(head_dim // 2)) / math.sqrt(
        head_dim
    )


def test_gravity_is_what_is_published_for_a_head_of_128() -> None:
    angles = torch.arange(586)[:, None] / 10000 ** (torch.arange(0, 128, 2) / 128)
    angles = torch.cat([angles, angles], dim=-1)[None]
    view = view_of(torch.zeros(1, 586, 2), torch.ones(1, 586, dtype=torch.bool))
    view.position_embeddings = (angles.cos(), angles.sin())
    row = gravity(view, torch.tensor([[585]]))[0, 0]
    assert float(row[585]) == pytest.approx(11.3, abs=0.05)
    assert float(row[0]) == pytest.approx(2.5, abs=0.05)
    for column in (0, 100, 500, 584):
        assert float(row[column]) == pytest.approx(pull(585 - column, 128), abs=1e-3)


def test_gravity_never_changes_the_sign() -> None:
    # Of a head of 2, the only angle is the distance itself, in radians.
    angles = torch.arange(8.0)[:, None].expand(-1, 2)[None]
    view = view_of(torch.zeros(1, 8, 2), torch.ones(1, 8, dtype=torch.bool))
    view.position_embeddings = (angles.cos(), angles.sin())
    row = gravity(view, torch.tensor([[7]]))[0, 0].tolist()
    for column in range(8):
        assert row[column] == pytest.approx(math.sqrt(2) * max(0.01, math.cos(7 - column)), abs=1e-5)


# Schedules


@pytest.mark.parametrize(
    ("tokens", "left", "mean"),
    [
        (192, (309, 204, 113), 206.5),
        (128, (312, 117, 39), 145.4),
        (96, (249, 55, 27), 114.1),
        (64, (82, 32, 18), 82.2),
    ],
)
def test_the_own_rule_of_version_1_is_the_official_list_and_what_is_recycled(
    tokens: int, left: tuple[int, ...], mean: float
) -> None:
    counts = SparseVLMReducer(deep_config(32), tokens=tokens).layer_counts(576, None, 32)
    assert counts == [576] * 3 + [left[0]] * 4 + [left[1]] * 9 + [left[2]] * 16
    assert sum(counts) / 32 == pytest.approx(mean, abs=0.06)


@pytest.mark.parametrize(
    ("tokens", "left"),
    [(192, (300, 200, 118)), (128, (238, 108, 60)), (96, (246, 54, 28)), (64, (66, 34, 20))],
)
def test_the_own_rule_of_version_2_is_the_official_list(tokens: int, left: tuple[int, ...]) -> None:
    counts = SparseVLMReducer(deep_config(32), version="v2", tokens=tokens).layer_counts(576, None, 32)
    assert counts == [576] * 3 + [left[0]] * 4 + [left[1]] * 9 + [left[2]] * 16


def test_tokens_leave_before_layers_3_7_and_16_of_32() -> None:
    assert SparseVLMReducer(deep_config(32)).cuts(32) == [3, 7, 16]
    assert SparseVLMReducer(deep_config(16)).cuts(16) == [2, 4, 8]
    assert SparseVLMReducer(deep_config(2)).cuts(2) == [1]
    assert SparseVLMReducer(deep_config(1)).cuts(1) == []


def test_a_budget_keeps_the_official_shape() -> None:
    num_visual = 576 * 32
    reducer = SparseVLMReducer(deep_config(32))
    # 3 x 576 + 4 x 300 + 9 x 200 + 16 x 110 = 6488.
    counts = reducer.layer_counts(num_visual, 6488, 32)
    assert [counts[layer] for layer in (2, 3, 7, 16)] == [18432, 9600, 6400, 3520]
    # Twice as steep: shares squared.
    squares = [(kept / 576) ** 2 for kept in (300, 200, 110)]
    mean = num_visual * (3 + 4 * squares[0] + 9 * squares[1] + 16 * squares[2]) / 32
    counts = reducer.layer_counts(num_visual, round(mean), 32)
    for layer, share in zip((3, 7, 16), squares, strict=True):
        assert counts[layer] == pytest.approx(num_visual * share, abs=3)


# Recycling


def clusters(points: list[list[float]], count: int) -> tuple[list[int], list[int]]:
    """The definition: the centres by falling product of density and isolation, and the centre of each point."""
    number = range(len(points))
    distance = [[math.dist(a, b) / math.sqrt(len(a)) for b in points] for a in points]
    density = [Decimal(-sum(d * d for d in sorted(row)[:count]) / count).exp() for row in distance]
    isolation = []
    for i in number:
        denser = [distance[i][j] for j in number if (density[j], -j) > (density[i], -i)]
        isolation.append(min(denser, default=max(map(max, distance))))
    product = [density[i] * Decimal(isolation[i]) for i in number]
    centres = sorted(number, key=lambda i: (-product[i], i))[:count]
    belongs = [i if i in centres else min(centres, key=lambda c, i=i: distance[i][c]) for i in number]
    return centres, belongs


def reduced(
    hidden_states: list[list[float]], scores: list[float], num_keep: int, merge: str, order: str
) -> tuple[list[int], list[list[float]]]:
    """The definition, for visual tokens alone: which places are filled, and with what."""
    number = range(len(scores))

    def num_clusters(num_removed: int) -> int:
        return int((int(0.3 * num_removed) + 1) / 10) + 1 if num_removed else 0

    fitting = [kept for kept in range(len(scores) + 1) if kept + num_clusters(len(scores) - kept) <= num_keep]
    num_kept = max(fitting[-1] if fitting else 0, math.ceil(num_keep / 2))
    ranked = sorted(number, key=lambda i: (-scores[i], i))
    kept, removed = sorted(ranked[:num_kept]), ranked[num_kept:]
    best = sorted(removed[: int(0.3 * len(removed)) + 1])
    content = {i: hidden_states[i] for i in kept}
    in_order = [content[i] for i in kept]
    if num_keep > num_kept:
        centres, belongs = clusters([hidden_states[i] for i in best], num_keep - num_kept)
        for centre in centres:
            group = [hidden_states[best[i]] for i in range(len(best)) if belongs[i] == centre]
            total = [sum(values) for values in zip(*group, strict=True)]
            content[best[centre]] = total if merge == "sum" else [value / len(group) for value in total]
            in_order.append(content[best[centre]])
    places = sorted(content)
    return places, in_order if order == "official" else [content[place] for place in places]


def reduced_by_model(
    hidden_states: torch.Tensor, scores: torch.Tensor, num_keep: list[int], is_visual: torch.Tensor, **parameters: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which columns stay, and all hidden states."""
    reducer = SparseVLMReducer(deep_config(3), **parameters)
    return reducer.reduce(view_of(hidden_states, is_visual), scores, torch.tensor(num_keep))


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_density_peaks_are_the_centres(scale: float) -> None:
    points = scale * torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0))
    num_points = [50, 31, 8]
    is_there = torch.arange(50) < torch.tensor(num_points)[:, None]
    for count in ([1, 1, 1], [6, 12, 3], [25, 31, 0]):
        belongs, rank = density_peaks(points, is_there, torch.tensor(count))
        for row, number in enumerate(num_points):
            if count[row] == 0:
                assert (rank[row] == 0).all()
                continue
            expected_centres, expected = clusters(points[row, :number].tolist(), count[row])
            assert [int((rank[row] == place + 1).nonzero()) for place in range(count[row])] == expected_centres
            assert int((rank[row] > 0).sum()) == count[row]
            assert belongs[row, :number].tolist() == expected


def test_points_in_one_place_are_no_further_apart_for_standing_far_out() -> None:
    points = torch.tensor([[1000.0, 1000.1]] * 30 + [[1001.0, 1000.0]] * 10)[None]
    belongs, rank = density_peaks(points, torch.ones(1, 40, dtype=torch.bool), torch.tensor([4]))
    # Within a place all distances are 0: only the first point of each stands alone, and then the earlier are taken.
    assert rank[0].nonzero()[:, 0].tolist() == [0, 1, 2, 30]
    assert belongs[0].tolist() == [0, 1, 2] + [0] * 27 + [30] * 10


@pytest.mark.parametrize("order", ["spatial", "official"])
@pytest.mark.parametrize("merge", ["average", "sum"])
def test_the_best_of_what_leaves_is_clustered(merge: str, order: str) -> None:
    generator = torch.Generator().manual_seed(0)
    is_visual = torch.zeros(2, 64, dtype=torch.bool)
    is_visual[0, 3:60] = True
    is_visual[0, 20] = False
    is_visual[1, 1:41] = True
    hidden_states = torch.randn(2, 64, 3, generator=generator)
    scores = torch.randn(2, 64, generator=generator)
    recycled_more_than_one = 0
    for num_keep in (
        [56, 40],
        [55, 39],
        [50, 33],
        [30, 20],
        [9, 11],
        [4, 5],
        [2, 3],
        [1, 1],
        [0, 0],
        [56, 7],
        [3, 40],
    ):
        stays, left = reduced_by_model(hidden_states, scores, num_keep, is_visual, merge=merge, order=order)
        for row in range(2):
            visual = columns(is_visual[row])
            places, content = reduced(
                hidden_states[row, visual].tolist(), scores[row, visual].tolist(), num_keep[row], merge, order
            )
            assert columns(stays[row] & is_visual[row]) == [visual[place] for place in places]
            assert left[row, stays[row] & is_visual[row]].tolist() == [
                pytest.approx(values, abs=1e-5) for values in content
            ]
            assert torch.equal(left[row, ~is_visual[row]], hidden_states[row, ~is_visual[row]])
            changed = sum(values not in hidden_states[row].tolist() for values in left[row].tolist())
            recycled_more_than_one += changed > 1
    assert recycled_more_than_one


def test_ties_go_to_the_earlier_token() -> None:
    # All alike: the first 2 are kept, of the others the first int(0.3 x 8) + 1 = 3 are merged where the first stood.
    hidden_states = torch.ones(1, 10, 2)
    stays, left = reduced_by_model(hidden_states, torch.ones(1, 10), [3], torch.ones(1, 10, dtype=torch.bool))
    assert columns(stays[0]) == [0, 1, 2]
    assert torch.equal(left, hidden_states)
    # Of equal tokens in two groups the densest and the first of the other group are the centres.
    hidden_states = torch.tensor([[0.0]] * 12 + [[5.0], [0.0]] * 14)[None]
    scores = torch.zeros(1, 40)
    stays, left = reduced_by_model(hidden_states, scores, [10], torch.ones(1, 40, dtype=torch.bool), merge="sum")
    places, content = reduced(hidden_states[0].tolist(), [0.0] * 40, 10, "sum", "spatial")
    assert columns(stays[0]) == places
    assert left[0, stays[0]].tolist() == content


def test_densities_too_small_for_a_float_still_differ() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden_states = 300.0 * torch.randn(1, 60, 3, generator=generator)
    scores = torch.randn(1, 60, generator=generator)
    stays, left = reduced_by_model(hidden_states, scores, [20], torch.ones(1, 60, dtype=torch.bool))
    places, content = reduced(hidden_states[0].tolist(), scores[0].tolist(), 20, "average", "spatial")
    assert columns(stays[0]) == places
    assert left[0, stays[0]].tolist() == [pytest.approx(values, abs=1e-3) for values in content]


def test_version_2_recycles_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_states, scores = torch.randn(1, 40, 2, generator=generator), torch.randn(1, 40, generator=generator)
    stays, left = reduced_by_model(hidden_states, scores, [12], torch.ones(1, 40, dtype=torch.bool), version="v2")
    assert set(columns(stays[0])) == set(scores[0].topk(12).indices.tolist())
    assert torch.equal(left, hidden_states)
