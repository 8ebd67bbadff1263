"""What VisionZip promises: CLS, dominant patches, and contextual tokens into which the rest was merged."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from adavtp.modeling.reducers.base import build_reducer
from adavtp.modeling.reducers.visionzip import VisionZipReducer
from adavtp.modeling.vision.features import VisionFeatures
from adavtp.modeling.vision.tower import TowerAttention
from tiny_features import MAKING_LAYER, features_of, head_mean_of_cls, tiny_features
from tiny_models import NUM_PATCHES, tiny_config


def reducer(keep_cls: bool = False, **parameters: Any) -> VisionZipReducer:
    fields = {"vision_feature_select_strategy": "full"} if keep_cls else {}
    return build_reducer("visionzip", tiny_config(**fields), **parameters)


# The definition, in loops


def tokens_by_definition(
    features: VisionFeatures,
    image: int,
    num_dominant: int,
    num_contextual: int,
    average: bool = False,
    cls: bool = True,
) -> dict[int, np.ndarray]:
    """Each output token by its place, in the order CLS, dominant, contextual."""
    x = features.patches[image].double().numpy()
    scores = head_mean_of_cls(features.attention[MAKING_LAYER], image)
    dominant = sorted(sorted(range(len(x)), key=lambda token: -scores[token])[:num_dominant])
    rest = [token for token in range(len(x)) if token not in dominant]
    targets = rest[:: len(rest) // num_contextual][:num_contextual] if num_contextual else []
    metric = features.attention[MAKING_LAYER].keys[image].double().numpy().mean(axis=0)
    metric = [key / math.sqrt(key @ key) for key in metric]
    goes_to = {target: [] for target in targets}
    others = [token for token in rest if token not in targets]
    for token in others if targets else []:
        goes_to[max(targets, key=lambda target: float(metric[token] @ metric[target]))].append(x[token])
    tokens = {others[0]: features.cls[image, 0].double().numpy()} if cls else {}
    tokens |= {token: x[token] for token in dominant}
    for target, assigned in goes_to.items():
        if average:
            tokens[target] = np.mean([x[target], *assigned], axis=0)
        else:
            tokens[target] = x[target] + (np.mean(assigned, axis=0) if assigned else 0)
    return tokens


def assert_tokens(selection: Any, image: int, expected: dict[int, np.ndarray], spatial: bool = True) -> None:
    places = sorted(expected)
    assert selection.positions[image].tolist() == places
    in_order = [expected[place] for place in (places if spatial else expected)]
    np.testing.assert_allclose(selection.features[image].numpy(), in_order, rtol=1e-4, atol=1e-5)


def counts_of(num_keep: int, num_tokens: int) -> list[int]:
    """CLS and dominant patches, which come out as they went in, and contextual tokens, which do not."""
    features = tiny_features(1, num_tokens)
    selection = reducer(order="official")(features, torch.tensor([num_keep]))
    originals = {tuple(token) for token in [*features.patches[0].tolist(), *features.cls[0].tolist()]}
    untouched = [tuple(token) in originals for token in selection.features[0].tolist()]
    assert untouched == sorted(untouched, reverse=True)
    return [sum(untouched), len(untouched) - sum(untouched)]


@pytest.mark.parametrize("order", ["spatial", "official"])
@pytest.mark.parametrize("average", [False, True])
def test_cls_and_dominant_patches_stay_and_the_rest_goes_to_its_nearest_target(average: bool, order: str) -> None:
    features = tiny_features(3, num_tokens=30)
    selection = reducer(average=average, order=order)(features, torch.tensor([13, 13, 13]))
    for image in range(3):  # floor(0.16 x 13) = 2 contextual, CLS and 10 dominant patches
        assert_tokens(selection, image, tokens_by_definition(features, image, 10, 2, average), order == "spatial")


@pytest.mark.parametrize(("num_keep", "split"), [(64, [54, 10]), (128, [108, 20]), (192, [162, 30])])
def test_the_default_share_makes_the_published_splits(num_keep: int, split: list[int]) -> None:
    assert counts_of(num_keep, 576) == split


@pytest.mark.parametrize(("contextual", "num_contextual"), [(0.5, 4), (0.25, 2), (0.9, 7), (1.0, 7), (0.0, 0)])
def test_the_share_of_contextual_tokens_can_be_chosen(contextual: float, num_contextual: int) -> None:
    features = tiny_features(2)
    selection = reducer(contextual=contextual)(features, torch.tensor([8, 8]))
    for image in range(2):
        expected = tokens_by_definition(features, image, 7 - num_contextual, num_contextual)
        assert_tokens(selection, image, expected)


def test_a_share_that_floating_point_makes_too_small_is_not_cut() -> None:
    # 0.29 x 100 is 28.999999999999996.
    features = tiny_features(1, num_tokens=200)
    selection = reducer(contextual=0.29)(features, torch.tensor([100]))
    assert_tokens(selection, 0, tokens_by_definition(features, 0, 100 - 29 - 1, 29))


def small_image(keys: list[list[float]], attended: list[float]) -> VisionFeatures:
    """One image with patches 1, 2, 3, ..., CLS 100, these keys, and CLS attention in the order of `attended`."""
    keys = torch.tensor([[*key, score] for key, score in zip(keys, attended, strict=True)])
    query = torch.zeros(1, 1, keys.shape[1])
    query[..., -1] = 1.0
    patches = torch.arange(1.0, len(keys) + 1)[None, :, None]
    attention = {MAKING_LAYER: TowerAttention(query, torch.zeros_like(query), keys[None, None])}
    return features_of(patches, cls=torch.full((1, 1, 1), 100.0), attention=attention)


def test_a_target_that_nothing_goes_to_stays_what_it_is() -> None:
    # Token 0 is dominant; the rest is 1 .. 4 with targets 1 and 3, and tokens 2 and 4 both point to where 3 points.
    features = small_image([[0, 0], [1, 0], [0, 1], [0, 1], [0, 1]], [1e-3, 0, 0, 0, 0])
    selection = reducer(contextual=0.5, order="official")(features, torch.tensor([4]))
    assert selection.features[0, :, 0].tolist() == [100, 1, 2, 4 + (3 + 5) / 2]
    assert selection.positions.tolist() == [[0, 1, 2, 3]]


def test_of_equal_attention_and_equal_similarity_the_earlier_wins() -> None:
    # Dominant: token 0 of six alike. Of 1 .. 5 targets are 1 and 3, and all others go to 1.
    features = small_image([[1, 1]] * 6, [0.0] * 6)
    selection = reducer(contextual=0.5, order="official")(features, torch.tensor([4]))
    torch.testing.assert_close(selection.features[0, :, 0], torch.tensor([100, 1, 2 + (3 + 5 + 6) / 3, 4]))


def test_cls_takes_the_first_free_place() -> None:
    # Dominant are 0 and 2, the rest 1, 3, 4, 5 has its one target at 1, so that 3 is free.
    features = small_image([[1, 1]] * 6, [1.0, 0, 1.0, 0, 0, 0])
    selection = reducer()(features, torch.tensor([4]))
    assert selection.positions.tolist() == [[0, 1, 2, 3]]
    assert selection.features[0, :, 0].tolist() == [1, 2 + (4 + 5 + 6) / 3, 3, 100]


def test_one_token_is_cls_and_two_are_cls_and_the_best_patch() -> None:
    features = tiny_features(2)
    for num_keep in (1, 2):
        selection = reducer()(features, torch.tensor([num_keep] * 2))
        for image in range(2):
            assert_tokens(selection, image, tokens_by_definition(features, image, num_keep - 1, 0))


def test_from_three_tokens_on_one_is_contextual() -> None:
    assert counts_of(3, NUM_PATCHES) == [2, 1]
    assert counts_of(6, NUM_PATCHES) == [5, 1]


def test_all_tokens_are_cls_and_all_but_one() -> None:
    features = tiny_features(2)
    selection = reducer()(features, torch.tensor([NUM_PATCHES] * 2))
    assert selection.keep.all()
    for image in range(2):
        assert_tokens(selection, image, tokens_by_definition(features, image, NUM_PATCHES - 3, 2))


@pytest.mark.parametrize("num_keep", [1, 2, 5, 12, NUM_PATCHES])
def test_where_the_model_keeps_cls_it_is_not_kept_twice(num_keep: int) -> None:
    features = tiny_features(2)
    selection = reducer(keep_cls=True)(features, torch.tensor([num_keep] * 2))
    num_contextual = max(int(0.16 * num_keep), int(num_keep >= 3))
    for image in range(2):
        dominant = num_keep - num_contextual
        assert_tokens(selection, image, tokens_by_definition(features, image, dominant, num_contextual, cls=False))
