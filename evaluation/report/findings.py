"""What the numbers of a report say, in sentences that are worked out from them.

A method is above or below another only where the 95% interval of the difference on the same examples leaves 0 out;
otherwise the two are not told apart, which says nothing about their being equal.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..reducer_table import CONTROLLER, is_control
from ..settings import FULL, TOKENS
from .hard_subset import RIGHT_FROM, SMALLER_PICTURE
from .joined import kept_label

Row = dict[str, Any]


def lead(checkpoint: dict[str, Any]) -> str:
    """
    The finding in plain words: what the method that all are compared with scores at the lowest budget where another
    was measured too, what the best published method and the best control score there, and what all tokens give; then
    the same on the hard subset, where there is one.

    Args:
        checkpoint: one of `checkpoints` of [`report_numbers`].
    """
    reduced = [row for row in checkpoint["settings"] if row["reducer"] != FULL]
    full = [row for row in checkpoint["settings"] if row["reducer"] == FULL]
    if not reduced:
        return f"With all tokens the score is {score(full[0]['score'], checkpoint)}; nothing else was measured."
    row, others = _leading(reduced, checkpoint["against"])
    best = _best_other(others, checkpoint)
    controls = [one for one in others if is_control(one["reducer"])]
    control = max(controls, key=lambda one: one["score"], default=None)
    text = _beside_each_other([row, best, control, *full], checkpoint) + f".{_how_sure(row, best)}"
    asked = [budget for budget in row["asked"] if isinstance(budget, float)]
    if not asked and checkpoint["num_patches"] is None:
        where = f"With {row['num_keep']} visual tokens of each image or tile"
    else:
        share = 100 * (asked[0] if asked else row["num_keep"] / checkpoint["num_patches"])
        of = "the visual tokens" if checkpoint.get("dial", TOKENS) == TOKENS else "the full model's FLOPs for a prompt"
        where = f"At {round(share, 1) if share < 10 else round(share):g}% of {of}"
    return f"{where} {text}{_on_hard_subset(row, best, checkpoint)}"


def _leading(rows: Sequence[Row], against: str | None) -> tuple[Row, list[Row]]:
    """The row that the finding is about, and those beside it at the same budget."""
    subject = against or max(rows, key=lambda row: row["score"])["reducer"]
    own = sorted((row for row in rows if row["reducer"] == subject), key=lambda row: row["num_keep"])
    beside = {row["num_keep"] for row in rows if row["reducer"] != subject}
    row = next((one for one in own if one["num_keep"] in beside), own[0] if own else rows[0])
    return row, [one for one in rows if one["num_keep"] == row["num_keep"] and one["reducer"] != row["reducer"]]


def _beside_each_other(rows: Sequence[Row | None], checkpoint: dict[str, Any]) -> str:
    """What each scores, the first in a whole sentence: a method, the best other, the best control, everything kept."""
    verb = "answers {} right" if checkpoint["is_binary"] and checkpoint["is_share"] else "scores {}"
    subject, best, control, *full = rows
    clauses = [f"{_called(subject['reducer'])} {verb.format(score(subject['score'], checkpoint))}"]
    if best is not None:
        kind = "best published method" if checkpoint["papers"].get(best["reducer"]) else "best other method"
        clauses.append(f"the {kind} (`{best['reducer']}`) {score(best['score'], checkpoint)}")
    if control is not None:
        clauses.append(f"the best control (`{control['reducer']}`) {score(control['score'], checkpoint)}")
    clauses += [f"the model with all tokens {score(row['score'], checkpoint)}" for row in full]
    *first, last = clauses
    return f"{', '.join(first)} and {last}" if first else last


def _on_hard_subset(row: Row, best: Row | None, checkpoint: dict[str, Any]) -> str:
    """The same methods on the hard subset of the same budget; of its controls the best there."""
    subset = hard_subset_at(checkpoint, row["num_keep"])
    own = {one["reducer"]: one for one in subset["settings"]} if subset else {}
    if row["reducer"] not in own:
        return ""
    full = [own[FULL]] if FULL in own else []
    rows = [own[row["reducer"]], best and own.get(best["reducer"]), own.get(subset["best_control"]), *full]
    return f" Of the {_hard_questions(subset, checkpoint)}, {_beside_each_other(rows, checkpoint)}."


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


def hard_subset_at(checkpoint: dict[str, Any], num_keep: int | float) -> dict[str, Any] | None:
    """The hard subset at a number of kept tokens, if there is one, it has questions, and others answered them too."""
    subsets = [one for one in checkpoint.get("hard_subsets", []) if one["num_keep"] == num_keep]
    return next((one for one in subsets if one.get("settings")), None)


def _hard_questions(subset: dict[str, Any], checkpoint: dict[str, Any]) -> str:
    """`55.8% of the questions that `downsample` answers wrongly`, with its K where that is another."""
    by = subset["by"]
    where = "" if by["num_keep"] == subset["num_keep"] else f" at {kept_label(by['num_keep'])}"
    return f"{100 * subset['share']:.1f}% of questions that `{by['reducer']}` answers wrongly{where}"


def hard_subset_notes(checkpoint: dict[str, Any]) -> list[str]:
    """What the hard subset is, and at which budgets it is another's, empty or missing, and why: a sentence each."""
    if "hard_subsets" not in checkpoint:
        return [
            "There is no hard subset: these numbers are older than it. A report written anew from its run has one."
        ]
    if not checkpoint["is_share"]:
        return [f"There is no hard subset: {checkpoint['metric']} does not say which answers are right."]
    subsets, notes = checkpoint["hard_subsets"], []
    if any(one["by"] for one in subsets):
        notes.append(
            f"The hard subset: the questions that the control `{SMALLER_PICTURE}`, which shows all of the picture "
            f"smaller, answers wrongly with the same K (a score below {RIGHT_FROM:g}). It has none of them right and "
            "no row. Where choosing matters shows here (arXiv 2510.07143)."
        )
    lacking: dict[str, list[str]] = {}
    for one in subsets:
        where, by, why = kept_label(one["num_keep"]), one["by"], _why_not_measured(checkpoint, one["num_keep"])
        if by is None:
            lacking.setdefault(why, []).append(where)
        elif by["num_keep"] != one["num_keep"]:
            nearest = f"the nearest below at which `{by['reducer']}` was measured"
            notes.append(f"{where}: the hard subset is that of {kept_label(by['num_keep'])}, {nearest}. {why}")
        elif not one["num_examples"]:
            notes.append(f"{where}: the hard subset is empty, `{by['reducer']}` answers everything right.")
        if by is not None and _is_off(by, checkpoint):
            notes.append(
                f"{where}: layers saw {by['visual_tokens']:.1f} tokens of `{by['reducer']}`, mean of examples."
            )
    return notes + [f"No hard subset at {', '.join(places)}. {why}" for why, places in lacking.items()]


