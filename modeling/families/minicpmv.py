"""MiniCPM-V 4.6: tiles of any size in one row of patches, merged 16 to a token or, by the family's own dial, 4."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .encoded import JOINS_PATCHES, KINDS, EncodingFamily, KindUnits, means_of_squares

_SIZES = {"image": "target_sizes", "video": "target_sizes_videos"}


class MiniCPMVFamily(EncodingFamily):
    """
    Every tile and every frame of a video is a unit: which of them belong together is not among what the model gets.
    """

    why_not_in_tower = JOINS_PATCHES
    unit_names = ("image", "tile", "frame")
    has_dial = True
    images_axis = -1

    def image_inputs(self, config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """See [`EncodingFamily.image_inputs`]: every image one tile, its patches side by side."""
        patch, least = config.vision_config.patch_size, 2 * config.merge_kernel_size[0] ** config.merger_times
        sides = (torch.tensor(sizes) // patch).clamp(min=least)
        pixels = torch.ones(1, 3, patch, patch * int(sides.prod(dim=-1).sum()))
        return {"pixel_values": pixels, "target_sizes": sides}

    def image_sizes(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """See [`EncodingFamily.image_sizes`]."""
        patch = config.vision_config.patch_size
        return [(height * patch, width * patch) for height, width in inputs["target_sizes"].tolist()]

    def units(
        self, model: PreTrainedModel, kind: str, output: ModelOutput | None, inputs: Mapping[str, Any]
    ) -> KindUnits:
        """See [`EncodingFamily.units`]."""
        grids = self._grids(model, kind, inputs, self._mode(model, inputs))
        return KindUnits(grids, torch.zeros(sum(height * width for _, height, width in grids), dtype=torch.bool))

    def pixels(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any], num_units: int
    ) -> list[torch.Tensor]:
        """See [`EncodingFamily.pixels`]."""
        columns = inputs[_SIZES[kind]].prod(dim=-1) * model.config.vision_config.patch_size
        return list(inputs[KINDS[kind]].split(columns.tolist(), dim=-1))

    def pictures(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """See [`Family.pictures`]."""
        rows, sizes = self.pixels(model, "image", inputs, 0), inputs[_SIZES["image"]].tolist()
        tiles = [row[0].unflatten(-1, (*size, -1)) for row, size in zip(rows, sizes, strict=True)]
        return [tile.transpose(1, 2).flatten(3).flatten(1, 2) for tile in tiles]

    def pooled(
        self, model: PreTrainedModel, kind: str, values: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """
        See [`EncodingFamily.pooled`]. Behind the tower's own merger its layers see a quarter of the patches, row by
        row as before.
        """
        grids = self._grids(model, kind, inputs, self._mode(model, inputs))
        num_tokens = sum(height * width for _, height, width in grids)
        side = round((len(values) / num_tokens) ** 0.5)
        return means_of_squares(values, [(height * side, width * side) for _, height, width in grids], side)

    def native_settings(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any]
    ) -> list[dict[str, tuple[int, int, int]]]:
        """See [`EncodingFamily.native_settings`]: modes of downsampling."""
        grids = {mode: self._grids(model, kind, inputs, mode) for mode in ("4x", "16x")}
        return [dict(zip(grids, own, strict=True)) for own in zip(*grids.values(), strict=True)]

    def encoded_natively(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any], setting: str, units: list[int]
    ) -> list[torch.Tensor]:
        """See [`EncodingFamily.encoded_natively`]."""
        pixels = self.pixels(model, kind, inputs, len(inputs[_SIZES[kind]]))
        given = {
            KINDS[kind]: torch.cat([pixels[unit] for unit in units], dim=-1),
            _SIZES[kind]: inputs[_SIZES[kind]][units],
            "downsample_mode": setting,
        }
        return list(model.encoded(kind, given).pooler_output)

    @staticmethod
    def _mode(model: PreTrainedModel, inputs: Mapping[str, Any]) -> str:
        return inputs.get("downsample_mode") or model.config.downsample_mode

    @staticmethod
    def _grids(model: PreTrainedModel, kind: str, inputs: Mapping[str, Any], mode: str) -> list[tuple[int, int, int]]:
        config = model.config
        rows, columns = (size**config.merger_times for size in config.merge_kernel_size)
        if mode != "4x":
            rows, columns = rows * 2, columns * 2
        return [(1, height // rows, width // columns) for height, width in inputs[_SIZES[kind]].tolist()]


MINICPMV = MiniCPMVFamily()
