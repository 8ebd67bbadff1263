"""The model card of a checkpoint, written from its own files.

Every number on a card comes from the configuration, the weights' headers, a training log or an evaluation file, so
that a card cannot promise what was not measured.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, get_local_safetensors_metadata
from huggingface_hub.errors import SafetensorsParsingError

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..evaluation.records import read_record
from ..evaluation.settings import FULL
from ..modeling.families.llava import LLAVA
from ..modeling.hub.loading import family_class
from ..modeling.hub.own_files import failures_in_words
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from .drawn_data import DRAWN_DATA
from .licence import Origin
from .training_record import DRAWN_BY_DEFAULT, TrainingRecord, data_names, is_hub_id

TEMPLATE = Path(__file__).with_name("model_card_template.md")

# Above this a vocabulary is a language's and not a list of words worth a warning.
_SMALL_VOCABULARY = 1000
_BUDGET_WITHOUT_MEASUREMENT = 0.5
# As safetensors write data types, and as torch does.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def model_card(folder: str | Path, name: str, record: TrainingRecord, origin: Origin) -> ModelCard:
    """
    Writes the card of a checkpoint. Its weights are not loaded.

    Args:
        folder: with the checkpoint: model and processor.
        name: what the card's snippet loads: a repository id or a folder.
        record: of the training, and of what was measured. Names of files on the card are theirs.
        origin: base model and licence.

    Returns:
        The card, with metadata for the Hub. It shows the pictures that [`curve_names`] says.

    Raises:
        ValueError: if a file of the record is not JSON or YAML, or lacks a field; the message names the file.
        OSError: if the folder has no configuration or processor.
    """
    folder = Path(folder)
    with failures_in_words("configuration", name):
        family = family_class(folder, {})
        model_class = family or AdaVTPForConditionalGeneration
        config = model_class.config_class.from_pretrained(folder)
    tokenizer = model_class.processor_class.from_pretrained(folder).tokenizer
    # From the headers of the weight files: the number of parameters of each data type.
    try:
        numbers = get_local_safetensors_metadata(folder).parameter_count
    except SafetensorsParsingError as error:
        raise ValueError(f"A weight file is not whole; copy or download it again. {error}") from error
    dtype = max(numbers, key=numbers.get)
    task = record.drawn_task if origin.base_model is None else None
    drawn = DRAWN_DATA.get(task)
    return ModelCard.from_template(
        _metadata(name, record, origin, "llava" if family is None else config.model_type, [task] if task else []),
        template_path=str(TEMPLATE),
        name=name,
        config=config,
        family=None if family is None else config.model_type,
        reducers=", ".join(f"`{entry if isinstance(entry, str) else entry['name']}`" for entry in config.reducers),
        num_visual_tokens=LLAVA.tokens_per_image(config) if family is None else None,
        num_parameters=f"{sum(numbers.values()):,}",
        dtype=_DTYPES.get(dtype, dtype),
        question="What is in the picture?" if drawn is None else drawn.question,
        example_budget=_example_budget(record.results),
        default_budget=_in_words(_default_budget(folder, config)),
        evaluations=[
            _shown_evaluation(result) | {"curve": curve}
            for result, curve in zip(record.results, curve_names(record), strict=True)
        ],
        stages=_shown_stages(record),
        recipe_file=None if record.recipe is None else record.recipe.name,
        origin=origin,
        drawn=drawn,
        vocabulary_size=len(tokenizer) if len(tokenizer) <= _SMALL_VOCABULARY else None,
        unknown_token=tokenizer.unk_token,
        trained_budgets=_trained_budgets(record.stages),
    )


def curve_names(record: TrainingRecord) -> list[str]:
    """Names of the pictures that a card shows, one for each evaluation file."""
    numbers = range(1, len(record.evaluations) + 1)
    return ["budget_curve.png"] if len(numbers) == 1 else [f"budget_curve_{number:02}.png" for number in numbers]


def _metadata(name: str, record: TrainingRecord, origin: Origin, family: str, tags: list[str]) -> ModelCardData:
    data = ModelCardData(
        license=origin.license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        language="en",
        tags=["adavtp", family, "visual-token-pruning", "token-budget", *tags],
        base_model=origin.base_model,
        datasets=record.hub_data_sets or None,
        model_name=name.rpartition("/")[2],
        # An index without results would be refused by the Hub.
        eval_results=[_hub_result(result, row) for result in record.results for row in result["rows"]] or None,
    )
    if origin.base_model is not None and record.stages:
        data["base_model_relation"] = "finetune"
    return data


def _hub_result(result: dict[str, Any], row: dict[str, Any]) -> EvalResult:
    dataset, metric = _dataset_name(result), result.get("metric", "accuracy")
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=dataset.replace(" ", "-"),
        dataset_name=dataset,
        dataset_split=result["split"],
        metric_type=metric,
        metric_name=f"{metric}, token_budget={row['budget']}, reducer={row['reducer']}",
        metric_value=round(row["accuracy"], 4),
        metric_args={"token_budget": row["budget"], "reducer": row["reducer"]},
    )


def _dataset_name(result: dict[str, Any]) -> str:
    """An id on the Hub, or the name of a data set; of a folder on somebody's machine its last part."""
    form, colon, path = result.get("dataset", DRAWN_DATA[DRAWN_BY_DEFAULT].name).rpartition(":")
    return form + colon + (path if is_hub_id(path) else Path(path).name)


