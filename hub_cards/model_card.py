"""The model card of a checkpoint, written from its own files.

Every number on a card comes from the configuration, the weights, a training log or an evaluation file, so that a card
cannot promise what was not measured.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor

TEMPLATE = Path(__file__).with_name("model_card_template.md")

EVALUATION_FIELDS = ("command", "versions", "split", "num_questions", "rows")
ROW_FIELDS = (
    *("reducer", "budget", "num_keep", "accuracy", "accuracy_low", "accuracy_high", "decoder_tokens", "milliseconds"),
)
LOG_FIELDS = ("stage", "log")

# Stage kinds of recipes that have no data set of their own to name.
DIGIT_SCENE_KINDS = ("patch_labels", "packed_questions")
DIGIT_SCENES = "digit scenes"

# Above this a vocabulary is a language's and not a list of words worth a warning.
_SMALL_VOCABULARY = 1000
_BUDGET_WITHOUT_MEASUREMENT = 0.5


def model_card(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    name: str,
    recipe: str | Path | None = None,
    training_logs: Sequence[str | Path] = (),
    evaluations: Sequence[str | Path] = (),
) -> ModelCard:
    """
    Writes the card of a checkpoint.

    Args:
        model: the checkpoint's model.
        processor: its processor.
        name: what the card's snippet loads: a repository id or a folder.
        recipe: the YAML file of the run that made it.
        training_logs: JSON files of the run's stages in order, each with `stage` (fields of the recipe's stage) and
            `log` (entries with `step` and `loss`).
        evaluations: JSON files, each with `command`, `versions`, `split`, `num_questions` and `rows`; a row has
            `reducer`, `budget`, `num_keep`, `accuracy`, `accuracy_low`, `accuracy_high` (fractions), `decoder_tokens`
            and `milliseconds`. `dataset`, `machine` and a row's `accuracy_by_kind` are shown where they are there.

    Returns:
        The card, with metadata for the Hub.

    Raises:
        ValueError: if a file is not JSON or YAML, or lacks a field; the message names the file.
    """
    results = [read_record(path, EVALUATION_FIELDS) for path in evaluations]
    for path, result in zip(evaluations, results, strict=True):
        for row in result["rows"]:
            _check_fields(row, ROW_FIELDS, f"{path}, a row")
    logs = [read_record(path, LOG_FIELDS) for path in training_logs]
    settings = {} if recipe is None else _read_recipe(Path(recipe))
    stages = [log["stage"] for log in logs] or settings.get("stages", [])
    is_digit_scenes = bool(stages) and all(_data_name(stage) == DIGIT_SCENES for stage in stages)
    tokenizer = processor.tokenizer
    return ModelCard.from_template(
        _metadata(name, results, settings, is_digit_scenes),
        template_path=str(TEMPLATE),
        name=name,
        config=model.config,
        num_parameters=f"{model.num_parameters():,}",
        dtype=str(model.dtype).removeprefix("torch."),
        question="What colour is the largest digit?" if is_digit_scenes else "What is in the picture?",
        example_budget=_example_budget(results),
        default_budget=_in_words(getattr(model.generation_config, "token_budget", None) or model.config.token_budget),
        evaluations=[_shown_evaluation(result) for result in results],
        stages=_shown_stages(logs, stages),
        recipe_file=None if recipe is None else Path(recipe).name,
        digit_scenes=is_digit_scenes,
        vocabulary_size=len(tokenizer) if len(tokenizer) <= _SMALL_VOCABULARY else None,
        unknown_token=tokenizer.unk_token,
        trained_budgets=_trained_budgets(stages),
    )


def read_record(path: str | Path, fields: Sequence[str]) -> dict[str, Any]:
    """
    Reads a JSON object.

    Raises:
        ValueError: if the file is not a JSON object or lacks one of `fields`; the message names file and field.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    _check_fields(record, fields, str(path))
    return record


def _check_fields(record: Any, fields: Sequence[str], where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}; expected is an object with {', '.join(fields)}.")
    if missing := [field for field in fields if field not in record]:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}; expected are {', '.join(fields)}.")


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    _check_fields(settings, ("model", "stages"), str(path))
    return settings


def _metadata(
    name: str, results: list[dict[str, Any]], settings: dict[str, Any], is_digit_scenes: bool
) -> ModelCardData:
    base = settings.get("model", {}).get("checkpoint")
    return ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        language="en",
        tags=["adavtp", "llava", "visual-token-pruning", "token-budget"] + ["digit-scenes"] * is_digit_scenes,
        base_model=base if base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)) else None,
        model_name=name.rpartition("/")[2],
        # An index without results would be refused by the Hub.
        eval_results=[_hub_result(result, row) for result in results for row in result["rows"]] or None,
    )


