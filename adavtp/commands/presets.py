"""`adavtp demo` and `adavtp compare`: evaluations of a drawn task with settings that are chosen already."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from ..evaluation.runs import Run
from ..evaluation.settings import reducer_of_text
from .console import (
    REFERENCE_TASK,
    CheckpointArgument,
    CheckpointOption,
    DrawnTaskOption,
    command_as_typed,
    console,
    folder_to_write,
)
from .evaluate import evaluate_checkpoint

DEMO_BUDGETS = (1.0, 0.4, 0.2, 0.1, 0.05)
# What the controller is set beside: a published method that needs no training.
PUBLISHED = "cdpruner"
DEMO_REDUCERS = ("full", "adaptive", PUBLISHED, "random")
COMPARED_BUDGETS = [0.1, 0.2, 0.4, 0.6, 0.8]
# Reducers inside the decoder cannot go far below: the layers before them see everything.
GALLERY_BUDGET = 0.4
GALLERY_TEXT = (
    "What each reducer keeps of one image. The brighter a patch, the more decoder layers see it. Of reducers that "
    "merge, the patches in whose place tokens stand are bright."
)


def demo(
    questions: Annotated[int, typer.Option(help="Number of held-out questions.", min=1)] = 240,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.", callback=folder_to_write)] = Path(
        "outputs/demo"
    ),
    checkpoint: CheckpointOption = None,
    data: DrawnTaskOption = REFERENCE_TASK,
) -> None:
    """
    Answer held-out questions at five budgets, by the controller, a published method and chance.

    Prints a table and writes two pictures: accuracy.png, and kept_patches.png, which shows for one question what each
    kept of the image and answered. Only kinds of question with short answers are asked.
    """
    from ..evaluation.pictures import save_kept_patches, where_methods_differ
    from ..evaluation.report.curves import curves_of_evaluation, save_curves
    from ..tasks.drawn_tasks import drawn_task

    with TemporaryDirectory() as folder:
        run = evaluate_checkpoint(
            *(checkpoint, data, DEMO_BUDGETS, DEMO_REDUCERS, Path(folder) / "run"),
            questions=questions,
            kinds=drawn_task(data).short_kinds,
        )
        evaluation = json.loads((run.folder / "evaluation.json").read_text())
        output.mkdir(parents=True, exist_ok=True)
        save_kept_patches(run, where_methods_differ(run), output / "kept_patches.png")
    save_curves([curves_of_evaluation(evaluation)], output / "accuracy.png")
    console.print(f"Pictures: {output / 'kept_patches.png'} and {output / 'accuracy.png'}")


def compare(
    checkpoint: CheckpointArgument = None,
    data: DrawnTaskOption = REFERENCE_TASK,
    output: Annotated[
        Path, typer.Option(help="Folder for the page, its pictures and its numbers.", callback=folder_to_write)
    ] = Path("docs"),
    work: Annotated[Path, typer.Option(help="Folder of the run.", callback=folder_to_write)] = Path("runs/comparison"),
    questions: Annotated[int, typer.Option(help="Number of test questions.", min=6)] = 2400,
    budgets: Annotated[
        list[float], typer.Option("--budgets", "--budget", help="Several: fractions below 1.")
    ] = COMPARED_BUDGETS,
    reducers: Annotated[
        list[str] | None,
        typer.Option(
            "--reducers",
            "--reducer",
            help="Several: reducers as in fastv:layer=2, stacks as in tome,adaptive. Default: all registered but "
            "those that are parts of another.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 100,
) -> None:
    """
    Compare reducers on a drawn task's test split; write reducers.md, its two pictures, and reducers.json.

    The run's folder grows while answers come in. Interrupted, the same command goes on where it stopped; with more
    budgets or reducers it answers only those. After a change to a reducer's code, delete it.
    """
    if wrong := [budget for budget in budgets if not 0.0 <= budget < 1.0]:
        raise ValueError(
            f"`budgets` has {wrong[0]}; allowed are fractions from 0.0 to below 1.0; the full budget always runs."
        )
    # Everything kept stands beside the reducers that were named.
    stacks = None if reducers is None else ["full", *map(reducer_of_text, reducers)]
    run = evaluate_checkpoint(
        *(checkpoint, data, sorted(set(budgets)), stacks, work), questions=questions, batch_size=batch_size
    )
    write_comparison(run, output)


def write_comparison(run: Run, output: Path) -> None:
    """Writes the page of a comparison, its numbers and its pictures, from its finished run."""
    from ..evaluation.pictures import save_gallery
    from ..evaluation.report.curves import save_curves
    from ..evaluation.report.joined import join_runs
    from ..evaluation.report.numbers import report_numbers
    from ..evaluation.report.sections import report_markdown

    output.mkdir(parents=True, exist_ok=True)
    numbers = report_numbers(join_runs([run]), None, "Reducers compared", command_as_typed())
    (output / "reducers.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    save_curves(numbers["checkpoints"], output / "reducers_accuracy.png")
    asked = {entry["budget"] for entry in [*run.header["settings"], *run.header["unreachable"]]} - {1.0}
    save_gallery(run, min(asked, key=lambda budget: abs(budget - GALLERY_BUDGET)), output / "reducers_gallery.png")
    pictures = {GALLERY_TEXT: "reducers_gallery.png"}
    page = report_markdown(numbers, "reducers_accuracy.png", pictures)
    (output / "reducers.md").write_text(page, encoding="utf-8")
    console.print(f"Page: {output / 'reducers.md'}, numbers: {output / 'reducers.json'}")
