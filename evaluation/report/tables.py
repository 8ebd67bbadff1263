"""The tables of a report: from numbers to cells."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..metric_modules import SCORED_TOGETHER
from ..reducer_table import is_control
from ..settings import FULL, TOKENS
from .blocks import Block, Table
from .findings import hard_subset_at
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
    labels: Mapping[int | float, str] | None = None,
    about: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """
    A row for each reducer, a column for each number K of kept tokens.

    Args:
        caption: of the table.
        settings: `reducer`, `num_keep` and more of each.
        cell: what stands where a setting was measured; `None` for nothing.
        labels: of the columns, where [`kept_label`] does not say all.
        about: what stands behind a reducer's name, under `stage` and `published`.
    """
    cells = {(row["reducer"], row["num_keep"]): text for row in settings if (text := cell(row)) is not None}
    counts = sorted({num_keep for _, num_keep in cells})
    rows = [
        [named(reducer), *(about[reducer] if about else []), *(cells.get((reducer, keep), NOTHING) for keep in counts)]
        for reducer in dict.fromkeys(reducer for reducer, _ in cells)
    ]
    headings = ["reducer", *(["stage", "published"] if about else [])]
    return Table(caption, headings + [(labels or {}).get(keep, kept_label(keep)) for keep in counts], rows)


def _labels(checkpoint: dict[str, Any]) -> dict[int | float, str]:
    return {one["num_keep"]: _label(one) for one in checkpoint["budgets"]}


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
        _labels(checkpoint),
        {name: [stage, checkpoint["papers"][name]] for name, stage in checkpoint["stages"].items()},
    )


def hard_tables(checkpoint: dict[str, Any]) -> list[Block]:
    """The same of the hard subset, with everything kept in the first row; nothing where there is no subset."""
    caption = f"On the hard subset: {score_unit(checkpoint)}, with the 95% interval of each single cell"
    return _on_hard_subset(caption, checkpoint, lambda row: _score_cell(row, checkpoint))


def _on_hard_subset(
    caption: str, checkpoint: dict[str, Any], cell: Callable[[Mapping[str, Any]], str | None]
) -> list[Block]:
    """A table whose columns have the share of questions that are in the subset, with its interval."""
    labels, rows = _labels(checkpoint), []
    for num_keep in labels:
        if subset := hard_subset_at(checkpoint, num_keep):
            share, low, high = (f"{100 * subset[name]:.1f}" for name in ("share", "low", "high"))
            labels[num_keep] += f": {share}% ({low} to {high}) of questions"
            rows += [row | {"num_keep": num_keep} for row in subset["settings"]]
    table = by_budget(caption, rows, cell, labels)
    return [table] if table.rows else []


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
    hard = [one for one in checkpoint.get("hard_subsets", []) if one.get("settings")]
    if on_hard := sum(name in row for one in hard for row in one["settings"]):
        text += f" On the hard subset it is for the {on_hard} there."
    if name == "control":
        best = _at_each_budget((one["reducer"], one["num_keep"]) for one in checkpoint["best_controls"])
        best += _at_each_budget(((one["best_control"], one["num_keep"]) for one in hard), "; on the hard subset ")
        text = f"Of the controls that were measured, the best is {best}. {text}"
    caption = f"{score_unit(checkpoint)}: difference to {others[name]}, with its 95% interval (paired bootstrap)"
    cell = lambda row: difference_cell(row.get(name), checkpoint)  # noqa: E731
    table = by_budget(caption, _reduced(checkpoint), cell, _labels(checkpoint))
    return [text, table, *_on_hard_subset(f"On the hard subset: {caption}", checkpoint, cell)]


def _at_each_budget(reducers: Iterable[tuple[str | None, int | float]], before: str = "") -> str:
    places = [f"`{reducer}` at {kept_label(num_keep)}" for reducer, num_keep in reducers if reducer is not None]
    return before + ", ".join(places) if places else ""


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
        why = "A budget of compute comes to another number of visual tokens"
        if checkpoint.get("dial", TOKENS) == TOKENS:
            why = "Images differ in how many visual tokens they have"
        return f"{why}: the table has what a decoder layer really saw of a prompt, mean over layers and examples."
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
    """For each budget a row for everything kept and for each reducer, a column for each category and its metric."""
    counts = {row["num_keep"] for row in _reduced(checkpoint)} if checkpoint["categories"] else set()
    return [_category_table(checkpoint, budget) for budget in checkpoint["budgets"] if budget["num_keep"] in counts]


def _category_table(checkpoint: dict[str, Any], budget: dict[str, Any]) -> Table:
    rows = [row for row in checkpoint["settings"] if row["reducer"] == FULL or row["num_keep"] == budget["num_keep"]]
    columns = _category_columns(checkpoint)
    cells = [[named(row["reducer"]), *(_category_cell(cell_of(row)) for cell_of in columns.values())] for row in rows]
    caption = f"{_label(budget)}: {score_unit(checkpoint)}, with its 95% interval"
    if checkpoint["against"] is not None:
        caption += f"; where there is one, difference to `{checkpoint['against']}` with its own, not corrected"
    return Table(caption, ["reducer", *columns], cells, folded=True)


def categories_in_short(checkpoint: dict[str, Any]) -> list[Block]:
    """One table of all settings: a row for each reducer at each budget, a column for each category and its metric."""
    columns = _category_columns(checkpoint)
    if not columns:
        return []
    rows = sorted(checkpoint["settings"], key=lambda row: (row["reducer"] != FULL, row["num_keep"]))
    cells = [
        [named(row["reducer"]), f"{row['num_keep']:g}"]
        + [scaled(cell["score"], about) for cell, about in (cell_of(row) for cell_of in columns.values())]
        for row in rows
    ]
    asked = "K" if checkpoint["num_patches"] is not None else "budget"
    caption = f"By kind of question: {score_unit(checkpoint)}; intervals are in the part's own tables"
    return [Table(caption, ["reducer", asked, *columns], cells, folded=True)]


# A row's score in a category, and what says whether that is a share.
_CategoryCell = tuple[Mapping[str, Any], Mapping[str, Any]]


def _category_columns(checkpoint: dict[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], _CategoryCell]]:
    """Headings, and what stands below: a category's score, and behind it the score by its own metric if it has one."""
    columns = {}
    for name, number in checkpoint["categories"].items():
        columns[f"{name} ({number:,})"] = lambda row, name=name: (row["categories"][name], checkpoint)
        metric = checkpoint["settings"][0]["categories"][name].get("metric", {}).get("name")
        if metric is not None:
            about = {"is_share": metric not in SCORED_TOGETHER}
            columns[f"{name}, {metric}"] = lambda row, name=name, about=about: (
                row["categories"][name]["metric"],
                about,
            )
    return columns


def _category_cell(found: _CategoryCell) -> str:
    cell, checkpoint = found
    return "; ".join(filter(None, [_score_cell(cell, checkpoint), difference_cell(cell.get("against"), checkpoint)]))


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
