"""What SCOPE promises: tokens that are attended to and cover what no kept token covers."""

import math

import pytest
import torch

from adavtp.modeling.reducers.base import build_reducer
from adavtp.modeling.reducers.scope import SCOPEReducer
from adavtp.modeling.vision.features import VisionFeatures
from tiny_features import MAKING_LAYER, attention_from, features_of, head_mean_of_cls, tiny_features
from tiny_models import tiny_config


def reducer(**parameters: float) -> SCOPEReducer:
    return build_reducer("scope", tiny_config(), **parameters)


def kept_by_definition(features: VisionFeatures, image: int, num_keep: int, alpha: float) -> list[int]:
    """Every gain anew at every step, one pair of tokens after another."""
    x = features.patches[image].double().tolist()
    attention = head_mean_of_cls(features.attention[MAKING_LAYER], image)

    def cosine(one: list[float], other: list[float]) -> float:
        product = sum(a * b for a, b in zip(one, other, strict=True))
        return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))

    chosen: list[int] = []
    while len(chosen) < num_keep:
        worth = {}
        for token in set(range(len(x))) - set(chosen):
            covered = [max([0.0, *(cosine(own, x[other]) for other in chosen)]) for own in x]
            gain = sum(max(0.0, cosine(own, x[token]) - before) for own, before in zip(x, covered, strict=True))
            worth[token] = gain * attention[token] ** alpha
        chosen.append(max(worth, key=lambda token: worth[token]))
    return sorted(chosen)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.5])
def test_the_largest_product_of_gain_and_attention_joins_next(alpha: float) -> None:
    features = tiny_features(3, 16)
    for num_keep in (1, 2, 5, 11):
        positions = reducer(alpha=alpha)(features, torch.full((3,), num_keep)).positions
        expected = [kept_by_definition(features, image, num_keep, alpha) for image in range(3)]
        assert positions.tolist() == expected


def test_what_is_covered_counts_no_more() -> None:
    # Three tokens in one direction, more attended than the two that stand alone: one of them stands for all.
    patches = torch.eye(5)[[0, 0, 0, 1, 2]][None]
    attention = {MAKING_LAYER: attention_from(torch.tensor([[0.5, 0.6, 0.4, 0.2, 0.1]]))}
    features = features_of(patches, attention=attention)
    kept = [reducer()(features, torch.tensor([count])).positions[0].tolist() for count in (1, 2, 3, 4)]
    assert kept == [[1], [1, 3], [1, 3, 4], [0, 1, 3, 4]]


def test_a_larger_budget_adds_to_a_smaller_one() -> None:
    features = tiny_features(1, 16)
    kept = torch.cat([reducer()(features, torch.tensor([count])).keep for count in range(1, 17)])
    assert (kept[1:] | ~kept[:-1]).all()
