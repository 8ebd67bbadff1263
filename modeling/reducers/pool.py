"""Spatial pooling to any number of tokens: the plainest way to merge.

The grid of patches is cut into K rectangles of nearly the same size, and each becomes the mean (or the maximum)
of its patches. Where the grid is square and K a square whose root divides its side, this is ordinary average pooling.
"""

import math

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..vision.features import VisionFeatures
from .base import TokenReducer, register_reducer, require_choice


@register_reducer("pool")
class PoolReducer(TokenReducer):
    """
    Pools the grid of patches to exactly K cells that cover every patch once; see [`cell_of_patch`] for how it is cut.
    A cell stands at the patch in its middle, and the output is in raster order.

    Args:
        kind: `"average"` or `"max"`, which takes the largest value of each channel.
    """

    one_count = True

    def __init__(self, config: AdaVTPConfig, kind: str = "average") -> None:
        super().__init__(config)
        require_choice("kind", kind, ("average", "max"))
        self.kind = kind

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        patches, num_cells = features.patches, int(num_keep[0])
        num_images, num_tokens, _ = patches.shape
        rows, columns = features.grid
        if num_tokens != rows * columns:
            raise ValueError(
                f"Reducer 'pool' needs the whole grid of {rows} x {columns} patches and got {num_tokens} tokens; it "
                "has to come first."
            )
        cell = cell_of_patch(rows, columns, num_cells, patches.device)
        pooled = (
            cell_means(patches, cell, num_cells) if self.kind == "average" else cell_maxima(patches, cell, num_cells)
        )
        middle = middle_of_cells(cell, columns, num_cells)
        return Selection.from_tokens(pooled, middle.expand(num_images, -1), num_tokens)


def num_bands(rows: int, columns: int, num_cells: int) -> int:
    """
    The bands of rows that a grid is cut into for K cells: h, the whole number nearest to sqrt(K rows / columns), so
    that cells are about square, as far as there are rows for it and no band has more cells than the grid has columns.
    """
    root = math.isqrt(num_cells * rows // columns)
    # The nearest is root + 1 where K rows / columns > (root + 1/2)^2.
    nearest = root + int(4 * num_cells * rows > columns * (2 * root + 1) ** 2)
    return max(-(-num_cells // columns), min(nearest, rows, num_cells))


def cell_of_patch(rows: int, columns: int, num_cells: int, device: torch.device) -> torch.Tensor:
    """
    Cuts the grid into h bands of rows, and band i into w_i cells.

    Band i is rows floor(i rows / h) to floor((i + 1) rows / h) - 1, it starts at cell o_i = floor(i K / h) and has
    w_i = o_{i + 1} - o_i cells, which differ by at most one and add up to K. Its cell j is columns
    floor(j columns / w_i) to floor((j + 1) columns / w_i) - 1. Read backwards, x of n is in part
    ((x + 1) p - 1) // n of p parts. `[rows * columns]` int64, the cell of each patch, numbered in raster order.
    """
    bands = num_bands(rows, columns, num_cells)
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    band = ((row + 1) * bands - 1) // rows
    first_cell = band * num_cells // bands
    width = (band + 1) * num_cells // bands - first_cell
    cell_in_band = ((column + 1) * width[:, None] - 1) // columns
    return (first_cell[:, None] + cell_in_band).flatten()


def middle_of_cells(cell: torch.Tensor, columns: int, num_cells: int) -> torch.Tensor:
    """The middle patch of each rectangle of `cell` `[rows * columns]`, of four the upper left. `[num_cells]`"""
    patch = torch.arange(len(cell), device=cell.device)
    corners = patch.new_zeros(2, num_cells)
    # Of a rectangle in raster order the first patch is its upper left corner, and the last its lower right.
    for corner, which in zip(corners, ("amin", "amax"), strict=True):
        corner.scatter_reduce_(0, cell, patch, which, include_self=False)
    row, column = (corners // columns).sum(dim=0) // 2, (corners % columns).sum(dim=0) // 2
    return row * columns + column


def cell_means(patches: torch.Tensor, cell: torch.Tensor, num_cells: int) -> torch.Tensor:
    """
    The mean of each cell's patches, `[num_images, num_cells, hidden_size]`, summed in float32: a product with the
    matrix of cells and not an `index_add`, whose order of addition on a GPU is chance.
    """
    is_member = (cell == torch.arange(num_cells, device=cell.device)[:, None]).float()
    sums = is_member @ patches.float()
    return (sums / is_member.sum(dim=-1, keepdim=True)).to(patches.dtype)


def cell_maxima(patches: torch.Tensor, cell: torch.Tensor, num_cells: int) -> torch.Tensor:
    """The largest value of each channel in each cell, as [`cell_means`]."""
    num_images, _, width = patches.shape
    pooled = patches.new_zeros(num_images, num_cells, width)
    return pooled.scatter_reduce(1, cell[None, :, None].expand_as(patches), patches, "amax", include_self=False)
