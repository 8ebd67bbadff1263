"""What each kind of a recipe's stages is trained by: its data, its collator and its trainer."""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk
from transformers import Trainer, TrainingArguments

from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from ..tasks.digit_scenes import load_digit_questions, load_digit_scenes
from .budget_stream import BudgetStream
from .collator import BudgetCollator
from .packed_questions import PackedQuestionCollator
from .patch_pretraining import PatchLabelCollator, PatchLabeller
from .recipe import Stage
from .recipe_adapters import with_adapters
from .recipe_streams import evaluation_rows, training_stream
from .trainer import AdaVTPTrainer
from .training_arguments import AdaVTPTrainingArguments
from .whole_checkpoints import WholeCheckpointsMixin


class PatchTrainer(WholeCheckpointsMixin, Trainer):
    """Trains a [`PatchLabeller`]."""


def stage_arguments(stage: Stage, folder: Path, seed: int) -> TrainingArguments:
    """
    The training arguments of one stage. They come before its model: DeepSpeed learns from them how to load it.

    Args:
        stage: what is done.
        folder: for the stage's checkpoints.
        seed: of the order of data and of the budgets.
    """
    common = {"report_to": [], "seed": seed}
    if stage.kind == "patch_labels":
        fixed = {"label_names": ["patch_digits", "patch_colours"], "remove_unused_columns": False}
        return TrainingArguments(str(folder), **fixed | common | stage.training)
    return AdaVTPTrainingArguments(str(folder), **common | stage.training)


def stage_trainer(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    stage: Stage,
    arguments: TrainingArguments,
    seed: int,
) -> Trainer:
    """
    The trainer of one stage, ready to `train`.

    Args:
        model: to be trained, in place.
        processor: of the model.
        stage: what is done.
        arguments: see [`stage_arguments`].
        seed: of the order of data and of the budgets.

    Returns:
        An [`AdaVTPTrainer`], or a `Trainer` of the tower alone for `"patch_labels"`.

    Raises:
        ValueError: if the tower alone is to be trained with its parameters spread over processes.
    """
    kinds = {"patch_labels": _patch_labels, "packed_questions": _packed_questions, "conversations": _conversations}
    return kinds[stage.kind](model, processor, stage, arguments, seed)


def _patch_labels(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    stage: Stage,
    arguments: TrainingArguments,
    seed: int,
) -> Trainer:
    # An earlier stage may have frozen it.
    model.model.vision_tower.requires_grad_(True)
    trainer = PatchTrainer(
        model=PatchLabeller(model.model.vision_tower),
        args=arguments,
        data_collator=PatchLabelCollator(processor.image_processor),
        **_data_sets(stage, arguments),
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"stage {stage.name!r} is of kind 'patch_labels', which trains a part of the model that is saved with the "
            "rest; run it on one process or with DDP."
        )
    return trainer


def _packed_questions(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    stage: Stage,
    arguments: AdaVTPTrainingArguments,
    seed: int,
) -> Trainer:
    collator = PackedQuestionCollator(processor, BudgetStream(**_budgets(stage, seed)))
    return _budgeted_trainer(model, processor, stage, arguments, collator, _data_sets(stage, arguments))


def _conversations(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    stage: Stage,
    arguments: AdaVTPTrainingArguments,
    seed: int,
) -> Trainer:
    budgets = _budgets(stage, seed)
    data, eval_data, rows = stage.data, stage.eval_data, None
    is_stream = "sources" in data
    # One process prepares what the others then find on the disk.
    with arguments.main_process_first(desc="preparing conversations"):
        train = training_stream(processor, data, budgets, arguments) if is_stream else _conversation_data(**data)
        if eval_data:
            is_checked = "sources" in eval_data
            rows = evaluation_rows(processor, eval_data, seed) if is_checked else _conversation_data(**eval_data)
    data_sets = {"train_dataset": train, "eval_dataset": rows}
    return _budgeted_trainer(model, processor, stage, arguments, BudgetCollator(processor, **budgets), data_sets)


def _budgets(stage: Stage, seed: int) -> dict[str, Any]:
    return {"budget_range": (1.0, 1.0), "seed": seed} | stage.budgets


def _budgeted_trainer(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    stage: Stage,
    arguments: AdaVTPTrainingArguments,
    collator: PackedQuestionCollator | BudgetCollator,
    data_sets: dict[str, Any],
) -> AdaVTPTrainer:
    model.set_reducer(stage.reducer)
    if stage.gradient_gates is not None:
        model.config.gradient_gates = stage.gradient_gates
    return AdaVTPTrainer(
        model=with_adapters(model, stage, arguments.train_parts) if stage.adapters else model,
        args=arguments,
        data_collator=collator,
        processing_class=processor,
        **data_sets,
    )


def _data_sets(stage: Stage, arguments: TrainingArguments) -> dict[str, Dataset | None]:
    """Digit scenes. One process makes them, the others then find them on the disk."""
    with arguments.main_process_first(desc="preparing scenes"):
        return {
            "train_dataset": load_digit_scenes(**stage.data),
            "eval_dataset": load_digit_scenes(**stage.eval_data) if stage.eval_data else None,
        }


def _conversation_data(path: str, **arguments: Any) -> Dataset:
    """`"digit-scenes"`, a folder written by `Dataset.save_to_disk`, or whatever `datasets.load_dataset` takes."""
    if path == "digit-scenes":
        return load_digit_questions(**arguments)
    if (Path(path) / "dataset_info.json").is_file():
        return load_from_disk(path, **arguments)
    return load_dataset(path, **arguments)
