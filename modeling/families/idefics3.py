"""Idefics3 and SmolVLM: every tile is a unit; what the encoder makes is joined prompt by prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .encoded import JOINS_PATCHES, KINDS, EncodingFamily, KindUnits, num_tiles


class Idefics3Family(EncodingFamily):
    """All tiles have equally many tokens, and a token is made of the patches of a square."""

    why_not_in_tower = JOINS_PATCHES
    why_not_in_decoder = None
    unit_names = ("tile", "frame")
    units_differ = False

    def image_inputs(self, config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """See [`EncodingFamily.image_inputs`]: tiles, and a view of the whole image behind several."""
        side = config.vision_config.image_size
        tiles = sum(num_tiles(*size, side, side) for size in sizes)
        return {"pixel_values": torch.ones(1, tiles, 3, side, side)}

    def units(self, model: PreTrainedModel, kind: str, output: ModelOutput, inputs: Mapping[str, Any]) -> KindUnits:
        """See [`EncodingFamily.units`]."""
        side, rows = round(model.base_model.image_seq_len**0.5), sum(len(entry) for entry in output.pooler_output)
        return KindUnits([(1, side, side)] * (rows // side**2), torch.zeros(rows, dtype=torch.bool))

    def pixels(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any], num_units: int
    ) -> list[torch.Tensor]:
        """See [`EncodingFamily.pixels`]: tiles that are all 0 fill up prompts that have fewer."""
        return [tile for tile in inputs[KINDS[kind]].flatten(0, 1) if bool((tile != 0).any())]

    def pooled(
        self, model: PreTrainedModel, kind: str, values: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """See [`EncodingFamily.pooled`]: the mean over what the family's pixel shuffle puts side by side."""
        scale, channels = model.config.scale_factor, values.shape[-1]
        patches = model.base_model.image_seq_len * scale**2
        shuffled = model.base_model.connector.pixel_shuffle(values.view(-1, patches, channels), scale)
        return shuffled.reshape(-1, shuffled.shape[-1] // channels, channels).mean(dim=1)


IDEFICS3 = Idefics3Family()
