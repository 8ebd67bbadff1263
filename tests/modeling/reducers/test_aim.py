"""AIM's promises: likenesses merge before the decoder, PageRank prunes inside it, one budget is divided over both."""

import math
import random

import pytest
import torch

from adavtp import Selection
from adavtp.modeling.decoder import view as decoder_views
from adavtp.modeling.reducers.aim import AimMerge, AimPrune, AimReducer
from adavtp.modeling.vision.features import VisionFeatures
from adavtp.modeling.vision.tower import TowerAttention
from tiny_decoder_views import deep_config, tiny_view
from tiny_features import LAYER_ABOVE, tiny_features
from tiny_features import features_of as tokens_of
from tiny_models import tiny_config


def features_of(patches: torch.Tensor, keys: torch.Tensor) -> VisionFeatures:
    """Tokens `[num_images, n, C]` and keys `[num_images, heads, n, d]` as a reducer sees them."""
    return tokens_of(patches, attention={LAYER_ABOVE: TowerAttention(None, None, keys)})


def merged(features: VisionFeatures, num_keep: int | None, order: str = "spatial", **parameters: object) -> Selection:
    """What merging leaves of each image."""
    counts = None if num_keep is None else torch.full((len(features.patches),), num_keep)
    return AimMerge(tiny_config(), order=order, **parameters)(features, counts)


Token = tuple[list[float], list[float], int]


def rounds(tokens: list[Token], num_keep: int) -> list[Token]:
    """The definition: tokens of feature, key and place, in the order that rounds leave behind."""
    while len(tokens) > num_keep:
        num_joining = min(len(tokens) - num_keep, len(tokens) // 2)
        sources, targets = tokens[::2], tokens[1::2]
        best = []
        for number, (_, key, _) in enumerate(sources):
            cosines = [
                sum(map(float.__mul__, key, other)) / math.hypot(*key) / math.hypot(*other) for _, other, _ in targets
            ]
            best.append((-max(cosines), number, cosines.index(max(cosines))))
        best.sort()
        joining, staying = best[:num_joining], best[num_joining:]
        left = [sources[number] for _, number, _ in staying]
        for number, (feature, key, place) in enumerate(targets):
            group = [(feature, key)] + [sources[source][:2] for _, source, target in joining if target == number]
            mean = [
                [sum(values) / len(group) for values in zip(*kind, strict=True)] for kind in zip(*group, strict=True)
            ]
            left.append((mean[0], mean[1], place))
        tokens = left
    return tokens


def expected_of(features: VisionFeatures, image: int, num_keep: int) -> list[Token]:
    """The definition on one image, keys of all heads side by side."""
    keys = features.attention[LAYER_ABOVE].keys[image]
    tokens = [
        (feature.tolist(), [float(value) for head in keys for value in head[place]], place)
        for place, feature in enumerate(features.patches[image].double())
    ]
    return rounds(tokens, num_keep)


# Merging


@pytest.mark.parametrize("order", ["spatial", "official"])
@pytest.mark.parametrize(("num_tokens", "num_keep"), [(16, 13), (16, 8), (16, 7), (16, 3), (15, 4), (9, 1), (2, 1)])
def test_rounds_merge_each_token_into_its_likeness(num_tokens: int, num_keep: int, order: str) -> None:
    features = tiny_features(2, num_tokens)
    selection = merged(features, num_keep, order)
    for image in range(2):
        expected = expected_of(features, image, num_keep)
        if order == "spatial":
            expected = sorted(expected, key=lambda token: token[2])
        assert selection.positions[image].tolist() == sorted(place for _, _, place in expected)
        tokens = torch.tensor([feature for feature, _, _ in expected])
        assert torch.allclose(selection.features[image], tokens, atol=1e-5)


def test_a_group_is_a_plain_mean_in_every_round() -> None:
    # Keys say who is whose likeness: 0, 2 and 4 join 1; in the second round 1 (of four patches) and 3 are averaged.
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2], [0.0, -1.0]])
    patches = torch.tensor([[0.0], [4.0], [8.0], [100.0], [12.0], [1000.0]])
    selection = merged(features_of(patches[None], keys[None, None]), 3)
    assert selection.positions.tolist() == [[1, 3, 5]]
    assert selection.features[0, :, 0].tolist() == [6.0, 100.0, 1000.0]
    # 1 and 5 are now in A, 3 in B; the key of 1, (1, 0.1) on average, is nearer to that of 3 than that of 5 is.
    selection = merged(features_of(patches[None], keys[None, None]), 2)
    assert selection.positions.tolist() == [[3, 5]]
    assert selection.features[0, :, 0].tolist() == [53.0, 1000.0]


