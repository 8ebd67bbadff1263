"""A tiny checkpoint on disk, and adapters that were trained on it."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny_conversations import conversation_rows, digit_model, digit_processor
from torch import nn

from adavtp import AdaVTPForConditionalGeneration, AdaVTPTrainer, AdaVTPTrainingArguments, BudgetCollator
from adavtp.trainer.adapters import add_adapters

PARTS = ["controller", "projector", "decoder"]
MIXED = (1, 0, 2)


def base_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Path:
    """A whole checkpoint with its processor."""
    processor = digit_processor()
    digit_model(processor, seed=seed, **fields).to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def adapted_model(base: Path, train_parts: list[str] = PARTS, **arguments: Any) -> PeftModel:
    """The checkpoint with adapters of rank 4 that have not learned anything yet."""
    torch.manual_seed(1)
    model = AdaVTPForConditionalGeneration.from_pretrained(base)
    return add_adapters(model, train_parts, **({"r": 4, "lora_alpha": 8} | arguments))


def adapter_trainer(folder: Path, model: nn.Module, num_rows: int = 8, **arguments: Any) -> AdaVTPTrainer:
    """Two steps of two rows at random budgets, by default."""
    processor = digit_processor()
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "train_parts": PARTS,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return AdaVTPTrainer(
        model=model,
        args=AdaVTPTrainingArguments(str(folder), **(defaults | arguments)),
        data_collator=BudgetCollator(processor, (0.2, 1.0)),
        processing_class=processor,
        train_dataset=conversation_rows(num_rows, MIXED),
        eval_dataset=conversation_rows(3, MIXED),
    )


def trained_adapter(folder: Path, base: Path, **arguments: Any) -> PeftModel:
    """The model after two steps; its adapter is saved in the folder."""
    trainer = adapter_trainer(folder / "run", adapted_model(base), **arguments)
    trainer.train()
    trainer.save_model(str(folder))
    return trainer.model.eval()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def trained_in_processes(folder: Path, base: Path, batch_size: int, **arguments: Any) -> dict[str, torch.Tensor]:
    """
    Weights after two steps over four rows, of which one has an image: it always stands beside text.

    Args:
        folder: for what the trainer writes.
        base: the checkpoint.
        batch_size: of each process.
        arguments: of the trainer.
    """
    parts = ["controller", "projector", "vision", "decoder"]
    # Gates inside attention make a dropped token's gradient a thousand times that of its weight, and so its rounding.
    model = AdaVTPForConditionalGeneration.from_pretrained(base, selection_output="mask", gradient_gates="features")
    torch.manual_seed(1)
    model = add_adapters(model, parts, r=4, lora_dropout=0.0)
    step = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "train_parts": parts}
    trainer = adapter_trainer(folder, model, per_device_train_batch_size=batch_size, **step, **arguments)
    trainer.data_collator.budgets.budget_range = (1.0, 1.0)
    trainer.train_dataset = conversation_rows(4, (1, 0, 0, 0))
    trainer.train()
    return weights_of(model)


def one_of_two(folder: str, base: str) -> None:
    """What each of two launched processes does; leaves its weights in the folder."""
    arguments = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    weights = trained_in_processes(Path(folder) / "run", Path(base), 1, **arguments)
    torch.save(weights, Path(folder) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
