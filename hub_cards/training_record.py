"""What a folder says of how its weights came about: a recipe, a training log for each stage, evaluation files.

These files travel with the weights, and everything that a model card says of training and accuracy is read from them:
the data, the base model, the budgets that were trained and the numbers that were measured.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from ..modeling.hub.own_files import require_own_file

RECIPE = "recipe.yaml"
# What a recipe's stage leaves behind when it is finished, with the recipe's `model`, and what a conversion does, with
# its `source`.
FINISHED, CONVERSION = "finished.json", "conversion.json"
EVALUATION_FIELDS = ("command", "versions", "split", "num_questions", "rows")
ROW_FIELDS = (
    *("reducer", "budget", "num_keep", "accuracy", "accuracy_low", "accuracy_high", "decoder_tokens", "milliseconds"),
)
LOG_FIELDS = ("stage", "log")

# Stage kinds of recipes that have no data set of their own to name.
DIGIT_SCENE_KINDS = ("patch_labels", "packed_questions")
DIGIT_SCENES = "digit scenes"

_STAGE_NAME = re.compile(r"[^/\\\0]{1,100}")
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
        """Copies the files into `folder` under the names that published folders have."""
        stages = [log["stage"]["name"] for log in self.logs]
        log_names = [f"training_log_{number:02}_{stage}.json" for number, stage in enumerate(stages, start=1)]
        names = [f"evaluation_{number:02}.json" for number in range(1, len(self.evaluations) + 1)]
        if len(names) == 1:
            names = ["evaluation.json"]
        return TrainingRecord(
            None if self.recipe is None else Path(shutil.copyfile(self.recipe, folder / RECIPE)),
            [Path(shutil.copyfile(a, folder / b)) for a, b in zip(self.training_logs, log_names, strict=True)],
            [Path(shutil.copyfile(a, folder / b)) for a, b in zip(self.evaluations, names, strict=True)],
            self.began_with,
        )

    @cached_property
    def logs(self) -> list[dict[str, Any]]:
        """Contents of the training logs."""
        logs = [read_record(path, LOG_FIELDS) for path in self.training_logs]
        for path, log in zip(self.training_logs, logs, strict=True):
            _check_fields(log["stage"], ("name", "kind"), f"{path}, its stage")
            name = log["stage"]["name"]
            # It becomes part of a file's name.
            if not isinstance(name, str) or not _STAGE_NAME.fullmatch(name):
                raise ValueError(f"{path} has a stage named {name!r}; allowed are names of files without a folder.")
        return logs

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """Contents of the evaluation files."""
        results = [read_record(path, EVALUATION_FIELDS) for path in self.evaluations]
        for path, result in zip(self.evaluations, results, strict=True):
            for row in result["rows"]:
                _check_fields(row, ROW_FIELDS, f"{path}, a row")
        return results

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Content of the recipe; empty without one."""
        return {} if self.recipe is None else read_record(self.recipe, ("model", "stages"), "YAML")

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
    def is_digit_scenes(self) -> bool:
        """Whether the stages' data are known, and all are digit scenes."""
        return {name for stage in self.stages for name in data_names(stage)} == {DIGIT_SCENES}

    @property
    def hub_data_sets(self) -> list[str]:
        """Ids of the data sets on the Hub that stages were trained on."""
        named = [path for stage in self.stages for path in _data_paths(stage)]
        return [path for path in dict.fromkeys(named) if is_hub_id(path)]


def _began_with(folder: Path) -> str | None:
    """What a recipe's stage was trained from, or a converted checkpoint was converted from."""
    named = []
    if (folder / FINISHED).is_file():
        named.append(read_record(folder / FINISHED, ()).get("model", {}).get("checkpoint"))
    if (folder / CONVERSION).is_file():
        named.append(read_record(folder / CONVERSION, ("source",))["source"])
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
    if stage.get("kind") in DIGIT_SCENE_KINDS:
        return [DIGIT_SCENES]
    paths = _data_paths(stage)
    called = [path if is_hub_id(path) else Path(path).name or path for path in paths]
    return [DIGIT_SCENES if name == "digit-scenes" else name for name in called] or ["not named"]


def _data_paths(stage: dict[str, Any]) -> list[str]:
    data = stage.get("data") or {}
    sources = data.get("sources", [data])
    return [str(source["path"]) for source in sources if source.get("path") is not None]


def read_record(path: str | Path, fields: Sequence[str], form: Literal["JSON", "YAML"] = "JSON") -> dict[str, Any]:
    """
    Reads an object.

    Raises:
        ValueError: if the file is not of that form, is no object or lacks one of `fields`; the message names both.
    """
    read = json.loads if form == "JSON" else yaml.safe_load
    try:
        record = read(Path(path).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not {form}: {error}") from error
    _check_fields(record, fields, str(path))
    return record


def _check_fields(record: Any, fields: Sequence[str], where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}; expected is an object with {', '.join(fields)}.")
    if missing := [field for field in fields if field not in record]:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}; expected are {', '.join(fields)}.")
