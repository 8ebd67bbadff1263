"""What PruMerge and PruMerge+ promise: what is kept, what is merged into it by which weight, and what stands where."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from adavtp.modeling.budget.selection import Selection
from adavtp.modeling.reducers.base import build_reducer
from adavtp.modeling.reducers.prumerge import PruMergeReducer
from adavtp.modeling.vision.features import VisionFeatures
from adavtp.modeling.vision.tower import TowerAttention
from tiny_features import (
    LAYER_ABOVE,
    MAKING_LAYER,
    features_of,
    head_mean_of_cls,
    one_image,
    row_of_cls,
    tiny_features,
)
from tiny_models import NUM_PATCHES, tiny_config

NAMES = ["prumerge", "prumerge+"]


def images_attended(scores: list[float]) -> VisionFeatures:
    """One image with this CLS attention in the layer above, in one head of width 1, and patches 1, 2, 3, ..."""
    num_tokens = len(scores)
    keys = torch.tensor(scores, dtype=torch.float64)
    cls_key = (1 - keys.sum()).log().float().view(1, 1, 1)
    attention = TowerAttention(torch.ones(1, 1, 1), cls_key, keys.log().float().view(1, 1, -1, 1))
    patches = torch.arange(1.0, num_tokens + 1)[None, :, None].expand(-1, -1, 3)
    return features_of(patches, attention={LAYER_ABOVE: attention})


def reducer(name: str, **parameters: Any) -> PruMergeReducer:
    return build_reducer(name, tiny_config(), **parameters)


# The definitions, in loops


def scores_of(features: VisionFeatures, image: int, per_head: bool = False) -> np.ndarray:
    if per_head:
        return head_mean_of_cls(features.attention[MAKING_LAYER], image)
    attention = features.attention[LAYER_ABOVE]
    query, cls_key = attention.query[image].double().numpy(), attention.cls_key[image].double().numpy()
    keys = attention.keys[image].double().numpy()
    joined = np.array([np.concatenate([head[token] for head in keys]) for token in range(keys.shape[1])])
    return row_of_cls(np.concatenate(list(query)), np.concatenate(list(cls_key)), joined)


def best_of(scores: np.ndarray, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda token: -scores[token])[:count]


def neighbours_of(features: VisionFeatures, image: int, token: int, count: int) -> list[int]:
    keys = features.attention[LAYER_ABOVE].keys[image].double().numpy()
    joined = [np.concatenate([head[other] for head in keys]) for other in range(keys.shape[1])]
    unit = [key / math.sqrt(key @ key) for key in joined]
    others = [other for other in range(len(unit)) if other != token]
    return sorted(others, key=lambda other: -float(unit[token] @ unit[other]))[:count]


def tokens_by_definition(
    features: VisionFeatures,
    image: int,
    kept: list[int],
    neighbours: int = 32,
    average: bool = False,
    per_head: bool = False,
    extra: bool = True,
) -> dict[int, np.ndarray]:
    """Each output token by its place: kept ones at their own in the order given, the extra one at the last free."""
    x, a = features.patches[image].double().numpy(), scores_of(features, image, per_head)
    tokens = {}
    for token in kept:
        near = neighbours_of(features, image, token, neighbours)
        merged = x[token] + sum((a[other] * x[other] for other in near), np.zeros_like(x[0]))
        tokens[token] = merged / (1 + sum(a[other] for other in near)) if average else merged
    rest = [token for token in range(len(x)) if token not in kept]
    if extra and rest:
        total = sum(a[token] * x[token] for token in rest)
        tokens[max(rest)] = total / sum(a[token] for token in rest) if average else total
    return tokens


def assert_tokens(selection: Selection, image: int, expected: dict[int, np.ndarray], spatial: bool = True) -> None:
    """The image's tokens are these, in the order of their places or in that of the dictionary."""
    places, count = sorted(expected), len(expected)
    assert selection.positions[image].tolist() == places + [-1] * (selection.positions.shape[1] - count)
    assert selection.keep[image].nonzero()[:, 0].tolist() == places
    in_order = [expected[place] for place in (places if spatial else expected)]
    np.testing.assert_allclose(selection.features[image, :count].numpy(), in_order, rtol=1e-4, atol=1e-5)


def stride_among(candidates: list[int], count: int) -> list[int]:
    return [candidates[math.floor((i + 0.5) * len(candidates) / count)] for i in range(count)]


