"""What a folder says of how its weights came about: a recipe, a training log for each stage, evaluation files.

These files travel with the weights, and everything that a model card says of training and accuracy is read from them:
the data, the base model, the budgets that were trained and the numbers that were measured.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..evaluation.circumstances import command_without_places, without_place
from ..evaluation.records import check_record, check_types, read_record
from ..modeling.hub.own_files import require_own_file
from .drawn_data import DRAWN_DATA

RECIPE = "recipe.yaml"
# What a recipe's stage leaves behind when it is finished, with the recipe's `model`, and what a conversion does, with
# its `source`.
FINISHED, CONVERSION = "finished.json", "conversion.json"
# Fields that files of a record have, and those that they may have.
EVALUATION = {"command": str, "versions": dict[str, str], "split": str, "num_questions": int, "rows": list[dict]}
MORE_OF_EVALUATION = {"dataset": str, "metric": str, "machine": str}
ROW = {"reducer": str, "budget": float, "num_keep": int | None} | dict.fromkeys(
    ("accuracy", "accuracy_low", "accuracy_high", "decoder_tokens", "milliseconds"), float
)
MORE_OF_ROW = {"accuracy_by_kind": dict[str, float], "flops": float | None, "visual_tokens": float}
LOG, STAGE = {"stage": dict, "log": list[dict]}, {"name": str, "kind": str}
MORE_OF_STAGE = {"data": dict | None, "budgets": dict, "training": dict}
RECIPE_FIELDS = {"model": dict, "stages": list[dict]}

# Kinds of stages that draw their data, and what they draw where they do not say it.
DRAWN_KINDS = ("patch_labels", "told_questions", "told_patches", "shown_questions", "packed_questions")
DRAWN_BY_DEFAULT = "digit-scenes"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA_FILE = re.compile(r"\.(jsonl?|csv|parquet|arrow|tar|ya?ml|txt|gz|zst)$")


@dataclass
class TrainingRecord:
    """
    Attributes:
        recipe: YAML file of the run.
        training_logs: JSON files of the run's stages in order, each with `stage` (fields of the recipe's stage) and
            `log` (entries with `step` and `loss`), and `base_model` and `license` where a trainer knew them.
        evaluations: JSON files, each with `command`, `versions`, `split`, `num_questions` and `rows`; a row has
            `reducer`, `budget`, `num_keep`, `accuracy`, `accuracy_low`, `accuracy_high` (fractions), `decoder_tokens`
            and `milliseconds`. `dataset`, `metric`, `machine`, and a row's `accuracy_by_kind` and `flops`, are shown
            where they are there.
        began_with: repository or folder of the model that training began with, where no recipe says it.

    Raises:
        ValueError: if a file is not JSON or YAML, or lacks a field; the message names the file. Files are read when
            they are first asked for.
    """

    recipe: Path | None = None
    training_logs: Sequence[Path] = ()
    evaluations: Sequence[Path] = ()
    began_with: str | None = None

    @classmethod
    def found_in(
        cls,
        folder: str | Path,
        recipe: str | Path | None = None,
        training_logs: Sequence[str | Path] | None = None,
        evaluations: Sequence[str | Path] | None = None,
    ) -> "TrainingRecord":
        """The files that are given, and where one kind is not (`None`), those that lie in the folder."""
        folder = Path(folder)
        if recipe is None and (folder / RECIPE).is_file():
            recipe = folder / RECIPE
        logs = sorted(folder.glob("training_log*.json")) if training_logs is None else training_logs
        results = sorted(folder.glob("evaluation*.json")) if evaluations is None else evaluations
        for path in (recipe, *logs, *results):
            if path is not None and Path(path).parent == folder:
                require_own_file(Path(path), folder)
        return cls(
            None if recipe is None else Path(recipe),
            [Path(log) for log in logs],
            [Path(result) for result in results],
            _began_with(folder),
        )

    def copy_to(self, folder: Path) -> "TrainingRecord":
        """
        Copies the files into `folder` under the names that published folders have. Of absolute paths they keep the
        last names, and of a token nothing.
        """
        stages = [log["stage"]["name"] for log in self.logs]
        log_names = [f"training_log_{number:02}_{stage}.json" for number, stage in enumerate(stages, start=1)]
        names = [f"evaluation_{number:02}.json" for number in range(1, len(self.evaluations) + 1)]
        if len(names) == 1:
            names = ["evaluation.json"]
        return TrainingRecord(
            None if self.recipe is None else _published(self.recipe, self.settings, folder / RECIPE),
            [_published(*own, folder / to) for *own, to in zip(self.training_logs, self.logs, log_names, strict=True)],
            [_published(*own, folder / to) for *own, to in zip(self.evaluations, self.results, names, strict=True)],
            self.began_with,
        )

    @cached_property
    def logs(self) -> list[dict[str, Any]]:
        """Contents of the training logs."""
        logs = [read_record(path, LOG) for path in self.training_logs]
        for path, log in zip(self.training_logs, logs, strict=True):
            check_stage(log["stage"], f"{path}, stage")
        return logs

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """Contents of the evaluation files."""
        results = [read_record(path, EVALUATION) for path in self.evaluations]
        for path, result in zip(self.evaluations, results, strict=True):
            check_types(result, MORE_OF_EVALUATION, str(path))
            if not result["rows"]:
                raise ValueError(f"{path} has no rows; nothing was measured.")
            for row in result["rows"]:
                check_record(row, ROW, f"{path}, a row")
                check_types(row, MORE_OF_ROW, f"{path}, a row")
        return results

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Content of the recipe; empty without one."""
        if self.recipe is None:
            return {}
        settings = read_record(self.recipe, RECIPE_FIELDS, "YAML")
        for stage in settings["stages"]:
            check_stage(stage, f"{self.recipe}, a stage")
        return settings

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The stages that were carried out, or else those that the recipe plans."""
        return [log["stage"] for log in self.logs] or self.settings.get("stages", [])

    @property
    def base_model(self) -> str | None:
        """What training began with, as it was written: a repository or a folder."""
        of_recipe = self.settings.get("model", {}).get("checkpoint")
        named = [of_recipe, self.began_with, *(log.get("base_model") for log in self.logs)]
        return next((str(name) for name in named if name), None)

    @property
    def license(self) -> str | None:
        """What a trainer knew of the licence of the model that it began with."""
        return next((log["license"] for log in self.logs if log.get("license")), None)

    @property
    def drawn_task(self) -> str | None:
        """The drawn task that all stages' data are of; `None` if some are of another, or are not known."""
        paths = {path for stage in self.stages for path in _data_paths(stage) or [None]}
        return paths.pop() if len(paths) == 1 and paths <= set(DRAWN_DATA) else None

    @property
    def hub_data_sets(self) -> list[str]:
        """Ids of the data sets on the Hub that stages were trained on."""
        named = [path for stage in self.stages for path in _data_paths(stage)]
        return [path for path in dict.fromkeys(named) if is_hub_id(path)]