def _is_off(by: dict[str, Any], checkpoint: dict[str, Any]) -> bool:
    """Whether a setting saw another number of tokens than was asked for, where all images have equally many."""
    return checkpoint["num_patches"] is not None and abs(by["visual_tokens"] - by["num_keep"]) >= 0.05


def _why_not_measured(checkpoint: dict[str, Any], num_keep: int | float) -> str:
    """Why the smaller picture is not there at a budget, or what to ask for."""
    asked = [one["asked"] for one in checkpoint["budgets"] if one["num_keep"] == num_keep]
    budgets = {budget for own in asked for budget in own}
    for row in checkpoint["unreachable"]:
        if row["reducer"].partition(":")[0] == SMALLER_PICTURE and row["budget"] in budgets:
            return f"`{row['reducer']}` could not be run there: {row['reason']}"
    return (
        f"`{SMALLER_PICTURE}` was not measured there; to have one, add `--reducers {SMALLER_PICTURE}` to `adavtp "
        f"evaluate`, in an experiment `controls: [{SMALLER_PICTURE}]`."
    )


def statistics_in_short(checkpoint: dict[str, Any]) -> list[str]:
    """
    For each budget a line: who scores highest, how many methods are above, below and not told apart from the best
    control and from the method that all are compared with, and who scores highest on the hard subset. Then who has the
    largest area.
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
    subset = hard_subset_at(checkpoint, num_keep)
    hard = [row for row in subset["settings"] if row["reducer"] != FULL] if subset else []
    if hard:
        best = max(row["score"] for row in hard)
        names = listed(row["reducer"] for row in hard if row["score"] == best)
        text += f"; of the {_hard_questions(subset, checkpoint)}: {names} with {score(best, checkpoint)}"
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
