"""Carrying a recipe out: from wherever an earlier run of it in the same folder stopped, one stage after another."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, Trainer, set_seed

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from ..tasks.digit_processor import build_digit_processor
from .recipe import Recipe, Stage
from .recipe_adapters import loading_arguments, whole_checkpoint
from .recipe_stages import stage_arguments, stage_trainer
from .trainer import AdaVTPTrainer
from .whole_checkpoints import last_whole_checkpoint

FINISHED = "finished.json"
# What a recipe says of its checkpoint and a saved configuration does not.
HOW_TO_LOAD = ("attn_implementation", "dtype")


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
        ValueError: if stages are finished in the folder that are not the recipe's first, or were trained from another
            model, with another seed or other settings.
    """
    output_dir = Path(output_dir)
    done = [stage for stage in recipe.stages if (output_dir / stage.name / FINISHED).is_file()]
    if recipe.stages[: len(done)] != done:
        raise ValueError(f"`output_dir` {output_dir} has stages finished that are not the recipe's first; empty it.")
    for stage in done:
        _require_same(recipe, stage, output_dir / stage.name)
    model, processor = None, None
    for number, stage in enumerate(recipe.stages[len(done) :], start=len(done)):
        folder, source = output_dir / stage.name, recipe.model
        is_new = number == 0 and "checkpoint" not in source
        if is_new:
            # Before the arguments, by which DeepSpeed would spread it over processes before it has weights.
            set_seed(recipe.seed)
            model, processor = _build(source)
        arguments = stage_arguments(stage, folder, recipe.seed + number)
        before = recipe.stages[number - 1] if number > 0 else None
        # Adapters belong to a checkpoint on disk, and what stands behind them is one. Several processes may each have
        # a part of what they trained.
        starts_from_disk = model is None or arguments.world_size > 1 or stage.adapters or (before and before.adapters)
        if starts_from_disk and not is_new:
            if before is not None:
                how = {name: source[name] for name in HOW_TO_LOAD if name in source}
                source = how | {"checkpoint": str(whole_checkpoint(output_dir / before.name))}
            set_seed(recipe.seed)
            model, processor = _build(source | loading_arguments(source, stage))
        # What a stage draws does not depend on whether the ones before it ran in this process.
        set_seed(recipe.seed + number)
        trainer = stage_trainer(model, processor, stage, arguments, recipe.seed + number)
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
        if stage is recipe.stages[-1] and recipe.reducer is not None:
            model.set_reducer(recipe.reducer)
        _save(trainer, model, processor, recipe, stage)
    last = output_dir / recipe.stages[-1].name
    return whole_checkpoint(last) if recipe.evaluation else last


def _save(
    trainer: Trainer,
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    recipe: Recipe,
    stage: Stage,
) -> None:
    """Writes what a stage leaves. The weights come from all processes, the files from the main one."""
    folder, is_main = Path(trainer.args.output_dir), trainer.is_world_process_zero()
    if trainer.is_fsdp_enabled:
        # Checkpoints on the way may be in parts, one of each process. What is left is for everybody.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if isinstance(trainer, AdaVTPTrainer):
        trainer.save_model(str(folder))
    elif is_main:
        model.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    if is_main:
        processor.save_pretrained(folder)
        log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        (folder / "training_log.json").write_text(json.dumps({"stage": stage.__dict__, "log": log}, indent=1))
        # Written last: a folder without it is not a finished stage.
        (folder / FINISHED).write_text(json.dumps({"steps": trainer.state.global_step} | _settings(recipe, stage)))
    trainer.accelerator.wait_for_everyone()


def _settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What a stage's weights depend on, besides the stages before it, as JSON knows it."""
    return json.loads(json.dumps({"model": recipe.model, "seed": recipe.seed, "stage": stage.__dict__}))


def _require_same(recipe: Recipe, stage: Stage, folder: Path) -> None:
    """That a finished stage is the recipe's, and not one of the same name from before the recipe was changed."""
    finished, asked = json.loads((folder / FINISHED).read_text()), _settings(recipe, stage)
    # Folders from before these two settings existed were trained without them.
    finished = {**finished, "adapters": {}, "gradient_gates": None, **finished.get("stage", {})}
    asked = {**asked, **asked["stage"]}
    # Folders from before settings were written down have only the number of steps.
    differing = [name for name in asked if name in finished and name != "stage" and finished[name] != asked[name]]
    if differing:
        shown = "; ".join(f"`{name}` was {finished[name]} and is {asked[name]}" for name in differing)
        raise ValueError(f"{folder} is finished and was trained with other settings: {shown}. Choose another folder.")


def _build(model: dict[str, Any]) -> tuple[AdaVTPForConditionalGeneration, AdaVTPProcessor]:
    if "checkpoint" in model:
        checkpoint, fields_of_model = model["checkpoint"], {k: v for k, v in model.items() if k != "checkpoint"}
        processor = AdaVTPProcessor.from_pretrained(checkpoint)
        return AdaVTPForConditionalGeneration.from_pretrained(checkpoint, **fields_of_model), processor
    vision = model["vision_config"]
    processor = build_digit_processor(vision["image_size"], vision["patch_size"])
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = AutoConfig.for_model(**model["text_config"] | special | {"vocab_size": len(tokenizer)})
    config = AdaVTPConfig(
        **model | {"vision_config": AutoConfig.for_model(**vision), "text_config": text},
        image_token_index=processor.image_token_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )
    new_model = AdaVTPForConditionalGeneration(config)
    # Answers are a word, captions a line; without a limit of its own `generate` counts the prompt towards twenty.
    new_model.generation_config.max_new_tokens = 16
    return new_model, processor