def _shown_evaluation(result: dict[str, Any]) -> dict[str, Any]:
    rows = result["rows"]
    circumstances = [f"{name} {version}" for name, version in result["versions"].items()]
    circumstances += [result["machine"]] if "machine" in result else []
    reducer = "adaptive" if any(row["reducer"] == "adaptive" for row in rows) else rows[0]["reducer"]
    detailed = [row for row in rows if row["reducer"] in (reducer, FULL) and row.get("accuracy_by_kind")]
    kinds = sorted({kind for row in detailed for kind in row["accuracy_by_kind"]})
    whole = max(rows, key=_tokens)
    return {
        "dataset": _dataset_name(result),
        "split": result["split"],
        "num_questions": result["num_questions"],
        "metric": result.get("metric", "accuracy").replace("_", " "),
        "command": result["command"],
        "circumstances": ", ".join(circumstances),
        "rows": [_shown_row(row, whole) for row in rows],
        "trade_off": _trade_off(rows, reducer, whole),
        "kinds_reducer": reducer,
        "kinds_budgets": [round(row["budget"], 4) for row in detailed],
        "kinds": [
            {"name": kind, "accuracies": [_percent(row["accuracy_by_kind"].get(kind)) for row in detailed]}
            for kind in kinds
        ],
    }


def _shown_row(row: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    return row | {
        "num_keep": f"{_tokens(row):.4g}",
        "budget": round(row["budget"], 4),
        "accuracy": _percent(row["accuracy"]),
        "low": _percent(row["accuracy_low"]),
        "high": _percent(row["accuracy_high"]),
        "against_whole": "" if row is whole else _points(row, whole),
        "decoder_tokens": f"{row['decoder_tokens']:.1f}",
        "milliseconds": f"{row['milliseconds']:.1f}",
    }


def _tokens(row: dict[str, Any]) -> float:
    """Visual tokens that are kept of an image; where images differ in how many there are, the mean of prompts."""
    return row["visual_tokens"] if row["num_keep"] is None else row["num_keep"]


def _trade_off(rows: list[dict[str, Any]], reducer: str, whole: dict[str, Any]) -> dict[str, Any] | None:
    """What the smallest measured budget costs and saves; `None` if only one was measured."""
    smallest = min((row for row in rows if row["reducer"] == reducer), key=_tokens)
    if _tokens(smallest) == _tokens(whole):
        return None
    return {
        "budget": round(smallest["budget"], 4),
        "reducer": reducer,
        "num_keep": f"{_tokens(smallest):.4g}",
        "num_tokens": f"{_tokens(whole):.4g}",
        "decoder_tokens": _percent(smallest["decoder_tokens"] / whole["decoder_tokens"]),
        "points": _points(smallest, whole),
    }


def _points(row: dict[str, Any], whole: dict[str, Any]) -> str:
    return f"{100 * (row['accuracy'] - whole['accuracy']):+.1f}"


def _shown_stages(record: TrainingRecord) -> list[dict[str, Any]]:
    shown = []
    for number, stage in enumerate(record.stages):
        training = stage.get("training", {})
        entries = [entry for entry in record.logs[number]["log"] if "loss" in entry] if record.logs else []
        steps = entries[-1].get("step") if entries else None
        budgets = stage.get("budgets", {}).get("budget_range", [1.0, 1.0])
        more = {key: value for key, value in (stage.get("data") or {}).items() if key not in ("path", "sources")}
        shown.append(
            {
                "name": stage["name"],
                "kind": stage["kind"].replace("_", " "),
                "data": ", ".join(data_names(stage) + [f"{key} {value}" for key, value in more.items()]),
                "steps": training.get("max_steps", steps),
                "batch": training.get("per_device_train_batch_size", "default"),
                "learning_rate": training.get("learning_rate", "default"),
                "budgets": "to".join(f" {budget} " for budget in dict.fromkeys(budgets)).strip(),
                "loss": f"{entries[0]['loss']:.3f} to {entries[-1]['loss']:.3f}" if entries else "not logged",
            }
        )
    return shown


def _trained_budgets(stages: list[dict[str, Any]]) -> str | None:
    """The lowest and the highest budget that any stage drew, or `None` if none drew budgets."""
    ranges = [stage["budgets"]["budget_range"] for stage in stages if "budget_range" in stage.get("budgets", {})]
    return f"{min(map(min, ranges))} to {max(map(max, ranges))}" if ranges else None


def _example_budget(results: list[dict[str, Any]]) -> float | int:
    """A measured budget from the middle of those that leave something out."""
    reduced = sorted({row["budget"] for result in results for row in result["rows"]} - {1.0})
    return reduced[len(reduced) // 2] if reduced else _BUDGET_WITHOUT_MEASUREMENT


def _default_budget(folder: Path, config: AdaVTPConfig) -> float | int:
    """What `generate` keeps when nobody says how much."""
    path = folder / "generation_config.json"
    of_generation = read_record(path, {}).get("token_budget") if path.is_file() else None
    return config.token_budget if of_generation is None else of_generation


def _in_words(budget: float | int) -> str:
    if isinstance(budget, int):
        return f"{budget} of them"
    return "all of them" if budget == 1.0 else f"a fraction of {budget}"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"
