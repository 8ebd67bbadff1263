"""From run folders to the numbers of a report.

Runs of one checkpoint on the same data are one measurement, however many commands it took: they are joined example by
example, and where two of them answered the same, they have to agree. What is compared is then compared on the same
examples, and several checkpoints stand beside each other, each with its own figures.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from .comparison import reducer_table
from .metric_modules import SCORED_TOGETHER
from .runs import Run
from .settings import FULL
from .statistics import (
    NUM_DRAWS,
    SEED,
    area_weights,
    bootstrap_means,
    common_range,
    holm,
    interval,
    mean_interval,
    paired_p_value,
    rank_agreement,
)

CONTROLS = ("random", "grid", "downsample")

# What runs that are joined have in common, beside checkpoint and data.
_IN_COMMON = ("metric", "max_new_tokens", "num_examples", "num_patches", "num_layers")


def is_control(reducer: str) -> bool:
    """Whether a reducer, as it is written on the command line, is one that looks at nothing."""
    return reducer.partition(":")[0] in CONTROLS


@dataclass
class Answered:
    """
    All examples under one reducer and one number of kept tokens.

    Attributes:
        reducer, num_keep: what chose, and the number K of tokens that was asked for.
        asked: the budgets that this K was asked for with.
        predictions: `[num_examples]`.
        scores, visual_tokens, flops, milliseconds: `[num_examples]` float64.
    """

    reducer: str
    num_keep: int
    asked: list[float | int]
    predictions: list[str]
    scores: np.ndarray
    visual_tokens: np.ndarray
    flops: np.ndarray
    milliseconds: np.ndarray


@dataclass
class Measured:
    """
    One checkpoint on one set of examples, joined from the runs that measured it.

    Attributes:
        runs: that were joined.
        examples: for each index, an answer's line without what a setting adds.
        settings: by reducer and number of kept tokens, in the order they were asked for.
    """

    runs: list[Run]
    examples: list[dict[str, Any]]
    settings: dict[tuple[str, int], Answered] = field(default_factory=dict)

    @property
    def header(self) -> dict[str, Any]:
        """Of the first run; its checkpoint, data and metric are those of all."""
        return self.runs[0].header


def join_runs(runs: Sequence[Run]) -> list[Measured]:
    """
    Runs with the same checkpoint and the same data as one, in the order they were given.

    Raises:
        ValueError: if there are none, a run is not finished, runs of one checkpoint on the same data differ in what
            they measured, or two of them answered the same setting differently.
    """
    if not runs:
        raise ValueError("`runs` is empty; allowed are one or more run folders.")
    joined: dict[tuple[str, str], Measured] = {}
    for run in runs:
        key = run.header["checkpoint_hash"], run.header["data_hash"]
        _add(joined.setdefault(key, Measured([], [])), run)
    return list(joined.values())


def _add(measured: Measured, run: Run) -> None:
    for name in _IN_COMMON:
        if measured.runs and run.header.get(name) != measured.header.get(name):
            raise ValueError(
                f"runs of checkpoint {run.header['checkpoint']!r} on {run.header['data']!r} differ in {name!r}: "
                f"{measured.header.get(name)!r} and {run.header.get(name)!r} in {str(run.folder)!r}."
            )
    lines: dict[tuple[str, float | int], list[dict[str, Any]]] = {}
    for line in run.answers():
        lines.setdefault((line["reducer"], line["budget"]), []).append(line)
    _require_finished(run, lines)
    for (reducer, budget), own in lines.items():
        own.sort(key=lambda line: line["index"])
        if not measured.examples:
            names = ("index", "id", "question", "answers", "category")
            measured.examples = [{name: line.get(name) for name in names} for line in own]
        # A fraction and a count may mean the same K: that is one setting, asked for in two ways.
        key = reducer, own[0]["num_keep"]
        _require_agreement(measured, run, key, own)
        setting = measured.settings.setdefault(key, _setting(*key, own))
        if budget not in setting.asked:
            setting.asked.append(budget)
    measured.runs.append(run)


def _require_finished(run: Run, lines: dict[tuple[str, float | int], list[dict[str, Any]]]) -> None:
    unreachable = {(row["reducer"], row["budget"]) for row in run.header["unreachable"]}
    for setting in {(row["reducer"], row["budget"]): None for row in run.header["settings"]} | dict.fromkeys(lines):
        answered = len(lines.get(setting, []))
        if setting not in unreachable and answered != run.header["num_examples"]:
            raise ValueError(
                f"the run in {str(run.folder)!r} is not finished: {setting[0]!r} at {setting[1]:g} has {answered} of "
                f"{run.header['num_examples']} examples."
            )
        if any(line["score"] is None for line in lines.get(setting, [])):
            raise ValueError(
                f"the run in {str(run.folder)!r} is not finished: {setting[0]!r} at {setting[1]:g} has no scores yet."
            )


def _require_agreement(measured: Measured, run: Run, key: tuple[str, int], own: list[dict[str, Any]]) -> None:
    for example, line in zip(measured.examples, own, strict=True):
        if (example["index"], example["id"]) != (line["index"], line["id"]):
            raise ValueError(
                f"the run in {str(run.folder)!r} has the example {line['index']} {line['id']!r}, where another run of "
                f"the same data has {example['index']} {example['id']!r}."
            )
    if key not in measured.settings:
        return
    before, now = measured.settings[key], _setting(*key, own)
    for name in ("predictions", "scores", "visual_tokens", "flops"):
        for example, first, second in zip(measured.examples, getattr(before, name), getattr(now, name), strict=True):
            if first != second:
                raise ValueError(
                    f"{key[0]!r} with {key[1]} tokens was answered twice and differs: example {example['id']!r} has "
                    f"{name.removesuffix('s')} {first!r}, and {second!r} in {str(run.folder)!r}."
                )


def _setting(reducer: str, num_keep: int, lines: list[dict[str, Any]]) -> Answered:
    columns = {
        name: np.array([line[name] for line in lines], dtype=np.float64)
        for name in ("score", "visual_tokens", "flops", "ms")
    }
    return Answered(
        *(reducer, num_keep, [], [line["prediction"] for line in lines]),
        *(columns["score"], columns["visual_tokens"], columns["flops"], columns["ms"]),
    )


def report_numbers(measured: Sequence[Measured], against: str | None, title: str, command: str) -> dict[str, Any]:
    """
    Everything that a report says in numbers, as a JSON-ready record.

    Args:
        measured: from [`join_runs`].
        against: the reducer that all others are compared with; `None` is `"adaptive"` where it was measured.
        title, command: of the report.

    Returns:
        `checkpoints`, one for each of `measured`, with `settings` (score, interval, cost, budget, differences),
        `areas` (under the score-FLOPs curves), `unreachable`, `measurements` and `runs`; and `over_checkpoints`, one
        for each data set that several checkpoints were measured on. Their names are as in the runs, with the beginning
        of their hash where two have the same.

    Raises:
        ValueError: if `against` was not measured.
    """
    registered = {row["name"]: row for row in reducer_table()}
    checkpoints = [_checkpoint(one, against, registered) for one in measured]
    _tell_apart_by_hash(checkpoints)
    same_data: dict[tuple[str, str], list[int]] = {}
    for number, one in enumerate(checkpoints):
        same_data.setdefault((one["data_hash"], one["metric"]), []).append(number)
    return {
        "title": title,
        "command": command,
        "num_draws": NUM_DRAWS,
        "seed": SEED,
        "checkpoints": checkpoints,
        "over_checkpoints": [
            _over_checkpoints([checkpoints[number] for number in group])
            | {"beside_first": _beside_first([measured[number] for number in group])}
            for group in same_data.values()
            if len(group) > 1
        ],
    }


def _tell_apart_by_hash(checkpoints: list[dict[str, Any]]) -> None:
    """Different checkpoints of the same name, as `last` of two training runs, get the beginning of their hash."""
    hashes: dict[str, set[str]] = {}
    for one in checkpoints:
        hashes.setdefault(one["checkpoint"], set()).add(one["checkpoint_hash"])
    for one in checkpoints:
        if len(hashes[one["checkpoint"]]) > 1:
            one["checkpoint"] += f" ({one['checkpoint_hash'][:8]})"


def _checkpoint(measured: Measured, against: str | None, registered: dict[str, dict[str, Any]]) -> dict[str, Any]:
    header, settings = measured.header, list(measured.settings.values())
    reducers = list(dict.fromkeys(setting.reducer for setting in settings))
    if not settings:
        raise ValueError(
            f"{measured.runs[0].folder} has no setting that could be measured; there is nothing to report."
        )
    if against is None:
        against = "adaptive" if "adaptive" in reducers else None
    elif against not in reducers:
        raise ValueError(f"`against` is {against!r}; measured were {', '.join(reducers)}.")
    draws = bootstrap_means(np.stack([setting.scores for setting in settings]))
    column = {(setting.reducer, setting.num_keep): draws[:, number] for number, setting in enumerate(settings)}
    rows = [_row(setting, column[setting.reducer, setting.num_keep]) for setting in settings]
    best_controls = _best_controls(rows)
    _compare(rows, measured.settings, column, "against", {row["num_keep"]: against for row in rows})
    _compare(rows, measured.settings, column, "control", best_controls)
    _compare(rows, measured.settings, column, "full", {row["num_keep"]: FULL for row in rows}, header["num_patches"])
    categories = [example["category"] for example in measured.examples]
    _add_categories(rows, measured.settings, np.array(categories, dtype=object), against)
    names = ("checkpoint", "checkpoint_hash", "data", "data_hash", "metric")
    return {name: header[name] for name in (*names, "num_examples", "num_patches", "num_layers")} | {
        "is_share": header["metric"] not in SCORED_TOGETHER,
        "is_binary": all(np.isin(setting.scores, (0, 1)).all() for setting in settings),
        "reducers": reducers,
        "stages": {reducer: _known_of(reducer, registered, "stage") for reducer in reducers},
        "papers": {reducer: _known_of(reducer, registered, "paper") for reducer in reducers},
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


def _known_of(label: str, known: dict[str, dict[str, Any]], column: str) -> str:
    """What the table of registered reducers says of a reducer, or of each in a stack; nothing of those it lacks."""
    # A comma inside brackets belongs to a parameter.
    names = [part.partition(":")[0].strip() for part in re.split(r",(?![^\[]*\])", label)]
    values = [known[name][column] for name in names if name in known]
    return " + ".join(dict.fromkeys(value for value in values if value))


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
    low, high = mean_interval(setting.scores, draws)
    # A question without a picture has no visual tokens, whatever the budget.
    off_by = setting.visual_tokens[setting.visual_tokens > 0] - setting.num_keep
    return {
        "reducer": setting.reducer,
        "num_keep": setting.num_keep,
        "asked": setting.asked,
        "score": float(setting.scores.mean()),
        "low": low,
        "high": high,
        "visual_tokens": float(setting.visual_tokens.mean()),
        "off_by_mean": float(off_by.mean()) if len(off_by) else 0.0,
        "off_by_most": float(np.abs(off_by).max(initial=0.0)),
        "flops": float(setting.flops.mean()),
        "milliseconds": float(np.median(setting.milliseconds)),
    }


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
            row[name] = _difference(settings[own].scores - settings[other].scores, column[own] - column[other])
            row[name]["other"] = other[0]
            compared.append(row[name])
    _correct(compared)


def _difference(differences: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    low, high = interval(draws)
    return {
        "difference": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "p": paired_p_value(differences),
    }


def _correct(compared: list[dict[str, Any]]) -> None:
    for one, corrected in zip(compared, holm([one["p"] for one in compared]), strict=True):
        one["p_holm"] = corrected


def _add_categories(
    rows: list[dict[str, Any]], settings: dict[tuple[str, int], Answered], categories: np.ndarray, against: str | None
) -> None:
    """Puts into each row its score in each category, and there its difference to `against` at the same K."""
    for category in sorted({category for category in categories if category is not None}):
        own = categories == category
        scores = {key: setting.scores[own] for key, setting in settings.items()}
        draws = dict(zip(scores, bootstrap_means(np.stack(list(scores.values()))).T, strict=True))
        for row in rows:
            key, other = (row["reducer"], row["num_keep"]), (against, row["num_keep"])
            low, high = mean_interval(scores[key], draws[key])
            cell = {"score": float(scores[key].mean()), "low": low, "high": high}
            if other in scores and other != key:
                cell["against"] = _difference(scores[key] - scores[other], draws[key] - draws[other])
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
    cost = {name: [float(settings[point].flops.mean()) for point in points] for name, points in curves.items()}
    bounds = common_range(list(cost.values())) if cost else None
    if bounds is None:
        return None
    scores, draws = {}, {}
    for name, points in curves.items():
        weights = area_weights(cost[name], *bounds)
        scores[name] = weights @ np.stack([settings[point].scores for point in points])
        draws[name] = np.stack([column[point] for point in points], axis=1) @ weights
    pairs = [
        {"reducer": one, "other": other} | _difference(scores[one] - scores[other], draws[one] - draws[other])
        for one, other in combinations(curves, 2)
    ]
    _correct(pairs)
    rows = []
    for name in curves:
        low, high = interval(draws[name])
        rows.append({"reducer": name, "area": float(scores[name].mean()), "low": float(low), "high": float(high)})
    return {"low_flops": bounds[0], "high_flops": bounds[1], "rows": rows, "pairs": pairs}


def _over_checkpoints(group: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of what all of several checkpoints measured, and how far they agree on the order of methods."""
    scores = [{(row["reducer"], row["num_keep"]): row["score"] for row in one["settings"]} for one in group]
    common = [key for key in scores[0] if all(key in own for own in scores)]
    areas = [{row["reducer"]: row["area"] for row in one["areas"][0]["rows"]} if one["areas"] else {} for one in group]
    common_areas = [name for name in areas[0] if all(name in own for own in areas)]
    at = {num_keep: [key for key in common if key[1] == num_keep] for num_keep in sorted({key[1] for key in common})}
    return {
        "data": group[0]["data"],
        "data_hash": group[0]["data_hash"],
        "metric": group[0]["metric"],
        "checkpoints": [{"checkpoint": one["checkpoint"], "checkpoint_hash": one["checkpoint_hash"]} for one in group],
        "settings": [
            {"reducer": key[0], "num_keep": key[1]} | _spread([own[key] for own in scores]) for key in common
        ],
        "areas": [{"reducer": name} | _spread([own[name] for own in areas]) for name in common_areas],
        "not_in_all": len(set().union(*scores)) - len(common),
        "agreement": [
            {"num_keep": num_keep, "num_reducers": len(keys)}
            | _agreement([[own[key] for key in keys] for own in scores])
            for num_keep, keys in at.items()
            if len(keys) > 1
        ],
        "area_agreement": _agreement([[own[name] for name in common_areas] for own in areas]),
    }


def _beside_first(group: list[Measured]) -> list[list[dict[str, Any]]]:
    """Of each checkpoint but the first, what its settings score above or below the first's on the same examples."""
    first, compared = group[0], []
    for one in group[1:]:
        common = [key for key in one.settings if key in first.settings]
        scores = np.array([one.settings[key].scores - first.settings[key].scores for key in common])
        rows = [
            {"reducer": key[0], "num_keep": key[1]} | _difference(own, draws)
            for key, own, draws in zip(common, scores, bootstrap_means(scores).T if common else [], strict=True)
        ]
        _correct(rows)
        compared.append(rows)
    return compared


def _spread(values: list[float]) -> dict[str, Any]:
    return {"values": values, "mean": float(np.mean(values)), "lowest": min(values), "highest": max(values)}


def _agreement(orders: list[list[float]]) -> dict[str, Any]:
    """Kendall's tau of every two checkpoints' scores of the same methods."""
    return {"tau": [rank_agreement(first, second) for first, second in combinations(orders, 2)]}