def _hub_result(result: dict[str, Any], row: dict[str, Any]) -> EvalResult:
    dataset = result.get("dataset", DIGIT_SCENES)
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=dataset.replace(" ", "-"),
        dataset_name=dataset,
        dataset_split=result["split"],
        metric_type="accuracy",
        metric_name=f"accuracy, token_budget={row['budget']}, reducer={row['reducer']}",
        metric_value=round(row["accuracy"], 4),
        metric_args={"token_budget": row["budget"], "reducer": row["reducer"]},
    )


def _shown_evaluation(result: dict[str, Any]) -> dict[str, Any]:
    circumstances = [f"{name} {version}" for name, version in result["versions"].items()]
    reducer = (
        "adaptive" if any(row["reducer"] == "adaptive" for row in result["rows"]) else result["rows"][0]["reducer"]
    )
    detailed = [row for row in result["rows"] if row["reducer"] in (reducer, "full") and row.get("accuracy_by_kind")]
    kinds = sorted({kind for row in detailed for kind in row["accuracy_by_kind"]})
    return {
        "dataset": result.get("dataset", DIGIT_SCENES),
        "split": result["split"],
        "num_questions": result["num_questions"],
        "command": result["command"],
        "circumstances": ", ".join(circumstances + [result["machine"]] * ("machine" in result)),
        "rows": [
            row
            | {
                "budget": round(row["budget"], 4),
                "accuracy": _percent(row["accuracy"]),
                "low": _percent(row["accuracy_low"]),
                "high": _percent(row["accuracy_high"]),
                "decoder_tokens": f"{row['decoder_tokens']:.1f}",
                "milliseconds": f"{row['milliseconds']:.1f}",
            }
            for row in result["rows"]
        ],
        "kinds_reducer": reducer,
        "kinds_budgets": [round(row["budget"], 4) for row in detailed],
        "kinds": [
            {"name": kind, "accuracies": [_percent(row["accuracy_by_kind"].get(kind)) for row in detailed]}
            for kind in kinds
        ],
    }


def _shown_stages(logs: list[dict[str, Any]], stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for number, stage in enumerate(stages):
        training = stage.get("training", {})
        entries = [entry for entry in logs[number]["log"] if "loss" in entry] if logs else []
        steps = entries[-1].get("step") if entries else None
        budgets = stage.get("budgets", {}).get("budget_range", [1.0, 1.0])
        shown.append(
            {
                "name": stage["name"],
                "kind": stage["kind"].replace("_", " "),
                "data": ", ".join([_data_name(stage)] + [f"{k} {v}" for k, v in stage.get("data", {}).items()]),
                "steps": training.get("max_steps", steps),
                "batch": training.get("per_device_train_batch_size", "default"),
                "learning_rate": training.get("learning_rate", "default"),
                "budgets": "to".join(f" {budget} " for budget in dict.fromkeys(budgets)).strip(),
                "loss": f"{entries[0]['loss']:.3f} to {entries[-1]['loss']:.3f}" if entries else "not logged",
            }
        )
    return shown


def _data_name(stage: dict[str, Any]) -> str:
    path = stage.get("data", {}).get("path")
    is_digit_scenes = stage["kind"] in DIGIT_SCENE_KINDS or path == "digit-scenes"
    return DIGIT_SCENES if is_digit_scenes else str(path)


def _trained_budgets(stages: list[dict[str, Any]]) -> str | None:
    """The lowest and the highest budget that any stage drew, or `None` if none drew budgets."""
    ranges = [stage["budgets"]["budget_range"] for stage in stages if "budget_range" in stage.get("budgets", {})]
    return f"{min(map(min, ranges))} to {max(map(max, ranges))}" if ranges else None


def _example_budget(results: list[dict[str, Any]]) -> float | int:
    """A measured budget from the middle of those that leave something out."""
    reduced = sorted({row["budget"] for result in results for row in result["rows"]} - {1.0})
    return reduced[len(reduced) // 2] if reduced else _BUDGET_WITHOUT_MEASUREMENT


def _in_words(budget: float | int) -> str:
    if isinstance(budget, int):
        return f"{budget} of them"
    return "all of them" if budget == 1.0 else f"a fraction of {budget}"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"
