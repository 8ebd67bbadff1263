"""From joined runs to the numbers of a report.

What is compared is compared on the same examples, and several checkpoints stand beside each other, each with its own
figures.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..circumstances import command_without_places, without_place
from ..metric_modules import SCORED_TOGETHER, score_examples
from ..reducer_table import CONTROLLER, is_control, known_of_label, reducer_table
from ..runs import Run
from ..settings import FULL, TOKENS
from ..statistics import (
    NUM_DRAWS,
    SEED,
    area_weights,
    common_range,
    correct,
    difference,
    interval,
)
from .hard_subset import hard_subsets
from .joined import Answered, Measured, everything_kept_by
from .over_checkpoints import over_checkpoints
from .paired import Key, Paired

Row = dict[str, Any]


def report_numbers(measured: Sequence[Measured], against: str | None, title: str, command: str) -> dict[str, Any]:
    """
    Everything that a report says in numbers, as a JSON-ready record.

    Args:
        measured: from [`join_runs`].
        against: the reducer that all others are compared with; `None` is the controller where it was measured.
        title, command: of the report.

    Returns:
        `checkpoints`, one for each of `measured`, with `settings` (score, interval, cost, budget, differences, and the
        same in each category), `hard_subsets` (see [`hard_subsets`]), `areas` (under the score-FLOPs curves),
        `unreachable`, `measurements` and `runs`; and `over_checkpoints`, one for each data set that several
        checkpoints were measured on. Their names are as in the runs, with the beginning of their hash where two have
        the same.

    Raises:
        ValueError: if `against` was not measured.
    """
    table = reducer_table()
    checkpoints = [_checkpoint(one, against, table) for one in measured]
    _tell_apart_by_hash(checkpoints)
    return {
        "title": title,
        "command": command,
        "num_draws": NUM_DRAWS,
        "seed": SEED,
        "checkpoints": checkpoints,
        "over_checkpoints": over_checkpoints(checkpoints),
    }


def _tell_apart_by_hash(checkpoints: list[dict[str, Any]]) -> None:
    """Different checkpoints of the same name, as `last` of two training runs, get the beginning of their hash."""
    hashes: dict[str, set[str]] = {}
    for one in checkpoints:
        hashes.setdefault(one["checkpoint"], set()).add(one["checkpoint_hash"])
    for one in checkpoints:
        if len(hashes[one["checkpoint"]]) > 1:
            one["checkpoint"] += f" ({one['checkpoint_hash'][:8]})"


def _checkpoint(measured: Measured, against: str | None, table: list[dict[str, Any]]) -> dict[str, Any]:
    header, settings = measured.header, list(measured.settings.values())
    reducers = list(dict.fromkeys(setting.reducer for setting in settings))
    if not settings:
        raise ValueError(
            f"{measured.runs[0].folder} has no setting that could be measured; there is nothing to report."
        )
    if against is None:
        against = CONTROLLER if CONTROLLER in reducers else None
    elif against not in reducers:
        raise ValueError(f"`against` is {against!r}; measured were {', '.join(reducers)}.")
    rows = [_row(setting, measured) for setting in settings]
    controls = _best_controls(rows)
    others = {
        "against": lambda key: (against, key[1]),
        # A control beside the best control says which control is better, not what a method is worth.
        "control": lambda key: None if is_control(key[0]) else (controls.get(key[1]), key[1]),
        "full": lambda key: everything_kept_by(header),
    }
    for name, other_of in others.items():
        correct(measured.paired.compare(rows, name, other_of))
    categories = [example.category for example in measured.examples]
    for category in sorted(set(categories) - {None}):
        _add_category(rows, measured, category, against)
    names = ("checkpoint", "checkpoint_hash", "data", "data_hash", "metric")
    return {name: header[name] for name in (*names, "num_examples", "num_patches", "num_layers")} | {
        "data": without_place(header["data"]),
        "dial": header.get("dial", TOKENS),
        "is_share": header["metric"] not in SCORED_TOGETHER,
        "is_binary": all(np.isin(scores, (0, 1)).all() for scores in measured.paired.scores.values()),
        "reducers": reducers,
        "stages": {reducer: known_of_label(reducer, table, "stage") for reducer in reducers},
        "papers": {reducer: known_of_label(reducer, table, "paper") for reducer in reducers},
        "against": against,
        "budgets": _budgets(settings),
        "categories": {name: categories.count(name) for name in sorted(set(categories) - {None})},
        "category_metrics": measured.category_metrics,
        "settings": rows,
        "hard_subsets": hard_subsets(measured, against),
        "best_controls": [{"num_keep": key, "reducer": value} for key, value in controls.items()],
        "areas": _areas(measured),
        "unreachable": _unreachable(measured),
        "figures": [row for run in measured.runs for row in run.header.get("figures") or []],
        "measurements": [row for run in measured.runs for row in run.header.get("measurements") or []],
        "runs": [_about(run) for run in measured.runs],
    }


def _unreachable(measured: Measured) -> list[dict[str, Any]]:
    """What no run could reach, each reducer and budget once."""
    reached = {(one.reducer, budget) for one in measured.settings.values() for budget in one.asked}
    rows = [row for run in measured.runs for row in run.header["unreachable"]]
    once = {(row["reducer"], row["budget"]): row for row in rows}
    return [row for setting, row in once.items() if setting not in reached]


def _about(run: Run) -> dict[str, Any]:
    names = ("command", "versions", "machine", "seconds", "evaluation_seconds", "model_seconds")
    about = {name: run.header.get(name) for name in names}
    return {"folder": run.folder.name} | about | {"command": command_without_places(about["command"])}


def _budgets(settings: list[Answered]) -> list[dict[str, Any]]:
    """What was asked for, fractions and counts, by the number of tokens that it means."""
    asked: dict[int | float, dict[float | int, None]] = {}
    for setting in sorted(settings, key=lambda setting: setting.num_keep):
        asked.setdefault(setting.num_keep, {}).update(dict.fromkeys(setting.asked))
    return [{"num_keep": num_keep, "asked": list(budgets)} for num_keep, budgets in asked.items()]


def _row(setting: Answered, measured: Measured) -> Row:
    key, visual_tokens = (setting.reducer, setting.num_keep), setting.column("visual_tokens")
    off_by = None
    if measured.header["num_patches"] is not None:
        # A question without a picture has no visual tokens, whatever the budget.
        off_by = float(np.abs(visual_tokens[visual_tokens > 0] - setting.num_keep).max(initial=0.0))
    milliseconds = float(np.median(setting.column("ms")))
    return {
        "reducer": setting.reducer,
        "num_keep": setting.num_keep,
        "asked": setting.asked,
        **measured.paired.mean(key),
        "visual_tokens": float(visual_tokens.mean()),
        "off_by_most": off_by,
        # JSON has no number for what was not counted or measured.
        "flops": _mean_flops(setting),
        "milliseconds": None if np.isnan(milliseconds) else milliseconds,
    }


def _mean_flops(setting: Answered) -> float | None:
    mean = float(setting.column("flops").mean())
    return None if np.isnan(mean) else mean


def _best_controls(rows: list[Row]) -> dict[int, str]:
    """At each number of kept tokens, the control with the highest score."""
    best: dict[int, Row] = {}
    for row in rows:
        known = best.get(row["num_keep"])
        if is_control(row["reducer"]) and (known is None or row["score"] > known["score"]):
            best[row["num_keep"]] = row
    return {num_keep: row["reducer"] for num_keep, row in sorted(best.items())}


def _add_category(rows: list[Row], measured: Measured, category: str, against: str | None) -> None:
    """
    Puts into each row its score in a category, and there its difference to `against` at the same K; and under `metric`
    the same by the metric that says more of this category's answers, with its `name`, where there is one.
    """
    is_own = np.array([example.category == category for example in measured.examples])
    metric, own = measured.category_metrics.get(category), measured.paired.only(is_own)
    more = None if metric in (None, measured.header["metric"]) else _scored_by(metric, measured, is_own)
    for row in rows:
        cell = _category_cell(row, own, against)
        if more is not None:
            cell["metric"] = {"name": metric} | _category_cell(row, more, against)
        row.setdefault("categories", {})[category] = cell


def _category_cell(row: Row, paired: Paired, against: str | None) -> Row:
    key, other = (row["reducer"], row["num_keep"]), (against, row["num_keep"])
    is_compared = other in paired.scores and other != key
    return paired.mean(key) | ({"against": paired.difference(key, other)} if is_compared else {})


def _scored_by(metric: str, measured: Measured, chosen: np.ndarray) -> Paired:
    """The answers to the chosen examples, scored by another metric than the run's."""
    scores = {}
    for key, setting in measured.settings.items():
        own = [setting.answers[index] for index in np.flatnonzero(chosen)]
        own = score_examples(metric, [answer.prediction for answer in own], [answer.answers for answer in own])
        scores[key] = np.array(own)
    return Paired(scores)


