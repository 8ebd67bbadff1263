"""The tables of a report over several checkpoints: mean and spread, agreement, and each beside the first."""

from typing import Any

from .blocks import Cell, Table
from .tables import NOTHING, difference_cell, named, scaled, score_unit


def spread_tables(over: dict[str, Any], first: dict[str, Any]) -> list[Table]:
    """Mean over checkpoints, with the lowest and the highest."""
    number = len(over["checkpoints"])
    cells = {(row["reducer"], row["num_keep"]): row for row in over["settings"]}
    budgets = dict.fromkeys(row["num_keep"] for row in sorted(over["settings"], key=lambda row: row["num_keep"]))
    reducers = dict.fromkeys(row["reducer"] for row in over["settings"])
    rows = [
        [named(name), *(_spread_cell(cells.get((name, num_keep)), first) for num_keep in budgets)] for name in reducers
    ]
    tables = [
        Table(
            f"{score_unit(first)}: mean over {number} checkpoints", ["reducer", *map("K = {}".format, budgets)], rows
        )
    ]
    if over["areas"]:
        rows = [[named(row["reducer"]), _spread_cell(row, first)] for row in over["areas"]]
        tables.append(
            Table("Area under the score-FLOPs curve, each over its checkpoint's range", ["reducer", "area"], rows)
        )
    return tables


def beside_first_blocks(over: dict[str, Any], first: dict[str, Any]) -> list[str | Table]:
    """For each other checkpoint its difference to the first, in the same settings on the same examples."""
    text = (
        "Every other checkpoint minus this one, in the same setting on the same examples. **Bold** and \\* as above. "
        "These intervals are over examples: they say how these checkpoints differ, not how ways to train do."
    )
    tables = []
    for checkpoint, rows in zip(over["checkpoints"][1:], over["beside_first"], strict=True):
        cells = {(row["reducer"], row["num_keep"]): row for row in rows}
        budgets = sorted({row["num_keep"] for row in rows})
        caption = (
            f"`{checkpoint['checkpoint']}` minus `{first['checkpoint']}`; {score_unit(first)}, with 95% intervals"
        )
        body = [
            [named(name), *(difference_cell(cells.get((name, keep)), first) or Cell(NOTHING) for keep in budgets)]
            for name in dict.fromkeys(row["reducer"] for row in rows)
        ]
        tables.append(Table(caption, ["reducer", *map("K = {}".format, budgets)], body))
    return [text, *tables]


def _spread_cell(row: dict[str, Any] | None, checkpoint: dict[str, Any]) -> Cell:
    if row is None:
        return Cell(NOTHING)
    ends = f"{scaled(row['lowest'], checkpoint)} to {scaled(row['highest'], checkpoint)}"
    return Cell(f"{scaled(row['mean'], checkpoint)} ({ends})", row["mean"])


def agreement_table(over: dict[str, Any]) -> Table:
    rows = [(f"K = {row['num_keep']}", row["num_reducers"], row["tau"]) for row in over["agreement"]]
    rows.append(("area", len(over["areas"]), over["area_agreement"]["tau"]))
    cells = []
    for name, number, taus in rows:
        known = [tau for tau in taus if tau is not None]
        text = ", ".join(NOTHING if tau is None else f"{tau:.2f}" for tau in taus)
        cells.append([Cell(name), Cell(str(number), number), Cell(text, min(known, default=None))])
    caption = "Kendall's tau-b of the scores of the same methods, for every two checkpoints: 1 is the same order"
    return Table(caption, ["by", "methods", "tau"], cells)
