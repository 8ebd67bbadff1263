"""Carrying a recipe out: from wherever an earlier run of it in the same folder stopped, one stage after another."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin, Trainer, set_seed

from ...modeling.reducers.base import REDUCERS
from ..whole_checkpoints import last_whole_checkpoint
from .recipe import Recipe, Stage
from .stages import check_data, stage_arguments, stage_trainer
from .starting_model import MERGED, model_on_disk, new_model, whole_checkpoint

BEGUN, FINISHED = "begun.json", "finished.json"
# Settings that are noted of a stage. Those of its training may change while it is going on, such as batches that turn
# out too large, and those of a finished one no more.
IDENTITY = ("model", "seed", "stage")


def run_recipe(recipe: Recipe, output_dir: str | Path) -> Path:
    """
    Carries a recipe out, from wherever an earlier run of it in the same folder stopped. Every process that a launcher
    started calls it, with the same arguments.

    Args:
        recipe: what to do.
        output_dir: folder for the stages' checkpoints.

    Returns:
        The folder of the last stage's checkpoint, with model and processor. For a stage with adapters that is the
        adapter's, or, if the recipe has an evaluation, that of the merged checkpoint.

    Raises:
        ValueError: if a stage's data are not described as they have to be; if stages are finished in the folder that
            are not the recipe's first, or were trained from another model, with another seed or other settings; if one
            was begun so; or if nothing says how.
    """
    for stage in recipe.stages:
        # Now, and not when the stages before have run for hours.
        check_data(stage)
    folders = [Path(output_dir) / stage.name for stage in recipe.stages]
    model, processor = None, None
    for number in range(_num_finished(recipe, folders), len(recipe.stages)):
        stage, seed = recipe.stages[number], recipe.seed + number
        before = recipe.stages[number - 1] if number > 0 else None
        if before is None and "checkpoint" not in recipe.model:
            # Before the arguments, by which DeepSpeed would spread it over processes before it has weights.
            set_seed(recipe.seed)
            model, processor = new_model(recipe.model)
        arguments = stage_arguments(stage, folders[number], seed)
        # Adapters belong to a checkpoint on disk, and what stands behind them is one. Several processes may each have
        # a part of what they trained.
        is_handed_on = model is not None and not stage.adapters and not (before and before.adapters)
        if not is_handed_on or (before and arguments.world_size > 1):
            set_seed(recipe.seed)
            model, processor = model_on_disk(recipe, stage, folders[number - 1] if before else None)
        # Now that the checkpoint has brought its own, and not when the last of them is asked for after hours.
        if unknown := sorted(recipe.reducer_names() - set(REDUCERS)):
            raise ValueError(f"`reducer` is {unknown[0]!r}; registered reducers: {', '.join(sorted(REDUCERS))}.")
        # What a stage draws does not depend on whether the ones before it ran in this process.
        set_seed(seed)
        trainer = stage_trainer(model, processor, stage, arguments, seed)
        if trainer.is_world_process_zero():
            folders[number].mkdir(parents=True, exist_ok=True)
            (folders[number] / BEGUN).write_text(json.dumps(_settings(recipe, stage)))
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folders[number]))
        if stage is recipe.stages[-1] and recipe.reducer is not None:
            model.set_reducer(recipe.reducer)
        _save(trainer, processor, recipe, stage)
    return whole_checkpoint(folders[-1]) if recipe.evaluation else folders[-1]


def _save(trainer: Trainer, processor: ProcessorMixin, recipe: Recipe, stage: Stage) -> None:
    """Writes what a stage leaves. The weights come from all processes, the files from the main one."""
    folder = Path(trainer.args.output_dir)
    if trainer.is_fsdp_enabled:
        # Checkpoints on the way may be in parts, one of each process. What is left is for everybody.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        processor.save_pretrained(folder)
        # Of an adapter that was here before, whose record is gone.
        shutil.rmtree(folder / MERGED, ignore_errors=True)
        log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        (folder / "training_log.json").write_text(json.dumps({"stage": stage.__dict__, "log": log}, indent=1))
        # Written last: a folder without it is not a finished stage.
        (folder / FINISHED).write_text(json.dumps({"steps": trainer.state.global_step} | _settings(recipe, stage)))
    trainer.accelerator.wait_for_everyone()


def _num_finished(recipe: Recipe, folders: list[Path]) -> int:
    """How many stages an earlier run has finished, which have to be the recipe's first, as they stand in it now."""
    are_finished = [(folder / FINISHED).is_file() for folder in folders]
    number = sum(are_finished)
    if not all(are_finished[:number]):
        raise ValueError(
            f"`output_dir` {folders[0].parent} has stages finished that are not the recipe's first; empty it."
        )
    for place, (stage, folder) in enumerate(zip(recipe.stages, folders, strict=True)):
        if folder.exists() and not folder.is_dir():
            raise ValueError(
                f"stage {stage.name!r} is to be trained in {folder}, which is a file; choose another folder."
            )
        if place < number:
            _require_same(folder / FINISHED, _settings(recipe, stage), "is finished and was trained")
        elif (folder / BEGUN).exists():
            _require_same(folder / BEGUN, _settings(recipe, stage), "was begun", but={"training"})
        elif (checkpoint := last_whole_checkpoint(folder)) is not None:
            raise ValueError(
                f"{folder} has {Path(checkpoint).name} and no {BEGUN}, which would say of which run it is. Choose "
                "another folder, or delete that one."
            )
    return number


def _require_same(path: Path, asked: dict[str, Any], what: str, but: Collection[str] = ()) -> None:
    """That what a folder was made with, as it says itself, is what is asked for."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        noted = {name: noted[name] for name in IDENTITY}
        # Folders from before a setting was written down were trained without it.
        noted |= {"adapters": {}, "gradient_gates": None, **noted.pop("stage")}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} does not say what its folder was trained with ({type(error).__name__}: {error}); choose another "
            "folder, or delete that one."
        ) from error
    asked = asked | asked["stage"]
    if differing := [name for name in asked if name in noted and name not in but and noted[name] != asked[name]]:
        shown = "; ".join(f"`{name}` was {noted[name]} and is {asked[name]}" for name in differing)
        raise ValueError(f"{path.parent} {what} with other settings: {shown}. Choose another folder.")


def _settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What a stage's weights depend on, besides the stages before it, as JSON knows it."""
    return json.loads(json.dumps({"model": recipe.model, "seed": recipe.seed, "stage": stage.__dict__}))
