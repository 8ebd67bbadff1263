"""The tables of a report: from numbers to cells."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..reducer_table import is_control
from ..settings import FULL
from .blocks import Block, Table
from .joined import kept_label

NOTHING = "–"


def everything_kept(checkpoint: dict[str, Any]) -> list[str]:
    rows = [row for row in checkpoint["settings"] if row["reducer"] == FULL]
    return [
        f"Everything kept ({kept_label(row['num_keep'])}): {_score_cell(row, checkpoint)}, "
        + ("FLOPs not counted." if row["flops"] is None else f"at {_with_unit(row['flops'], 'FLOPs')} an example.")
        for row in rows
    ]


# Tables with a row for each reducer and a column for each budget.


def by_budget(
    caption: str,
    settings: Iterable[Mapping[str, Any]],
    cell: Callable[[Mapping[str, Any]], str | None],
    budgets: Sequence[Mapping[str, Any]] = (),
    about: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """
    A row for each reducer, a column for each number K of kept tokens.

    Args:
        caption: of the table.
        settings: `reducer`, `num_keep` and more of each.
        cell: what stands where a setting was measured; `None` for nothing.
        budgets: `num_keep`, and under `asked` the fractions that were asked for, which stand beside it.
        about: what stands behind a reducer's name, under `stage` and `published`.
    """
    cells = {(row["reducer"], row["num_keep"]): text for row in settings if (text := cell(row)) is not None}
    counts, labels = sorted({num_keep for _, num_keep in cells}), {one["num_keep"]: _label(one) for one in budgets}
    rows = [
        [named(reducer), *(about[reducer] if about else []), *(cells.get((reducer, keep), NOTHING) for keep in counts)]
        for reducer in dict.fromkeys(reducer for reducer, _ in cells)
    ]
    headings = ["reducer", *(["stage", "published"] if about else [])]
    return Table(caption, headings + [labels.get(keep, kept_label(keep)) for keep in counts], rows)


def _label(budget: Mapping[str, Any]) -> str:
    """`K = 57 (0.4)`: the number of tokens, and the fractions that were asked for."""
    num_keep, label = budget["num_keep"], kept_label(budget["num_keep"])
    fractions = [f"{asked:g}" for asked in budget["asked"] if isinstance(asked, float)]
    return label if not fractions or isinstance(num_keep, float) else f"{label} ({', '.join(fractions)})"


def named(reducer: str) -> str:
    return f"`{reducer}`" + (" (control)" if is_control(reducer) else "")


def _reduced(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in checkpoint["settings"] if row["reducer"] != FULL]


def score_table(checkpoint: dict[str, Any]) -> Table:
    interval = "Wilson" if checkpoint["is_binary"] else "bootstrap"
    return by_budget(
        f"{score_unit(checkpoint)}, with the 95% interval ({interval}) of each single cell",
        _reduced(checkpoint),
        lambda row: _score_cell(row, checkpoint),
        checkpoint["budgets"],
        {name: [stage, checkpoint["papers"][name]] for name, stage in checkpoint["stages"].items()},
    )


def score_unit(checkpoint: dict[str, Any]) -> str:
    return f"Mean {checkpoint['metric']}" + (", percent" if checkpoint["is_share"] else "")


def scaled(value: float, checkpoint: dict[str, Any], sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if checkpoint["is_share"] else f"{value:{sign}.3f}"


def _score_cell(row: Mapping[str, Any], checkpoint: dict[str, Any]) -> str:
    score, low, high = (scaled(row[name], checkpoint) for name in ("score", "low", "high"))
    return f"{score} ({low} to {high})"


def difference_cell(one: Mapping[str, Any] | None, checkpoint: dict[str, Any]) -> str | None:
    """Bold where the interval leaves out 0, a star where it stays told apart under Holm's correction."""
    if one is None:
        return None
    text, low, high = (scaled(one[name], checkpoint, "+") for name in ("difference", "low", "high"))
    text = f"**{text}**" if one["low"] > 0 or one["high"] < 0 else text
    star = "\\*" if one.get("p_holm", 1.0) < 0.05 else ""
    return f"{text}{star} ({low} to {high})"


def difference_blocks(checkpoint: dict[str, Any], name: str) -> list[Block]:
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
        best = [f"`{one['reducer']}` at {kept_label(one['num_keep'])}" for one in checkpoint["best_controls"]]
        text = f"Of the controls that were measured, the best is {', '.join(best)}. {text}"
    caption = f"{score_unit(checkpoint)}: difference to {others[name]}, with its 95% interval (paired bootstrap)"
    cell = lambda row: difference_cell(row.get(name), checkpoint)  # noqa: E731
    return [text, by_budget(caption, _reduced(checkpoint), cell, checkpoint["budgets"])]


# Tables with a row for each setting.


def cost_table(checkpoint: dict[str, Any]) -> Table:
    counted = [row["flops"] for row in checkpoint["settings"] if row["flops"] is not None]
    unit, divisor = unit_of(counted or [0.0], "FLOPs")
    full = [row["flops"] for row in checkpoint["settings"] if row["reducer"] == FULL and counted]
    share = ["of full, %"] if full else []
    rows = [
        [
            named(row["reducer"]),
            f"{row['num_keep']:g}",
            f"{row['visual_tokens']:.1f}",
            NOTHING if row["flops"] is None else f"{row['flops'] / divisor:.3f}",
            *[NOTHING if row["flops"] is None else f"{100 * row['flops'] / flops:.1f}" for flops in full],
            NOTHING if row["milliseconds"] is None else f"{row['milliseconds']:.1f}",
        ]
        for row in checkpoint["settings"]
    ]
    caption = "FLOPs are counted, mean over examples; ms is the median over examples, of answering in batches"
    if not counted:
        caption = "FLOPs are not counted, since images differ in size; ms is the median over examples, in batches"
    asked = "K" if checkpoint["num_patches"] is not None else "budget"
    return Table(caption, ["reducer", asked, "visual tokens seen", f"{unit} an example", *share, "ms an answer"], rows)


