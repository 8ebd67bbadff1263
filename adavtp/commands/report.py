"""`adavtp report`: from runs to tables, curves, and a page to open."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .console import command_as_typed, console, folder_to_write


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of `adavtp evaluate`.", exists=True, file_okay=False),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.", callback=folder_to_write)] = Path("report"),
    against: Annotated[
        str | None,
        typer.Option(
            help="Reducer that all others are compared with, as in fastv:layer=2. Default: adaptive, where it was "
            "measured."
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "Accuracy against FLOPs",
) -> None:
    """
    Write what runs came to: report.md, report.json, curves.png, curves.svg and index.html.

    Runs of one checkpoint on the same data are joined, and have to agree where they answered the same. Several
    checkpoints stand beside each other, with their mean and spread.
    """
    write_report(runs, output, against, title, command_as_typed())


def write_report(folders: Sequence[Path], output: Path, against: str | None, title: str, command: str) -> None:
    """
    What `adavtp report` does; see [`report_numbers`].

    Raises:
        ValueError: if a folder has no finished run, runs do not agree, or `against` was not measured.
    """
    from ..evaluation.report.curves import save_curves
    from ..evaluation.report.joined import join_runs
    from ..evaluation.report.numbers import report_numbers
    from ..evaluation.report.page import report_page, viewed_examples
    from ..evaluation.report.sections import report_markdown
    from ..evaluation.runs import Run

    with console.status("Reading answers ..."):
        measured = join_runs([Run.open(folder) for folder in folders])
        numbers = report_numbers(measured, against, title, command)
    output.mkdir(parents=True, exist_ok=True)
    with console.status("Writing ..."):
        (output / "report.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        (output / "report.md").write_text(report_markdown(numbers), encoding="utf-8")
        save_curves(numbers["checkpoints"], output / "curves.png", output / "curves.svg")
        viewed = [viewed_examples(*pair) for pair in zip(measured, numbers["checkpoints"], strict=True)]
        page = report_page(numbers, viewed, (output / "curves.svg").read_text(encoding="utf-8"))
        (output / "index.html").write_text(page, encoding="utf-8")
    console.print(f"Report: {output / 'report.md'}, page: {output / 'index.html'}")
