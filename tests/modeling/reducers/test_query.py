"""What the query reducer promises: the tokens nearest to the prompt's text in the decoder's space."""

import math

import torch

from adavtp.modeling.reducers.query import QueryReducer
from tiny_features import features_of, tiny_features
from tiny_models import tiny_config

CONFIG = tiny_config()


def cosine(one: list[float], other: list[float]) -> float:
    product = sum(x * y for x, y in zip(one, other, strict=True))
    return product / math.sqrt(sum(x * x for x in one) * sum(y * y for y in other))


def test_it_keeps_the_tokens_with_the_largest_cosine() -> None:
    features = tiny_features()
    num_keep = [1, 6, 16]
    keep = QueryReducer(CONFIG)(features, torch.tensor(num_keep)).keep
    for image, count in enumerate(num_keep):
        question = features.question[image].tolist()
        cosines = [cosine(token, question) for token in features.patches[image].tolist()]
        best = sorted(range(16), key=lambda token: (-cosines[token], token))[:count]
        assert keep[image].nonzero()[:, 0].tolist() == sorted(best)


def test_scores_are_cosines_over_the_temperature() -> None:
    features = tiny_features()
    expected = [
        [cosine(token, question) / 0.07 for token in image]
        for image, question in zip(features.patches.tolist(), features.question.tolist(), strict=True)
    ]
    assert torch.allclose(QueryReducer(CONFIG).scores(features), torch.tensor(expected), atol=1e-4)
    hot = QueryReducer(CONFIG, temperature=0.7).scores(features)
    assert torch.allclose(hot, torch.tensor(expected) / 10, atol=1e-5)


def test_another_question_is_another_choice() -> None:
    features = tiny_features(1)
    reducer = QueryReducer(CONFIG)
    other = features_of(features.patches, question=-features.question)
    keep, opposite = (reducer(asked, torch.tensor([8])).keep for asked in (features, other))
    assert torch.equal(keep, ~opposite)


def test_an_entropy_floor_keeps_more_where_one_token_stands_out() -> None:
    patches = torch.eye(8)[None].expand(2, -1, -1)
    question = torch.stack([torch.eye(8)[0], torch.ones(8)])
    reducer = QueryReducer(tiny_config(min_token_entropy=0.5))
    # Softmax of 1 / 0.07 against seven zeros leaves next to no entropy; of eight alike it is largest at any number.
    assert reducer(features_of(patches, question=question), torch.tensor([2, 2])).num_keep.tolist() == [8, 2]
