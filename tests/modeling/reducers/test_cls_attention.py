"""What the CLS-attention reducer promises: the K patches that CLS looks at most, by the mean over heads."""

import numpy as np
import pytest
import torch

from adavtp import AdaVTPConfig
from adavtp.modeling.reducers.base import build_reducer
from adavtp.modeling.reducers.cls_attention import CLSAttentionReducer
from adavtp.modeling.vision.features import VisionFeatures
from adavtp.modeling.vision.tower import TowerAttention, tower_layers
from tiny_features import MAKING_LAYER, attention_from, features_of, head_mean_of_cls, tiny_features
from tiny_models import tiny_config, tiny_model


def images(attention: TowerAttention, layer: int = MAKING_LAYER) -> VisionFeatures:
    """Images with this attention in a layer."""
    return features_of(attention.keys.mean(dim=1), attention={layer: attention})


def reducer(config: AdaVTPConfig | None = None, **parameters: int) -> CLSAttentionReducer:
    return build_reducer("cls_attention", config or tiny_config(), **parameters)


def test_the_most_attended_patches_stay_in_spatial_order() -> None:
    features = tiny_features(3)
    selection = reducer()(features, torch.tensor([1, 5, 11]))
    for image, count in enumerate([1, 5, 11]):
        scores = head_mean_of_cls(features.attention[MAKING_LAYER], image)
        best = sorted(np.argsort(-scores)[:count].tolist())
        assert selection.positions[image].tolist() == best + [-1] * (11 - count)
    assert selection.features is None


def test_what_counts_is_the_mean_and_not_one_head() -> None:
    # Head 0 likes patch 0 best, head 1 patch 1; both like patch 2 second best, and it has the largest mean.
    logits = torch.tensor([[2.0, -9.0, 1.8], [-9.0, 2.0, 1.8]])
    attention = TowerAttention(torch.ones(1, 2, 1), torch.zeros(1, 2, 1), logits[None, :, :, None])
    assert reducer()(images(attention), torch.tensor([1])).positions.tolist() == [[2]]


def test_attention_that_underflows_has_finite_scores() -> None:
    attention = TowerAttention(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.tensor([[[[0.0], [300.0], [0.0]]]]))
    assert reducer().scores(images(attention)).isfinite().all()
    config = tiny_config(min_token_entropy=0.5)
    assert reducer(config)(images(attention), torch.tensor([1])).num_keep.tolist() == [3]


def test_a_floor_on_the_entropy_adds_tokens() -> None:
    # Two equal scores have the largest entropy that two can have, one score has none.
    features = images(attention_from(torch.tensor([[0.3, 0.1, 0.3, 0.1]])))
    module = reducer(tiny_config(min_token_entropy=0.9))
    assert module(features, torch.tensor([1])).positions.tolist() == [[0, 2]]


@pytest.mark.parametrize("layer", [None, 0, 1, 2])
@torch.no_grad()
def test_scores_are_the_logarithm_of_the_head_mean_in_the_chosen_layer(layer: int | None) -> None:
    features = tiny_features(2)
    module = reducer(layer=layer)
    (chosen,) = module.attention_layers
    assert chosen == (MAKING_LAYER if layer is None else layer)
    expected = np.log([head_mean_of_cls(features.attention[chosen], image) for image in range(2)])
    np.testing.assert_allclose(module.scores(features).numpy(), expected, rtol=1e-4)


@torch.no_grad()
def test_scores_are_those_of_the_towers_own_attention() -> None:
    tower = tiny_model().model.vision_tower
    tower.set_attn_implementation("eager")
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = tower(pixel_values, output_attentions=True, output_hidden_states=True)
    for layer in range(3):
        attention = TowerAttention.of_layer(tower_layers(tower)[layer], output.hidden_states[layer], has_cls=True)
        expected = output.attentions[layer][:, :, 0, 1:].mean(dim=1).log()
        torch.testing.assert_close(reducer(layer=layer).scores(images(attention, layer)), expected)
