"""Training of a part of a model by itself, before the model answers anything."""

from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from .whole_checkpoints import WholeCheckpointsMixin


class PartTrainer(WholeCheckpointsMixin, Trainer):
    """
    Trains a part of a model, in place; saves the model, and in checkpoints on the way the part. Raises `ValueError` if
    parameters are spread over processes.

    Args:
        whole_model: whose part it is.
        part: what is trained.
    """

    def __init__(
        self, whole_model: AdaVTPForConditionalGeneration, part: nn.Module, args: TrainingArguments, **kwargs: Any
    ) -> None:
        self._whole_model = whole_model
        super().__init__(model=part, args=args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "A part of the model is trained alone, and saved with the rest; run this stage on one process or with "
                "DDP."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `Trainer`."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._whole_model.save_pretrained(output_dir or self.args.output_dir)
