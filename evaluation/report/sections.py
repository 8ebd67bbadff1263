"""A report of runs: sections of sentences and tables, which a Markdown file and a page both show.

The finding stands first, then the tables, then the statistics. Every number comes from [`report_numbers`], and every
sentence about methods from findings.py; here is only how they are laid out and how they are to be read.
"""

from collections.abc import Sequence
from typing import Any

from ..reducer_table import CONTROLS
from . import tables, tables_over_checkpoints
from .blocks import Command, Curves, Listing, Section
from .findings import agreement_of_checkpoints, lead, listed, statistics_in_short


def report_sections(numbers: dict[str, Any]) -> list[Section]:
    """
    A report's sections.

    Args:
        numbers: from [`report_numbers`].
    """
    description = "Score against counted FLOPs and against the budget, with 95% intervals"
    sections = [Section("What was found", 2, [*leads(numbers), Curves(description)])]
    for checkpoint in numbers["checkpoints"]:
        sections += checkpoint_sections(checkpoint)
    for over in numbers["over_checkpoints"]:
        sections += over_checkpoints_sections(over, compared_checkpoints(numbers, over))
    return [
        *sections,
        Section("How to read it", 2, [Listing(conventions(numbers))]),
        _what_was_run(numbers),
    ]


def leads(numbers: dict[str, Any]) -> list[str]:
    """The finding of each checkpoint, with its name where there are several."""
    several = len(numbers["checkpoints"]) > 1
    return [
        (f"**{one['checkpoint']} on {one['data']}**: " if several else "") + lead(one)
        for one in numbers["checkpoints"]
    ]


def compared_checkpoints(numbers: dict[str, Any], over: dict[str, Any]) -> list[dict[str, Any]]:
    """The checkpoints that one of `over_checkpoints` is over: those of its data and metric."""
    key = over["data_hash"], over["metric"]
    return [one for one in numbers["checkpoints"] if (one["data_hash"], one["metric"]) == key]


def checkpoint_sections(checkpoint: dict[str, Any]) -> list[Section]:
    """
    The sections about one checkpoint on one set of examples.

    Args:
        checkpoint: one of `checkpoints` of [`report_numbers`].
    """
    title = f"{checkpoint['checkpoint']} on {checkpoint['data']}"
    sections = [
        Section(title, 2, [about(checkpoint)]),
        Section("Scores", 3, [*tables.everything_kept(checkpoint), tables.score_table(checkpoint)]),
        Section("Score and cost", 3, [tables.cost_table(checkpoint)]),
        Section("What else the metric says", 3, tables.figure_tables(checkpoint)),
        Section("Measured", 3, tables.measured_tables(checkpoint)),
        Section("Statistics in short", 3, [Listing(statistics_in_short(checkpoint))]),
        Section(f"Beside {checkpoint['against']}", 3, tables.difference_blocks(checkpoint, "against")),
        Section("Beside the best control", 3, tables.difference_blocks(checkpoint, "control")),
        Section("Beside everything kept", 3, tables.difference_blocks(checkpoint, "full")),
        Section("Area under the score-FLOPs curve", 3, tables.area_blocks(checkpoint)),
        Section("Categories", 3, tables.category_tables(checkpoint), folded=True),
        Section("Whether budgets were kept", 3, tables.adherence_blocks(checkpoint)),
        Section("What could not be measured", 3, tables.unreachable_blocks(checkpoint)),
    ]
    return [section for section in sections if section.blocks]


def about(checkpoint: dict[str, Any]) -> str:
    return (
        f"{checkpoint['num_examples']:,} examples, scored by {checkpoint['metric']}; {checkpoint['num_patches']} "
        f"visual tokens an image, {checkpoint['num_layers']} decoder layers; checkpoint "
        f"`{checkpoint['checkpoint_hash'][:16]}`, data `{checkpoint['data_hash'][:16]}`."
    )


