"""What each kind of a recipe's stages is trained by: its data, its collator and its trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk
from transformers import Trainer, TrainingArguments

from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from .budget_stream import BudgetStream
from .collator import BudgetCollator
from .digit_scenes import load_digit_questions, load_digit_scenes
from .packed_questions import PackedQuestionCollator
from .patch_pretraining import PatchLabelCollator, PatchLabeller
from .recipe import Stage
from .trainer import AdaVTPTrainer
from .training_arguments import AdaVTPTrainingArguments


def stage_trainer(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, stage: Stage, folder: Path, seed: int
) -> Trainer:
    """
    The trainer of one stage, ready to `train`.

    Args:
        model: to be trained, in place.
        processor: of the model.
        stage: what is done.
        folder: for the stage's checkpoints.
        seed: of the order of data and of the budgets.

    Returns:
        An [`AdaVTPTrainer`], or a `Trainer` of the tower alone for `"patch_labels"`.
    """
    kinds = {"patch_labels": _patch_labels, "packed_questions": _packed_questions, "conversations": _conversations}
    return kinds[stage.kind](model, processor, stage, folder, seed)


def _patch_labels(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, stage: Stage, folder: Path, seed: int
) -> Trainer:
    fixed = {"label_names": ["patch_digits", "patch_colours"], "remove_unused_columns": False}
    # An earlier stage may have frozen it.
    model.model.vision_tower.requires_grad_(True)
    return Trainer(
        model=PatchLabeller(model.model.vision_tower),
        args=TrainingArguments(str(folder), **fixed | {"report_to": [], "seed": seed} | stage.training),
        data_collator=PatchLabelCollator(processor.image_processor),
        **_data_sets(stage, load_digit_scenes),
    )


def _packed_questions(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, stage: Stage, folder: Path, seed: int
) -> Trainer:
    collator = PackedQuestionCollator(processor, BudgetStream(**_budgets(stage, seed)))
    return _budgeted_trainer(model, processor, stage, folder, seed, collator, load_digit_scenes)


def _conversations(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, stage: Stage, folder: Path, seed: int
) -> Trainer:
    collator = BudgetCollator(processor, **_budgets(stage, seed))
    return _budgeted_trainer(model, processor, stage, folder, seed, collator, _conversation_data)


def _budgets(stage: Stage, seed: int) -> dict[str, Any]:
    return {"budget_range": (1.0, 1.0), "seed": seed} | stage.budgets


def _budgeted_trainer(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    stage: Stage,
    folder: Path,
    seed: int,
    collator: PackedQuestionCollator | BudgetCollator,
    load: Callable[..., Dataset],
) -> AdaVTPTrainer:
    model.set_reducer(stage.reducer)
    return AdaVTPTrainer(
        model=model,
        args=AdaVTPTrainingArguments(str(folder), **{"report_to": [], "seed": seed} | stage.training),
        data_collator=collator,
        processing_class=processor,
        **_data_sets(stage, load),
    )


def _data_sets(stage: Stage, load: Callable[..., Dataset]) -> dict[str, Dataset | None]:
    return {
        "train_dataset": load(**stage.data),
        "eval_dataset": load(**stage.eval_data) if stage.eval_data else None,
    }


def _conversation_data(path: str, **arguments: Any) -> Dataset:
    """`"digit-scenes"`, a folder written by `Dataset.save_to_disk`, or whatever `datasets.load_dataset` takes."""
    if path == "digit-scenes":
        return load_digit_questions(**arguments)
    if (Path(path) / "dataset_info.json").is_file():
        return load_from_disk(path, **arguments)
    return load_dataset(path, **arguments)
