"""What the tables of a report say, in sentences that are worked out from the numbers.

A method is above or below another only where the 95% interval of the difference on the same examples leaves 0 out;
otherwise the two are not told apart, which says nothing about their being equal.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .report_numbers import CONTROLS, FULL, is_control


@dataclass(frozen=True)
class Finding:
    """A sentence, and below it what belongs to it. Reducers stand in backticks."""

    text: str
    details: list[str] = field(default_factory=list)


def findings(checkpoint: dict[str, Any]) -> list[Finding]:
    """
    What was found for one checkpoint on one set of examples.

    Args:
        checkpoint: one of `checkpoints` of [`report_numbers`].

    Returns:
        For each budget the highest score; and what is above, below and not told apart from the best control, the
        reducer that all are compared with, and everything kept. Then who has the largest area.
    """
    found = []
    for num_keep in [budget["num_keep"] for budget in checkpoint["budgets"]]:
        rows = [row for row in checkpoint["settings"] if row["num_keep"] == num_keep and row["reducer"] != FULL]
        if rows:
            found.append(_at_one_budget(num_keep, rows, checkpoint))
    return found + [_of_the_area(area) for area in checkpoint["areas"]]


def _at_one_budget(num_keep: int, rows: list[dict[str, Any]], checkpoint: dict[str, Any]) -> Finding:
    best = max(row["score"] for row in rows)
    names = listed(row["reducer"] for row in rows if row["score"] == best)
    text = f"K = {num_keep}: the highest score of {len(rows)} measured is {score(best, checkpoint)}, of {names}."
    controls = [one["reducer"] for one in checkpoint["best_controls"] if one["num_keep"] == num_keep]
    if not controls:
        text += f" No control ({listed(CONTROLS)}) was measured."
    others = [("control", f"the best control, `{control}`") for control in controls]
    others += [("against", f"`{checkpoint['against']}`"), ("full", "everything kept")]
    details = []
    for name, other in others:
        details += _told_apart([(row["reducer"], row[name]) for row in rows if name in row], other)
    return Finding(text, details)


def _told_apart(compared: Sequence[tuple[str, dict[str, Any]]], other: str) -> list[str]:
    """Who is above, who is below, and who is neither, with how many stay so under Holm's correction."""
    above = [(name, one) for name, one in compared if one["low"] > 0]
    below = [(name, one) for name, one in compared if one["high"] < 0]
    neither = [name for name, one in compared if one["low"] <= 0 <= one["high"]]
    lines = []
    for side, rows in (("Above", above), ("Below", below)):
        if rows:
            surviving = sum(one["p_holm"] < 0.05 for _, one in rows)
            names = listed(name for name, _ in rows)
            lines.append(f"{side} {other}: {names} ({surviving} of {len(rows)} also after Holm's correction).")
    if neither:
        lines.append(f"Not told apart from {other}: {listed(neither)}.")
    return lines


def _of_the_area(area: dict[str, Any]) -> Finding:
    """Who has the largest area, and who is not told apart from it."""
    rows = area["rows"]
    largest = max(row["area"] for row in rows)
    best = [row["reducer"] for row in rows if math.isclose(row["area"], largest)]
    behind = [pair["other"] for pair in area["pairs"] if pair["reducer"] == best[0] and pair["low"] > 0]
    behind += [pair["reducer"] for pair in area["pairs"] if pair["other"] == best[0] and pair["high"] < 0]
    beside = [row["reducer"] for row in rows if row["reducer"] not in (*best, *behind)]
    names = ", ".join(f"`{name}`" + (" (control)" if is_control(name) else "") for name in best)
    text = f"Area under the score-FLOPs curve, {len(rows)} reducers: the largest is that of {names}."
    details = [f"Not told apart from `{best[0]}`: {listed(beside)}."] if beside else []
    details += [f"Told apart below `{best[0]}`: {listed(behind)}."] if behind else []
    return Finding(text, details)


def findings_over_checkpoints(over: dict[str, Any], checkpoints: Sequence[dict[str, Any]]) -> list[Finding]:
    """
    What several checkpoints measured on the same examples agree on.

    Args:
        over: one of `over_checkpoints` of [`report_numbers`].
        checkpoints: those that it is over.

    Returns:
        Which methods are told apart from the one they are compared with in every checkpoint, to the same
        side; and how far the checkpoints agree on the order of methods.
    """
    lines = []
    for num_keep in dict.fromkeys(row["num_keep"] for row in over["settings"]):
        own = [_sides(checkpoint, num_keep) for checkpoint in checkpoints]
        for side in ("above", "below"):
            names = [name for name in own[0] if all(sides.get(name) == side for sides in own)]
            if names:
                text = f"K = {num_keep}: {side} `{checkpoints[0]['against']}` in each of the {len(checkpoints)} "
                lines.append(Finding(f"{text}checkpoints, each time by its own interval: {listed(names)}."))
        named = dict.fromkeys(name for sides in own for name in sides)
        opposite = [name for name in named if {"above", "below"} <= {sides.get(name) for sides in own}]
        if opposite:
            text = f"K = {num_keep}: above `{checkpoints[0]['against']}` in one checkpoint and below it in another: "
            lines.append(Finding(f"{text}{listed(opposite)}."))
    taus = [tau for tau in over["area_agreement"]["tau"] if tau is not None]
    if taus:
        text = f"Order of {len(over['areas'])} methods by area: Kendall's tau between two checkpoints is "
        lines.append(Finding(text + (f"{taus[0]:.2f}." if len(taus) == 1 else f"{min(taus):.2f} to {max(taus):.2f}.")))
    return lines


def _sides(checkpoint: dict[str, Any], num_keep: int) -> dict[str, str]:
    """Of every reducer at one K, on which side of `against` it is told apart, if it is."""
    compared = [row for row in checkpoint["settings"] if row["num_keep"] == num_keep and "against" in row]
    above = {row["reducer"]: "above" for row in compared if row["against"]["low"] > 0}
    return above | {row["reducer"]: "below" for row in compared if row["against"]["high"] < 0}


def score(value: float, checkpoint: dict[str, Any]) -> str:
    """A score as it is written: percent where scores are shares, else the number."""
    return f"{100 * value:.1f}%" if checkpoint["is_share"] else f"{value:.3f}"


def listed(names: Iterable[str]) -> str:
    """Names in backticks with commas between them."""
    return ", ".join(f"`{name}`" for name in names)
