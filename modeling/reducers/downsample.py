"""The control inside the tower: a smaller image.

Whoever wants fewer visual tokens can simply show the tower fewer pixels. The image is resized so that the tower makes
about K patches of it, its positions interpolated, and the whole tower gets cheaper, not only what follows it. A method
that looks at content is worth something where it beats this.
"""

import math
from typing import Literal

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..vision.encode import TowerPass
from ..vision.encoder_reducer import EncodedTokens, EncoderReducer, require_choice, take_tokens
from .base import register_reducer


def smallest_grid(num_keep: int) -> tuple[int, int]:
    """Rows and columns of the smallest grid of s x s or s x (s + 1) cells that has K or more."""
    side = math.isqrt(num_keep)
    if side * side == num_keep:
        return side, side
    return (side, side + 1) if side * (side + 1) >= num_keep else (side + 1, side + 1)


def patches_under_cells(rows: int, columns: int, side: int) -> torch.Tensor:
    """
    The patch of the full grid in which each cell of a smaller grid has its centre.

    Cell i of n has its centre at (i + 1/2) / n of the image, in patch floor((i + 1/2) side / n) of a row. Neighbouring
    centres are a patch or more apart, so no two cells share one.

    Args:
        rows, columns: of the smaller grid, no more than `side`.
        side: of the full, square grid.

    Returns:
        `[rows * columns]` int64, ascending.
    """
    row = torch.tensor([(2 * index + 1) * side // (2 * rows) for index in range(rows)])
    column = torch.tensor([(2 * index + 1) * side // (2 * columns) for index in range(columns)])
    return (row[:, None] * side + column).flatten()


def evenly_thinned(num_cells: int, num_keep: int) -> torch.Tensor:
    """
    Which cells stay when M - K of M leave at a uniform stride: those at floor((j + 1/2) M / (M - K)) leave.

    Returns:
        `[num_keep]` int64, ascending.
    """
    excess = num_cells - num_keep
    leaving = {(2 * step + 1) * num_cells // (2 * excess) for step in range(excess)}
    return torch.tensor([cell for cell in range(num_cells) if cell not in leaving])


@register_reducer("downsample")
class DownsampleReducer(EncoderReducer):
    """
    Resizes the image to the smallest grid of s x s or s x (s + 1) patches that has K or more, which changes its shape
    a little where the two differ. The few tokens above K leave behind the tower, at a uniform stride. Every token
    stands at the patch of the full grid under the centre of its cell.

    Args:
        interpolation: of the pixels, `"bicubic"` or `"bilinear"`, with antialiasing in both.
    """

    def __init__(self, config: AdaVTPConfig, interpolation: Literal["bicubic", "bilinear"] = "bicubic") -> None:
        super().__init__(config)
        require_choice("interpolation", interpolation, ("bicubic", "bilinear"))
        self.interpolation = interpolation

    def forward(self, tower: TowerPass, pixel_values: torch.Tensor, num_keep: torch.Tensor) -> EncodedTokens:
        """See [`EncoderReducer.forward`]."""
        count = int(num_keep[0])
        rows, columns = smallest_grid(count)
        # Only a tower for square images of one size can be shown a smaller one: its positions are interpolated.
        side = pixel_values.shape[-1] // self.config.vision_config.patch_size
        is_smaller = rows * columns < side * side
        if is_smaller:
            pixel_values = self._resized(pixel_values, rows, columns)
        sequence = tower.embed(pixel_values, of_any_size=is_smaller)
        for layer in range(len(tower.layers)):
            sequence = tower.run_layer(layer, sequence)
        cells = evenly_thinned(rows * columns, count).to(sequence.device)
        patches = take_tokens(tower.patches(sequence), cells.expand(len(sequence), -1))
        positions = patches_under_cells(rows, columns, side).to(sequence.device)[cells]
        return EncodedTokens(tower.with_patches(sequence, patches), positions.expand(len(sequence), -1))

    def _resized(self, pixel_values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """The images with as many pixels as the tower has in `rows` x `columns` patches."""
        patch_size = self.config.vision_config.patch_size
        return nn.functional.interpolate(
            pixel_values.float(),
            size=(rows * patch_size, columns * patch_size),
            mode=self.interpolation,
            antialias=True,
        ).to(pixel_values.dtype)
