"""The tables of a report: from numbers to cells."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from ..reducer_table import is_control
from ..settings import FULL
from .blocks import Cell, Table

NOTHING = "–"

# Reducers; of more, a table of all pairs is read by nobody. The numbers are in the JSON file.
MOST_COMPARED_IN_PAIRS = 12


def everything_kept(checkpoint: dict[str, Any]) -> list[str]:
    rows = [row for row in checkpoint["settings"] if row["reducer"] == FULL]
    return [
        f"Everything kept (K = {row['num_keep']}): {_score_cell(row, checkpoint).text}, at "
        f"{_with_unit(row['flops'], 'FLOPs')} an example."
        for row in rows
    ]


# Tables with a row for each reducer and a column for each budget.


def _reduced_budgets(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The budgets that something else than `full` was measured at."""
    measured = {row["num_keep"] for row in checkpoint["settings"] if row["reducer"] != FULL}
    return [budget for budget in checkpoint["budgets"] if budget["num_keep"] in measured]


def _budget_label(budget: dict[str, Any]) -> str:
    """`K = 57 (0.4)`: the number of tokens, and the fractions that were asked for."""
    fractions = [f"{asked:g}" for asked in budget["asked"] if isinstance(asked, float)]
    return f"K = {budget['num_keep']}" + (f" ({', '.join(fractions)})" if fractions else "")


def _by_budget(
    checkpoint: dict[str, Any], caption: str, cell: Callable[[dict[str, Any]], Cell | None], with_stage: bool = False
) -> Table:
    """A row for each reducer, a column for each budget; `cell` says what stands where something was measured."""
    budgets = _reduced_budgets(checkpoint)
    measured = {(row["reducer"], row["num_keep"]): row for row in checkpoint["settings"]}
    rows = []
    for reducer in checkpoint["reducers"]:
        settings = [measured.get((reducer, budget["num_keep"])) for budget in budgets]
        cells = [None if setting is None else cell(setting) for setting in settings]
        if any(cells):
            about = [checkpoint["stages"][reducer], checkpoint["papers"][reducer]] if with_stage else []
            rows.append([named(reducer), *map(Cell, about), *(one or Cell(NOTHING) for one in cells)])
    about = ["stage", "published"] if with_stage else []
    return Table(caption, ["reducer", *about, *map(_budget_label, budgets)], rows)


def named(reducer: str) -> Cell:
    return Cell(f"`{reducer}`" + (" (control)" if is_control(reducer) else ""))


def score_table(checkpoint: dict[str, Any]) -> Table:
    interval = "Wilson" if checkpoint["is_binary"] else "bootstrap"
    caption = f"{score_unit(checkpoint)}, with the 95% interval ({interval}) of each single cell"
    return _by_budget(checkpoint, caption, lambda row: _score_cell(row, checkpoint), with_stage=True)


def score_unit(checkpoint: dict[str, Any]) -> str:
    return f"Mean {checkpoint['metric']}" + (", percent" if checkpoint["is_share"] else "")


