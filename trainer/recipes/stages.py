"""What each kind of a recipe's stages is trained by: its data, its collator and its trainer.

Data of conversations that names `sources` is a stream to train on, and checked rows to evaluate on:

```yaml
data:
  sources:
    - {path: llava_v1_5_mix665k.json, images: images, weight: 0.9}
    - {path: org/more-conversations, streaming: true, weight: 0.1}
  max_length: 2048
```
"""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

from datasets import Dataset, load_dataset, load_from_disk
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments

from ...hub_cards.training_record import check_record, check_types
from ...modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ...modeling.processing_adavtp import AdaVTPProcessor
from ...tasks.drawn_tasks import TASK_NAMES, DrawnTask, drawn_task
from ..adapters import add_adapters
from ..data.budget_stream import BudgetStream
from ..data.collator import BudgetCollator
from ..data.packed_collator import PackedQuestionCollator
from ..data.reader import ConversationReader
from ..data.sources import conversation_rows, load_conversations
from ..data.stream import ConversationStream, measured_lengths
from ..decoder_pretraining import (
    ShownReader,
    ToldImageCollator,
    ToldPageCollator,
    ToldPatches,
    ToldProjector,
    ToldReader,
)
from ..part_trainer import PartTrainer
from ..tower_pretraining import PatchLabelCollator, PatchLabeller
from ..trainer import AdaVTPTrainer
from ..training_arguments import AdaVTPTrainingArguments
from .recipe import DEFAULT_TASK, KINDS_OF_PARTS, Stage


def stage_arguments(stage: Stage, folder: Path, seed: int) -> TrainingArguments:
    """The training arguments of one stage. They come before its model: DeepSpeed learns from them how to load it."""
    common = {"report_to": [], "seed": seed}
    if stage.kind in KINDS_OF_PARTS:
        fixed = {"label_names": list(_task(stage.data).patch_labels), "remove_unused_columns": False}
        return TrainingArguments(str(folder), **fixed | common | stage.training)
    return AdaVTPTrainingArguments(str(folder), **common | stage.training)


def stage_trainer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    stage: Stage,
    arguments: TrainingArguments,
    seed: int,
) -> Trainer:
    """
    An [`AdaVTPTrainer`] of one stage, or a [`PartTrainer`] for one that trains a part, ready to `train` the model in
    place.

    Raises:
        ValueError: if the tower alone is to be trained with its parameters spread over processes; if the kind is not
            for models of this family; if a source cannot be read, its rows do not fill a batch, or one to evaluate on
            is streamed.
    """
    if stage.kind != "conversations" and not isinstance(processor, AdaVTPProcessor):
        raise ValueError(
            f"stage {stage.name!r}: `kind` is {stage.kind!r}, and a {model.config.model_type!r} model learns from "
            "'conversations' alone."
        )
    budgets = {"budget_range": (1.0, 1.0), "seed": seed} | stage.budgets
    # One process prepares what the others then find on the disk.
    with arguments.main_process_first(desc="preparing data"):
        train = _rows(stage, stage.data, seed, processor)
        evaluated = _rows(stage, stage.eval_data, seed, processor) if stage.eval_data else None
        if "sources" in stage.data:
            train = _stream(train, stage.data, processor, budgets, arguments)
        if evaluated is not None and "sources" in stage.eval_data:
            evaluated = _encoded(evaluated, ConversationReader(processor, stage.eval_data.get("max_length")))
    data = {"train_dataset": train, "eval_dataset": evaluated}
    if stage.kind in KINDS_OF_PARTS:
        part, collator = _part(model, processor, stage, budgets)
        return PartTrainer(model, part, arguments, data_collator=collator, **data)
    model.set_reducer(stage.reducer)
    if stage.gradient_gates is not None:
        model.config.gradient_gates = stage.gradient_gates
    if stage.adapters:
        adapters = {name: value for name, value in stage.adapters.items() if name != "quantize"}
        model = add_adapters(model, arguments.train_parts, **adapters)
    if stage.kind == "packed_questions":
        collator = PackedQuestionCollator(processor, BudgetStream(**budgets))
    else:
        collator = BudgetCollator(processor, **budgets)
    return AdaVTPTrainer(model=model, args=arguments, data_collator=collator, processing_class=processor, **data)


