"""What several checkpoints measured on the same examples: mean, spread, and how far they agree."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ..statistics import bootstrap_means, correct, difference, rank_agreement
from .joined import Measured


def over_checkpoints(measured: Sequence[Measured], checkpoints: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    For each data set that several checkpoints were measured on, the numbers over them.

    Args:
        measured, checkpoints: the same in the same order, as answers and as numbers.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for number, one in enumerate(checkpoints):
        groups.setdefault((one["data_hash"], one["metric"]), []).append(number)
    return [
        _over([checkpoints[number] for number in group])
        | {"beside_first": _beside_first([measured[number] for number in group])}
        for group in groups.values()
        if len(group) > 1
    ]


def _over(group: list[dict[str, Any]]) -> dict[str, Any]:
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
        scores = np.array([one.settings[key].column("score") - first.settings[key].column("score") for key in common])
        rows = [
            {"reducer": key[0], "num_keep": key[1]} | difference(own, draws)
            for key, own, draws in zip(common, scores, bootstrap_means(scores).T if common else [], strict=True)
        ]
        correct(rows)
        compared.append(rows)
    return compared


def _spread(values: list[float]) -> dict[str, Any]:
    return {"values": values, "mean": float(np.mean(values)), "lowest": min(values), "highest": max(values)}


def _agreement(orders: list[list[float]]) -> dict[str, Any]:
    """Kendall's tau of every two checkpoints' scores of the same methods."""
    return {"tau": [rank_agreement(first, second) for first, second in combinations(orders, 2)]}