def scaled(value: float, checkpoint: dict[str, Any], sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if checkpoint["is_share"] else f"{value:{sign}.3f}"


def _score_cell(row: dict[str, Any], checkpoint: dict[str, Any]) -> Cell:
    ends = f"{scaled(row['low'], checkpoint)} to {scaled(row['high'], checkpoint)}"
    return Cell(f"{scaled(row['score'], checkpoint)} ({ends})", row["score"])


def difference_cell(one: dict[str, Any] | None, checkpoint: dict[str, Any]) -> Cell | None:
    """Bold where the interval leaves out 0, a star where it stays told apart under Holm's correction."""
    if one is None:
        return None
    text = scaled(one["difference"], checkpoint, "+")
    text = f"**{text}**" if one["low"] > 0 or one["high"] < 0 else text
    star = "\\*" if one.get("p_holm", 1.0) < 0.05 else ""
    ends = f"{scaled(one['low'], checkpoint, '+')} to {scaled(one['high'], checkpoint, '+')}"
    return Cell(f"{text}{star} ({ends})", one["difference"])


def difference_blocks(checkpoint: dict[str, Any], name: str) -> list[str | Table]:
    """Differences to `"against"`, to the best `"control"` or to `"full"`."""
    number = sum(name in row for row in checkpoint["settings"])
    if number == 0:
        return []
    others = {
        "against": f"`{checkpoint['against']}` at the same K",
        "control": "the best control at the same K",
        "full": "everything kept",
    }
    text = (
        f"**Bold**: the interval of this one difference leaves out 0. \\*: told apart also after Holm's correction "
        f"for the {number} differences of this table (p below 0.05)."
    )
    if name == "control":
        best = [f"`{one['reducer']}` at K = {one['num_keep']}" for one in checkpoint["best_controls"]]
        text = f"Of the controls that were measured, the best is {', '.join(best)}. {text}"
    caption = f"{score_unit(checkpoint)}: difference to {others[name]}, with its 95% interval (paired bootstrap)"
    return [text, _by_budget(checkpoint, caption, lambda row: difference_cell(row.get(name), checkpoint))]


def adherence_blocks(checkpoint: dict[str, Any]) -> list[str | Table]:
    rows = checkpoint["settings"]
    worst = max(rows, key=lambda row: row["off_by_most"])
    text = (
        f"Visual tokens of an image that a decoder layer really saw, mean over layers, against the K that was asked "
        f"for: in {len(rows)} settings with {checkpoint['num_examples']:,} examples each they differ by at most "
        f"{worst['off_by_most']:.3g} tokens"
    )
    if worst["off_by_most"] == 0:
        return [f"{text}."]
    caption = "Tokens seen minus K: mean over examples, and the largest difference of any example in brackets"
    table = _by_budget(
        checkpoint,
        caption,
        lambda row: Cell(f"{row['off_by_mean']:+.3g} ({row['off_by_most']:.3g})", row["off_by_mean"]),
    )
    return [f"{text} (`{worst['reducer']}`, K = {worst['num_keep']}).", table]


# Tables with a row for each setting.


def cost_table(checkpoint: dict[str, Any]) -> Table:
    unit, divisor = unit_of([row["flops"] for row in checkpoint["settings"]], "FLOPs")
    full = [row["flops"] for row in checkpoint["settings"] if row["reducer"] == FULL]
    share = ["of full, %"] if full else []
    columns = [
        "reducer",
        "K",
        score_unit(checkpoint),
        "visual tokens seen",
        f"{unit} an example",
        *share,
        "ms an answer",
    ]
    rows = [
        [
            named(row["reducer"]),
            Cell(str(row["num_keep"]), row["num_keep"]),
            _score_cell(row, checkpoint),
            Cell(f"{row['visual_tokens']:.1f}", row["visual_tokens"]),
            Cell(f"{row['flops'] / divisor:.3f}", row["flops"]),
            *[Cell(f"{100 * row['flops'] / flops:.1f}", row["flops"] / flops) for flops in full],
            Cell(NOTHING if row["milliseconds"] is None else f"{row['milliseconds']:.1f}", row["milliseconds"]),
        ]
        for row in checkpoint["settings"]
    ]
    caption = "FLOPs are counted, mean over examples; ms is the median over examples, of answering in batches"
    return Table(caption, columns, rows)


def measured_tables(checkpoint: dict[str, Any]) -> list[str | Table]:
    """One table for each device and batch size that something was measured on."""
    rows = checkpoint["measurements"]
    places = dict.fromkeys((row["device"], row["batch_size"]) for row in rows)
    return [
        _measured_table([row for row in rows if (row["device"], row["batch_size"]) == place], *place, checkpoint)
        for place in places
    ]


def _rounded(budget: Any) -> Any:
    """A budget as it was asked for, but for the digits of fractions such as 115/576."""
    return round(budget, 4) if isinstance(budget, float) else budget


def _measured_table(rows: list[dict[str, Any]], device: str, batch_size: int, checkpoint: dict[str, Any]) -> Table:
    settings = {(row["reducer"], asked): row for row in checkpoint["settings"] for asked in row["asked"]}
    peak, peak_divisor = unit_of([row["peak_memory_bytes"] for row in rows], "B")
    kept, kept_divisor = unit_of([row["kv_bytes"] for row in rows], "B")
    columns = ["reducer", "budget", score_unit(checkpoint), "ms to first token", "tokens/s"]
    cells = []
    for row in rows:
        setting = settings.get((row["reducer"], row["budget"]))
        cells.append(
            [
                named(row["reducer"]),
                Cell(json.dumps(_rounded(row["budget"]))),
                Cell(NOTHING) if setting is None else _score_cell(setting, checkpoint),
                _with_quartiles(row, "time_to_first_token_ms"),
                _with_quartiles(row, "tokens_per_second"),
                Cell(f"{row['peak_memory_bytes'] / peak_divisor:.1f}", row["peak_memory_bytes"]),
                Cell(f"{row['kv_bytes'] / kept_divisor:.2f}", row["kv_bytes"]),
            ]
        )
    caption = f"Measured on {device}, batches of {batch_size}: medians, lower to upper quartile"
    return Table(caption, [*columns, f"peak memory, {peak}", f"keys and values, {kept}"], cells)


def _with_quartiles(row: dict[str, Any], name: str) -> Cell:
    return Cell(f"{row[name]:.1f} ({row[f'{name}_low']:.1f} to {row[f'{name}_high']:.1f})", row[name])


def unit_of(values: Sequence[float], unit: str) -> tuple[str, float]:
    """The unit that the largest of the values is written in, as `("GFLOPs", 1e9)`, and what they are divided by."""
    for prefix, divisor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if max(values) >= divisor:
            return prefix + unit, divisor
    return unit, 1.0


def _with_unit(value: float, unit: str) -> str:
    name, divisor = unit_of([value], unit)
    return f"{value / divisor:.3f} {name}"


# Areas, categories, and what is missing.


def area_blocks(checkpoint: dict[str, Any]) -> list[str | Table]:
    blocks = []
    for area in checkpoint["areas"]:
        unit, divisor = unit_of([area["high_flops"]], "FLOPs")
        between = f"{area['low_flops'] / divisor:.3f} to {area['high_flops'] / divisor:.3f} {unit}"
        rows = [
            [named(row["reducer"]), _score_cell(row | {"score": row["area"]}, checkpoint)]
            for row in sorted(area["rows"], key=lambda row: -row["area"])
        ]
        caption = (
            f"{score_unit(checkpoint)}: mean over {between}, which {len(rows)} reducers cover, with 95% intervals"
        )
        blocks.append(Table(caption, ["reducer", "area"], rows))
        if 1 < len(rows) <= MOST_COMPARED_IN_PAIRS:
            blocks.append(_pairs_table(area, [row[0] for row in rows], checkpoint))
    return blocks or ["No range of FLOPs is covered by all reducers with two points or more on their curve."]


def _pairs_table(area: dict[str, Any], names: list[Cell], checkpoint: dict[str, Any]) -> Table:
    """Every reducer's area minus every other's."""
    order = [row["reducer"] for row in sorted(area["rows"], key=lambda row: -row["area"])]
    known = {(pair["reducer"], pair["other"]): pair for pair in area["pairs"]}
    known |= {(pair["other"], pair["reducer"]): _turned(pair) for pair in area["pairs"]}
    rows = [
        [name, *(difference_cell(known.get((own, other)), checkpoint) or Cell("") for other in order)]
        for name, own in zip(names, order, strict=True)
    ]
    caption = (
        f"Area of the row minus that of the column, with 95% intervals; \\*: told apart also after Holm's correction "
        f"for {len(area['pairs'])} pairs"
    )
    return Table(caption, ["reducer", *(f"`{name}`" for name in order)], rows)


def _turned(pair: dict[str, Any]) -> dict[str, Any]:
    return pair | {"difference": -pair["difference"], "low": -pair["high"], "high": -pair["low"]}


def category_tables(checkpoint: dict[str, Any]) -> list[Table]:
    budgets = _reduced_budgets(checkpoint) if checkpoint["categories"] else []
    return [_category_table(checkpoint, budget) for budget in budgets]


def _category_table(checkpoint: dict[str, Any], budget: dict[str, Any]) -> Table:
    """At one budget: a row for each reducer, a column for each category."""
    rows = [row for row in checkpoint["settings"] if row["num_keep"] == budget["num_keep"]]
    cells = []
    for row in rows:
        cells.append([named(row["reducer"])])
        for category in checkpoint["categories"]:
            one = row["categories"][category]
            text = scaled(one["score"], checkpoint)
            difference = difference_cell(one.get("against"), checkpoint)
            cells[-1].append(Cell(f"{text}; {difference.text}" if difference else text, one["score"]))
    caption = f"{_budget_label(budget)}: {score_unit(checkpoint)}"
    if checkpoint["against"] is not None:
        caption += f"; difference to `{checkpoint['against']}`, with its 95% interval, not corrected"
    sizes = [f"{name} ({number:,})" for name, number in checkpoint["categories"].items()]
    return Table(caption, ["reducer", *sizes], cells)


def figure_tables(checkpoint: dict[str, Any]) -> list[str | Table]:
    """F1 beside POPE's accuracy, MME's score, and whatever else a metric has besides the mean of its scores."""
    rows = [row for row in checkpoint["figures"] if "figures" in row]
    blocks: list[str | Table] = []
    for category in dict.fromkeys([None, *(name for row in rows for name in row["by_category"])]):
        own = [(row, row["figures"] if category is None else row["by_category"].get(category)) for row in rows]
        names = list(dict.fromkeys(name for _, figures in own for name in figures or {}))
        cells = [
            [named(row["reducer"]), Cell(f"{row['budget']:g}", row["budget"])]
            + [Cell(f"{figures[name]:.4g}", figures[name]) for name in names]
            for row, figures in own
            if figures
        ]
        if cells:
            caption = f"Figures of {checkpoint['metric']}" + ("" if category is None else f", {category}")
            blocks.append(Table(caption, ["reducer", "budget", *names], cells))
    blocks += [
        f"`{row['reducer']}` at {row['budget']:g}: {row['reason']}" for row in checkpoint["figures"] if "reason" in row
    ]
    return blocks


def unreachable_blocks(checkpoint: dict[str, Any]) -> list[str | Table]:
    budgets: dict[tuple[str, str], list[float]] = {}
    for row in checkpoint["unreachable"]:
        budgets.setdefault((row["reducer"], row["reason"]), []).append(row["budget"])
    if not budgets:
        return ["Every reducer was measured at every budget that was asked for."]
    rows = [
        [named(reducer), Cell(", ".join(f"{budget:g}" for budget in asked)), Cell(reason)]
        for (reducer, reason), asked in budgets.items()
    ]
    return [Table("Settings that were asked for and could not be run", ["reducer", "budgets", "why"], rows)]
