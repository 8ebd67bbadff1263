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
from ..vision.encoder_reducer import EncodedTokens, EncoderReducer
from .base import register_reducer, require_choice, take_tokens
from .controls import at_a_stride


def smallest_grid(num_keep: int) -> tuple[int, int]:
    """Rows and columns of the smallest grid of s x s or s x (s + 1) cells that has K or more."""
    side = math.isqrt(num_keep)
    if side * side == num_keep:
        return side, side
    return (side, side + 1) if side * (side + 1) >= num_keep else (side + 1, side + 1)


def patches_under_cells(rows: int, columns: int, grid: tuple[int, int]) -> torch.Tensor:
    """
    The patch of the full grid, rows and columns, in which each cell of a smaller grid has its centre, ascending.

    Cell i of n has its centre at (i + 1/2) / n of the image, in patch floor((i + 1/2) width / n) of a row.
    Neighbouring centres are a patch or more apart, so no two cells share one.
    """
    height, width = grid
    row = torch.tensor([(2 * index + 1) * height // (2 * rows) for index in range(rows)])
    column = torch.tensor([(2 * index + 1) * width // (2 * columns) for index in range(columns)])
    return (row[:, None] * width + column).flatten()


def evenly_thinned(num_cells: int, num_keep: int) -> torch.Tensor:
    """Which cells stay, ascending, when M - K of M leave at a uniform stride, at floor((j + 1/2) M / (M - K))."""
    leaving = at_a_stride(torch.tensor([num_cells]), torch.tensor([num_cells - num_keep]), num_cells)[0]
    return (~leaving).nonzero()[:, 0]


@register_reducer("downsample")
class DownsampleReducer(EncoderReducer):
    """
    Resizes the image to the smallest grid of s x s or s x (s + 1) patches that has K or more, which changes its shape
    a little where the two differ. The few tokens above K leave behind the tower, at a uniform stride. Every token
    stands at the patch of the full grid under the centre of its cell.

    Args:
        interpolation: of the pixels, `"bicubic"` or `"bilinear"`, with antialiasing in both.
    """

    resizes = True

    def __init__(self, config: AdaVTPConfig, interpolation: Literal["bicubic", "bilinear"] = "bicubic") -> None:
        super().__init__(config)
        require_choice("interpolation", interpolation, ("bicubic", "bilinear"))
        self.interpolation = interpolation

    def forward(self, tower: TowerPass, pixel_values: torch.Tensor, num_keep: torch.Tensor) -> EncodedTokens:
        count = int(num_keep[0])
        rows, columns = smallest_grid(count)
        # Only a tower for square images of one size can be shown a smaller one: its positions are interpolated.
        patch_size = self.config.vision_config.patch_size
        side = pixel_values.shape[-1] // patch_size
        is_smaller = rows * columns < side * side
        if is_smaller:
            pixel_values = nn.functional.interpolate(
                pixel_values.float(),
                size=(rows * patch_size, columns * patch_size),
                mode=self.interpolation,
                antialias=True,
            ).to(pixel_values.dtype)
        sequence = tower.embed(pixel_values, of_any_size=is_smaller)
        for layer in range(len(tower.layers)):
            sequence = tower.run_layer(layer, sequence)
        cells = evenly_thinned(rows * columns, count).to(sequence.device)
        patches = take_tokens(tower.patches(sequence), cells.expand(len(sequence), -1))
        positions = patches_under_cells(rows, columns, (side, side)).to(sequence.device)[cells]
        return EncodedTokens(tower.with_patches(sequence, patches), positions.expand(len(sequence), -1))
