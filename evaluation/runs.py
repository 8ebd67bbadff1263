"""The folder of an evaluation: what was asked, with what, and every answer.

`run.json` says what the run is of, `answers.jsonl` has a line for each example and setting. While a run is going on,
every process appends to a file of its own. A line counts once it is whole, so that a run may be killed at any moment:
whoever goes on with it first puts all whole lines into one file, and what has no line is asked again.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from PIL import Image

from ..modeling.vision.shown_image import WHOLE, Place, ShownImage
from .records import check_record, check_types, read_record

HEADER, ANSWERS, PICTURES = "run.json", "answers.jsonl", "pictures"

# Of every header; of one that a report is made of; and of some.
HEADER_FIELDS = {"settings": list[dict], "unreachable": list[dict]}
HEADER_FIELDS |= dict.fromkeys(("command", "checkpoint_hash", "data_hash", "metric"), str)
FINISHED_FIELDS = dict.fromkeys(("checkpoint", "checkpoint_hash", "data", "data_hash", "metric"), str)
FINISHED_FIELDS |= dict.fromkeys(("num_examples", "num_layers"), int) | {"num_patches": int | None}
MORE_OF_HEADER = {"split": str, "machine": str, "versions": dict[str, str], "max_new_tokens": int, **FINISHED_FIELDS}
MORE_OF_HEADER |= {"category_metrics": dict[str, str], "dial": str, "scheduler": str}
MORE_OF_HEADER |= dict.fromkeys(("figures", "measurements"), list[dict] | None)
MORE_OF_HEADER |= dict.fromkeys(("seconds", "model_seconds", "evaluation_seconds"), float)
MEASUREMENT = {"reducer": str, "device": str, "batch_size": int, "peak_memory_bytes": float, "kv_bytes": float}

# What answers of one table have to have in common.
IDENTITY = ("checkpoint_hash", "data_hash", "metric", "max_new_tokens", "dial", "scheduler")


@dataclass
class Answer:
    """
    One example in one setting, from the model to the report: what was asked, what was answered, and what it cost.

    Attributes:
        index: the example's place in the data.
        id, question, answers, category: see [`Example`].
        reducer, budget: what chose the visual tokens, as on the command line, and the budget as it was asked for.
        num_keep: the number K of tokens that the budget means; `None` where images differ in how many they have.
        prediction: the model's answer.
        score: by the run's metric; `None` until a metric that needs all answers together has them.
        visual_tokens: see [`PromptCost`].
        text_tokens: the tokens of the prompt that stand for nothing of an image.
        new_tokens: generated, the end-of-text token counted.
        flops: counted for vision tower, reducer, projector, prefill and decoding; `None` where they are not.
        ms: milliseconds, its share of those that its batch took.
        layers_seen: of the first examples, how many decoder layers saw each patch of the first image, unit by unit.
    """

    index: int
    id: str
    reducer: str
    budget: float | int
    question: str
    answers: list[str]
    prediction: str
    score: float | None
    category: str | None
    num_keep: int | None
    visual_tokens: float
    text_tokens: int
    new_tokens: int
    flops: float | None
    ms: float | None
    layers_seen: list[int] | None = None

    @property
    def setting(self) -> tuple[str, float | int]:
        """The key of its [`Setting`]."""
        return self.reducer, self.budget

    @property
    def key(self) -> tuple[str, float | int, int]:
        """What there is one answer for: reducer, budget and the example's index."""
        return self.reducer, self.budget, self.index


def setting_of(entry: Mapping[str, Any]) -> tuple[str, float | int]:
    """The key of the setting that an entry of a run's header is about."""
    return entry["reducer"], entry["budget"]


