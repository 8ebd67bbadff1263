"""From joined runs to the numbers of a report.

What is compared is compared on the same examples, and several checkpoints stand beside each other, each with its own
figures.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..metric_modules import SCORED_TOGETHER
from ..reducer_table import CONTROLLER, is_control, known_of_label, reducer_table
from ..runs import Run
from ..settings import FULL
from ..statistics import (
    NUM_DRAWS,
    SEED,
    area_weights,
    bootstrap_means,
    common_range,
    correct,
    difference,
    interval,
    mean_interval,
)
from .joined import Answered, Measured
from .over_checkpoints import over_checkpoints


def report_numbers(measured: Sequence[Measured], against: str | None, title: str, command: str) -> dict[str, Any]:
    """
    Everything that a report says in numbers, as a JSON-ready record.

    Args:
        measured: from [`join_runs`].
        against: the reducer that all others are compared with; `None` is the controller where it was measured.
        title, command: of the report.

    Returns:
        `checkpoints`, one for each of `measured`, with `settings` (score, interval, cost, budget, differences),
        `areas` (under the score-FLOPs curves), `unreachable`, `measurements` and `runs`; and `over_checkpoints`, one
        for each data set that several checkpoints were measured on. Their names are as in the runs, with the beginning
        of their hash where two have the same.

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
        "over_checkpoints": over_checkpoints(measured, checkpoints),
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
    draws = bootstrap_means(np.stack([setting.column("score") for setting in settings]))
    column = {(setting.reducer, setting.num_keep): draws[:, number] for number, setting in enumerate(settings)}
    rows = [_row(setting, column[setting.reducer, setting.num_keep]) for setting in settings]
    best_controls = _best_controls(rows)
    _compare(rows, measured.settings, column, "against", {row["num_keep"]: against for row in rows})
    _compare(rows, measured.settings, column, "control", best_controls)
    _compare(rows, measured.settings, column, "full", {row["num_keep"]: FULL for row in rows}, header["num_patches"])
    categories = [example.category for example in measured.examples]
    _add_categories(rows, measured.settings, np.array(categories, dtype=object), against)
    names = ("checkpoint", "checkpoint_hash", "data", "data_hash", "metric")
    return {name: header[name] for name in (*names, "num_examples", "num_patches", "num_layers")} | {
        "is_share": header["metric"] not in SCORED_TOGETHER,
        "is_binary": all(np.isin(setting.column("score"), (0, 1)).all() for setting in settings),
        "reducers": reducers,
        "stages": {reducer: known_of_label(reducer, table, "stage") for reducer in reducers},
        "papers": {reducer: known_of_label(reducer, table, "paper") for reducer in reducers},
        "against": against,
        "budgets": _budgets(settings),
        "categories": _category_sizes(categories),
        "settings": rows,
        "best_controls": [{"num_keep": key, "reducer": value} for key, value in best_controls.items()],
        "areas": _areas(measured.settings, column, header["num_patches"]),
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
    return {"folder": run.folder.name} | {name: run.header.get(name) for name in names}


def _budgets(settings: list[Answered]) -> list[dict[str, Any]]:
    asked: dict[int, list[float | int]] = {}
    for setting in sorted(settings, key=lambda setting: setting.num_keep):
        known = asked.setdefault(setting.num_keep, [])
        known += [budget for budget in setting.asked if budget not in known]
    return [{"num_keep": num_keep, "asked": budgets} for num_keep, budgets in asked.items()]


def _category_sizes(categories: list[str | None]) -> dict[str, int]:
    return {name: categories.count(name) for name in sorted({name for name in categories if name is not None})}


def _row(setting: Answered, draws: np.ndarray) -> dict[str, Any]:
    scores, visual_tokens = setting.column("score"), setting.column("visual_tokens")
    low, high = mean_interval(scores, draws)
    # A question without a picture has no visual tokens, whatever the budget.
    off_by = visual_tokens[visual_tokens > 0] - setting.num_keep
    return {
        "reducer": setting.reducer,
        "num_keep": setting.num_keep,
        "asked": setting.asked,
        "score": float(scores.mean()),
        "low": low,
        "high": high,
        "visual_tokens": float(visual_tokens.mean()),
        "off_by_mean": float(off_by.mean()) if len(off_by) else 0.0,
        "off_by_most": float(np.abs(off_by).max(initial=0.0)),
        "flops": float(setting.column("flops").mean()),
        "milliseconds": _known(np.median(setting.column("ms"))),
    }


def _known(value: float) -> float | None:
    """`None` for what was not measured, which JSON has no number for."""
    return None if np.isnan(value) else float(value)


def _best_controls(rows: list[dict[str, Any]]) -> dict[int, str]:
    """At each number of kept tokens, the control with the highest score."""
    best: dict[int, dict[str, Any]] = {}
    for row in rows:
        known = best.get(row["num_keep"])
        if is_control(row["reducer"]) and (known is None or row["score"] > known["score"]):
            best[row["num_keep"]] = row
    return {num_keep: row["reducer"] for num_keep, row in sorted(best.items())}


def _compare(
    rows: list[dict[str, Any]],
    settings: dict[tuple[str, int], Answered],
    column: dict[tuple[str, int], np.ndarray],
    name: str,
    others: dict[int, str | None],
    at: int | None = None,
) -> None:
    """Puts into each row its difference to another setting, that of `others` at its own K or at the K `at`."""
    compared = []
    for row in rows:
        own = row["reducer"], row["num_keep"]
        other = others.get(row["num_keep"]), row["num_keep"] if at is None else at
        # A control beside the best control says which control is better, not what a method is worth.
        if other in settings and own[0] != other[0] and not (name == "control" and is_control(own[0])):
            row[name] = difference(
                settings[own].column("score") - settings[other].column("score"), column[own] - column[other]
            )
            row[name]["other"] = other[0]
            compared.append(row[name])
    correct(compared)


def _add_categories(
    rows: list[dict[str, Any]], settings: dict[tuple[str, int], Answered], categories: np.ndarray, against: str | None
) -> None:
    """Puts into each row its score in each category, and there its difference to `against` at the same K."""
    for category in sorted({category for category in categories if category is not None}):
        own = categories == category
        scores = {key: setting.column("score")[own] for key, setting in settings.items()}
        draws = dict(zip(scores, bootstrap_means(np.stack(list(scores.values()))).T, strict=True))
        for row in rows:
            key, other = (row["reducer"], row["num_keep"]), (against, row["num_keep"])
            low, high = mean_interval(scores[key], draws[key])
            cell = {"score": float(scores[key].mean()), "low": low, "high": high}
            if other in scores and other != key:
                cell["against"] = difference(scores[key] - scores[other], draws[key] - draws[other])
            row.setdefault("categories", {})[category] = cell


def _areas(
    settings: dict[tuple[str, int], Answered], column: dict[tuple[str, int], np.ndarray], num_patches: int
) -> list[dict[str, Any]]:
    """
    Areas under the score-FLOPs curves over the range that all reducers cover; and, where some could not reach a budget
    and so narrow it, over that of the others too.
    """
    curves = _curves(settings, num_patches)
    every_budget = {num_keep for points in curves.values() for _, num_keep in points}
    reaching = {name: points for name, points in curves.items() if {keep for _, keep in points} == every_budget}
    groups = [curves, reaching] if len(reaching) not in (0, len(curves)) else [curves]
    return [area for group in groups if (area := _area(group, settings, column)) is not None]


def _curves(settings: dict[tuple[str, int], Answered], num_patches: int) -> dict[str, list[tuple[str, int]]]:
    """The settings on each reducer's curve, two or more. With everything kept a reducer is `full`."""
    curves: dict[str, list[tuple[str, int]]] = {}
    for reducer, num_keep in settings:
        if reducer != FULL:
            curves.setdefault(reducer, []).append((reducer, num_keep))
    for reducer, points in curves.items():
        if (FULL, num_patches) in settings and (reducer, num_patches) not in settings:
            points.append((FULL, num_patches))
    return {reducer: points for reducer, points in curves.items() if len(points) > 1}


def _area(
    curves: dict[str, list[tuple[str, int]]],
    settings: dict[tuple[str, int], Answered],
    column: dict[tuple[str, int], np.ndarray],
) -> dict[str, Any] | None:
    cost = {
        name: [float(settings[point].column("flops").mean()) for point in points] for name, points in curves.items()
    }
    bounds = common_range(list(cost.values())) if cost else None
    if bounds is None:
        return None
    scores, draws = {}, {}
    for name, points in curves.items():
        weights = area_weights(cost[name], *bounds)
        scores[name] = weights @ np.stack([settings[point].column("score") for point in points])
        draws[name] = np.stack([column[point] for point in points], axis=1) @ weights
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