def over_checkpoints_sections(over: dict[str, Any], checkpoints: Sequence[dict[str, Any]]) -> list[Section]:
    """
    The sections about what several checkpoints measured on the same examples.

    Args:
        over: one of `over_checkpoints` of [`report_numbers`].
        checkpoints: those that it is over.
    """
    first, number = checkpoints[0], len(checkpoints)
    names = ", ".join(f"`{one['checkpoint']}`" for one in over["checkpoints"])
    text = f"{number} checkpoints on {over['data']}: {names}. Mean over them, lowest and highest in brackets: " + (
        "a spread, not an interval; so few checkpoints give none."
    )
    lines = agreement_of_checkpoints(over, checkpoints)
    missing = over["not_in_all"]
    return [
        Section(f"Over checkpoints: {over['data']}", 2, [text]),
        *([Section("What they agree on", 3, [Listing(lines)])] if lines else []),
        Section(
            "Mean and spread",
            3,
            [
                *([f"{missing} settings were not measured for all."] if missing else []),
                *tables_over_checkpoints.spread_tables(over, first),
            ],
        ),
        Section("Whether the order of methods agrees", 3, [tables_over_checkpoints.agreement_table(over)]),
        Section(f"Beside {first['checkpoint']}", 3, tables_over_checkpoints.beside_first_blocks(over, first)),
    ]


def conventions(numbers: dict[str, Any]) -> list[str]:
    """How the numbers are to be read."""
    return [
        "A budget is the mean number of visual tokens of an image that a decoder layer sees in prefill; K is that "
        "number, the fraction that was asked for times the number of tokens, rounded down.",
        "FLOPs are counted from the shapes that each example really had, 1 multiply-accumulate = 2 FLOPs: vision "
        "tower, reducer, projector, prefill, and the decoding steps of its own answer.",
        "Intervals are 95% and of single cells: with so many cells, one in twenty misses by chance. Scores of 0 and 1 "
        "have Wilson's, all others the percentiles of a bootstrap.",
        f"Differences are on the same examples, with intervals by paired bootstrap over examples "
        f"({numbers['num_draws']:,} draws, seed {numbers['seed']}), the same draws for all settings.",
        "Holm's correction goes over all differences of a kind within a checkpoint; its p-values are of the exact "
        "sign test (McNemar's) where every difference is of one size, as with right and wrong, else of the paired t "
        "test.",
        "Examples are drawn as if they were independent. Where several are about the same picture they are not, and "
        "the intervals are too narrow.",
        f"The controls, {listed(CONTROLS)}, look at nothing. The best of them is picked after the fact, at each K, "
        "which favours the controls.",
        "The area under the score-FLOPs curve goes straight from point to point in the mean FLOPs of a setting, which "
        "are counted and taken as known; divided by the range it is a mean score. With everything kept all reducers "
        "are the same, so `full`, where it was measured, is on every curve.",
        "Not told apart does not mean equal.",
    ]


def _what_was_run(numbers: dict[str, Any]) -> Section:
    blocks: list[Any] = []
    for checkpoint in numbers["checkpoints"]:
        for run in checkpoint["runs"]:
            versions = ", ".join(f"{name} {version}" for name, version in (run["versions"] or {}).items())
            blocks.append(Command(run["command"]))
            lines = [
                f"{checkpoint['num_examples']:,} examples of {checkpoint['data']}, hash `{checkpoint['data_hash']}`",
                f"checkpoint `{checkpoint['checkpoint']}`, hash `{checkpoint['checkpoint_hash']}`",
                f"{versions}; {run['machine']}"
                + (f"; {run['seconds'] / 60:.1f} minutes, interrupted sessions not counted" if run["seconds"] else ""),
            ]
            if run["model_seconds"] and run["evaluation_seconds"] is not None:
                share = 100 * run["evaluation_seconds"] / run["model_seconds"]
                lines.append(
                    f"answering took {share:.1f}% more time than `generate` alone; loading the model and reading the "
                    "data are not in it"
                )
            blocks.append(Listing(lines))
    blocks.append("This report:")
    blocks.append(Command(numbers["command"]))
    return Section("What was run", 2, blocks)
