"""Gemma 3 and PaliGemma: images of one size, whose columns see each other in both directions."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .encoded import EncodingFamily


class Gemma3Family(EncodingFamily):
    """The projector takes the mean of the patches of a square."""

    takes_tensor = ("image",)
    units_differ = False
    why_not_in_decoder = None

    def blocks(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor | None:
        """See [`EncodingFamily.blocks`]: every image, whose columns stand one behind the other."""
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


class PaliGemmaFamily(EncodingFamily):
    """A token is a patch, positions begin at 1, and an answer does not belong to the prefix whose type is 0."""

    why_not_in_decoder = "it acts inside the decoder, where all of a prompt sees all of it, before and behind."
    takes_tensor = ("image",)
    token_type_of_answers = 1
    units_differ = False
    first_position = 1

    def projected(self, model: PreTrainedModel, patches: torch.Tensor) -> torch.Tensor:
        """See [`EncodingFamily.projected`]."""
        tower = self.tower(model)
        # The transformer inside is a module of its own in the older transformers.
        norm = getattr(tower, "vision_model", tower).post_layernorm
        return model.base_model.multi_modal_projector(norm(patches))


GEMMA3, PALIGEMMA = Gemma3Family(), PaliGemmaFamily()
