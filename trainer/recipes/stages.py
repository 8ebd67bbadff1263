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
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments

from ...hub_cards.training_record import check_record, check_types
from ...modeling.processing_adavtp import AdaVTPProcessor
from ...tasks.digit_scenes import load_digit_questions, load_digit_scenes
from ..adapters import add_adapters
from ..data.budget_stream import BudgetStream
from ..data.collator import BudgetCollator
from ..data.packed_collator import PackedQuestionCollator
from ..data.reader import ConversationReader
from ..data.sources import conversation_rows, load_conversations
from ..data.stream import ConversationStream, measured_lengths
from ..tower_pretraining import PatchLabelCollator, TowerTrainer
from ..trainer import AdaVTPTrainer
from ..training_arguments import AdaVTPTrainingArguments
from .recipe import Stage


def stage_arguments(stage: Stage, folder: Path, seed: int) -> TrainingArguments:
    """The training arguments of one stage. They come before its model: DeepSpeed learns from them how to load it."""
    common = {"report_to": [], "seed": seed}
    if stage.kind == "patch_labels":
        fixed = {"label_names": ["patch_digits", "patch_colours"], "remove_unused_columns": False}
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
    An [`AdaVTPTrainer`] of one stage, or a [`TowerTrainer`] for `"patch_labels"`, ready to `train` the model in place.

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
    if stage.kind == "patch_labels":
        return TowerTrainer(model, arguments, data_collator=PatchLabelCollator(processor.image_processor), **data)
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


def check_data(stage: Stage) -> None:
    """`ValueError` if what a stage says of its data are not the arguments of what reads them, in their types."""
    for name, data in (("data", stage.data), ("eval_data", stage.eval_data)):
        where = f"stage {stage.name!r}, {name}"
        if name == "eval_data" and not data:
            continue
        if stage.kind != "conversations":
            _check_arguments(load_digit_scenes, data, where)
        elif "sources" in data:
            check_types(data, {"sources": list[dict[str, Any]], "max_length": int | None}, where)
        else:
            check_record(data, {"path": str}, where)
            if data["path"] == "digit-scenes":
                _check_arguments(load_digit_questions, {key: data[key] for key in data if key != "path"}, where)


def _check_arguments(function: Callable[..., Any], data: dict[str, Any], where: str) -> None:
    try:
        signature(function).bind(**data)
    except TypeError as error:
        raise ValueError(f"{where}: {error}; allowed are {', '.join(signature(function).parameters)}.") from error
    check_types(data, get_type_hints(function), where)


def _rows(stage: Stage, data: dict[str, Any], seed: int, processor: ProcessorMixin) -> Any:
    """
    Digit scenes for the first two kinds. For conversations: `sources`; or as `path` `"digit-scenes"`, a folder written
    by `Dataset.save_to_disk`, or whatever `datasets.load_dataset` takes, of which a row that cannot be read is an
    error.
    """
    if stage.kind != "conversations":
        return load_digit_scenes(**data)
    if "sources" in data:
        return load_conversations(data["sources"], seed)
    path, arguments = data["path"], {name: value for name, value in data.items() if name != "path"}
    if path == "digit-scenes":
        return load_digit_questions(**arguments)
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
