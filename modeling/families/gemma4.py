"""Gemma 4: images of any size up to a number of soft tokens, which is the family's own dial, 70 to 1120."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .encoded import JOINS_PATCHES, KINDS, EncodingFamily, KindUnits, means_of_squares

# What the family was trained for; its image processor takes no other.
SOFT_TOKENS = (70, 140, 280, 560, 1120)


class Gemma4Family(EncodingFamily):
    """
    Every frame of a call is a row of patches that is filled up to the longest, and a token is the mean of the patches
    of a square. A video is a unit.
    """

    why_not_in_tower = JOINS_PATCHES
    why_not_in_decoder = (
        "it acts inside the decoder, whose layers read an embedding of each token of their own and share keys."
    )
    unit_names = ("image", "video")
    has_dial = True
    reads_videos = True

    def image_inputs(self, config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """
        See [`EncodingFamily.image_inputs`]: patches, and the column and row of each, filled up to the least setting of
        the dial that holds them all.
        """
        vision = config.vision_config
        least, patch = vision.pooling_kernel_size, vision.patch_size
        sides = [[max(pixels // patch, least) for pixels in size] for size in sizes]
        places = [torch.cartesian_prod(*map(torch.arange, size)).flip(-1) for size in sides]
        most = max(map(len, places))
        filled = min((number * least**2 for number in SOFT_TOKENS if number * least**2 >= most), default=most)
        places = torch.stack([nn.functional.pad(own, (0, 0, 0, filled - len(own)), value=-1) for own in places])
        return {"pixel_values": torch.ones(*places.shape[:2], 3 * patch**2), "image_position_ids": places}

    def image_sizes(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """See [`EncodingFamily.image_sizes`]."""
        patch = config.vision_config.patch_size
        return [(height * patch, width * patch) for height, width in self._patches("image", inputs)]

    def units(
        self, model: PreTrainedModel, kind: str, output: ModelOutput | None, inputs: Mapping[str, Any]
    ) -> KindUnits:
        """See [`EncodingFamily.units`]."""
        side, frames = model.config.vision_config.pooling_kernel_size, self._patches(kind, inputs)
        firsts, grids = 0, []
        for number in self._num_frames(kind, inputs):
            height, width = frames[firsts]
            grids.append((number, height // side, width // side))
            firsts += number
        return KindUnits(grids, torch.zeros(sum(t * h * w for t, h, w in grids), dtype=torch.bool))

    def pixels(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any], num_units: int
    ) -> list[torch.Tensor]:
        """See [`EncodingFamily.pixels`]."""
        return list(inputs[KINDS[kind]].split(self._num_frames(kind, inputs)))

    def pictures(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """See [`Family.pictures`]."""
        patch, sizes = model.config.vision_config.patch_size, self._patches("image", inputs)
        pairs = zip(inputs[KINDS["image"]], sizes, strict=True)
        return [as_image(patches[: math.prod(size)], size, patch) for patches, size in pairs]

    def images_of_attention(
        self, model: PreTrainedModel, kind: str, query: torch.Tensor, key: torch.Tensor, inputs: Mapping[str, Any]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See [`EncodingFamily.images_of_attention`]: without the padding of smaller frames."""
        lengths = [height * width for height, width in self._patches(kind, inputs)]
        return [
            (query[row : row + 1, :, :length], key[row : row + 1, :, :length]) for row, length in enumerate(lengths)
        ]

    def pooled(
        self, model: PreTrainedModel, kind: str, values: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """See [`EncodingFamily.pooled`]."""
        side, sizes = model.config.vision_config.pooling_kernel_size, self._patches(kind, inputs)
        return means_of_squares(values, sizes, side)

    def native_settings(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any]
    ) -> list[dict[str, tuple[int, int, int]]]:
        """See [`EncodingFamily.native_settings`]: numbers of soft tokens of a frame."""
        side = model.config.vision_config.pooling_kernel_size
        settings = []
        for frames, height, width in self.units(model, kind, None, inputs).grids:
            sizes = {f"{n} soft tokens": self._resized(model, height * side, width * side, n) for n in SOFT_TOKENS}
            settings.append({name: (frames, h // side, w // side) for name, (h, w) in sizes.items()})
        return settings

    def encoded_natively(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any], setting: str, units: list[int]
    ) -> list[torch.Tensor]:
        """
        See [`EncodingFamily.encoded_natively`]. The frames are resized as the family's image processor does it, but
        from the pixels that were given: it rounds once more, and does not begin at the picture itself.
        """
        config, number = model.config.vision_config, int(setting.split()[0])
        side, patch, rows = config.pooling_kernel_size, config.patch_size, self._num_frames(kind, inputs)
        begins = torch.tensor([0, *rows]).cumsum(0).tolist()
        frames = [frame for unit in units for frame in range(begins[unit], begins[unit + 1])]
        pixels, positions, sizes = [], [], self._patches(kind, inputs)
        for frame in frames:
            image = as_image(inputs[KINDS[kind]][frame, : math.prod(sizes[frame])], sizes[frame], patch)
            height, width = self._resized(model, *sizes[frame], number)
            small = nn.functional.interpolate(
                image[None].float(), size=(height * patch, width * patch), mode="bicubic", antialias=True
            )[0]
            fill = (0, 0, 0, number * side**2 - height * width)
            pixels.append(nn.functional.pad(as_patches(small.clamp(0, 1), patch).to(image.dtype), fill))
            place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
            positions.append(nn.functional.pad(place, fill, value=-1))
        given = {KINDS[kind]: torch.stack(pixels), f"{kind}_position_ids": torch.stack(positions).to(pixels[0].device)}
        if kind == "video":
            given["num_frames_per_video"] = inputs["num_frames_per_video"][units]
        return list(model.encoded(kind, given).pooler_output)

    @staticmethod
    def _num_frames(kind: str, inputs: Mapping[str, Any]) -> list[int]:
        if kind == "image":
            return [1] * len(inputs[KINDS[kind]])
        return inputs["num_frames_per_video"].tolist()

    @staticmethod
    def _patches(kind: str, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of patches of each frame; padding is at position -1."""
        last = inputs[f"{kind}_position_ids"].amax(dim=1) + 1
        return [(height, width) for width, height in last.tolist()]

    @staticmethod
    def _resized(model: PreTrainedModel, height: int, width: int, soft_tokens: int) -> tuple[int, int]:
        """
        Rows and columns of patches of a frame with `height` x `width` of them when it may have so many soft tokens:
        the largest of its shape that are whole tokens. A frame so narrow that no token is left of a side gets one.
        """
        side = model.config.vision_config.pooling_kernel_size
        factor = math.sqrt(soft_tokens * side**2 / (height * width))
        # A whole number that the root misses by rounding is that number.
        rows, columns = (math.floor(factor * size / side + 1e-9) for size in (height, width))
        if rows == 0:
            rows, columns = 1, min(width // height, soft_tokens)
        elif columns == 0:
            rows, columns = min(height // width, soft_tokens), 1
        return rows * side, columns * side


def as_image(patches: torch.Tensor, size: tuple[int, int], patch: int) -> torch.Tensor:
    """Patches `[height * width, patch * patch * channels]` as an image `[channels, pixels, pixels]`."""
    image = patches.unflatten(0, size).unflatten(2, (patch, patch, -1))
    return image.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)


def as_patches(image: torch.Tensor, patch: int) -> torch.Tensor:
    """The reverse of [`as_image`]."""
    patches = image.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))
    return patches.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


GEMMA4 = Gemma4Family()
