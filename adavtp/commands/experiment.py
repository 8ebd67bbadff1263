"""`adavtp experiment`: an experiment from its checkpoints to its report, in one command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import command_as_typed, console, folder_to_write, reference_checkpoint
from .report import write_report

if TYPE_CHECKING:
    from .experiment_runs import Experiment, Part


def experiment(
    name: Annotated[str, typer.Argument(help="The experiment's name, 1, or a file (YAML).")],
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            "--checkpoints",
            help="Several: checkpoint folders or Hub repositories. Default: the package's for the experiment's data.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the reports. Default: reports/experiment_NAME.", callback=folder_to_write),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for answers and trained variants. Default: runs/experiment_NAME.", callback=folder_to_write
        ),
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option("--part", "--parts", help="Several: parts to carry out. Default: all.")
    ] = None,
) -> None:
    """
    Carry out an experiment on one or several checkpoints, and write its report.

    Variants are trained, every checkpoint answers every part's questions, and every part gets a report with tables,
    curves and a page; report.md has what all of them say in short. Interrupted, the same command goes on where it
    stopped.
    """
    from .experiment_runs import Experiment, evaluate_part, named_experiments

    known = named_experiments()
    path = known.get(name, Path(name))
    if not path.is_file():
        raise ValueError(f"`name` is {name!r}; it is an experiment's, {', '.join(known)}, or a file's.")
    plan = Experiment.from_file(path)
    names = [own.name for own in plan.parts]
    if unknown := sorted(set(part or []) - set(names)):
        raise ValueError(f"`part` is {unknown[0]!r}; this experiment's parts: {', '.join(names)}.")
    output = output or Path("reports") / path.stem
    work = work or Path("runs") / path.stem
    checkpoints = [str(one) for one in checkpoint or [reference_checkpoint(plan.data)]]
    if len({Path(one).name for one in checkpoints}) < len(checkpoints):
        raise ValueError(f"`checkpoint` is {checkpoints}; folders are named by their last names, which must differ.")
    for own in (own for own in plan.parts if not part or own.name in part):
        folders = []
        for one in checkpoints:
            console.rule(f"{own.name}: {Path(one).name}")
            folder = work / Path(one).name / own.name
            folders += [run.folder for run in evaluate_part(plan, own, one, folder, command_as_typed())]
        write_report(folders, output / own.name, own.against, own.asks, command_as_typed())
    (output / "report.md").write_text(summary(plan, output, command_as_typed()), encoding="utf-8")
    console.print(f"Report: {output / 'report.md'}")


def summary(plan: "Experiment", output: Path, command: str) -> str:
    """The page (Markdown) that says in short what the parts' reports in `output` say, of those that have one."""
    text = [
        f"# {plan.title}",
        f"Written by\n\n```\n{command}\n```\n\nfrom the reports of its parts, each with the "
        "versions and commands that made its numbers.",
    ]
    for part in plan.parts:
        path = output / part.name / "report.json"
        if path.is_file():
            text += part_summary(part, json.loads(path.read_text(encoding="utf-8")))
    return "\n\n".join(text) + "\n"


def part_summary(part: "Part", numbers: dict[str, Any]) -> list[str]:
    """
    Paragraphs on one part: what it asks, what was found, its curves, and its statistics in short; folded below, scores
    on all questions, on the hard subset, and by kind of question.
    """
    from ..evaluation.report.blocks import as_markdown
    from ..evaluation.report.findings import hard_subset_notes, statistics_in_short
    from ..evaluation.report.over_checkpoints import agreement_of_checkpoints, compared_checkpoints
    from ..evaluation.report.sections import leads
    from ..evaluation.report.tables import categories_in_short, hard_tables, score_table

    text = [
        f"## {part.name}",
        part.asks,
        *leads(numbers),
        f"![{part.asks}]({part.name}/curves.png)",
        f"[Tables]({part.name}/report.md) · [page]({part.name}/index.html), to be opened in a browser",
    ]
    for checkpoint in numbers["checkpoints"]:
        lines = [*statistics_in_short(checkpoint), *hard_subset_notes(checkpoint)]
        tables = [score_table(checkpoint), *hard_tables(checkpoint), *categories_in_short(checkpoint)]
        text += [f"**{checkpoint['checkpoint']}**", as_markdown(lines)]
        text += [as_markdown(replace(table, folded=True)) for table in tables]
    for over in numbers["over_checkpoints"]:
        lines = agreement_of_checkpoints(over, compared_checkpoints(numbers, over))
        text += ["**All checkpoints**", as_markdown(lines)]
    return text