class Run:
    """A run's folder, and what its `run.json` says."""

    def __init__(self, folder: str | Path, header: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.header = header

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Opens the folder of a run, finished or not; `ValueError` if there is none."""
        path = Path(folder) / HEADER
        if not path.is_file():
            raise ValueError(
                f"{folder} is not the folder of a run: it has no {HEADER}, which `adavtp evaluate` writes."
            )
        header = read_record(path, HEADER_FIELDS)
        check_types(header, MORE_OF_HEADER, str(path))
        for entry in [*header["settings"], *header["unreachable"]]:
            check_record(entry, {"reducer": str, "budget": float}, f"{path}, a setting")
        # Where images differ in how many tokens they have, no budget is a number K.
        num_keep = {"num_keep": None if header.get("num_patches", 0) is None else int}
        for entry in header["settings"]:
            check_record(entry, num_keep, f"{path}, a setting")
        for row in header.get("measurements") or []:
            check_record(row, MEASUREMENT, f"{path}, a measurement")
        return cls(folder, header)

    @classmethod
    def begin(cls, folder: str | Path, header: Mapping[str, Any]) -> "Run":
        """
        The run that this header describes: a new one, or the one in the folder with what the header adds to it.
        Nothing is written yet.

        Raises:
            ValueError: if the folder has answers of another checkpoint, other data or another metric, or answers and
                pictures of which nothing says whose they are.
        """
        if not (Path(folder) / HEADER).is_file():
            _require_no_answers(Path(folder))
            return cls(folder, {"seconds": 0.0, "model_seconds": 0.0, "evaluation_seconds": 0.0} | dict(header))
        run = cls.open(folder)
        for name in IDENTITY:
            if run.header.get(name) != header.get(name):
                raise ValueError(
                    f"{folder} has a run with {name} {run.header.get(name)!r}, and this one has {header.get(name)!r}; "
                    "choose another folder, or delete that one."
                )
        settings = {setting_of(entry): entry for entry in [*run.header["settings"], *header["settings"]]}
        unreachable = {setting_of(entry): entry for entry in [*run.header["unreachable"], *header["unreachable"]]}
        # A setting that was out of reach may be within it now, with a mended reducer.
        unreachable = [entry for setting, entry in unreachable.items() if setting not in settings]
        added = {"settings": list(settings.values()), "unreachable": unreachable}
        # Commands of several settings are one run's, so that it can be repeated from what it says.
        command = list(dict.fromkeys([*run.header["command"].split("\n"), header["command"]]))
        run.header |= dict(header) | added | {"command": "\n".join(command)}
        return run

    def write_header(self) -> None:
        """Writes `run.json`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / HEADER, json.dumps(self.header, indent=1) + "\n")

    @property
    def path(self) -> Path:
        """Of the merged answers."""
        return self.folder / ANSWERS

    def append(self, answers: Iterable[Answer], process: int = 0) -> None:
        """Adds answers to the file of a process; when this returns, they survive the end of the process."""
        path = self.folder / f"{self.path.stem}_of_process_{process:05d}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.writelines(_line(answer) for answer in answers)

    def answers(self) -> list[Answer]:
        """
        All answers whose lines are whole, each once, in the order of the header's settings and then of the examples.
        A last line that is cut off was being written when its process was killed, and is left out.

        Raises:
            ValueError: if another line is no answer; the message names the file and the line.
        """
        known: dict[Any, Answer] = {}
        for path in [self.path, *self._of_processes()]:
            for answer in _whole_lines(path):
                known.setdefault(answer.key, answer)
        settings = self.header["settings"]
        places = {setting_of(entry): place for place, entry in enumerate(settings)}
        num_examples = self.header.get("num_examples")
        for answer in known.values():
            is_asked = answer.setting in places and answer.num_keep == settings[places[answer.setting]]["num_keep"]
            if not is_asked or not 0 <= answer.index < (num_examples or math.inf):
                raise ValueError(
                    f"{self.folder} has an answer of {answer.reducer!r} at {answer.budget} with {answer.num_keep} "
                    f"tokens to example {answer.index}, which its {HEADER} does not have: they are of different runs."
                )
        return sorted(known.values(), key=lambda answer: (places[answer.setting], answer.index))

    def answers_of_settings(self) -> dict[tuple[str, float | int], list[Answer]]:
        """The answers of every setting of the header, in the order of the examples."""
        answers = {setting_of(entry): [] for entry in self.header["settings"]}
        for answer in self.answers():
            answers[answer.setting].append(answer)
        return answers

    def done(self) -> set[tuple[str, float | int, int]]:
        """
        What had been answered when answers were last merged. What processes have added since is left out, so that all
        that begin together share out the same work, however late one of them asks.
        """
        return {answer.key for answer in _whole_lines(self.path)}

    def write(self, answers: Iterable[Answer]) -> None:
        """Puts these answers in the place of all. Only one process may do so, while no other appends."""
        _write(self.path, "".join(map(_line, answers)))
        for path in self._of_processes():
            path.unlink()

    def merge(self) -> None:
        """Puts the answers of all processes into one file; see [`write`]."""
        (self.folder / PICTURES).mkdir(parents=True, exist_ok=True)
        self.write(self.answers())

    def picture(self, index: int) -> Path:
        """Where the picture of an example is."""
        return self.folder / PICTURES / f"{index}.png"

    def shown_image(self, index: int) -> tuple[ShownImage, list[tuple[int, int]]] | None:
        """The picture of an example with where on it each unit lies, and their grids; `None` if there is none."""
        path = self.picture(index)
        if not path.is_file():
            return None
        units = path.with_suffix(".json")
        if units.is_file():
            fields = read_record(units, {"places": list[list[float]], "grids": list[list[int]]})
        else:
            # Earlier runs have pictures of nothing but LLaVA's squares.
            side = math.isqrt(self.header["num_patches"] or 0)
            fields = {"places": [WHOLE], "grids": [(side, side)]}
        with Image.open(path) as image:
            shown = ShownImage(image.convert("RGB"), [Place(*place) for place in fields["places"]])
        return shown, [tuple(grid) for grid in fields["grids"]]

    def save_shown_image(self, index: int, shown: ShownImage, grids: Sequence[tuple[int, int]]) -> None:
        """Writes the picture of an example; the grids are of its units."""
        path = self.picture(index)
        _write(path.with_suffix(".json"), json.dumps({"places": shown.places, "grids": grids}) + "\n")
        partial = path.with_suffix(f".part{path.suffix}")
        shown.image.save(partial)
        partial.replace(path)

    def _of_processes(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.path.stem}_of_process_*.jsonl"))


ANSWER_FIELDS = get_type_hints(Answer)


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer)) + "\n"


def _whole_lines(path: Path) -> list[Answer]:
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected are the answers of a run, a line each.")
    *whole, _ = path.read_bytes().split(b"\n")
    answers = []
    for number, line in enumerate(whole, start=1):
        try:
            fields = json.loads(line)
            check_types(fields, ANSWER_FIELDS, "it")
            answers.append(Answer(**fields))
        # A line that is a list has no fields to ask for.
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no answer: {error}") from error
    return answers


def _require_no_answers(folder: Path) -> None:
    """That a folder without a record of its run has nothing that a new run would take for its own."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the run.")
    left = [*folder.glob(f"{Path(ANSWERS).stem}*.jsonl"), *(folder / PICTURES).glob("*")]
    if (folder / HEADER).exists():
        left.append(folder / HEADER)
    if left:
        raise ValueError(
            f"{folder} has {left[0].relative_to(folder)} and no file {HEADER} that says of which checkpoint and data "
            "it is; choose another folder, or delete that one."
        )


def _write(path: Path, text: str) -> None:
    """Through a second file, so that an interruption leaves a whole one."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
