"""A training run written down: a YAML file that says what is trained, on what, and how it is measured.

A recipe builds or loads a model and takes it through stages, one after another. Each stage leaves a checkpoint, so a
run that is interrupted goes on where it stopped.

```yaml
seed: 0
model: {checkpoint: llava-hf/llava-1.5-7b-hf}
stages:
  - name: budgets
    kind: conversations
    data: {path: my/conversations, split: train}
    budgets: {budget_range: [0.2, 1.0], per: sample}
    training: {max_steps: 2000, train_parts: [controller, projector]}
evaluation: {questions: 2400, budgets: [1.0, 0.4], reducers: [adaptive, random]}
```
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset, load_from_disk
from transformers import AutoConfig, Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from .budget_stream import BudgetStream
from .collator import BudgetCollator
from .digit_processor import build_digit_processor
from .digit_scenes import load_digit_questions, load_digit_scenes
from .packed_questions import PackedQuestionCollator
from .patch_pretraining import PatchLabelCollator, PatchLabeller
from .trainer import AdaVTPTrainer
from .training_arguments import AdaVTPTrainingArguments

FINISHED = "finished.json"
EVALUATION_FIELDS = ("questions", "budgets", "reducers")


@dataclass
class Stage:
    """
    One stretch of training.

    Attributes:
        name: names the stage's folder.
        kind: a key of `STAGE_KINDS`: `"patch_labels"`, `"packed_questions"` or `"conversations"`.
        data: arguments of the stage's data set.
        eval_data: the same for the data set that `Trainer` evaluates on, if `training` asks it to.
        budgets: arguments of [`BudgetStream`]; empty for the full budget throughout.
        reducer: what chooses the visual tokens, as in `set_reducer`; `"random"` makes a model ready for any choice.
        training: arguments of [`AdaVTPTrainingArguments`], or of `TrainingArguments` for `"patch_labels"`.

    Raises:
        ValueError: if the kind is not known, or an argument of `budgets` or `training`; or a budget is not allowed.
    """

    name: str
    kind: str
    data: dict[str, Any] = field(default_factory=dict)
    eval_data: dict[str, Any] = field(default_factory=dict)
    budgets: dict[str, Any] = field(default_factory=dict)
    reducer: Any = "adaptive"
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in STAGE_KINDS:
            raise ValueError(f"stage {self.name!r}: `kind` is {self.kind!r}; allowed are {', '.join(STAGE_KINDS)}.")
        of_training = TrainingArguments if self.kind == "patch_labels" else AdaVTPTrainingArguments
        arguments = [f.name for f in fields(of_training) if f.name != "output_dir"]
        known = {"training": arguments, "budgets": ["budget_range", "per", "seed"]}
        for group, names in known.items():
            _check_names(getattr(self, group), names, f"stage {self.name!r}, {group}")
        # Now, and not when the stages before this one have run for hours.
        BudgetStream(**self.budgets)


@dataclass
class Recipe:
    """
    A whole run.

    Attributes:
        model: `{"checkpoint": path or repository}`, of AdaVTP or LLaVA, and beside it what `from_pretrained` takes,
            configuration fields among it; or the fields of an [`AdaVTPConfig`] for a new model for digit scenes.
        stages: what is done, in order.
        seed: of initialisation, of the order of data and of the budgets.
        reducer: what the last stage's checkpoint chooses tokens with, as in `set_reducer`, if not with what that stage
            trained. The weights of all reducers that were trained are in it.
        evaluation: what `adavtp train` measures at the end on digit scenes: `questions`, the number of them, `budgets`
            and `reducers`; empty for nothing.

    Raises:
        ValueError: if there are no stages or two have the same name, or the model or the evaluation is not complete.
    """

    model: dict[str, Any]
    stages: list[Stage]
    seed: int = 0
    reducer: Any = None
    evaluation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`stages` are named {names}; a recipe has at least one, and no name twice.")
        if "checkpoint" not in self.model and not {"vision_config", "text_config"} <= set(self.model):
            raise ValueError(
                f"`model` has {', '.join(self.model) or 'no fields'}; it needs `checkpoint`, or `vision_config` and "
                "`text_config`."
            )
        if self.evaluation:
            _check_names(self.evaluation, EVALUATION_FIELDS, "evaluation", EVALUATION_FIELDS)

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """
        Reads a recipe.

        Raises:
            ValueError: if a field is unknown or missing, or a stage's kind is not known.
        """
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=RecipeLoader)
        check_fields(content, cls, str(path))
        stages = content["stages"] or []
        for number, stage in enumerate(stages):
            check_fields(stage, Stage, f"{path}, stage {number}")
        return cls(**content | {"stages": [Stage(**stage) for stage in stages]})


class RecipeLoader(yaml.SafeLoader):
    """Reads `1e-3` as the number that everybody means; YAML 1.1, which PyYAML follows, takes it for a word."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def check_fields(content: Any, of: type, where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: found {content!r}; expected are fields, `name: value`.")
    needed = [f.name for f in fields(of) if f.default is MISSING and f.default_factory is MISSING]
    _check_names(content, [f.name for f in fields(of)], where, needed)


def _check_names(content: dict[str, Any], known: Sequence[str], where: str, needed: Sequence[str] = ()) -> None:
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(f"{where}: unknown field(s) {', '.join(unknown)}; allowed are {', '.join(known)}.")
    if missing := [name for name in needed if name not in content]:
        raise ValueError(f"{where}: missing field(s) {', '.join(missing)}.")


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
        trainer = STAGE_KINDS[stage.kind](model, processor, stage, folder, recipe.seed + number)
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


STAGE_KINDS: dict[str, Callable[..., Trainer]] = {
    "patch_labels": _patch_labels,
    "packed_questions": _packed_questions,
    "conversations": _conversations,
}
