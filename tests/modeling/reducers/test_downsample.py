"""What the smaller image promises: the tower's own features of it, K of them, each at its place in the image."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from adavtp.modeling.reducers.downsample import DownsampleReducer, evenly_thinned, patches_under_cells, smallest_grid
from tiny_models import IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE, tiny_config
from tiny_towers import TOWERS, counts, tiny_images, tiny_pass, whole_run


def test_the_grid_is_the_smallest_square_or_nearly_square_one_with_k_cells() -> None:
    grids = sorted((side * other, (side, other)) for side in range(1, 26) for other in (side, side + 1))
    for num_keep in range(1, 577):
        assert smallest_grid(num_keep) == next(grid for cells, grid in grids if cells >= num_keep)
    assert smallest_grid(576) == (24, 24)
    assert smallest_grid(144) == (12, 12)
    assert smallest_grid(145) == (12, 13)


@pytest.mark.parametrize("side", [1, 2, 4, 5, 24])
def test_a_cell_stands_at_the_patch_under_its_centre_and_no_two_at_one(side: int) -> None:
    for rows in range(1, side + 1):
        for columns in {rows, min(rows + 1, side)}:
            places = patches_under_cells(rows, columns, (side, side)).tolist()
            expected = [
                math.floor(Fraction(2 * row + 1, 2 * rows) * side) * side
                + math.floor(Fraction(2 * column + 1, 2 * columns) * side)
                for row in range(rows)
                for column in range(columns)
            ]
            assert places == expected
            assert places == sorted(set(places))


def test_the_tokens_beyond_k_leave_at_a_uniform_stride() -> None:
    assert evenly_thinned(6, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert evenly_thinned(6, 5).tolist() == [0, 1, 2, 4, 5]
    assert evenly_thinned(12, 10).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11]
    assert evenly_thinned(12, 9).tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 11]
    for num_keep in range(1, 300):
        rows, columns = smallest_grid(num_keep)
        kept = evenly_thinned(rows * columns, num_keep).tolist()
        assert kept == sorted(set(kept))
        assert len(kept) == num_keep


@torch.no_grad()
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("vision", TOWERS)
def test_the_features_are_the_stock_tower_s_of_the_smaller_image(vision: str, interpolation: str) -> None:
    tower = tiny_pass(vision)
    reducer = DownsampleReducer(tower.config, interpolation=interpolation)
    options = {} if vision == "dinov2" else {"interpolate_pos_encoding": True}
    for num_keep, rows, columns, kept in (
        (4, 2, 2, [0, 1, 2, 3]),
        (6, 2, 3, list(range(6))),
        (5, 2, 3, [0, 1, 2, 4, 5]),
    ):
        smaller = nn.functional.interpolate(
            tiny_images(), (rows * PATCH_SIZE, columns * PATCH_SIZE), mode=interpolation, antialias=True
        )
        states = tower.tower(smaller, output_hidden_states=True, **options).hidden_states[-2]
        expected = states[:, int(tower.config.has_cls) :][:, kept]
        encoded = reducer(tower, tiny_images(), counts(num_keep))
        torch.testing.assert_close(tower.patches(encoded.sequence), expected, atol=1e-6, rtol=1e-6)
        if tower.config.has_cls:
            torch.testing.assert_close(encoded.sequence[:, 0], states[:, 0], atol=1e-6, rtol=1e-6)
        # Centres of halves of 4 patches lie in patches 1 and 3, of thirds in 0, 2 and 3.
        places = [row * 4 + column for row in (1, 3) for column in ((1, 3) if columns == 2 else (0, 2, 3))]
        assert encoded.positions.tolist() == [[places[index] for index in kept]] * 2


@torch.no_grad()
def test_the_tower_sees_about_k_tokens_and_no_more() -> None:
    tower = tiny_pass(budget=True)
    lengths = []
    handle = tower.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for num_keep in (1, 2, 3, 7, 10, 13, 16):
        DownsampleReducer(tower.config)(tower, tiny_images(), counts(num_keep))
    handle.remove()
    assert lengths == [2 + cells for cells in (1, 2, 4, 9, 12, 16, 16)]


@torch.no_grad()
def test_an_image_whose_size_is_no_multiple_of_the_patches_is_left_alone_at_a_full_budget() -> None:
    config = tiny_config("siglip").vision_config
    config.image_size = IMAGE_SIZE + 3
    tower = tiny_pass("siglip", vision_config=config)
    images = torch.randn(2, 3, IMAGE_SIZE + 3, IMAGE_SIZE + 3, generator=torch.Generator().manual_seed(0))
    encoded = DownsampleReducer(tower.config)(tower, images, counts(NUM_PATCHES))
    assert torch.equal(encoded.sequence, whole_run(tower, images))
    assert DownsampleReducer(tower.config)(tower, images, counts(9)).positions.shape == (2, 9)