def test_of_equal_likenesses_the_earlier_joins_the_earlier() -> None:
    patches = torch.tensor([[1.0], [10.0], [3.0], [20.0], [5.0], [30.0]])
    selection = merged(features_of(patches[None], torch.ones(1, 1, 6, 2)), 4, "official")
    assert selection.positions.tolist() == [[1, 3, 4, 5]]
    assert selection.features[0, :, 0].tolist() == pytest.approx([5.0, 14.0 / 3, 20.0, 30.0])


def test_the_official_order_puts_what_did_not_merge_first_by_falling_likeness() -> None:
    keys = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.5], [-1.0, 0.0], [1.0, 0.0], [-1.0, -1.0]])
    patches = torch.arange(6.0)[:, None]
    selection = merged(features_of(patches[None], keys[None, None]), 5, "official")
    assert selection.positions.tolist() == [[0, 1, 2, 3, 5]]
    assert selection.features[0, :, 0].tolist() == [2.0, 0.0, 2.5, 3.0, 5.0]
    selection = merged(features_of(patches[None], keys[None, None]), 5)
    assert selection.features[0, :, 0].tolist() == [0.0, 2.5, 2.0, 3.0, 5.0]


def test_one_token_may_be_all_that_is_left_and_all_may_be_left() -> None:
    features = tiny_features(2)
    assert merged(features, 1).features.shape == (2, 1, 32)
    for order in ("spatial", "official"):
        everything = merged(features, 16, order)
        assert everything.keep.all()
        assert torch.equal(everything.features, features.patches)


def test_the_own_rule_leaves_252_of_576() -> None:
    features = tiny_features(1, 576, width=8)
    assert merged(features, None).num_keep.tolist() == [252]
    assert torch.equal(merged(features, None).features, merged(features, 252).features)
    assert merged(tiny_features(2, 2), None).num_keep.tolist() == [1, 1]
    assert merged(tiny_features(2, 10), None, share=0.7).num_keep.tolist() == [7, 7]


# Pruning


def page_rank(attention_logits: torch.Tensor) -> list[float]:
    """The definition, on the logits `[heads, n, n]` of one prompt."""
    ranks = []
    for head in attention_logits.tolist():
        length = len(head)
        weights = []
        for row, logits in enumerate(head):
            exponentials = [math.exp((logit - max(logits[: row + 1])) / 0.1) for logit in logits[: row + 1]]
            weights.append([value / sum(exponentials) for value in exponentials] + [0.0] * (length - row - 1))
        rank = [1 / length] * length
        for _ in range(5):
            rank = [sum(rank[row] * weights[row][column] for row in range(length)) for column in range(length)]
        ranks.append(rank)
    return [math.sqrt(sum(rank[column] ** 2 for rank in ranks) / len(ranks)) for column in range(len(ranks[0]))]


@pytest.mark.parametrize("rows_at_once", [4, 128])
@pytest.mark.parametrize("side", ["left", "right"])
def test_page_rank_ranks(monkeypatch: pytest.MonkeyPatch, side: str, rows_at_once: int) -> None:
    monkeypatch.setattr(decoder_views, "_ROWS_AT_ONCE", rows_at_once)
    view, attentions = tiny_view(cut=2, side=side)
    scores = AimPrune(deep_config(3)).scores(view, 0)
    for row in range(2):
        real = view.is_real[row].nonzero()[:, 0]
        # Attention is a softmax of logits, so its logarithm differs from them by a constant in each row.
        logits = attentions[1][row][:, real][:, :, real].log()
        assert scores[row, real].tolist() == pytest.approx(page_rank(logits), abs=1e-5)