def budgets_kept(checkpoint: dict[str, Any]) -> str:
    rows = checkpoint["settings"]
    if checkpoint["num_patches"] is None:
        return (
            "Images differ in how many visual tokens they have: the table has those of a whole prompt that a decoder "
            "layer really saw, mean over layers and examples."
        )
    worst = max(rows, key=lambda row: row["off_by_most"])
    where = f" (`{worst['reducer']}`, K = {worst['num_keep']})" if worst["off_by_most"] else ""
    return (
        f"Visual tokens of an image that a decoder layer really saw, mean over layers, against the K that was asked "
        f"for: in {len(rows)} settings with {checkpoint['num_examples']:,} examples each they differ by at most "
        f"{worst['off_by_most']:.3g} tokens{where}."
    )


def measured_tables(checkpoint: dict[str, Any]) -> list[Block]:
    """One table for each device and batch size that something was measured on."""
    rows = checkpoint["measurements"]
    places = dict.fromkeys((row["device"], row["batch_size"]) for row in rows)
    return [
        _measured_table([row for row in rows if (row["device"], row["batch_size"]) == place], *place)
        for place in places
    ]


def _measured_table(rows: list[dict[str, Any]], device: str, batch_size: int) -> Table:
    peak, peak_divisor = unit_of([row["peak_memory_bytes"] for row in rows], "B")
    kept, kept_divisor = unit_of([row["kv_bytes"] for row in rows], "B")
    columns = [
        "reducer",
        "budget",
        "ms to first token",
        "tokens/s",
        f"peak memory, {peak}",
        f"keys and values, {kept}",
    ]
    cells = [
        [
            named(row["reducer"]),
            # As it was asked for, but for the digits of fractions such as 115/576.
            json.dumps(round(row["budget"], 4) if isinstance(row["budget"], float) else row["budget"]),
            _with_quartiles(row, "time_to_first_token_ms"),
            _with_quartiles(row, "tokens_per_second"),
            f"{row['peak_memory_bytes'] / peak_divisor:.1f}",
            f"{row['kv_bytes'] / kept_divisor:.2f}",
        ]
        for row in rows
    ]
    return Table(f"Measured on {device}, batches of {batch_size}: medians, lower to upper quartile", columns, cells)


def _with_quartiles(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.1f} ({row[f'{name}_low']:.1f} to {row[f'{name}_high']:.1f})"


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


def area_blocks(checkpoint: dict[str, Any]) -> list[Block]:
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
    return blocks or ["No range of FLOPs is covered by all reducers with two points or more on their curve."]


def category_tables(checkpoint: dict[str, Any]) -> list[Block]:
    """For each budget a row for each reducer, a column for each category."""
    counts = {row["num_keep"] for row in _reduced(checkpoint)} if checkpoint["categories"] else set()
    return [_category_table(checkpoint, budget) for budget in checkpoint["budgets"] if budget["num_keep"] in counts]


def _category_table(checkpoint: dict[str, Any], budget: dict[str, Any]) -> Table:
    cells = []
    for row in checkpoint["settings"]:
        if row["num_keep"] == budget["num_keep"]:
            own = [row["categories"][category] for category in checkpoint["categories"]]
            pairs = [
                (scaled(one["score"], checkpoint), difference_cell(one.get("against"), checkpoint)) for one in own
            ]
            cells.append([named(row["reducer"]), *("; ".join(filter(None, pair)) for pair in pairs)])
    caption = f"{_label(budget)}: {score_unit(checkpoint)}"
    if checkpoint["against"] is not None:
        caption += f"; difference to `{checkpoint['against']}`, with its 95% interval, not corrected"
    sizes = [f"{name} ({number:,})" for name, number in checkpoint["categories"].items()]
    return Table(caption, ["reducer", *sizes], cells, folded=True)


def figure_tables(checkpoint: dict[str, Any]) -> list[Block]:
    """F1 beside POPE's accuracy, MME's score, and whatever else a metric has besides the mean of its scores."""
    rows = [row for row in checkpoint["figures"] if "figures" in row]
    blocks: list[Block] = []
    for category in dict.fromkeys([None, *(name for row in rows for name in row["by_category"])]):
        own = [(row, row["figures"] if category is None else row["by_category"].get(category)) for row in rows]
        names = list(dict.fromkeys(name for _, figures in own for name in figures or {}))
        cells = [
            [named(row["reducer"]), f"{row['budget']:g}", *(f"{figures[name]:.4g}" for name in names)]
            for row, figures in own
            if figures
        ]
        if cells:
            caption = f"Figures of {checkpoint['metric']}" + ("" if category is None else f", {category}")
            blocks.append(Table(caption, ["reducer", "budget", *names], cells))
    return blocks + [
        f"`{row['reducer']}` at {row['budget']:g}: {row['reason']}" for row in checkpoint["figures"] if "reason" in row
    ]


def unreachable_blocks(checkpoint: dict[str, Any]) -> list[Block]:
    budgets: dict[tuple[str, str], list[float]] = {}
    for row in checkpoint["unreachable"]:
        budgets.setdefault((row["reducer"], row["reason"]), []).append(row["budget"])
    if not budgets:
        return ["Every reducer was measured at every budget that was asked for."]
    rows = [
        [named(reducer), ", ".join(f"{budget:g}" for budget in asked), reason]
        for (reducer, reason), asked in budgets.items()
    ]
    return [Table("Settings that were asked for and could not be run", ["reducer", "budgets", "why"], rows)]
