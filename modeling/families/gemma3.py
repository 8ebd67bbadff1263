"""Gemma 3 and PaliGemma: images of one size, whose columns see each other in both directions."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .encoded import JOINS_PATCHES, KINDS, EncodingFamily, KindUnits


class PictureFamily(EncodingFamily):
    """All pictures have one size, and are read from behind the tower's last norm."""

    takes_tensor = ("image",)
    units_differ = False

    def units(
        self, model: PreTrainedModel, kind: str, output: ModelOutput | None, inputs: Mapping[str, Any]
    ) -> KindUnits:
        """See [`EncodingFamily.units`]."""
        side, number = self.side(model.config), len(inputs[KINDS[kind]])
        return KindUnits([(1, side, side)] * number, torch.zeros(number * side**2, dtype=torch.bool))

    def projected(self, model: PreTrainedModel, patches: torch.Tensor) -> torch.Tensor:
        """See [`EncodingFamily.projected`]."""
        tower = self.tower(model)
        # The transformer inside is a module of its own in the older transformers.
        norm = getattr(tower, "vision_model", tower).post_layernorm
        return super().projected(model, norm(patches))

    def side(self, config: PreTrainedConfig) -> int:
        """Rows of tokens, and columns."""
        return config.vision_config.image_size // config.vision_config.patch_size


class Gemma3Family(PictureFamily):
    """The projector takes the mean of the patches of a square."""

    why_not_in_tower = JOINS_PATCHES
    why_not_in_decoder = None

    def side(self, config: PreTrainedConfig) -> int:
        """See [`PictureFamily.side`]."""
        return int(config.mm_tokens_per_image**0.5)

    def blocks(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor | None:
        """See [`Family.blocks`]: every image, whose columns stand one behind the other."""
        is_image = self.placeholders(config, input_ids)
        begins = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
        return (begins.cumsum(dim=-1) - 1).masked_fill(~is_image, -1)

    def pooled(
        self, model: PreTrainedModel, kind: str, values: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """See [`EncodingFamily.pooled`]."""
        projector = model.base_model.multi_modal_projector
        side = projector.patches_per_image
        images = values.unflatten(0, (-1, side * side)).transpose(1, 2).unflatten(2, (side, side))
        return projector.avg_pool(images).flatten(2).transpose(1, 2).flatten(0, 1)


class PaliGemmaFamily(PictureFamily):
    """A token is a patch, positions begin at 1, and an answer does not belong to the prefix whose type is 0."""

    why_not_in_tower = None
    why_not_in_decoder = "it acts inside the decoder, where all of a prompt sees all of it, before and behind."
    token_type_of_answers = 1
    first_position = 1


GEMMA3, PALIGEMMA = Gemma3Family(), PaliGemmaFamily()
