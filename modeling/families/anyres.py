"""LLaVA-NeXT and LLaVA-OneVision: a small view of the whole image, and tiles put together with their padding cut off.

The whole view and every tile are units, a tile without its padding. Behind every row of tokens of the tiles, and
behind the whole view of an image that has none, stands a newline. Newlines are separators: they are not counted, and
never chosen. Inside the tower, which sees every tile with its padding, tokens that are padding go along, and what
leaves or merges is chosen among the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)
from transformers.utils import ModelOutput

from ..reducers.base import TokenReducer
from .encoded import KINDS, EncodingFamily, KindUnits


class AnyResFamily(EncodingFamily):
    """What a token is made of is found by sending marked values through the family's own packing."""

    knows_tiles = True
    why_not_in_tower = None
    why_not_in_decoder = None
    unit_names = ("view", "tile")

    def image_inputs(self, config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """See [`EncodingFamily.image_inputs`]: the whole view and the tiles, and the size before that."""
        side = config.vision_config.image_size
        tiles = max(image_size_to_num_patches(list(size), config.image_grid_pinpoints, side) for size in sizes)
        return {"pixel_values": torch.ones(len(sizes), tiles, 3, side, side), "image_sizes": torch.tensor(sizes)}

    def image_sizes(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """See [`EncodingFamily.image_sizes`]."""
        return [(height, width) for height, width in inputs["image_sizes"].tolist()]

    def why_not(self, config: PreTrainedConfig, reducer: TokenReducer | type[TokenReducer]) -> str | None:
        """See [`Family.why_not`]."""
        if reducer.stage == "encoder" and reducer.resizes:
            return (
                "it shows the tower a smaller picture, and here the tower sees tiles, of which some are part padding. "
                "Give the processor a smaller picture."
            )
        return super().why_not(config, reducer)

    def units(
        self, model: PreTrainedModel, kind: str, output: ModelOutput | None, inputs: Mapping[str, Any]
    ) -> KindUnits:
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
        return list(torch.cat(self._tiles(model, inputs))[self._is_shown(model, inputs)])

    def packed(self, model: PreTrainedModel, tokens: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """See [`EncodingFamily.packed`]."""
        is_shown = self._is_shown(model, inputs)
        tiles = tokens.new_zeros(len(is_shown), *tokens.shape[1:])
        tiles = tiles.index_copy(0, is_shown.nonzero()[:, 0].to(tokens.device), tokens)
        return self.pooled(model, "image", tiles.flatten(0, 1), inputs)

    def patches_of_units(self, model: PreTrainedModel, inputs: Mapping[str, Any], every: torch.Tensor) -> torch.Tensor:
        """See [`EncodingFamily.patches_of_units`]: those that packing does not cut off."""
        number = torch.arange(sum(self._num_tiles(model, inputs)) * every.shape[1], dtype=torch.float64) + 1
        packed = torch.cat(self._packed(model, torch.stack([number, number**2], dim=-1), inputs))
        # Of a mean of several the square is not the mean of the squares.
        if not torch.equal(packed[:, 0] ** 2, packed[:, 1]):
            raise ValueError(
                f"`image_sizes` is {inputs['image_sizes'].tolist()}, and tokens of pictures of so many tiles are made "
                "smaller behind the tower, so that none is of a patch that could leave inside it. Use a reducer "
                "behind the tower, or give the processor a smaller picture."
            )
        is_left = torch.isin(number, packed[:, 0]).view(-1, every.shape[1])
        return is_left[self._is_shown(model, inputs)]

    def _is_shown(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Which of all tiles of a call are not padding alone, `[num_tiles]` bool."""
        pairs = zip(self._num_tiles(model, inputs), self._tile_of_tokens(model, inputs), strict=True)
        return torch.cat([torch.isin(torch.arange(number), tile) for number, tile in pairs])

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
        pixels, numbers = inputs[KINDS["image"]], self._num_tiles(model, inputs)
        if pixels.dim() == 4:
            return list(pixels.split(numbers))
        return [tiles[:number] for tiles, number in zip(pixels, numbers, strict=True)]

    @staticmethod
    def _side(model: PreTrainedModel) -> int:
        return model.config.vision_config.image_size // model.config.vision_config.patch_size


class LlavaOnevisionFamily(AnyResFamily):
    """Only the image of a prompt that has one is tiled; of videos frames are pooled two by two."""

    reads_videos = True
    takes_tensor = ("video",)
    unit_names = ("view", "tile", "video")

    def image_inputs(self, config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """See [`EncodingFamily.image_inputs`]."""
        inputs = super().image_inputs(config, sizes)
        if len(sizes) > 1:
            inputs["pixel_values"] = inputs["pixel_values"][:, :1]
        return inputs | {"batch_num_images": torch.tensor([len(sizes)])}

    def units(
        self, model: PreTrainedModel, kind: str, output: ModelOutput | None, inputs: Mapping[str, Any]
    ) -> KindUnits:
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
