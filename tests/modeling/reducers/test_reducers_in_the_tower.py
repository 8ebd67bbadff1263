"""What every reducer inside the vision tower promises: exactly K tokens, and the tower itself where nothing leaves."""

from typing import Any

import pytest
import torch

from adavtp import AdaVTPConfig
from adavtp.modeling.reducers.base import REDUCERS, build_reducer
from adavtp.modeling.vision.encode import encode_image
from adavtp.modeling.vision.encoder_reducer import EncoderReducer
from tiny_models import NUM_PATCHES, tiny_config
from tiny_towers import PASS_IDS, PASSES, TOWERS, alone, counts, tiny_images, tiny_pass, whole_run

NAMES = sorted(name for name in REDUCERS if REDUCERS[name].stage == "encoder")
# Two layers of the tiny tower run, and each can merge half of what enters it.
LEAST = {"tome": 4, "token_fusion": 4}

every_reducer = pytest.mark.parametrize("name", NAMES)
every_tower = pytest.mark.parametrize("vision", TOWERS)


def reducer(name: str, config: AdaVTPConfig, **parameters: Any) -> EncoderReducer:
    """One whose weights, if it has any, tell tokens apart."""
    module = build_reducer(name, config, **parameters).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return module


@torch.no_grad()
@every_reducer
@every_tower
@pytest.mark.parametrize("fields", PASSES, ids=PASS_IDS)
def test_exactly_k_tokens_are_left_and_a_full_budget_is_the_plain_tower(
    name: str, vision: str, fields: dict[str, Any]
) -> None:
    tower = tiny_pass(vision, **fields)
    module = reducer(name, tower.config)
    for num_keep in (LEAST.get(name, 1), 6, 11, NUM_PATCHES - 1, NUM_PATCHES):
        encoded = module(tower, tiny_images(), counts(num_keep))
        assert encoded.sequence.shape == (2, tower.num_before + num_keep + tower.num_after, 32)
        assert all(len({*places} & {*range(NUM_PATCHES)}) == num_keep for places in encoded.positions.tolist())
        assert encoded.gates is None and encoded.loss is None
    assert torch.equal(encoded.sequence, whole_run(tower, tiny_images()))
    assert encoded.positions.tolist() == [list(range(NUM_PATCHES))] * 2
    if not fields["budget"]:
        plain = encode_image(tower.tower, tiny_images(), tower.config)
        assert torch.equal(tower.patches(encoded.sequence), plain.patches)


@torch.no_grad()
@every_reducer
@every_tower
def test_an_image_does_not_notice_what_shares_its_batch_nor_a_read_only_budget(name: str, vision: str) -> None:
    plain = tiny_pass(vision)
    module = reducer(name, plain.config)
    expected = module(plain, tiny_images(3), counts(6, 3))
    for place in ("first", "last"):
        tower = tiny_pass(vision, num_images=3, budget=True, budget_token_place=place)
        together = module(tower, tiny_images(3), counts(6, 3))
        torch.testing.assert_close(tower.without_budget(together.sequence), expected.sequence, atol=1e-5, rtol=1e-5)
        assert torch.equal(together.positions, expected.positions)
        for image in range(3):
            single = module(alone(tower, image), tiny_images(3)[image : image + 1], counts(6, 1))
            assert torch.equal(single.positions[0], together.positions[image])
            torch.testing.assert_close(single.sequence[0], together.sequence[image], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@every_reducer
@every_tower
def test_a_blank_picture_has_numbers_for_tokens_and_exactly_k_of_them(name: str, vision: str) -> None:
    tower = tiny_pass(vision)
    module = reducer(name, tower.config)
    for value in (0.0, 1.0):
        encoded = module(tower, torch.full_like(tiny_images(), value), counts(6))
        assert encoded.sequence.isfinite().all() and encoded.sequence.shape[1] == tower.num_before + 6
        assert all(len({*places} & {*range(NUM_PATCHES)}) == 6 for places in encoded.positions.tolist())


@torch.no_grad()
@every_reducer
@every_tower
def test_bfloat16_keeps_exactly_k_and_stays_bfloat16(name: str, vision: str) -> None:
    tower = tiny_pass(vision, dtype=torch.bfloat16, budget=True)
    for dtype in (torch.float32, torch.bfloat16):
        module = reducer(name, tower.config).to(dtype)
        for images in (tiny_images(), tiny_images().bfloat16()):
            encoded = module(tower, images, counts(7))
            assert encoded.sequence.dtype == torch.bfloat16 and encoded.sequence.isfinite().all()
            assert encoded.positions.shape == (2, 7)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dynamicvit", "token_fusion", "tome"])
def test_the_official_order_holds_the_tokens_of_the_spatial_one(name: str) -> None:
    tower = tiny_pass("siglip", vision_feature_layer=-1)
    spatial, official = (reducer(name, tower.config, order=order) for order in ("spatial", "official"))
    encoded = official(tower, tiny_images(), counts(6))
    by_place, in_order = (
        module.selection(of, tower.patches(of.sequence), NUM_PATCHES)
        for module, of in ((spatial, spatial(tower, tiny_images(), counts(6))), (official, encoded))
    )
    assert torch.equal(by_place.positions, in_order.positions)
    assert torch.equal(in_order.features, tower.patches(encoded.sequence))
    for image, places in enumerate(encoded.positions.tolist()):
        assert places != sorted(places)
        ranks = [sorted(places).index(place) for place in places]
        torch.testing.assert_close(by_place.features[image, ranks], in_order.features[image], atol=1e-5, rtol=1e-5)


@every_reducer
def test_several_feature_layers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"`vision_feature_layer` is \[-2, -1\]"):
        build_reducer(name, tiny_config(vision_feature_layer=[-2, -1]))
    build_reducer(name, tiny_config(vision_feature_layer=[-2]))
