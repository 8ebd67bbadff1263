"""What HiRED promises: the most attended patches, and a picture's budget on the tiles with something to see."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from adavtp.modeling.reducers.base import build_reducer
from adavtp.modeling.reducers.hired import HiREDReducer, bounded_shares, tile_of
from adavtp.modeling.vision.features import VisionFeatures
from tiny_features import MAKING_LAYER, attention_from
from tiny_models import NUM_PATCHES, tiny_config

SIDE = 4  # 16 patches


def images(
    first_layer: torch.Tensor, scores: torch.Tensor, sample: list[int] | None, dtype: torch.dtype = torch.float32
) -> VisionFeatures:
    """Images with these CLS attentions, `[num_images, num_tokens]` each, up to a factor."""
    num_images, num_tokens = scores.shape
    return VisionFeatures(
        torch.zeros(num_images, num_tokens, 4, dtype=dtype),
        torch.arange(num_tokens).expand(num_images, -1),
        attention={0: attention_from(first_layer, dtype), MAKING_LAYER: attention_from(scores, dtype)},
        sample=None if sample is None else torch.tensor(sample),
        num_patches=NUM_PATCHES,
    )


def random_images(sample: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> VisionFeatures:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(NUM_PATCHES, generator=generator) + 1.0 for _ in range(2 * len(sample))]
    first_layer, scores = torch.stack(orders).view(2, len(sample), -1)
    return images(first_layer, scores, sample, dtype)


def reducer(**parameters: Any) -> HiREDReducer:
    return build_reducer("hired", tiny_config(), **parameters)


def best(features: VisionFeatures, image: int, count: int) -> list[int]:
    scores = features.attention[MAKING_LAYER].keys[image, 0, :, 0].numpy()
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def kept(features: VisionFeatures, num_keep: list[int], **parameters: Any) -> list[int]:
    return reducer(**parameters)(features, torch.tensor(num_keep)).num_keep.tolist()


def picture(tokens: dict[int, float], num_images: int) -> torch.Tensor:
    """First-layer attention of a whole picture with much of it at some patches, and of `num_images` - 1 tiles."""
    first_layer = torch.ones(num_images, NUM_PATCHES)
    for patch, score in tokens.items():
        first_layer[0, patch] = score
    return first_layer


# A single image


def test_an_image_keeps_its_most_attended_patches_in_spatial_order() -> None:
    features = random_images([0, 0, 1])
    selection = reducer()(features, torch.tensor([3, 8, 5]))
    for image, count in enumerate([3, 8, 5]):
        assert selection.positions[image].tolist() == best(features, image, count) + [-1] * (8 - count)
    assert reducer().attention_layers == (MAKING_LAYER,)


# A whole picture and its tiles


def test_the_whole_picture_gets_half_and_tiles_share_by_the_best_patches_in_their_regions() -> None:
    # floor(16 x (1 - 0.5)) = 8 best patches; a 2 x 2 grid of tiles of 2 x 2 patches. Tile 0 (patches 0, 1, 4, 5) has
    # 4 of the best, tile 1 (2, 3, 6, 7) 1, tile 2 (8, 9, 12, 13) 2 and tile 3 (10, 11, 14, 15) 1.
    first_layer = picture(dict.fromkeys([0, 1, 4, 5, 7, 8, 13, 10], 5.0), 5)
    features = images(first_layer, torch.rand(5, 16) + 0.1, [0] * 5)
    # 10 x 4/8, 1/8, 2/8 and 1/8 are 5, 1.25, 2.5 and 1.25: one is left over, for the remainder of 0.5.
    assert kept(features, [4] * 5, tile_grid=(2, 2)) == [10, 5, 1, 3, 1]


def test_regions_are_blocks_and_not_strips_of_rows() -> None:
    # The left half of the picture: strips of four patches would give every tile the same.
    first_layer = picture(dict.fromkeys([0, 1, 4, 5, 8, 9, 12, 13], 5.0), 5)
    features = images(first_layer, torch.rand(5, 16) + 0.1, [0] * 5)
    assert kept(features, [4] * 5, tile_grid=[2, 2]) == [10, 4, 1, 4, 1]


def test_tiles_are_counted_row_by_row_in_grids_that_do_not_divide_the_picture() -> None:
    # Three columns of tiles on four columns of patches: the centres 1/2, 3/2, 5/2, 7/2 of 4 lie in thirds 0, 1, 1, 2.
    # Of the whole picture's tokens floor(16 x 0.15) = 2 are best, in column 1 or 3 and rows 0 and 1.
    for column, counts in ((1, [16, 1, 7, 1, 1, 1, 1]), (3, [16, 1, 1, 7, 1, 1, 1])):
        features = images(picture({column: 9.0, 4 + column: 8.0}, 7), torch.rand(7, 16) + 0.1, [0] * 7)
        assert kept(features, [4] * 7, tile_grid=(2, 3), alpha=0.85) == counts


def test_sharing_by_attention_adds_up_attention_itself() -> None:
    # Patch 0 has 8 times the attention of any other, so that tile 0 has 11 of 23 and each other tile 4.
    features = images(picture({0: 8.0}, 5), torch.rand(5, 16) + 0.1, [0] * 5)
    # 30 x 11/23 is 14.35 and 30 x 4/23 is 5.22; 10 x 11/23 is 4.78 and 10 x 4/23 is 1.74.
    assert kept(features, [9, 9, 9, 9, 10], tile_grid=(2, 2), share="attention") == [16, 15, 5, 5, 5]
    assert kept(features, [4] * 5, tile_grid=(2, 2), share="attention") == [10, 5, 2, 2, 1]


def test_shares_of_equal_remainder_go_to_the_earlier_tile() -> None:
    features = images(picture({}, 5), torch.rand(5, 16) + 0.1, [0] * 5)
    assert kept(features, [4, 4, 4, 4, 5], tile_grid=(2, 2), share="attention") == [10, 3, 3, 3, 2]


def test_tiles_with_nothing_to_see_still_keep_one_token() -> None:
    features = images(picture(dict.fromkeys(range(8), 5.0), 5), torch.rand(5, 16) + 0.1, [0] * 5)
    assert kept(features, [2] * 5, tile_grid=(2, 2)) == [5, 2, 1, 1, 1]
    assert kept(features, [1] * 5, tile_grid=(2, 2)) == [1, 1, 1, 1, 1]


def test_what_a_full_tile_cannot_take_goes_to_the_others() -> None:
    # All attention on tile 0: it takes its 16, and the 14 that are left of 30 go to three tiles without any.
    features = images(picture(dict.fromkeys([0, 1, 4, 5], 5.0), 5), torch.rand(5, 16) + 0.1, [0] * 5)
    assert kept(features, [9, 9, 9, 9, 10], tile_grid=(2, 2), alpha=0.75) == [16, 16, 5, 5, 4]


def test_tiles_share_equally_where_no_best_patch_counts() -> None:
    features = random_images([0] * 5)
    assert kept(features, [2, 2, 2, 2, 4], tile_grid=(2, 2), alpha=1.0) == [8, 1, 1, 1, 1]
    assert kept(features, [12] * 5, tile_grid=(2, 2), alpha=1.0) == [16, 11, 11, 11, 11]


def test_the_whole_picture_keeps_at_least_one_token_and_makes_room_for_its_tiles() -> None:
    features = random_images([0] * 5)
    assert kept(features, [4] * 5, tile_grid=(2, 2), alpha=0.0)[0] == 1
    # 77 tokens of 80: four full tiles leave 13, and a tenth would be 7.
    assert kept(features, [16, 16, 16, 16, 13], tile_grid=(2, 2), alpha=0.1) == [13, 16, 16, 16, 16]


def test_the_tokens_that_stay_are_the_best_of_the_features_layer() -> None:
    features = random_images([0] * 5)
    selection = reducer(tile_grid=(2, 2))(features, torch.tensor([4] * 5))
    for image, count in enumerate(selection.num_keep.tolist()):
        assert selection.keep[image].nonzero()[:, 0].tolist() == best(features, image, count)
    assert reducer(tile_grid=(2, 2)).attention_layers == (0, MAKING_LAYER)


def test_every_prompt_keeps_exactly_its_total_and_single_images_their_own() -> None:
    draw = random.Random(0)
    for seed in range(40):
        rows, columns = draw.randint(1, 3), draw.randint(1, 3)
        sizes = [draw.choice([1, rows * columns + 1]) for _ in range(3)]
        sample = [prompt for prompt, size in enumerate(sizes) for _ in range(size)]
        num_keep = [draw.randint(1, draw.choice([2, NUM_PATCHES])) for _ in sample]
        share, alpha = draw.choice(["count", "attention"]), draw.random()
        features = random_images(sample, seed)
        counts = kept(features, num_keep, tile_grid=(rows, columns), alpha=alpha, share=share)
        assert all(1 <= count <= NUM_PATCHES for count in counts)
        for prompt, size in enumerate(sizes):
            own = [image for image, owner in enumerate(sample) if owner == prompt]
            assert sum(counts[image] for image in own) == sum(num_keep[image] for image in own)
            assert size > 1 or counts[own[0]] == num_keep[own[0]]


def test_shares_are_the_proportions_cut_at_their_bounds() -> None:
    draw = random.Random(0)
    for _ in range(50):
        weights = [draw.choice([0.1, 1.0, draw.random(), 50.0]) for _ in range(draw.randint(1, 6))]
        total = draw.uniform(len(weights), 10 * len(weights))
        shares = bounded_shares(torch.tensor([[total]]).double(), torch.tensor([weights]).double(), 10)[0].tolist()
        low, high = 0.0, 1000.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(min(max(middle * w, 1), 10) for w in weights) < total else (low, middle)
        np.testing.assert_allclose(shares, [min(max(high * w, 1), 10) for w in weights], rtol=1e-6)


def test_a_batch_of_prompts_is_each_alone() -> None:
    sample = [0, 0, 0, 1, 2, 2, 2]
    features, num_keep = random_images(sample), torch.tensor([3, 9, 5, 4, 2, 2, 7])
    together = reducer(tile_grid=(1, 2))(features, num_keep).keep
    for rows in ([0, 1, 2], [3], [4, 5, 6]):
        rows = torch.tensor(rows)
        alone = reducer(tile_grid=(1, 2))(features.images(rows, NUM_PATCHES), num_keep[rows]).keep
        assert torch.equal(alone, together[rows])


def test_images_that_are_not_a_picture_and_its_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 tiles.*one image or 5.*\[3, 1\]"):
        kept(random_images([0, 0, 0, 1]), [4] * 4, tile_grid=(2, 2))
    with pytest.raises(ValueError, match="`features.sample`"):
        kept(images(torch.ones(1, 16), torch.ones(1, 16), None), [4], tile_grid=(2, 2))


def test_a_patch_of_a_picture_that_is_no_square_belongs_to_the_tile_with_its_centre() -> None:
    assert tile_of(torch.arange(2 * 6), (2, 6), (1, 3)).tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert tile_of(torch.arange(6 * 2), (6, 2), (3, 1)).tolist() == [0] * 4 + [1] * 4 + [2] * 4