def _areas(measured: Measured) -> list[dict[str, Any]]:
    """
    Areas under the score-FLOPs curves over the range that all reducers cover; and, where some could not reach a budget
    and so narrow it, over that of the others too.
    """
    curves = _curves(measured)
    every_budget = {num_keep for points in curves.values() for _, num_keep in points}
    reaching = {name: points for name, points in curves.items() if {keep for _, keep in points} == every_budget}
    groups = [curves, reaching] if len(reaching) not in (0, len(curves)) else [curves]
    return [area for group in groups if (area := _area(group, measured)) is not None]


def _curves(measured: Measured) -> dict[str, list[Key]]:
    """The settings on each reducer's curve, two or more. With everything kept a reducer is `full`."""
    everything, curves = everything_kept_by(measured.header), {}
    for reducer, num_keep in measured.settings:
        if reducer != FULL:
            curves.setdefault(reducer, []).append((reducer, num_keep))
    for reducer, points in curves.items():
        if everything in measured.settings and (reducer, everything[1]) not in measured.settings:
            points.append(everything)
    return {reducer: points for reducer, points in curves.items() if len(points) > 1}


def _area(curves: dict[str, list[Key]], measured: Measured) -> dict[str, Any] | None:
    cost = {name: [_mean_flops(measured.settings[point]) for point in points] for name, points in curves.items()}
    counted = all(flops is not None for own in cost.values() for flops in own)
    bounds = common_range(list(cost.values())) if cost and counted else None
    if bounds is None:
        return None
    scores, draws = {}, {}
    for name, points in curves.items():
        weights = area_weights(cost[name], *bounds)
        scores[name] = weights @ np.stack([measured.paired.scores[point] for point in points])
        draws[name] = weights @ np.stack([measured.paired.draws[point] for point in points])
    pairs = [
        {"reducer": one, "other": other} | difference(scores[one] - scores[other], draws[one] - draws[other])
        for one, other in combinations(curves, 2)
    ]
    correct(pairs)
    rows = []
    for name in curves:
        low, high = interval(draws[name])
        rows.append({"reducer": name, "area": float(scores[name].mean()), "low": float(low), "high": float(high)})
    return {"low_flops": bounds[0], "high_flops": bounds[1], "rows": rows, "pairs": pairs}
