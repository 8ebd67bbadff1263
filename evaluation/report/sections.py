"""A report of runs: sections of sentences and tables, which a Markdown file and a page both show.

The finding stands first, then the tables, then the statistics. Every number comes from [`report_numbers`], and every
sentence about methods from findings.py; here is only how they are laid out and how they are to be read.
"""

from collections.abc import Mapping
from typing import Any

from ..reducer_table import CONTROLS
from ..settings import COMPUTE, FULL
from . import tables
from .blocks import Block, Command, Curves, Section, as_markdown
from .findings import hard_subset_notes, lead, listed, statistics_in_short
from .hard_subset import SMALLER_PICTURE
from .over_checkpoints import compared_checkpoints, over_checkpoints_sections


def report_markdown(
    numbers: dict[str, Any], curves: str = "curves.png", pictures: Mapping[str, str] | None = None
) -> str:
    """
    The report as Markdown. The finding stands right below the title.

    Args:
        numbers: from [`report_numbers`].
        curves: the curves' path from the file.
        pictures: other pictures to show below the curves: what each shows, and its path.
    """
    first, *sections = report_sections(numbers)
    parts = [f"# {numbers['title']}", *(as_markdown(block, curves) for block in first.blocks)]
    for text, path in (pictures or {}).items():
        parts += [f"![{text.partition('.')[0]}]({path})", text]
    for section in sections:
        parts.append(f"{'#' * section.level} {section.title}")
        parts += [as_markdown(block, curves) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def report_sections(numbers: dict[str, Any]) -> list[Section]:
    """
    A report's sections.

    Args:
        numbers: from [`report_numbers`].
    """
    description = "Score against counted FLOPs and against the budget, with 95% intervals"
    sections = [Section("What was found", 2, [*leads(numbers), Curves(description)])]
    for checkpoint in numbers["checkpoints"]:
        sections += _checkpoint_sections(checkpoint)
    for over in numbers["over_checkpoints"]:
        sections += over_checkpoints_sections(over, compared_checkpoints(numbers, over))
    how = Section("How to read it", 2, [_conventions(numbers)])
    return [*sections, how, Section("What was run", 2, _what_was_run(numbers))]


def leads(numbers: dict[str, Any]) -> list[str]:
    """The finding of each checkpoint, with its name where there are several."""
    several = len(numbers["checkpoints"]) > 1
    return [
        (f"**{one['checkpoint']} on {one['data']}**: " if several else "") + lead(one)
        for one in numbers["checkpoints"]
    ]


def _checkpoint_sections(checkpoint: dict[str, Any]) -> list[Section]:
    """About one checkpoint on one set of examples."""
    patches = f"{checkpoint['num_patches'] or 'different numbers of'} visual tokens an image"
    if checkpoint.get("dial") == COMPUTE:
        patches = "budgets of compute"
    about = (
        f"{checkpoint['num_examples']:,} examples, scored by {checkpoint['metric']}; {patches}, "
        f"{checkpoint['num_layers']} decoder layers; checkpoint `{checkpoint['checkpoint_hash'][:16]}`, data "
        f"`{checkpoint['data_hash'][:16]}`."
    )
    below = {
        "Scores": [*tables.everything_kept(checkpoint), tables.score_table(checkpoint)],
        "Where choosing matters": [hard_subset_notes(checkpoint), *tables.hard_tables(checkpoint)],
        "By kind of question": tables.category_tables(checkpoint),
        "Cost": [tables.cost_table(checkpoint), tables.budgets_kept(checkpoint)],
        "What else the metric says": tables.figure_tables(checkpoint),
        "Measured": tables.measured_tables(checkpoint),
        "Statistics in short": [statistics_in_short(checkpoint)],
        f"Beside {checkpoint['against']}": tables.difference_blocks(checkpoint, "against"),
        "Beside the best control": tables.difference_blocks(checkpoint, "control"),
        "Beside everything kept": tables.difference_blocks(checkpoint, "full"),
        "Area under the score-FLOPs curve": tables.area_blocks(checkpoint),
        "What could not be measured": tables.unreachable_blocks(checkpoint),
    }
    title = f"{checkpoint['checkpoint']} on {checkpoint['data']}"
    return [Section(title, 2, [about]), *(Section(own, 3, blocks) for own, blocks in below.items() if blocks)]


def _conventions(numbers: dict[str, Any]) -> list[str]:
    """How the numbers are to be read."""
    return [
        "A budget is the mean number of visual tokens of an image that a decoder layer sees in prefill; K is that "
        "number, the fraction that was asked for times the number of tokens, rounded down. A budget of compute is the "
        "share of the FLOPs with which the full model's decoder would read the prompt, whatever is left out.",
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
        "are the same, so `full`, where it was measured, is on every curve. Differences between areas are in "
        "report.json.",
        f"The hard subset is of each checkpoint and K its own, and every method answered all of it. VTC-Bench (arXiv "
        f"2510.07143), from which it is, leaves out what the model with all tokens answers wrongly too; here the row "
        f"of `{FULL}` says how much that is. Since `{SMALLER_PICTURE}` chose it, nothing is compared with it there.",
        "Not told apart does not mean equal.",
    ]


def _what_was_run(numbers: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for checkpoint in numbers["checkpoints"]:
        for run in checkpoint["runs"]:
            versions = ", ".join(f"{name} {version}" for name, version in (run["versions"] or {}).items())
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
            blocks += [Command(run["command"]), lines]
    return [*blocks, "This report:", Command(numbers["command"])]
