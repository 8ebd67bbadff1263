"""What the numbers of a report say, in sentences that are worked out from them.

A method is above or below another only where the 95% interval of the difference on the same examples leaves 0 out;
otherwise the two are not told apart, which says nothing about their being equal.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..reducer_table import CONTROLLER, is_control
from ..settings import FULL
from .joined import kept_label


def lead(checkpoint: dict[str, Any]) -> str:
    """
    The finding in plain words: what the method that all are compared with scores at the lowest budget where another
    was measured too, what the best published method and the best control score there, and what all tokens give.

    Args:
        checkpoint: one of `checkpoints` of [`report_numbers`].
    """
    subject = checkpoint["against"]
    reduced = [row for row in checkpoint["settings"] if row["reducer"] != FULL]
    full = [score(row["score"], checkpoint) for row in checkpoint["settings"] if row["reducer"] == FULL]
    if not reduced:
        return f"With all tokens the score is {full[0]}; nothing else was measured."
    subject = subject or max(reduced, key=lambda row: row["score"])["reducer"]
    own = sorted((row for row in reduced if row["reducer"] == subject), key=lambda row: row["num_keep"])
    beside = {row["num_keep"] for row in reduced if row["reducer"] != subject}
    row = next((one for one in own if one["num_keep"] in beside), own[0] if own else reduced[0])
    others = [one for one in reduced if one["num_keep"] == row["num_keep"] and one["reducer"] != row["reducer"]]
    verb = "answers {} right" if checkpoint["is_binary"] and checkpoint["is_share"] else "scores {}"
    clauses = [f"{_called(row['reducer'])} {verb.format(score(row['score'], checkpoint))}"]
    best = _best_other(others, checkpoint)
    if best is not None:
        kind = "best published method" if checkpoint["papers"].get(best["reducer"]) else "best other method"
        clauses.append(f"the {kind} (`{best['reducer']}`) {score(best['score'], checkpoint)}")
    controls = [one for one in others if is_control(one["reducer"])]
    if controls:
        control = max(controls, key=lambda one: one["score"])
        clauses.append(f"the best control (`{control['reducer']}`) {score(control['score'], checkpoint)}")
    asked = [budget for budget in row["asked"] if isinstance(budget, float)]
    clauses += [f"the model with all tokens {everything}" for everything in full]
    *first, last = clauses
    text = f"{', '.join(first)} and {last}" if first else last
    if not asked and checkpoint["num_patches"] is None:
        return f"With {row['num_keep']} visual tokens of each image or tile {text}.{_how_sure(row, best)}"
    share = 100 * (asked[0] if asked else row["num_keep"] / checkpoint["num_patches"])
    share = round(share, 1) if share < 10 else round(share)
    return f"At {share:g}% of the visual tokens {text}.{_how_sure(row, best)}"


def _best_other(others: Sequence[dict[str, Any]], checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The best method that is no control: of those that were published, where there are some."""
    methods = [one for one in others if not is_control(one["reducer"])]
    published = [one for one in methods if checkpoint["papers"].get(one["reducer"])]
    return max(published or methods, key=lambda one: one["score"], default=None)


def _called(reducer: str) -> str:
    return f"the controller (`{reducer}`)" if reducer == CONTROLLER else f"`{reducer}`"


def _how_sure(row: dict[str, Any], best: dict[str, Any] | None) -> str:
    """Whether the first two are told apart; the difference is the other's minus the subject's."""
    if best is None or best.get("against", {}).get("other") != row["reducer"]:
        return ""
    one = best["against"]
    if one["low"] <= 0 <= one["high"]:
        return f" The answers do not tell `{row['reducer']}` and `{best['reducer']}` apart."
    first, second = (best, row) if one["low"] > 0 else (row, best)
    return f" `{first['reducer']}` is better than `{second['reducer']}` beyond chance (95% interval)."


def statistics_in_short(checkpoint: dict[str, Any]) -> list[str]:
    """
    For each budget a line: who scores highest, and how many methods are above, below and not told apart from the best
    control and from the method that all are compared with. Then who has the largest area.
    """
    lines = []
    for budget in checkpoint["budgets"]:
        rows = [row for row in checkpoint["settings"] if row["num_keep"] == budget["num_keep"]]
        rows = [row for row in rows if row["reducer"] != FULL]
        if rows:
            lines.append(_at_one_budget(budget["num_keep"], rows, checkpoint))
    return lines + [_of_the_area(area) for area in checkpoint["areas"]]


def _at_one_budget(num_keep: int | float, rows: list[dict[str, Any]], checkpoint: dict[str, Any]) -> str:
    best = max(row["score"] for row in rows)
    names = listed(row["reducer"] for row in rows if row["score"] == best)
    text = f"{kept_label(num_keep)}: highest of {len(rows)} is {names} with {score(best, checkpoint)}"
    control = next((one["reducer"] for one in checkpoint["best_controls"] if one["num_keep"] == num_keep), None)
    text += "; no control was measured" if control is None else ""
    for name, other in (("against", checkpoint["against"]), ("control", control)):
        compared = [row[name] for row in rows if name in row]
        if compared:
            kind = "the best control, " if name == "control" else ""
            text += f"; beside {kind}`{other}`: {_sides(compared)}"
    return f"{text}."


def _sides(compared: Sequence[dict[str, Any]]) -> str:
    """How many are above and below, how many of these also under Holm's correction, and how many are neither."""
    parts = []
    sides = {
        "above": [one for one in compared if one["low"] > 0],
        "below": [one for one in compared if one["high"] < 0],
    }
    for side, own in sides.items():
        surviving = sum(one["p_holm"] < 0.05 for one in own)
        parts.append(f"{len(own)} {side}" + (f" ({surviving} after Holm's correction)" if own else ""))
    return f"{', '.join(parts)}, {len(compared) - sum(map(len, sides.values()))} not told apart"


def _of_the_area(area: dict[str, Any]) -> str:
    """Who has the largest area, and from how many others it is told apart."""
    rows = area["rows"]
    largest = max(row["area"] for row in rows)
    best = [row["reducer"] for row in rows if math.isclose(row["area"], largest)]
    behind = [pair["other"] for pair in area["pairs"] if pair["reducer"] == best[0] and pair["low"] > 0]
    behind += [pair["reducer"] for pair in area["pairs"] if pair["other"] == best[0] and pair["high"] < 0]
    beside = [row["reducer"] for row in rows if row["reducer"] not in (*best, *behind)]
    names = ", ".join(f"`{name}`" + (" (control)" if is_control(name) else "") for name in best)
    text = f"Area under the score-FLOPs curve, {len(rows)} reducers: the largest is that of {names}"
    text += f"; not told apart from it: {listed(beside)}" if beside else ""
    return f"{text}."


def score(value: float, checkpoint: dict[str, Any]) -> str:
    """A score as it is written: percent where scores are shares, else the number."""
    return f"{100 * value:.1f}%" if checkpoint["is_share"] else f"{value:.3f}"


def listed(names: Iterable[str]) -> str:
    """Names in backticks with commas between them."""
    return ", ".join(f"`{name}`" for name in names)
