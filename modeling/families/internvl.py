"""InternVL: every tile is a unit, and a token is made of the patches of a square."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .encoded import JOINS_PATCHES, EncodingFamily, num_tiles


class InternVLFamily(EncodingFamily):
    """Frames of a video are images."""

    why_not_in_tower = JOINS_PATCHES
    why_not_in_decoder = None
    unit_names = ("tile", "frame")
    takes_tensor = ("image",)
    units_differ = False
    reads_last_norm = True

    def image_inputs(self, config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """See [`EncodingFamily.image_inputs`]: tiles, and a view of the whole image behind several."""
        sides = config.vision_config.image_size
        return {"pixel_values": torch.ones(sum(num_tiles(*size, *sides) for size in sizes), 3, *sides)}

    def pooled(
        self, model: PreTrainedModel, kind: str, values: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """See [`EncodingFamily.pooled`]: the mean over what the family's pixel shuffle puts side by side."""
        vision, channels = model.config.vision_config, values.shape[-1]
        sides = [image // patch for image, patch in zip(vision.image_size, vision.patch_size, strict=True)]
        shuffled = model.base_model.pixel_shuffle(values.view(-1, *sides, channels), model.config.downsample_ratio)
        return shuffled.reshape(-1, shuffled.shape[-1] // channels, channels).mean(dim=1)


INTERNVL = InternVLFamily()
