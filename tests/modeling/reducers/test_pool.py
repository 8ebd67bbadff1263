"""What pooling promises: any number of cells, every patch in exactly one, and average pooling where that exists."""

from fractions import Fraction
from math import floor

import pytest
import torch
from torch import nn

from adavtp import Selection
from adavtp.modeling.reducers.pool import PoolReducer, cell_of_patch
from adavtp.modeling.vision.features import VisionFeatures
from tiny_features import features_of
from tiny_models import tiny_config

CONFIG = tiny_config()


def pooled(patches: torch.Tensor, num_keep: int, kind: str = "average") -> Selection:
    reducer = PoolReducer(CONFIG, kind=kind)
    return reducer(features_of(patches), torch.full((len(patches),), num_keep))


def random_patches(num_images: int, side: int, width: int = 5) -> torch.Tensor:
    return torch.randn(num_images, side * side, width, generator=torch.Generator().manual_seed(0))


def cells_by_definition(side: int, num_cells: int) -> list[list[int]]:
    """The patches of every cell, bands from the top and cells from the left, in exact arithmetic."""
    allowed = [bands for bands in range(1, side + 1) if bands * side >= num_cells]
    # |h - sqrt(K)| by sign and square: the nearest h has (h - 1/2)^2 < K < (h + 1/2)^2 unless it is not allowed.
    nearest = [h for h in allowed if (h - Fraction(1, 2)) ** 2 < num_cells < (h + Fraction(1, 2)) ** 2]
    bands = nearest[0] if nearest else min(allowed)
    cells = []
    for band in range(bands):
        rows = range(floor(Fraction(band * side, bands)), floor(Fraction((band + 1) * side, bands)))
        width = floor(Fraction((band + 1) * num_cells, bands)) - floor(Fraction(band * num_cells, bands))
        for cell in range(width):
            columns = range(floor(Fraction(cell * side, width)), floor(Fraction((cell + 1) * side, width)))
            cells.append([row * side + column for row in rows for column in columns])
    return cells


@pytest.mark.parametrize("side", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("kind", ["average", "max"])
def test_every_number_of_cells_is_the_pooling_of_its_definition(side: int, kind: str) -> None:
    patches = random_patches(2, side)
    for num_cells in range(1, side * side + 1):
        selection = pooled(patches, num_cells, kind)
        cells = cells_by_definition(side, num_cells)
        assert len(cells) == num_cells and sorted(sum(cells, [])) == list(range(side * side))
        pool = {"average": lambda members: members.mean(dim=1), "max": lambda members: members.amax(dim=1)}[kind]
        expected = torch.stack([pool(patches[:, cell]) for cell in cells], dim=1)
        assert torch.allclose(selection.features, expected, atol=1e-6)
        assert selection.num_keep.tolist() == [num_cells] * 2


@pytest.mark.parametrize(("side", "root"), [(24, 1), (24, 2), (24, 8), (24, 12), (24, 24), (4, 2)])
@pytest.mark.parametrize("kind", ["average", "max"])
def test_it_is_ordinary_pooling_where_the_root_divides_the_side(side: int, root: int, kind: str) -> None:
    patches = random_patches(2, side)
    grid = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    ordinary = nn.functional.adaptive_avg_pool2d if kind == "average" else nn.functional.adaptive_max_pool2d
    expected = ordinary(grid, root).flatten(2).transpose(1, 2)
    assert torch.allclose(pooled(patches, root * root, kind).features, expected, atol=1e-5)


def test_cells_of_a_24_grid_cover_it_evenly_at_every_number() -> None:
    for num_cells in range(1, 577):
        cell = cell_of_patch(24, 24, num_cells, torch.device("cpu"))
        sizes = cell.bincount(minlength=num_cells)
        assert len(sizes) == num_cells and sizes.min() >= 1
        # Heights differ by one row at most and widths by one cell a band, so that neither more than doubles.
        assert sizes.max() <= 4 * sizes.min()


def test_a_grid_that_is_no_square_is_covered_evenly_at_every_number() -> None:
    for rows, columns in ((2, 9), (9, 2), (3, 5), (1, 6), (7, 1)):
        for num_cells in range(1, rows * columns + 1):
            sizes = cell_of_patch(rows, columns, num_cells, torch.device("cpu")).bincount(minlength=num_cells)
            assert len(sizes) == num_cells and sizes.min() >= 1
            assert sizes.max() <= 4 * sizes.min()


def test_images_that_are_no_squares_are_pooled_to_ordinary_pooling() -> None:
    patches = torch.randn(2, 6 * 4, 8, generator=torch.Generator().manual_seed(0))
    positions, grids = torch.arange(24).expand(2, -1), torch.tensor([[6, 4], [6, 4]])
    selection = PoolReducer(tiny_config())(VisionFeatures(patches, positions, grids=grids), torch.tensor([6, 6]))
    expected = patches.unflatten(1, (3, 2, 2, 2)).mean(dim=(2, 4)).flatten(1, 2)
    assert torch.allclose(selection.features, expected, atol=1e-6)
    assert selection.positions.tolist() == [[0, 2, 8, 10, 16, 18]] * 2


def test_a_cell_stands_at_the_patch_in_its_middle() -> None:
    # Two bands of three rows; the upper cut into three, the lower into three: cells of 3 x 2 patches.
    assert pooled(random_patches(1, 6), 6).positions.tolist() == [[6, 8, 10, 24, 26, 28]]
    for num_cells in range(1, 50):
        positions = pooled(random_patches(1, 7), num_cells).positions[0].tolist()
        for position, members in zip(positions, cells_by_definition(7, num_cells), strict=True):
            rows, columns = [member // 7 for member in members], [member % 7 for member in members]
            assert position == (min(rows) + max(rows)) // 2 * 7 + (min(columns) + max(columns)) // 2


@pytest.mark.parametrize("kind", ["average", "max"])
def test_keeping_everything_changes_nothing(kind: str) -> None:
    patches = random_patches(2, 6)
    assert torch.equal(pooled(patches, 36, kind).gather(patches), patches)


@pytest.mark.parametrize("kind", ["average", "max"])
def test_half_precision_is_pooled_in_float32(kind: str) -> None:
    patches = random_patches(3, 24, width=64).bfloat16()
    for num_cells in (1, 56, 100):
        features = pooled(patches, num_cells, kind).features
        assert features.dtype == torch.bfloat16
        assert torch.equal(features, pooled(patches.float(), num_cells, kind).features.bfloat16())


def test_what_is_no_whole_grid_is_refused() -> None:
    patches = random_patches(1, 4)
    rest = VisionFeatures(patches[:, :9], torch.arange(9)[None], num_patches=16)
    for features in (rest, features_of(patches[:, :12])):
        with pytest.raises(ValueError, match="needs the whole grid"):
            PoolReducer(tiny_config())(features, torch.tensor([4]))
