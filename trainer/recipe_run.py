"""Carrying a recipe out: from wherever an earlier run of it in the same folder stopped, one stage after another."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from .digit_processor import build_digit_processor
from .recipe import Recipe, Stage
from .recipe_stages import stage_trainer

FINISHED = "finished.json"


def run_recipe(recipe: Recipe, output_dir: str | Path) -> Path:
    """
    Carries a recipe out, from wherever an earlier run of it in the same folder stopped.

    Args:
        recipe: what to do.
        output_dir: folder for the stages' checkpoints.

    Returns:
        The folder of the last stage's checkpoint, with model and processor.

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
    if len(done) == len(recipe.stages):
        return output_dir / done[-1].name
    set_seed(recipe.seed)
    model, processor = _build(recipe.model if not done else {"checkpoint": str(output_dir / done[-1].name)})
    for number, stage in enumerate(recipe.stages[len(done) :], start=len(done)):
        folder = output_dir / stage.name
        # What a stage draws does not depend on whether the ones before it ran in this process.
        set_seed(recipe.seed + number)
        trainer = stage_trainer(model, processor, stage, folder, recipe.seed + number)
        trainer.train(resume_from_checkpoint=_last_whole_checkpoint(folder))
        if stage is recipe.stages[-1] and recipe.reducer is not None:
            model.set_reducer(recipe.reducer)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        log = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        (folder / "training_log.json").write_text(json.dumps({"stage": stage.__dict__, "log": log}, indent=1))
        # Written last: a folder without it is not a finished stage.
        (folder / FINISHED).write_text(json.dumps({"steps": trainer.state.global_step} | _settings(recipe, stage)))
    return output_dir / recipe.stages[-1].name


def _settings(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What a stage's weights depend on, besides the stages before it, as JSON knows it."""
    return json.loads(json.dumps({"model": recipe.model, "seed": recipe.seed, "stage": stage.__dict__}))


def _require_same(recipe: Recipe, stage: Stage, folder: Path) -> None:
    """That a finished stage is the recipe's, and not one of the same name from before the recipe was changed."""
    finished, asked = json.loads((folder / FINISHED).read_text()), _settings(recipe, stage)
    finished = {**finished, **finished.get("stage", {})}
    asked = {**asked, **asked["stage"]}
    # Folders from before settings were written down have only the number of steps.
    differing = [name for name in asked if name in finished and name != "stage" and finished[name] != asked[name]]
    if differing:
        shown = "; ".join(f"`{name}` was {finished[name]} and is {asked[name]}" for name in differing)
        raise ValueError(f"{folder} is finished and was trained with other settings: {shown}. Choose another folder.")


def _last_whole_checkpoint(folder: Path) -> str | None:
    """A checkpoint that was being written when its process ended lacks the file that `Trainer` writes last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return str(max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))) if whole else None


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
