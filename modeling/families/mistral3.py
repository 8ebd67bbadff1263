"""Mistral 3: images of any size, all of a call in one sequence of the tower, each seeing only itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .encoded import JOINS_PATCHES, KINDS, EncodingFamily, KindUnits, means_of_squares


class Mistral3Family(EncodingFamily):
    """Breaks between rows are text; a token is made of the patches of a square."""

    why_not_in_tower = JOINS_PATCHES
    why_not_in_decoder = None

    def image_inputs(self, config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """See [`EncodingFamily.image_inputs`]."""
        token = config.vision_config.patch_size * config.spatial_merge_size
        # Of an image of one token alone the family's encoder loses the axis of tokens.
        sides = torch.tensor(sizes).maximum(torch.tensor([token, 2 * token]))
        return {"pixel_values": torch.ones(len(sizes), 3, *sides.amax(dim=0).tolist()), "image_sizes": sides}

    def image_sizes(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """See [`EncodingFamily.image_sizes`]."""
        return [(height, width) for height, width in inputs["image_sizes"].tolist()]

    def units(self, model: PreTrainedModel, kind: str, output: ModelOutput, inputs: Mapping[str, Any]) -> KindUnits:
        """See [`EncodingFamily.units`]."""
        merge = model.config.spatial_merge_size
        grids = [(1, height // merge, width // merge) for height, width in self._patches(model, inputs)]
        return KindUnits(grids, torch.zeros(sum(height * width for _, height, width in grids), dtype=torch.bool))

    def pixels(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any], num_units: int
    ) -> list[torch.Tensor]:
        """See [`EncodingFamily.pixels`]: without the padding of smaller images."""
        pairs = zip(inputs[KINDS[kind]], inputs["image_sizes"].tolist(), strict=True)
        return [pixels[:, :height, :width] for pixels, (height, width) in pairs]

    def images_of_attention(
        self, model: PreTrainedModel, kind: str, query: torch.Tensor, key: torch.Tensor, inputs: Mapping[str, Any]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """See [`EncodingFamily.images_of_attention`]."""
        lengths = [height * width for height, width in self._patches(model, inputs)]
        return list(zip(query.split(lengths, dim=2), key.split(lengths, dim=2), strict=True))

    def pooled(
        self, model: PreTrainedModel, kind: str, values: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """See [`EncodingFamily.pooled`]."""
        return means_of_squares(values, self._patches(model, inputs), model.config.spatial_merge_size)

    @staticmethod
    def _patches(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of patches of each image."""
        patch = model.config.vision_config.patch_size
        return [(height // patch, width // patch) for height, width in inputs["image_sizes"].tolist()]


MISTRAL3 = Mistral3Family()
