"""What the query reducer promises: the tokens nearest to the prompt's text in the decoder's space."""

import math

import pytest
import torch

from adavtp.modeling.reducers.query import QueryReducer
from adavtp.modeling.vision.features import VisionFeatures
from tiny_models import tiny_config

CONFIG = tiny_config()


def features_of(patches: torch.Tensor, question: torch.Tensor) -> VisionFeatures:
    positions = torch.arange(patches.shape[1]).expand(len(patches), -1)
    return VisionFeatures(patches, positions, question=question, num_patches=patches.shape[1])


def random_features(num_images: int = 3, num_tokens: int = 16, dtype: torch.dtype = torch.float32) -> VisionFeatures:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(num_images, num_tokens, 12, generator=generator).to(dtype)
    return features_of(patches, torch.randn(num_images, 12, generator=generator).to(dtype))


def cosine(one: list[float], other: list[float]) -> float:
    product = sum(x * y for x, y in zip(one, other, strict=True))
    return product / math.sqrt(sum(x * x for x in one) * sum(y * y for y in other))


def test_it_keeps_the_tokens_with_the_largest_cosine() -> None:
    features = random_features()
    num_keep = [1, 6, 16]
    keep = QueryReducer(CONFIG)(features, torch.tensor(num_keep)).keep
    for image, count in enumerate(num_keep):
        question = features.question[image].tolist()
        cosines = [cosine(token, question) for token in features.patches[image].tolist()]
        best = sorted(range(16), key=lambda token: (-cosines[token], token))[:count]
        assert keep[image].nonzero()[:, 0].tolist() == sorted(best)


def test_scores_are_cosines_over_the_temperature() -> None:
    features = random_features()
    expected = [
        [cosine(token, question) / 0.07 for token in image]
        for image, question in zip(features.patches.tolist(), features.question.tolist(), strict=True)
    ]
    assert torch.allclose(QueryReducer(CONFIG).scores(features), torch.tensor(expected), atol=1e-4)
    hot = QueryReducer(CONFIG, temperature=0.7).scores(features)
    assert torch.allclose(hot, torch.tensor(expected) / 10, atol=1e-5)


def test_equal_cosines_go_to_the_earlier_token() -> None:
    features = features_of(torch.ones(1, 8, 4), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    for num_keep in range(1, 9):
        keep = QueryReducer(CONFIG)(features, torch.tensor([num_keep])).keep
        assert keep[0].tolist() == [True] * num_keep + [False] * (8 - num_keep)


def test_another_question_is_another_choice() -> None:
    features = random_features(num_images=1)
    reducer = QueryReducer(CONFIG)
    other = features_of(features.patches, -features.question)
    keep, opposite = (reducer(asked, torch.tensor([8])).keep for asked in (features, other))
    assert torch.equal(keep, ~opposite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_k_for_every_image_of_a_batch_and_the_same_as_alone(dtype: torch.dtype) -> None:
    features = random_features(40, 30, dtype)
    num_keep = torch.randint(1, 31, (40,), generator=torch.Generator().manual_seed(1))
    reducer = QueryReducer(CONFIG)
    keep = reducer(features, num_keep).keep
    assert torch.equal(keep.sum(dim=-1), num_keep)
    rows = [torch.tensor([row]) for row in range(40)]
    assert torch.equal(keep, torch.cat([reducer(features.images(row, 30), num_keep[row]).keep for row in rows]))


def test_an_entropy_floor_keeps_more_where_one_token_stands_out() -> None:
    patches = torch.eye(8)[None].expand(2, -1, -1)
    question = torch.stack([torch.eye(8)[0], torch.ones(8)])
    reducer = QueryReducer(tiny_config(min_token_entropy=0.5))
    # Softmax of 1 / 0.07 against seven zeros leaves next to no entropy; of eight alike it is largest at any number.
    assert reducer(features_of(patches, question), torch.tensor([2, 2])).num_keep.tolist() == [8, 2]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="`temperature` is"):
        QueryReducer(CONFIG, temperature=temperature)