def kept_by_plus(scores: np.ndarray, num_keep: int, important: float = 0.25) -> list[int]:
    attended = best_of(scores, max(1, round(important * (num_keep - 1))))
    rest = [token for token in range(len(scores)) if token not in attended]
    spatial = stride_among(rest, num_keep - 1 - len(attended)) if num_keep - 1 > len(attended) else []
    return attended + spatial


# What is kept, given K


@pytest.mark.parametrize("order", ["spatial", "official"])
@pytest.mark.parametrize("average", [False, True])
def test_the_most_attended_take_in_their_neighbours_and_one_token_all_the_rest(average: bool, order: str) -> None:
    features = tiny_features(3)
    selection = reducer("prumerge", average=average, neighbours=4, order=order)(features, torch.tensor([6, 6, 6]))
    for image in range(3):
        kept = best_of(scores_of(features, image), 5)
        expected = tokens_by_definition(features, image, kept, neighbours=4, average=average)
        assert_tokens(selection, image, expected, order == "spatial")


@pytest.mark.parametrize("order", ["spatial", "official"])
@pytest.mark.parametrize("important", [0.25, 0.5])
def test_plus_adds_tokens_at_a_uniform_stride_among_the_others(important: float, order: str) -> None:
    features = tiny_features(3)
    counts = [6, 9, 13]
    selection = reducer("prumerge+", important=important, neighbours=4, order=order)(features, torch.tensor(counts))
    for image, count in enumerate(counts):
        kept = kept_by_plus(scores_of(features, image), count, important)
        assert len(set(kept)) == count - 1
        expected = tokens_by_definition(features, image, kept, neighbours=4)
        assert_tokens(selection, image, expected, order == "spatial")


def test_a_quarter_of_what_plus_keeps_is_attended() -> None:
    # Of 12 kept beside the extra token, 3 are attended; 9 of the 13 others are at floor((i + 1/2) 13 / 9).
    features = images_attended([0.01] * 13 + [0.1, 0.2, 0.3])
    kept = reducer("prumerge+", neighbours=0)(features, torch.tensor([13])).positions[0].tolist()
    spatial, attended, extra = [0, 2, 3, 5, 6, 7, 9, 10, 12], [13, 14, 15], [11]
    assert kept == sorted(spatial + attended + extra)


@pytest.mark.parametrize("name", NAMES)
def test_of_equally_attended_tokens_the_earlier_is_kept(name: str) -> None:
    features = images_attended([0.05, 0.2, 0.05, 0.2, 0.05, 0.2])
    selection = reducer(name, neighbours=0, order="official", **({"important": 1.0} if "+" in name else {}))(
        features, torch.tensor([3])
    )
    assert selection.features[0, :2, 0].tolist() == [2.0, 4.0]


def test_of_equally_near_tokens_the_earlier_is_merged() -> None:
    # All keys point the same way, so that every other token is as near as any.
    features = images_attended([0.05, 0.1, 0.3, 0.15, 0.2])
    selection = reducer("prumerge", neighbours=2)(features, torch.tensor([2]))
    assert selection.positions.tolist() == [[2, 4]]
    # x_2 = 3 takes in tokens 0 and 1; the extra token has all but token 2.
    torch.testing.assert_close(selection.features[0, 0, 0], torch.tensor(3 + 0.05 * 1 + 0.1 * 2))
    torch.testing.assert_close(selection.features[0, 1, 0], torch.tensor(0.05 + 0.1 * 2 + 0.15 * 4 + 0.2 * 5))


def test_neighbours_may_be_kept_tokens_themselves_and_are_taken_as_they_were() -> None:
    features = images_attended([0.4, 0.3, 0.05])
    selection = reducer("prumerge", neighbours=1)(features, torch.tensor([3]))
    # Token 0 takes in token 1 and token 1 token 0; neither takes in what the other became.
    torch.testing.assert_close(selection.features[0, :2, 0], torch.tensor([1 + 0.3 * 2, 2 + 0.4 * 1]))


