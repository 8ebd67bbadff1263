"""What several checkpoints measured on the same examples: mean, spread, and what they agree on."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..statistics import rank_agreement
from .blocks import Section, Table
from .findings import listed
from .joined import kept_label
from .paired import Key
from .tables import by_budget, named, scaled, score_unit


def over_checkpoints(checkpoints: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    For each data set that several checkpoints were measured on, the numbers over them.

    Args:
        checkpoints: of [`report_numbers`].
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in checkpoints:
        groups.setdefault((one["data_hash"], one["metric"]), []).append(one)
    return [_over(group) for group in groups.values() if len(group) > 1]


def compared_checkpoints(numbers: dict[str, Any], over: dict[str, Any]) -> list[dict[str, Any]]:
    """The checkpoints that one of `over_checkpoints` is over: those of its data and metric."""
    key = over["data_hash"], over["metric"]
    return [one for one in numbers["checkpoints"] if (one["data_hash"], one["metric"]) == key]


def _over(group: list[dict[str, Any]]) -> dict[str, Any]:
    scores = [{(row["reducer"], row["num_keep"]): row["score"] for row in one["settings"]} for one in group]
    common = [key for key in scores[0] if all(key in own for own in scores)]
    hard = [_hard_scores(one) for one in group]
    common_hard = [key for key in hard[0] if all(key in own for own in hard)]
    areas = [{row["reducer"]: row["area"] for row in one["areas"][0]["rows"]} if one["areas"] else {} for one in group]
    common_areas = [name for name in areas[0] if all(name in own for own in areas)]
    orders = [[own[name] for name in common_areas] for own in areas]
    return {
        "data": group[0]["data"],
        "data_hash": group[0]["data_hash"],
        "metric": group[0]["metric"],
        "checkpoints": [{"checkpoint": one["checkpoint"], "checkpoint_hash": one["checkpoint_hash"]} for one in group],
        "settings": [
            {"reducer": key[0], "num_keep": key[1]} | _spread([own[key] for own in scores]) for key in common
        ],
        "hard_settings": [
            {"reducer": key[0], "num_keep": key[1]} | _spread([own[key] for own in hard]) for key in common_hard
        ],
        "areas": [{"reducer": name} | _spread([own[name] for own in areas]) for name in common_areas],
        "not_in_all": len(set().union(*scores)) - len(common),
        "area_agreement": {"tau": [rank_agreement(first, second) for first, second in combinations(orders, 2)]},
    }


def _hard_scores(checkpoint: dict[str, Any]) -> dict[Key, float]:
    """Scores on the hard subsets, by reducer and the subset's number of kept tokens."""
    subsets = [one for one in checkpoint["hard_subsets"] if one["by"]]
    return {(row["reducer"], one["num_keep"]): row["score"] for one in subsets for row in one["settings"]}


def _spread(values: list[float]) -> dict[str, Any]:
    return {"values": values, "mean": float(np.mean(values)), "lowest": min(values), "highest": max(values)}


def agreement_of_checkpoints(over: dict[str, Any], checkpoints: Sequence[dict[str, Any]]) -> list[str]:
    """
    What several checkpoints agree on, in sentences.

    Args:
        over: one of [`over_checkpoints`].
        checkpoints: those that it is over.

    Returns:
        Which methods are told apart from the one they are compared with in every checkpoint, to the same
        side; and how far the checkpoints agree on the order of methods.
    """
    against, lines = checkpoints[0]["against"], []
    for num_keep in dict.fromkeys(row["num_keep"] for row in over["settings"]):
        own = [_side_of_each(checkpoint, num_keep) for checkpoint in checkpoints]
        for side in ("above", "below"):
            names = [name for name in own[0] if all(sides.get(name) == side for sides in own)]
            if names:
                text = f"{kept_label(num_keep)}: {side} `{against}` in each of the {len(checkpoints)} checkpoints"
                lines.append(f"{text}, each time by its own interval: {listed(names)}.")
        named = dict.fromkeys(name for sides in own for name in sides)
        opposite = [name for name in named if {"above", "below"} <= {sides.get(name) for sides in own}]
        if opposite:
            text = f"{kept_label(num_keep)}: above `{against}` in one checkpoint and below it in another"
            lines.append(f"{text}: {listed(opposite)}.")
    taus = [tau for tau in over["area_agreement"]["tau"] if tau is not None]
    if taus:
        text = f"Order of {len(over['areas'])} methods by area: Kendall's tau between two checkpoints is "
        lines.append(text + (f"{taus[0]:.2f}." if len(taus) == 1 else f"{min(taus):.2f} to {max(taus):.2f}."))
    return lines


def _side_of_each(checkpoint: dict[str, Any], num_keep: int | float) -> dict[str, str]:
    """Of every reducer at one K, on which side of `against` it is told apart, if it is."""
    compared = [row for row in checkpoint["settings"] if row["num_keep"] == num_keep and "against" in row]
    above = {row["reducer"]: "above" for row in compared if row["against"]["low"] > 0}
    return above | {row["reducer"]: "below" for row in compared if row["against"]["high"] < 0}


def over_checkpoints_sections(over: dict[str, Any], checkpoints: Sequence[dict[str, Any]]) -> list[Section]:
    """The sections about it; see [`agreement_of_checkpoints`]."""
    first, number = checkpoints[0], len(checkpoints)
    names = ", ".join(f"`{one['checkpoint']}`" for one in over["checkpoints"])
    about = (
        f"{number} checkpoints on {over['data']}: {names}. Mean over them, lowest and highest in brackets: a spread, "
        "not an interval; so few checkpoints give none."
    )
    missing = [f"{over['not_in_all']} settings were not measured for all."] if over["not_in_all"] else []

    def cell(row: dict[str, Any]) -> str:
        mean, lowest, highest = (scaled(row[name], first) for name in ("mean", "lowest", "highest"))
        return f"{mean} ({lowest} to {highest})"

    tables = [by_budget(f"{score_unit(first)}: mean over {number} checkpoints", over["settings"], cell)]
    if hard := over.get("hard_settings"):
        tables.append(
            by_budget(f"{score_unit(first)}: the same, each on its checkpoint's own hard subset", hard, cell)
        )
    if over["areas"]:
        rows = [[named(row["reducer"]), cell(row)] for row in over["areas"]]
        caption = "Area under the score-FLOPs curve, each over its checkpoint's range"
        tables.append(Table(caption, ["reducer", "area"], rows))
    agreed = agreement_of_checkpoints(over, checkpoints)
    return [
        Section(f"Over checkpoints: {over['data']}", 2, [about]),
        *([Section("What they agree on", 3, [agreed])] if agreed else []),
        Section("Mean and spread", 3, [*missing, *tables]),
    ]