def _part(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, stage: Stage, budgets: dict[str, Any]
) -> tuple[nn.Module, Callable[[list[dict[str, Any]]], dict[str, Tensor]]]:
    """What a stage trains alone, and what batches its data."""
    task = _task(stage.data)
    if stage.kind == "patch_labels":
        labeller = PatchLabeller(model.model.vision_tower, task.patch_labels, stage.num_patches)
        return labeller, PatchLabelCollator(processor.image_processor, tuple(task.patch_labels))
    if not task.patch_words:
        raise ValueError(
            f"stage {stage.name!r}: `kind` is {stage.kind!r}, and {stage.data.get('path', DEFAULT_TASK)!r} has no "
            "words for what its patches show."
        )
    told = ToldPatches(processor, task.patch_words, task.patch_roles)
    if stage.kind == "told_patches":
        return ToldProjector(model), ToldImageCollator(told)
    with_pictures = stage.kind == "shown_questions"
    reader = ShownReader(model) if with_pictures else ToldReader(model)
    return reader, ToldPageCollator(told, BudgetStream(**budgets), with_pictures)


def check_data(stage: Stage) -> None:
    """`ValueError` if what a stage says of its data are not the arguments of what reads them, in their types."""
    for name, data in (("data", stage.data), ("eval_data", stage.eval_data)):
        where = f"stage {stage.name!r}, {name}"
        if name == "eval_data" and not data:
            continue
        if stage.kind != "conversations":
            _check_arguments(_task(data).load_examples, _but_path(data), where)
        elif "sources" in data:
            check_types(data, {"sources": list[dict[str, Any]], "max_length": int | None}, where)
        else:
            check_record(data, {"path": str}, where)
            if data["path"] in TASK_NAMES:
                _check_arguments(_task(data).load_questions, _but_path(data), where)


def _task(data: dict[str, Any]) -> DrawnTask:
    return drawn_task(data.get("path", DEFAULT_TASK))


def _but_path(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "path"}


def _check_arguments(function: Callable[..., Any], data: dict[str, Any], where: str) -> None:
    try:
        signature(function).bind(**data)
    except TypeError as error:
        raise ValueError(f"{where}: {error}; allowed are {', '.join(signature(function).parameters)}.") from error
    check_types(data, get_type_hints(function), where)


def _rows(stage: Stage, data: dict[str, Any], seed: int, processor: ProcessorMixin) -> Any:
    """
    Drawn examples for the first two kinds, of the task that `path` names. For conversations: `sources`; or as `path` a
    drawn task, a folder written by `Dataset.save_to_disk`, or whatever `datasets.load_dataset` takes, of which a row
    that cannot be read is an error.
    """
    if stage.kind != "conversations":
        return _task(data).load_examples(**_but_path(data))
    if "sources" in data:
        return load_conversations(data["sources"], seed)
    path, arguments = data["path"], _but_path(data)
    if path in TASK_NAMES:
        return _task(data).load_questions(**arguments)
    is_saved = (Path(path) / "dataset_info.json").is_file()
    rows = conversation_rows((load_from_disk if is_saved else load_dataset)(path, **arguments), path)
    reader = ConversationReader(processor)
    return (
        _encoded(rows, reader)
        if isinstance(rows, Dataset)
        else rows.map(reader.read, remove_columns=list(rows.features))
    )


def _stream(
    rows: Any,
    data: dict[str, Any],
    processor: ProcessorMixin,
    budgets: dict[str, Any],
    arguments: AdaVTPTrainingArguments,
) -> ConversationStream:
    reader = ConversationReader(processor, data.get("max_length"))
    of_stream = {name: data[name] for name in ("group_by_length", "block_size") if name in data}
    if isinstance(rows, Dataset) and data.get("group_by_length", True):
        of_stream["lengths"] = measured_lengths(rows, reader, max(arguments.dataloader_num_workers, 1))
    share = {"num_processes": arguments.world_size, "process_index": arguments.process_index}
    return ConversationStream(rows, reader, arguments.train_batch_size, **budgets | of_stream | share)


def _encoded(rows: Any, reader: ConversationReader) -> Dataset:
    """Rows that are encoded when they are asked for. One that cannot be read is an error: an evaluation that leaves
    rows out measures something else."""
    if not isinstance(rows, Dataset):
        raise ValueError("`eval_data`: a source is streamed; an evaluation needs rows with a length.")

    def encoded(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        read = [reader.read(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {name: [row[name] for row in read] for name in read[0]}

    return rows.with_transform(encoded)
