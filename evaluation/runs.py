"""The folder of an evaluation: what was asked, with what, and every answer.

`run.json` says what the run is of, `answers.jsonl` has a line for each example and setting. While a run is going on,
every process appends to a file of its own. A line counts once it is whole, so that a run may be killed at any moment:
whoever goes on with it first puts all whole lines into one file, and what has no line is asked again.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HEADER, ANSWERS, PICTURES, KEPT = "run.json", "answers.jsonl", "pictures", "kept.jsonl"

# What answers of one table have to have in common.
IDENTITY = ("checkpoint_hash", "data_hash", "metric", "max_new_tokens")

Key = tuple[str, float | int, int]


def setting_of(line: Mapping[str, Any]) -> tuple[str, float | int]:
    """The setting that a line, or an entry of the header's settings, belongs to."""
    return line["reducer"], line["budget"]


def key_of(line: Mapping[str, Any]) -> Key:
    """What there is one line for: reducer, budget and the example's index."""
    return line["reducer"], line["budget"], line["index"]


class SharedLines:
    """
    A file of JSON lines that several processes write: each appends to one of its own, which are merged now and then.

    Args:
        path: of the merged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, lines: Iterable[Mapping[str, Any]], process: int = 0) -> None:
        """Adds lines to the file of a process; when this returns, they survive the end of the process."""
        with self._of_process(process).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def read(self) -> list[dict[str, Any]]:
        """
        All whole lines, merged and not, each once. A last line that is cut off was being written when its process was
        killed, and is left out.

        Raises:
            ValueError: if another line is not JSON; the message names the file and the line.
        """
        lines = {}
        for path in [self.path, *self._of_processes()]:
            for line in _whole_lines(path):
                lines.setdefault(key_of(line), line)
        return list(lines.values())

    def merged(self) -> list[dict[str, Any]]:
        """The lines of the merged file."""
        return _whole_lines(self.path)

    def merge(self, order: Callable[[Mapping[str, Any]], Any]) -> None:
        """Puts all whole lines into one file, sorted. Only one process may do so, while no other appends."""
        self.write(sorted(self.read(), key=order))

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Puts these lines in the place of all."""
        _write(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        for path in self._of_processes():
            path.unlink()

    def _of_process(self, process: int) -> Path:
        return self.path.with_name(f"{self.path.stem}_of_process_{process:05d}.jsonl")

    def _of_processes(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}_of_process_*.jsonl"))


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return lines


def _write(path: Path, text: str) -> None:
    """Through a second file, so that an interruption leaves a whole one."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class Run:
    """
    A run's folder.

    Attributes:
        folder: where it is.
        header: what `run.json` says.
    """

    def __init__(self, folder: str | Path, header: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.header = header
        self.lines = SharedLines(self.folder / ANSWERS)
        self.kept_lines = SharedLines(self.folder / PICTURES / KEPT)

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """
        Opens the folder of a run, finished or not.

        Raises:
            ValueError: if there is none.
        """
        path = Path(folder) / HEADER
        if not path.is_file():
            raise ValueError(
                f"{folder} is not the folder of a run: it has no {HEADER}, which `adavtp evaluate` writes."
            )
        return cls(folder, json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def begin(cls, folder: str | Path, header: Mapping[str, Any]) -> "Run":
        """
        The run that this header describes: a new one, or the one in the folder with what the header adds to it.
        Nothing is written yet.

        Raises:
            ValueError: if the folder has answers of another checkpoint, other data or another metric.
        """
        if not (Path(folder) / HEADER).is_file():
            return cls(folder, {"seconds": 0.0, "model_seconds": 0.0, "evaluation_seconds": 0.0} | dict(header))
        run = cls.open(folder)
        for name in IDENTITY:
            if run.header.get(name) != header[name]:
                raise ValueError(
                    f"{folder} has a run with {name} {run.header.get(name)!r}, and this one has {header[name]!r}; "
                    "choose another folder with --output, or delete that one."
                )
        settings = {setting_of(setting): setting for setting in [*run.header["settings"], *header["settings"]]}
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

    def answers(self) -> list[dict[str, Any]]:
        """All answers, in the order of the header's settings and then of the examples."""
        return sorted(self.lines.read(), key=self._order())

    def done(self) -> set[Key]:
        """
        What had been answered when answers were last merged. What processes have added since is left out, so that all
        that begin together share out the same work, however late one of them asks.
        """
        return {key_of(line) for line in self.lines.merged()}

    def kept(self) -> dict[Key, list[int]]:
        """For the first examples, how many decoder layers saw each patch: by index, reducer and budget."""
        return {(line["index"], *setting_of(line)): line["layers_seen"] for line in self.kept_lines.read()}

    def merge(self) -> None:
        """Puts the answers of all processes into one file. Only one process may do so, while no other appends."""
        (self.folder / PICTURES).mkdir(parents=True, exist_ok=True)
        self.lines.merge(self._order())
        self.kept_lines.merge(self._order())

    def picture(self, index: int) -> Path:
        """Where the picture of an example is."""
        return self.folder / PICTURES / f"{index}.png"

    def _order(self) -> Callable[[Mapping[str, Any]], tuple[int, int]]:
        places = {setting_of(setting): place for place, setting in enumerate(self.header["settings"])}
        return lambda line: (places[setting_of(line)], line["index"])


def unanswered(
    settings: Sequence[Any], num_examples: int, batch_size: int, is_done: Callable[[Any, int], bool]
) -> list[tuple[int, Any]]:
    """
    What is left to do: the first example of each batch with each setting that has not answered all of it, batch by
    batch. Batches begin at multiples of `batch_size` whatever is done, so that answers do not depend on interruptions.
    """
    return [
        (start, setting)
        for start in range(0, num_examples, batch_size)
        for setting in settings
        if not all(is_done(setting, index) for index in range(start, min(start + batch_size, num_examples)))
    ]