def test_thirty_two_neighbours_are_merged_where_there_are_as_many() -> None:
    features = tiny_features(1, num_tokens=50)
    selection = reducer("prumerge")(features, torch.tensor([4]))
    kept = best_of(scores_of(features, 0), 3)
    assert_tokens(selection, 0, tokens_by_definition(features, 0, kept, neighbours=32))


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_attention_is_the_head_mean_of_the_layer_that_made_the_features(name: str) -> None:
    features = tiny_features(2)
    model = reducer(name, attention="per_head", neighbours=3)
    selection = model(features, torch.tensor([7, 7]))
    for image in range(2):
        scores = scores_of(features, image, per_head=True)
        kept = best_of(scores, 6) if name == "prumerge" else kept_by_plus(scores, 7)
        assert_tokens(selection, image, tokens_by_definition(features, image, kept, 3, per_head=True))
    assert model.attention_layers == (MAKING_LAYER, LAYER_ABOVE)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_token_is_the_best_with_its_neighbours_and_no_extra_one(name: str) -> None:
    features = tiny_features(2)
    selection = reducer(name, neighbours=5)(features, torch.tensor([1, 1]))
    for image in range(2):
        kept = best_of(scores_of(features, image), 1)
        assert_tokens(selection, image, tokens_by_definition(features, image, kept, neighbours=5, extra=False))


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_are_all_but_the_least_and_the_extra_one_in_its_place(name: str) -> None:
    features = tiny_features(2)
    selection = reducer(name, neighbours=5)(features, torch.tensor([NUM_PATCHES] * 2))
    assert selection.keep.all()
    for image in range(2):
        scores = scores_of(features, image)
        kept = best_of(scores, NUM_PATCHES - 1) if name == "prumerge" else kept_by_plus(scores, NUM_PATCHES)
        assert_tokens(selection, image, tokens_by_definition(features, image, kept, neighbours=5))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_one_token_keeps_it_as_it_is(name: str) -> None:
    features = tiny_features(2, num_tokens=1)
    for num_keep in (torch.tensor([1, 1]), None):
        selection = reducer(name)(features, num_keep)
        assert selection.positions.tolist() == [[0], [0]]
        assert torch.equal(selection.features, features.patches)


# The papers' own rules


def test_without_k_the_outliers_of_each_image_are_kept() -> None:
    features = tiny_features(6, peakedness=4.0)
    selection = reducer("prumerge", neighbours=4)(features, None)
    counts = set()
    for image in range(6):
        scores = scores_of(features, image)
        first, third = np.percentile(scores, [25, 75])
        kept = best_of(scores, max(1, sum(score > third + 1.5 * (third - first) for score in scores)))
        assert_tokens(selection, image, tokens_by_definition(features, image, kept, neighbours=4))
        counts.add(len(kept))
    assert len(counts) > 1  # ragged, and not all of them at the least


@pytest.mark.parametrize("order", ["spatial", "official"])
def test_without_k_plus_adds_every_stride_th_token(order: str) -> None:
    features = tiny_features(6, num_tokens=40, peakedness=4.0)
    selection = reducer("prumerge+", neighbours=4, order=order)(features, None)
    strides = set()
    for image in range(6):
        scores = scores_of(features, image)
        first, third = np.percentile(scores, [25, 75])
        outliers = best_of(scores, max(1, sum(score > third + 1.5 * (third - first) for score in scores)))
        stride = max(1, int(int(40 / len(outliers)) / 3))
        kept = outliers + [token for token in range(0, 39, stride) if token not in outliers]
        expected = tokens_by_definition(features, image, kept, neighbours=4)
        assert_tokens(selection, image, expected, order == "spatial")
        strides.add(stride)
    assert len(strides) > 1


def test_an_image_without_outliers_keeps_one_token_and_the_extra_one() -> None:
    selection = reducer("prumerge", neighbours=0)(images_attended([0.1, 0.11, 0.12, 0.13, 0.14]), None)
    assert selection.positions.tolist() == [[3, 4]]
    torch.testing.assert_close(selection.features[0, :, 0], torch.tensor([0.1 + 0.22 + 0.36 + 0.52, 5.0]))


def test_where_nothing_is_left_over_there_is_no_extra_token() -> None:
    # One outlier of 5, the last: the stride is 1, and tokens 0 to 3 are all candidates.
    selection = reducer("prumerge+", neighbours=0)(images_attended([0.01, 0.011, 0.012, 0.013, 0.9]), None)
    assert selection.num_keep.tolist() == [5]
    torch.testing.assert_close(selection.features[0, :, 0], torch.arange(1.0, 6.0))


@pytest.mark.parametrize("name", NAMES)
def test_without_k_a_batch_is_each_image_alone(name: str) -> None:
    features = tiny_features(4, peakedness=4.0)
    together = reducer(name)(features, None)
    for image in range(4):
        alone = reducer(name)(one_image(features, image), None)
        count = int(alone.num_keep)
        assert torch.equal(alone.keep[0], together.keep[image])
        torch.testing.assert_close(alone.features[0, :count], together.features[image, :count])
