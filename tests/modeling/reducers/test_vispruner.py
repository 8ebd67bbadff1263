"""What VisPruner promises: the most attended patches, and of the others those that resemble no other."""

import math

import numpy as np
import pytest
import torch

from adavtp.modeling.reducers.base import build_reducer
from adavtp.modeling.reducers.vispruner import VisPrunerReducer
from adavtp.modeling.vision.features import VisionFeatures
from tiny_features import MAKING_LAYER, attention_from, features_of, head_mean_of_cls, tiny_features
from tiny_models import NUM_PATCHES, tiny_config


def images(scores: torch.Tensor, patches: torch.Tensor) -> VisionFeatures:
    """Images with CLS attention in proportion to `scores` `[num_images, num_tokens]`."""
    return features_of(patches, attention={MAKING_LAYER: attention_from(scores)})


def attended_of(features: VisionFeatures, image: int) -> list[int]:
    """The patches by falling attention of CLS."""
    return np.argsort(-head_mean_of_cls(features.attention[MAKING_LAYER], image)).tolist()


def reducer(**parameters: float) -> VisPrunerReducer:
    return build_reducer("vispruner", tiny_config(), **parameters)


def diverse_by_definition(pool: list[int], patches: torch.Tensor, num_diverse: int) -> list[int]:
    """Rounds over even and odd places of the pool, in loops; no two similarities are the same."""
    x = patches.double().numpy()
    while len(pool) > num_diverse:
        even, odd = pool[::2], pool[1::2]
        nearest = {}
        for i in even:
            cosines = [x[i] @ x[j] / math.sqrt((x[i] @ x[i]) * (x[j] @ x[j])) for j in odd]
            nearest[i] = max(cosines)
        even = sorted(even, key=lambda i: -nearest[i])
        pool = even[min(8, len(pool) - num_diverse) :] + odd
    return pool


@pytest.mark.parametrize("num_tokens", [16, 37])
@pytest.mark.parametrize("important", [0.5, 0.75, 0.0])
def test_half_are_the_most_attended_and_half_are_diverse(important: float, num_tokens: int) -> None:
    features = tiny_features(3, num_tokens)
    for num_keep in (2, 4, 9, num_tokens - 1):
        selection = reducer(important=important)(features, torch.full((3,), num_keep))
        for image in range(3):
            attended = attended_of(features, image)
            num_important = int(num_keep * important)
            pool = attended[num_important:]
            diverse = diverse_by_definition(pool, features.patches[image], num_keep - num_important)
            assert selection.positions[image].tolist() == sorted(attended[:num_important] + diverse)


def test_a_duplicate_of_another_token_goes_first() -> None:
    # By attention 0, 1, 2, 3, 4: one is important, the pool is 1, 2, 3, 4, and token 3 is token 4 again.
    patches = torch.eye(5)[[0, 1, 2, 4, 4]][None]
    selection = reducer(important=0.25)(images(torch.tensor([[5.0, 4, 3, 2, 1]]), patches), torch.tensor([4]))
    assert selection.positions.tolist() == [[0, 1, 2, 4]]


def test_of_equally_similar_tokens_the_less_attended_goes() -> None:
    patches = torch.ones(1, 6, 4)
    selection = reducer(important=0.0)(images(torch.tensor([[6.0, 5, 4, 3, 2, 1]]), patches), torch.tensor([5]))
    assert selection.positions.tolist() == [[0, 1, 2, 3, 5]]


def test_of_equally_attended_tokens_the_earlier_is_important() -> None:
    features = images(torch.ones(1, 6), torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)))
    assert reducer(important=1.0)(features, torch.tensor([3])).positions.tolist() == [[0, 1, 2]]


def test_the_length_of_a_feature_does_not_count() -> None:
    features = tiny_features(2)
    before = reducer()(features, torch.tensor([6, 6])).keep
    features.patches = features.patches * torch.linspace(0.1, 10.0, NUM_PATCHES)[:, None]
    assert torch.equal(reducer()(features, torch.tensor([6, 6])).keep, before)


def test_one_token_is_diverse_and_all_tokens_are_all() -> None:
    features = tiny_features(2)
    selection = reducer()(features, torch.tensor([1, 1]))
    for image in range(2):
        attended = attended_of(features, image)
        assert selection.positions[image].tolist() == diverse_by_definition(attended, features.patches[image], 1)
    assert reducer()(features, torch.tensor([NUM_PATCHES] * 2)).keep.all()


def test_with_everything_important_attention_decides_alone() -> None:
    features = tiny_features(2)
    best = [sorted(attended_of(features, image)[:5]) for image in range(2)]
    assert reducer(important=1.0)(features, torch.tensor([5, 5])).positions.tolist() == best


def test_a_share_that_floating_point_makes_too_small_is_not_cut() -> None:
    # 0.29 x 100 is 28.999999999999996: the 29th most attended token is important, however much it resembles others.
    num_tokens = 120
    patches = torch.eye(num_tokens)
    patches[28] = patches[29]
    features = images(torch.arange(num_tokens, 0, -1.0)[None], patches[None])
    assert reducer(important=0.29)(features, torch.tensor([100])).keep[0, 28]