def test_the_own_rule_falls_by_an_eighth_from_layer_14_of_32() -> None:
    counts = AimPrune(deep_config(32)).layer_counts(576, None, 32)
    assert counts == [576] * 14 + [504, 432, 360, 288, 216, 144, 72] + [0] * 11
    # Published: 252 tokens have a mean of 138 over layers.
    assert sum(AimPrune(deep_config(32)).layer_counts(252, None, 32)) / 32 == pytest.approx(138, abs=0.5)
    # Of Qwen2's 28 layers, 15 see all and none is left in layer 22.
    counts = AimPrune(deep_config(28), layer=15, slope=0.125).layer_counts(64, None, 28)
    assert counts == [64] * 15 + [56, 48, 40, 32, 24, 16, 8] + [0] * 6


def test_fewer_layers_fall_in_proportion() -> None:
    assert AimPrune(deep_config(16)).layer_counts(64, None, 16) == [64] * 7 + [48, 32, 16] + [0] * 6
    assert AimPrune(deep_config(2)).layer_counts(64, None, 2) == [64, 0]


def test_tokens_are_ranked_anew_before_every_layer_from_the_first_cut() -> None:
    assert AimPrune(deep_config(16)).cuts(16) == list(range(7, 16))
    assert AimPrune(deep_config(4), layer=3).cuts(4) == [3]
    assert AimPrune(deep_config(1)).cuts(1) == []


def test_a_budget_is_reached_by_the_slope() -> None:
    reducer = AimPrune(deep_config(6), layer=2)
    # A slope of 1/4: 3/4, 1/2, 1/4, 0, and of 1/8: 7/8, 3/4, 5/8, 1/2.
    assert reducer.layer_counts(48, 28, 6) == [48, 48, 36, 24, 12, 0]
    assert reducer.layer_counts(48, 38, 6) == [48, 48, 42, 36, 30, 24]
    # A slope of 2/3 drops everything at the second layer already.
    assert reducer.layer_counts(18, 7, 6) == [18, 18, 6, 0, 0, 0]


# Both


def test_aim_is_both_parts_with_their_parameters() -> None:
    reducer = AimReducer(deep_config(4), order="official", share=0.5, layer=2, slope=0.3)
    merge, prune = reducer.parts
    assert isinstance(merge, AimMerge)
    assert isinstance(prune, AimPrune)
    assert (merge.order, merge.share, prune.layer, prune.slope) == ("official", 0.5, 2, 0.3)


def test_merging_leaves_what_gives_the_published_schedule_the_wanted_mean() -> None:
    reducer = AimReducer(deep_config(32))
    # The published schedule has a mean of 17.5 of 32 layers, 0.547 of the tokens.
    for num_keep in (1, 2, 39, 64, 138, 192, 315):
        assert reducer.split(576, num_keep, 32) == math.ceil(num_keep * 32 / 17.5)
    assert reducer.split(576, 400, 32) == 576
    # Of 9 layers 4 see all, then 5/9 and 1/9: 14/3 of 9, in floats a little less.
    assert AimReducer(deep_config(9)).split(576, 14, 9) == 27
    assert reducer.split(576, None, 32) == 252
    assert reducer.split(100, None, 32) == 43


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5, 28, 32])
def test_every_budget_can_be_divided_and_has_exactly_its_mean(num_layers: int) -> None:
    reducer = AimReducer(deep_config(num_layers))
    for num_patches in (1, 2, 16, 576):
        for num_keep in random.Random(0).sample(range(1, num_patches + 1), min(num_patches, 40)):
            num_left = reducer.split(num_patches, num_keep, num_layers)
            assert num_keep <= num_left <= num_patches
            counts = reducer.parts[1].layer_counts(num_left, num_keep, num_layers)
            assert counts[0] == num_left
            assert sum(counts) == num_keep * num_layers