def _published(file: Path, content: dict[str, Any], target: Path) -> Path:
    """Writes a file's text, with comments and all, for others than those on this machine; returns `target`."""
    text = file.read_text(encoding="utf-8")
    for name, value in sorted(_texts(content), key=lambda one: len(one[1]), reverse=True):
        shorter = command_without_places(value) if name == "command" else without_place(value)
        if name == "hub_token":
            shorter = "not published"
        # As JSON writes it, and as a person does.
        for written in (lambda text: json.dumps(text)[1:-1], str):
            text = text if shorter == value else text.replace(written(value), written(shorter))
    target.write_text(text, encoding="utf-8")
    return target


def _texts(content: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a file, each with the name of its field."""
    if isinstance(content, str):
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _texts(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value, name)


def check_stage(stage: dict[str, Any], where: str) -> None:
    """`ValueError` if a stage of a recipe, or of a log, has not what the card says of it."""
    check_record(stage, STAGE, where)
    check_types(stage, MORE_OF_STAGE, where)
    # Files are called by it.
    if not re.fullmatch(r"[^/\\\0]{1,100}", stage["name"]) or set(stage["name"]) == {"."}:
        raise ValueError(f"{where} has a stage named {stage['name']!r}; `name` has to be that of a file, no folder.")


def _began_with(folder: Path) -> str | None:
    """What a recipe's stage was trained from, or a converted checkpoint was converted from."""
    named = []
    if (folder / FINISHED).is_file():
        finished = read_record(folder / FINISHED, {})
        check_types(finished, {"model": dict[str, Any]}, str(folder / FINISHED))
        named.append(finished.get("model", {}).get("checkpoint"))
    if (folder / CONVERSION).is_file():
        named.append(read_record(folder / CONVERSION, {"source": str})["source"])
    return next((name for name in named if name), None)


def is_hub_id(name: Any) -> bool:
    """Whether a name can only be a repository on the Hub: `user/name`, and no file or folder here."""
    return bool(
        isinstance(name, str) and _HUB_ID.fullmatch(name) and not _DATA_FILE.search(name) and not Path(name).exists()
    )


def data_names(stage: dict[str, Any]) -> list[str]:
    """
    What a stage's data are called on a card. Of a folder on somebody's machine that is its last part.

    Args:
        stage: with `kind` and `data`, which has a `path`, or `sources` with a path each.
    """
    called = [path if is_hub_id(path) else Path(path).name or path for path in _data_paths(stage)]
    return [DRAWN_DATA[name].name if name in DRAWN_DATA else name for name in called] or ["not named"]


def _data_paths(stage: dict[str, Any]) -> list[str]:
    data = stage.get("data") or {}
    sources = data.get("sources", [data])
    if stage.get("kind") in DRAWN_KINDS:
        sources = [{"path": DRAWN_BY_DEFAULT} | data]
    return [str(source["path"]) for source in sources if source.get("path") is not None]
