"""What the CLS-attention reducer promises: the K patches that CLS looks at most, whatever shares the batch."""

import math
import random

import numpy as np
import pytest
import torch

from adavtp import AdaVTPConfig
from adavtp.modeling.reducers.base import build_reducer
from adavtp.modeling.reducers.cls_attention import CLSAttentionReducer
from adavtp.modeling.vision.features import VisionFeatures
from adavtp.modeling.vision.tower import TowerAttention, tower_layers
from tiny_models import NUM_PATCHES, tiny_config, tiny_model

# The tiny tower has layers 0, 1 and 2, and its features are those of the last but one.
MAKING_LAYER = 1


def features_of(
    attention: TowerAttention, layer: int = MAKING_LAYER, dtype: torch.dtype = torch.float32
) -> VisionFeatures:
    """Images with this attention and random patches."""
    num_images, _, num_tokens, _ = attention.keys.shape
    patches = torch.randn(num_images, num_tokens, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    positions = torch.arange(num_tokens).expand(num_images, -1)
    return VisionFeatures(patches, positions, attention={layer: attention}, num_patches=NUM_PATCHES)


def random_attention(num_images: int, num_tokens: int = NUM_PATCHES, seed: int = 0) -> TowerAttention:
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(num_images, 4, 8, generator=generator)
    cls_key = torch.randn(num_images, 4, 8, generator=generator)
    return TowerAttention(query, cls_key, torch.randn(num_images, 4, num_tokens, 8, generator=generator))


def attention_from(scores: list[list[float]]) -> TowerAttention:
    """Attention of one head of width 1 whose row of CLS is `scores`, the remainder to 1 going to CLS."""
    keys = torch.tensor(scores, dtype=torch.float64)
    cls_key = (1 - keys.sum(dim=-1)).log()
    return TowerAttention(
        torch.ones(len(scores), 1, 1), cls_key[:, None, None].float(), keys.log()[:, None, :, None].float()
    )


def head_mean(attention: TowerAttention) -> np.ndarray:
    """The definition, in loops: mean over heads of softmax(q k / sqrt(d)) over CLS and patches."""
    num_images, heads, num_tokens, width = attention.keys.shape
    mean = np.zeros((num_images, num_tokens))
    for image in range(num_images):
        for head in range(heads):
            query = attention.query[image, head].double().numpy()
            keys = [attention.cls_key[image, head].double().numpy(), *attention.keys[image, head].double().numpy()]
            weights = [math.exp(float(query @ key) / math.sqrt(width)) for key in keys]
            mean[image] += np.array(weights[1:]) / sum(weights) / heads
    return mean


def reducer(config: AdaVTPConfig | None = None, **parameters: int) -> CLSAttentionReducer:
    return build_reducer("cls_attention", config or tiny_config(), **parameters)


def test_scores_are_the_logarithm_of_the_head_mean_of_the_row_of_cls() -> None:
    attention = random_attention(3)
    scores = reducer().scores(features_of(attention)).numpy()
    np.testing.assert_allclose(scores, np.log(head_mean(attention)), rtol=1e-4)


def test_the_most_attended_patches_stay_in_spatial_order() -> None:
    attention = random_attention(3)
    selection = reducer()(features_of(attention), torch.tensor([1, 5, 11]))
    for image, count in enumerate([1, 5, 11]):
        best = sorted(np.argsort(-head_mean(attention)[image])[:count].tolist())
        assert selection.positions[image].tolist() == best + [-1] * (11 - count)
    assert selection.features is None


def test_what_counts_is_the_mean_and_not_one_head() -> None:
    # Head 0 likes patch 0 best, head 1 patch 1; both like patch 2 second best, and it has the largest mean.
    logits = torch.tensor([[2.0, -9.0, 1.8], [-9.0, 2.0, 1.8]])
    attention = TowerAttention(torch.ones(1, 2, 1), torch.zeros(1, 2, 1), logits[None, :, :, None])
    assert reducer()(features_of(attention), torch.tensor([1])).positions.tolist() == [[2]]


def test_of_equally_attended_patches_the_earlier_stays() -> None:
    attention = attention_from([[0.1, 0.2, 0.1, 0.2, 0.1, 0.2]])
    positions = [
        reducer()(features_of(attention), torch.tensor([count])).positions[0].tolist() for count in (1, 2, 4, 6)
    ]
    assert positions == [[1], [1, 3], [0, 1, 3, 5], [0, 1, 2, 3, 4, 5]]


def test_exactly_k_stay_for_any_k() -> None:
    draw = random.Random(0)
    for seed in range(20):
        counts = [draw.randint(1, NUM_PATCHES) for _ in range(4)]
        selection = reducer()(features_of(random_attention(4, seed=seed)), torch.tensor(counts))
        assert selection.num_keep.tolist() == counts


def test_a_batch_is_each_image_alone() -> None:
    attention, counts = random_attention(4), torch.tensor([3, 7, 1, 16])
    features = features_of(attention)
    together = reducer()(features, counts).keep
    for image in range(4):
        row = torch.tensor([image])
        assert torch.equal(reducer()(features.images(row, NUM_PATCHES), counts[row]).keep, together[row])


def test_bfloat16_keeps_exactly_k() -> None:
    attention = random_attention(2)
    half = TowerAttention(attention.query.bfloat16(), attention.cls_key.bfloat16(), attention.keys.bfloat16())
    selection = reducer()(features_of(half, dtype=torch.bfloat16), torch.tensor([4, 9]))
    assert selection.num_keep.tolist() == [4, 9]
    assert reducer().scores(features_of(half)).dtype == torch.float32


def test_tokens_that_another_reducer_left_are_ranked_among_themselves() -> None:
    attention = random_attention(1)
    index = torch.tensor([[1, 4, 5, 9, 12]])
    features = features_of(attention.take(index))
    features.positions = index
    best = np.argsort(-head_mean(attention.take(index))[0])[:2]
    assert reducer()(features, torch.tensor([2])).positions[0].tolist() == sorted(best.tolist())


def test_attention_that_underflows_has_finite_scores() -> None:
    attention = TowerAttention(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.tensor([[[[0.0], [300.0], [0.0]]]]))
    assert reducer().scores(features_of(attention)).isfinite().all()
    config = tiny_config(min_token_entropy=0.5)
    assert reducer(config)(features_of(attention), torch.tensor([1])).num_keep.tolist() == [3]


def test_a_floor_on_the_entropy_adds_tokens() -> None:
    # Two equal scores have the largest entropy that two can have, one score has none.
    attention = attention_from([[0.3, 0.1, 0.3, 0.1]])
    assert reducer(tiny_config(min_token_entropy=0.9))(features_of(attention), torch.tensor([1])).keep.tolist() == [
        [True, False, True, False]
    ]


@pytest.mark.parametrize("layer", [0, 1, 2])
@torch.no_grad()
def test_a_layer_of_the_tower_can_be_chosen(layer: int) -> None:
    chosen = random_attention(2, seed=layer)
    features = features_of(chosen, layer)
    features.attention[(layer + 1) % 3] = random_attention(2, seed=9)
    model = reducer(layer=layer)
    assert model.attention_layers == (layer,)
    np.testing.assert_allclose(model.scores(features).numpy(), np.log(head_mean(chosen)), rtol=1e-4)


@pytest.mark.parametrize(("feature_layer", "making"), [(-2, 1), (-1, 2), ([1, -1], 2), (1, 0)])
def test_by_default_the_layer_that_made_the_features_ranks(feature_layer: int | list[int], making: int) -> None:
    assert reducer(tiny_config(vision_feature_layer=feature_layer)).attention_layers == (making,)


@torch.no_grad()
def test_scores_are_those_of_the_towers_own_attention() -> None:
    tower = tiny_model().model.vision_tower
    tower.set_attn_implementation("eager")
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = tower(pixel_values, output_attentions=True, output_hidden_states=True)
    for layer in range(3):
        attention = TowerAttention.of_layer(tower_layers(tower)[layer], output.hidden_states[layer], has_cls=True)
        expected = output.attentions[layer][:, :, 0, 1:].mean(dim=1).log()
        torch.testing.assert_close(reducer(layer=layer).scores(features_of(attention, layer)), expected)


@pytest.mark.parametrize("layer", [-1, 3, 0.5, "1"])
def test_a_layer_that_is_not_there_is_refused(layer: int | float | str) -> None:
    with pytest.raises(ValueError, match="`layer` is .*allowed are 0 to 2"):
        reducer(layer=layer)


def test_a_tower_without_cls_is_refused() -> None:
    with pytest.raises(ValueError, match="CLS"):
        reducer(tiny_config("siglip"))


def test_features_that_no_layer_made_are_refused() -> None:
    with pytest.raises(ValueError, match="`vision_feature_layer` is 0"):
        reducer(tiny_config(vision_feature_layer=0))
