"""How much time evaluation adds to what the model itself needs.

The same batch of questions is answered twice in every round: by bare calls of `generate` on inputs that are ready, and
by an evaluation that decodes the images, prepares the inputs, answers, scores, counts FLOPs and writes every line.
What the second takes more is what evaluation adds, as a share of the first. Inputs are prepared once for all settings,
so the share falls with their number; it is shown for the settings of Experiment 1 and for a single one.

    python benchmarks/evaluation.py --json benchmarks/results/evaluation.json
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from adavtp.commands.console import load_checkpoint, reference_checkpoint
from adavtp.commands.evaluate import named_data
from adavtp.evaluation.answering import answer_examples, inputs_of
from adavtp.evaluation.data.examples import EvaluationData
from adavtp.evaluation.runs import Run
from adavtp.evaluation.settings import Setting, asked_settings, tokens_per_image
from circumstances import circumstances, console, write_json
from interleaved import CLOCKS, Spread, interleaved_medians, paired_ratio

# Its checkpoint is the one that answers fastest.
TASK = "digit-scenes"
TARGET = 0.05
MAX_NEW_TOKENS = 16

EXPERIMENT_1 = ["full", "prumerge", "prumerge+", "fastv:layer=1", "adaptive"]
FRACTIONS = [(115, 576), (230, 576), (345, 576), (460, 576)]


def settings_of(model: Any) -> dict[str, list[Setting]]:
    """Experiment 1's settings that four decoder layers can reach, and one alone."""
    budgets = [Fraction(*pair) for pair in FRACTIONS]
    reducers = [{"name": "fastv", "layer": 1} if name.startswith("fastv") else name for name in EXPERIMENT_1]
    asked = asked_settings(tokens_per_image(model), reducers, budgets)
    # Layers before FastV's cut see all tokens, so that the lowest budget is out of its reach here.
    reached = [one for one in asked if not (one.label.startswith("fastv") and one.num_keep < 0.3 * 144)]
    return {"Experiment 1": reached, "one setting": [one for one in asked if one.label == "adaptive"][1:2]}


def bare_calls(model: Any, inputs: Any, settings: Sequence[Setting]) -> Callable[[], None]:
    """Nothing but `generate`."""

    def call() -> None:
        for asked in settings:
            model.generate(**inputs, **asked.arguments(), max_new_tokens=MAX_NEW_TOKENS, do_sample=False)

    return call


def evaluation(
    model: Any, processor: Any, data: EvaluationData, settings: Sequence[Setting], folder: Path
) -> Callable[[], None]:
    """All that a run does with a batch, in a new folder each time."""
    header = {
        "command": "",
        "checkpoint_hash": "",
        "data_hash": "",
        "metric": data.metric,
        "max_new_tokens": MAX_NEW_TOKENS,
        "settings": [{"reducer": asked.label, "budget": asked.key[1]} for asked in settings],
        "unreachable": [],
    }

    def call() -> None:
        run = Run.begin(folder, header)
        run.write_header()
        run.merge()
        # Pictures are written of the first twelve examples of a whole run, and are no part of a batch.
        answer_examples(
            *(model, processor, data.examples, settings, run),
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=len(data.examples),
            shown=0,
        )
        shutil.rmtree(folder)

    return call


def measure(model: Any, processor: Any, batch_size: int, repeats: int, clock: str) -> dict[str, dict[str, Any]]:
    """
    Times both in turn.

    Returns:
        By the name of the settings: how many they are, seconds of each, and `added`, the share that evaluation adds.
    """
    data = named_data(TASK, None, None, batch_size)
    inputs = inputs_of(processor, data.examples[:batch_size]).to(model.device)
    rows = {}
    for name, settings in settings_of(model).items():
        with tempfile.TemporaryDirectory() as folder:
            calls = {
                "generate": bare_calls(model, inputs, settings),
                "evaluation": evaluation(model, processor, data, settings, Path(folder) / "run"),
            }
            seconds = interleaved_medians(calls, repeats, clock=clock, device=model.device)
        ratio = paired_ratio(seconds["evaluation"], seconds["generate"])
        added = Spread.of([value - 1 for value in ratio.repeats])
        rows[name] = {
            "settings": len(settings),
            **{f"{side}_seconds": asdict(spread) for side, spread in seconds.items()},
            "added": asdict(added),
        }
    return rows


def table(rows: dict[str, dict[str, Any]], batch_size: int) -> Table:
    """A line for each number of settings."""
    shown = Table(title=f"Batch of {batch_size} questions; median (quartiles)")
    for column in ("settings", "generate, s", "evaluation, s", "added, %", f"at most {100 * TARGET:g}%"):
        shown.add_column(column, justify="right")
    for name, row in rows.items():
        added = Spread(**row["added"])
        shown.add_row(
            f"{row['settings']} ({name})",
            Spread(**row["generate_seconds"]).shown(digits=2),
            Spread(**row["evaluation_seconds"]).shown(digits=2),
            added.shown(100),
            "yes" if added.median <= TARGET else "no",
        )
    return shown


def main(arguments: Sequence[str]) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or Hub repository; default: the package's for digit scenes")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    model, processor = load_checkpoint(options.checkpoint or str(reference_checkpoint(TASK)))
    model.to(options.device)
    rows = measure(model, processor, options.batch_size, options.repeats, options.clock)
    console().print(table(rows, options.batch_size))
    about = circumstances("evaluation.py", arguments, 0, options.device)
    settings = {"batch_size": options.batch_size, "repeats": options.repeats, "clock": options.clock}
    write_json(options.json, about | settings | {"target": TARGET, "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
