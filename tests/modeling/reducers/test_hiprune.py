"""What HiPrune promises: anchors of a middle layer, their neighbours, and registers of the layer of the features."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionModel, SiglipVisionModel

from adavtp.modeling.budget.top_k import top_k_mask
from adavtp.modeling.reducers.base import build_reducer
from adavtp.modeling.reducers.hiprune import HiPruneReducer
from adavtp.modeling.vision.encode import encode_image
from adavtp.modeling.vision.features import VisionFeatures
from tiny_families import Writer, batch_of, budgeted, stock_model
from tiny_features import tiny_features
from tiny_models import NUM_PATCHES, tiny_config, tiny_vision_config

# Of the tiny tower's three layers the first chooses anchors, and the second made the features.
MIDDLE, DEEP = 0, 1


def reducer(**parameters: float) -> HiPruneReducer:
    return build_reducer("hiprune", tiny_config(), **parameters)


def best(scores: torch.Tensor, number: int) -> list[int]:
    return scores.argsort(descending=True)[:number].tolist()


def kept_by_definition(features: VisionFeatures, image: int, num_keep: int, alpha: float, width: int) -> list[int]:
    """Three sets, one after another; tokens are numbered row by row."""
    middle, deep = (features.attention[layer].received[image].mean(dim=0) for layer in (MIDDLE, DEEP))
    number = len(middle)
    anchors = best(middle, min(round(num_keep * alpha / 5), num_keep // 5))
    kept = set()
    for anchor in anchors:
        for step in (0, -1, 1, -width, width):
            kept.add(min(max(anchor + step, 0), number - 1))
    registers = [token for token in best(deep, number) if token not in kept]
    return sorted(kept | set(registers[: num_keep - len(kept)]))


@pytest.mark.parametrize("alpha", [0.1, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("grid", [(4, 4), (6, 8)])
def test_anchors_buffers_and_registers_stay(grid: tuple[int, int], alpha: float) -> None:
    number = grid[0] * grid[1]
    features = replace(tiny_features(3, number), grids=torch.tensor([grid] * 3))
    for num_keep in (1, 5, 13, number - 1):
        positions = reducer(alpha=alpha)(features, torch.full((3,), num_keep)).positions
        expected = [kept_by_definition(features, image, num_keep, alpha, grid[1]) for image in range(3)]
        assert positions.tolist() == expected


def test_neighbours_that_were_dropped_before_are_not_there() -> None:
    whole = tiny_features(1, 16)
    middle, deep = torch.zeros(2, 1, 4, 16)
    middle[..., 5], deep[..., 15] = 1.0, 1.0
    for layer, received in ((MIDDLE, middle), (DEEP, deep)):
        whole.attention[layer].received = received
    left = torch.tensor([[0, 5, 6, 9, 11, 15]])
    features = replace(
        whole,
        patches=whole.patches[:, left[0]],
        positions=left,
        attention={layer: attention.take(left) for layer, attention in whole.attention.items()},
    )
    # Of 5 - 4, 5 - 1, 5 + 1 and 5 + 4 the tokens 6 and 9 are left.
    kept = reducer(alpha=1.0)(features, torch.tensor([5])).keep[0]
    assert left[0, kept].tolist() == [0, 5, 6, 9, 15]


@torch.no_grad()
@pytest.mark.parametrize(("vision", "tower_class"), [("clip", CLIPVisionModel), ("siglip", SiglipVisionModel)])
def test_what_a_token_receives_is_the_stock_tower_s_column_mean(vision: str, tower_class: type) -> None:
    config = tiny_config(vision)
    torch.manual_seed(0)
    tower = tower_class._from_config(config.vision_config, attn_implementation="eager").eval()
    pixels = torch.randn(2, 3, 32, 32)
    layers = build_reducer("hiprune", config).attention_layers
    features = encode_image(tower, pixels, config, attention_layers=layers, received_layers=layers)
    stock = tower(pixels, output_attentions=True).attentions
    first = int(config.has_cls)
    assert layers == (MIDDLE, DEEP)
    for layer in layers:
        expected = stock[layer].mean(dim=2)[..., first:]
        assert expected.shape[-1] == NUM_PATCHES
        torch.testing.assert_close(features.attention[layer].received, expected, atol=1e-6, rtol=1e-5)


def test_anchors_are_of_the_ninth_layer_of_24() -> None:
    for num_layers, middle in ((24, 8), (27, 9), (32, 11), (3, 0), (2, 0)):
        config = tiny_config(vision_config=tiny_vision_config(num_layers=num_layers), vision_feature_layer=-1)
        assert build_reducer("hiprune", config).middle_layer == middle
        assert build_reducer("hiprune", config, layer=1).middle_layer == 1
    low = tiny_config(vision_config=tiny_vision_config(num_layers=24), vision_feature_layer=3)
    assert build_reducer("hiprune", low).attention_layers == (2,)


def test_in_published_numbers_of_tokens_a_tenth_are_anchors_and_buffers() -> None:
    for num_keep, number in ((64, 1), (128, 3), (192, 4), (125, 2), (175, 4)):
        features = replace(tiny_features(1, 576), num_patches=576)
        middle = torch.zeros(1, 4, 576)
        # Anchors in descending order far from each other, and all registers at the end.
        chosen = [30 + 60 * place for place in range(6)]
        for rank, token in enumerate(chosen):
            middle[..., token] = 1.0 - 0.1 * rank
        deep = torch.arange(576.0).expand(1, 4, -1) / 576
        features.attention[MIDDLE].received, features.attention[DEEP].received = middle, deep
        kept = reducer()(features, torch.tensor([num_keep])).positions[0].tolist()
        assert [token in kept for token in chosen] == [rank < number for rank in range(6)]


@torch.no_grad()
def test_in_a_family_with_cls_too_registers_are_what_all_tokens_look_at() -> None:
    prompt = Writer("internvl").prompt(images=((2, 2),))
    batch = batch_of("internvl", [prompt])
    model, stock = budgeted("internvl"), deepcopy(stock_model("internvl"))
    stock.set_attn_implementation("eager")
    vision = stock.model.vision_tower
    layer = build_reducer("hiprune", model.config).attention_layers[-1]
    received = vision(batch["pixel_values"], output_attentions=True).attentions[layer].mean(dim=(1, 2))[:, 1:]
    # A token is made of the patches of a square.
    height, width = (
        image // patch for image, patch in zip(vision.config.image_size, vision.config.patch_size, strict=True)
    )
    pooled = torch.nn.functional.avg_pool2d(received.view(-1, 1, height, width), 2).flatten(1)
    reducer = {"name": "hiprune", "alpha": 0.0}
    keep = model.select_tokens(**batch, token_budget=0.5, reducer=reducer).keep
    assert torch.equal(keep, top_k_mask(pooled, keep.shape[1] // 2))
    assert not torch.equal(keep, model.select_tokens(**batch, token_budget=0.5, reducer="cls_attention").keep)
