"""The list of samples that a run could not train on: a line of JSON each, in the run's folder."""

import json
import logging
import math
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class RejectedSamples:
    """A process's `rejected_samples.jsonl` in the run's folder; `rejected_samples_<process>.jsonl` of several."""

    def __init__(self, folder: str | Path, num_processes: int = 1, process_index: int = 0) -> None:
        of_processes = [f"_{index}" for index in range(num_processes)] if num_processes > 1 else [""]
        paths = [Path(folder) / f"rejected_samples{of_process}.jsonl" for of_process in of_processes]
        self.path, self._paths = paths[process_index], paths
        self._kinds: set[str] = set()

    def begin(self, step: int) -> None:
        """
        Forgets what was rejected after a step: a run that goes on from there meets it again. If it does so on another
        number of processes, the first of them looks after the lists that nobody goes on with.
        """
        others = set(self.path.parent.glob("rejected_samples*.jsonl")) - set(self._paths)
        for path in [self.path, *others] if self.path == self._paths[0] else [self.path]:
            if path.is_file():
                _forget_after(step, path)

    def add(self, rejected: list[dict[str, Any]], step: int) -> None:
        """Writes down samples, `{"id", "reason", "kind"}`, of a step, and warns of the first of each kind."""
        if not rejected:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for sample in rejected:
                file.write(json.dumps({"step": step} | sample) + "\n")
        for sample in rejected:
            if sample["kind"] not in self._kinds:
                self._kinds.add(sample["kind"])
                logger.warning(
                    f"Sample {sample['id']!r} is left out, and another one trained on in its place: "
                    f"{sample['reason']}. All of these samples are in {self.path}; no more warnings of kind "
                    f"{sample['kind']!r} follow."
                )


def _forget_after(step: int, path: Path) -> None:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step(line) <= step]
    if kept:
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    else:
        path.unlink()


def _step(line: str) -> float:
    """The step that a line is of; that of what is no line comes never: a run that was killed may leave half of one."""
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return math.inf
