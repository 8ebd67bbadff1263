"""LLaVA-NeXT and LLaVA-OneVision: a small view of the whole image, and tiles put together with their padding cut off.

The whole view and every tile are units, a tile without its padding. Behind every row of tokens of the tiles, and
behind the whole view of an image that has none, stands a newline. Newlines are separators: they are not counted, and
never chosen.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)
from transformers.utils import ModelOutput

from .encoded import KINDS, EncodingFamily, KindUnits


class AnyResFamily(EncodingFamily):
    """What a token is made of is found by sending marked values through the family's own packing."""

    knows_tiles = True
    why_not_in_decoder = None
    unit_names = ("view", "tile")

    def image_inputs(
        self, config: PreTrainedConfig, height: int, width: int, number: int = 1
    ) -> dict[str, torch.Tensor]:
        """See [`EncodingFamily.image_inputs`]: the whole view and the tiles, and the size before that."""
        side, size = config.vision_config.image_size, [max(height, 1), max(width, 1)]
        tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, side)
        pixels = torch.ones(number, tiles, 3, side, side)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([size] * number)}

    def units(self, model: PreTrainedModel, kind: str, output: ModelOutput, inputs: Mapping[str, Any]) -> KindUnits:
        """See [`EncodingFamily.units`]."""
        side, grids, units, parts = self._side(model), [], [], {}
        tiles = self._tile_of_tokens(model, inputs)
        for tile in tiles:
            number = len(grids)
            # A tile of whose tokens all are padding has none.
            shown, of_token = tile[tile >= 0].unique(return_inverse=True)
            units.append(number + of_token)
            grids.append((1, side, side))
            if len(shown) == 1:
                continue
            in_grid = of_token[side**2 :].view(int((tile < 0).sum()), -1)
            is_own = in_grid == torch.arange(1, len(shown))[:, None, None]
            rows, columns = is_own.any(dim=2).sum(dim=1), is_own.any(dim=1).sum(dim=1)
            grids += [(1, *size) for size in torch.stack([rows, columns], dim=1).tolist()]
            row, column = ((2 * torch.arange(side) + 1) * size // (2 * side) for size in in_grid.shape)
            parts[number] = number + in_grid[row[:, None], column].flatten()
        return KindUnits(grids, torch.cat(tiles) < 0, torch.cat(units), parts)

    def pixels(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any], num_units: int
    ) -> list[torch.Tensor]:
        """See [`EncodingFamily.pixels`]."""
        if kind == "video":
            return super().pixels(model, kind, inputs, num_units)
        pairs = zip(self._tiles(model, inputs), self._tile_of_tokens(model, inputs), strict=True)
        return [tiles[number] for tiles, tile in pairs for number in tile[tile >= 0].unique().tolist()]

    def _tile_of_tokens(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """
        Of each image for all that the encoder makes of it, `[rows]` int64: 0 for the whole view, then the number of
        the tile, row by row from 1; -1 for newlines.
        """
        config, marks, widths = model.config, [], []
        for size, number in zip(inputs["image_sizes"], self._num_tiles(model, inputs), strict=True):
            side = config.vision_config.image_size
            widths.append(get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)[1])
            tile = torch.arange(number) - 1
            # Packing may interpolate a tile's row and column; what comes third is 0 for newlines alone.
            mark = torch.stack([tile // widths[-1], tile % widths[-1], torch.ones(number)], dim=-1)
            marks.append(mark.repeat_interleave(self._side(model) ** 2, dim=0))
        packed = [values.round().long() for values in self._packed(model, torch.cat(marks), inputs)]
        return [
            (values[:, 0] * width + values[:, 1] + 1).masked_fill(values[:, 2] == 0, -1)
            for values, width in zip(packed, widths, strict=True)
        ]

    def pooled(
        self, model: PreTrainedModel, kind: str, values: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """See [`EncodingFamily.pooled`]."""
        if kind == "image":
            return torch.cat(list(self._packed(model, values, inputs)))
        videos = len(inputs[KINDS["video"]])
        pooled = model.base_model.apply_pooling(values.unflatten(0, (-1, self._side(model) ** 2)))
        pooled = pooled.reshape(videos, -1, values.shape[-1])
        return torch.nn.functional.pad(pooled, (0, 0, 0, 1)).flatten(0, 1)

    def _packed(self, model: PreTrainedModel, values: torch.Tensor, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Values of patches `[num_patches, channels]` packed image by image, newlines 0."""
        tiles = values.unflatten(0, (-1, self._side(model) ** 2)).split(self._num_tiles(model, inputs))
        newline = values.new_zeros(values.shape[-1])
        return model.base_model.pack_image_features(
            tiles, inputs["image_sizes"], image_newline=newline, **self._packing(model, inputs)
        )[0]

    def _packing(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
        # Only read for a warning.
        return {"vision_feature_select_strategy": "full"}

    def _num_tiles(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int]:
        config = model.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in inputs["image_sizes"]
        ]

    def _tiles(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        pixels = inputs[KINDS["image"]]
        return list(pixels if pixels.dim() == 5 else pixels.split(self._num_tiles(model, inputs)))

    @staticmethod
    def _side(model: PreTrainedModel) -> int:
        return model.config.vision_config.image_size // model.config.vision_config.patch_size


class LlavaOnevisionFamily(AnyResFamily):
    """Only the image of a prompt that has one is tiled; of videos frames are pooled two by two."""

    reads_videos = True
    takes_tensor = ("video",)
    unit_names = ("view", "tile", "video")

    def image_inputs(
        self, config: PreTrainedConfig, height: int, width: int, number: int = 1
    ) -> dict[str, torch.Tensor]:
        """See [`EncodingFamily.image_inputs`]."""
        together = {"batch_num_images": torch.tensor([number])}
        return super().image_inputs(config, height, width, number) | together

    def units(self, model: PreTrainedModel, kind: str, output: ModelOutput, inputs: Mapping[str, Any]) -> KindUnits:
        """See [`EncodingFamily.units`]: a video's frames are squares, and a newline stands at its end."""
        if kind == "image":
            return super().units(model, kind, output, inputs)
        side = -(-self._side(model) // 2)
        lengths = [len(entry) for entry in output.pooler_output]
        is_separator = torch.zeros(sum(lengths), dtype=torch.bool)
        is_separator[torch.tensor(lengths).cumsum(0) - 1] = True
        return KindUnits([((length - 1) // side**2, side, side) for length in lengths], is_separator)

    def _packing(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
        given = inputs.get("vision_aspect_ratio")
        return {"vision_aspect_ratio": model.config.vision_aspect_ratio if given is None else given}

    def _num_tiles(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int]:
        tiles, in_prompt = super()._num_tiles(model, inputs), inputs.get("batch_num_images")
        if in_prompt is None:
            return tiles
        is_alone = [number == 1 for number in in_prompt.tolist() for _ in range(number)]
        return [number if alone else 1 for number, alone in zip(tiles, is_alone, strict=True)]


LLAVA_NEXT, LLAVA_ONEVISION = AnyResFamily(), LlavaOnevisionFamily()
