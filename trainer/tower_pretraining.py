"""A vision tower that already sees: pretraining on what each patch shows.

LLaVA starts from a pretrained CLIP. The reference model's small tower has none to start from, and from the language
model's loss alone it stays at chance for thousands of steps: an answer of one word says too little about hundreds of
patches. So it first learns to say of every patch what it shows, and what it belongs to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor


class PatchLabeller(nn.Module):
    """
    A CLIP vision tower with linear heads on its patch features, one for each thing that is told of a patch.

    Args:
        vision_tower: a CLIP vision model; it is trained in place.
        label_classes: name of each label -> number of classes. The last class says that there is nothing to tell.
        num_patches: how many patches of each image the tower sees, those with most to tell first, others at random; by
            default all. A tower that sees a third of a page learns in a fifth of the time, and then has to see whole
            ones: what it counts among few patches it does not count among all.
        background_weight: weight of the last class in the loss; most patches are of it.
    """

    def __init__(
        self,
        vision_tower: PreTrainedModel,
        label_classes: Mapping[str, int],
        num_patches: int | None = None,
        background_weight: float = 0.2,
    ) -> None:
        super().__init__()
        # An earlier stage may have frozen it.
        self.vision_tower = vision_tower.requires_grad_(True)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(vision_tower.config.hidden_size, classes) for name, classes in label_classes.items()}
        )
        self.num_patches, self.background_weight = num_patches, background_weight

    def forward(self, pixel_values: torch.Tensor, **labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: `[batch, 3, height, width]`.
            labels: of each name, `[batch, num_patches]` int64.

        Returns:
            `loss`, and `correct` `[batch, num_labels]`: of each image's patches of which there is something to tell,
            the share of which it is told right; NaN for an image without any.
        """
        tells = {name: labels[name] != head.out_features - 1 for name, head in self.heads.items()}
        if self.num_patches is None:
            features = self.vision_tower(pixel_values).last_hidden_state[:, 1:]
        else:
            much = torch.stack(list(tells.values())).sum(dim=0)
            much = much + torch.rand(much.shape, device=much.device)
            seen = much.topk(self.num_patches, dim=1).indices.sort(dim=1).values
            features = self._features_of(pixel_values, seen)
            labels = {name: label.gather(1, seen) for name, label in labels.items()}
            tells = {name: told.gather(1, seen) for name, told in tells.items()}
        loss, correct = 0.0, []
        for name, head in self.heads.items():
            logits = head(features)
            loss = loss + self._loss(logits, labels[name])
            right = (logits.argmax(dim=-1) == labels[name]) & tells[name]
            correct.append(right.sum(dim=1) / tells[name].sum(dim=1))
        return {"loss": loss, "correct": torch.stack(correct, dim=-1).detach()}

    def _features_of(self, pixel_values: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """What the tower makes of CLS and the patches at `seen` `[batch, num_seen]` alone; without CLS."""
        tower = self.vision_tower
        hidden_states = tower.embeddings(pixel_values)
        index = torch.cat([torch.zeros_like(seen[:, :1]), seen + 1], dim=1)[..., None]
        hidden_states = hidden_states.gather(1, index.expand(-1, -1, hidden_states.shape[-1]))
        return tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden_states)).last_hidden_state[:, 1:]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[-1] = self.background_weight
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)


@dataclass
class PatchLabelCollator:
    """Batches rows of a drawn task for [`PatchLabeller`], which is told the columns of `label_names`."""

    image_processor: BaseImageProcessor
    label_names: tuple[str, ...]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixel_values = self.image_processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        labels = {name: torch.tensor([row[name] for row in rows], dtype=torch.int64) for name in self.label_names}
        return {"pixel_values": pixel_values} | labels
