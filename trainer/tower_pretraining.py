"""A vision tower that already sees: pretraining on what covers each patch.

LLaVA starts from a pretrained CLIP. The reference model's small tower has none to start from, and from the language
model's loss alone it stays at chance on digit identity for thousands of steps: an answer of one word says too little
about 144 patches. So it first learns to say, for every patch of a digit scene, which digit and which colour cover it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor

from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..tasks.digit_scenes import BACKGROUND_COLOUR, BACKGROUND_DIGIT
from .whole_checkpoints import WholeCheckpointsMixin


class PatchLabeller(nn.Module):
    """
    A vision tower with two linear heads on its patch features, one for the digit and one for the colour.

    Args:
        vision_tower: a CLIP vision model; it is trained in place.
        background_weight: weight of background patches in the loss; about four patches of five are background.
    """

    def __init__(self, vision_tower: PreTrainedModel, background_weight: float = 0.2) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.digit_head = nn.Linear(vision_tower.config.hidden_size, BACKGROUND_DIGIT + 1)
        self.colour_head = nn.Linear(vision_tower.config.hidden_size, BACKGROUND_COLOUR + 1)
        self.background_weight = background_weight

    def forward(
        self, pixel_values: torch.Tensor, patch_digits: torch.Tensor, patch_colours: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: `[batch, 3, height, width]`.
            patch_digits: `[batch, num_patches]` int64, 10 for background.
            patch_colours: `[batch, num_patches]` int64, 8 for background.

        Returns:
            `loss`, and `correct` `[batch, 2]`: of each image's digit patches, the share whose digit and whose colour
            are named right.
        """
        features = self.vision_tower(pixel_values).last_hidden_state[:, 1:]
        digit_logits, colour_logits = self.digit_head(features), self.colour_head(features)
        loss = self._loss(digit_logits, patch_digits) + self._loss(colour_logits, patch_colours)
        on_digit = (patch_digits != BACKGROUND_DIGIT).float()
        right = torch.stack(
            [digit_logits.argmax(-1) == patch_digits, colour_logits.argmax(-1) == patch_colours], dim=-1
        )
        correct = (right * on_digit[..., None]).sum(1) / on_digit.sum(1, keepdim=True)
        return {"loss": loss, "correct": correct.detach()}

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[-1] = self.background_weight
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)


class TowerTrainer(WholeCheckpointsMixin, Trainer):
    """
    Trains the tower of a model as a [`PatchLabeller`], in place; saves the model, and in checkpoints on the way the
    labeller. Raises `ValueError` if parameters are spread over processes.
    """

    def __init__(self, model: AdaVTPForConditionalGeneration, args: TrainingArguments, **kwargs: Any) -> None:
        self._whole_model = model
        # An earlier stage may have frozen it.
        tower = model.model.vision_tower.requires_grad_(True)
        super().__init__(model=PatchLabeller(tower), args=args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "A stage of kind 'patch_labels' trains a part of the model that is saved with the rest; run it on one "
                "process or with DDP."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `Trainer`."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._whole_model.save_pretrained(output_dir or self.args.output_dir)


@dataclass
class PatchLabelCollator:
    """Batches rows of [`load_digit_scenes`] for [`PatchLabeller`]."""

    image_processor: BaseImageProcessor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixel_values = self.image_processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        return {
            "pixel_values": pixel_values,
            "patch_digits": torch.tensor([row["patch_digits"] for row in rows], dtype=torch.int64),
            "patch_colours": torch.tensor([row["patch_colours"] for row in rows], dtype=torch.int64),
        }
