"""Curves: score against counted FLOPs, and against the number of tokens kept, with 95% intervals.

Reports, model cards and the demo draw with these. Where FLOPs are not known there is the second panel alone.

What looks at nothing is drawn in dashed grey in every panel, so that no method is seen without it. A few methods share
one panel; many are spread over panels by the stage at which they act. A method is known by colour and marker together,
in colours that colour-blind readers can tell apart (Okabe and Ito).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..metric_modules import SCORED_TOGETHER
from ..reducer_table import CONTROLLER, CONTROLS, is_control
from ..settings import FULL
from .tables import unit_of

ONE_PANEL = 8
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
AGAINST_COLOUR = "#D55E00"
CONTROL_COLOUR = "#808080"
CONTROL_MARKERS = dict(zip(CONTROLS, ("x", "+", "1", "2"), strict=True))

# Text stays text in SVG; the salt and the missing date make the same report the same file.
STYLE = {
    "svg.hashsalt": "adavtp",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


_SVG_METADATA = ("Creator", "Date", "Format", "Type")


def save_curves(checkpoints: Sequence[dict[str, Any]], *paths: Path) -> None:
    """
    Writes the curves; the same numbers give the same files.

    Args:
        checkpoints: of [`report_numbers`], or from [`curves_of_evaluation`]. Each has a row of panels, or two.
        paths: of the pictures, PNG or SVG.
    """
    with mpl.rc_context(STYLE):
        figure = curves_figure(checkpoints)
        for path in paths:
            if path.suffix == ".svg":
                figure.savefig(path, transparent=True, metadata=dict.fromkeys(_SVG_METADATA))
            else:
                figure.savefig(path, dpi=160)


def curves_of_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """
    What `evaluation.json` says, in the form of a report's checkpoint as far as curves need it; older files have no
    FLOPs, or no `"full"`.
    """
    names = {"score": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}
    settings = [dict(row) | {name: row[own] for name, own in names.items()} for row in evaluation["rows"]]
    differ = any(row["num_keep"] is None for row in settings)
    for row in settings if differ else []:
        row["num_keep"] = row["budget"]
    reducers = list(dict.fromkeys(row["reducer"] for row in settings))
    return {
        "metric": evaluation.get("metric", "accuracy"),
        "is_share": evaluation.get("metric") not in SCORED_TOGETHER,
        "reducers": reducers,
        "stages": dict.fromkeys(reducers, ""),
        "against": CONTROLLER if CONTROLLER in reducers else None,
        "num_patches": None if differ else max(row["num_keep"] for row in settings),
        "settings": settings,
    }


def curves_figure(checkpoints: Sequence[dict[str, Any]]) -> Figure:
    """The curves as a figure; see [`save_curves`]."""
    counted = all(row.get("flops") is not None for one in checkpoints for row in one["settings"])
    # Where images differ in how many tokens they have, the mean that was seen stands for K.
    tokens = "num_keep" if all(one["num_patches"] is not None for one in checkpoints) else "visual_tokens"
    costs = ["flops", tokens] if counted else [tokens]
    panels = _panels(checkpoints)
    few = len(panels) == 1
    rows, columns = (1, len(costs)) if few else (len(costs), len(panels))
    width, height = (5.2, 4.0) if few else (3.5, 3.1)
    size = (width * columns, height * rows * len(checkpoints) + (0.9 if few else 2.0))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows * len(checkpoints), columns, squeeze=False, sharey="row")
    for number, checkpoint in enumerate(checkpoints):
        own = axes[rows * number : rows * (number + 1)]
        for place, (stage, methods) in enumerate(panels.items()):
            for axis, cost in zip(own[0] if few else own[:, place], costs, strict=True):
                _draw(axis, checkpoint, methods, cost)
            if stage:
                own[0][place].set_title(f"stage: {stage}", fontsize=10)
        about = f"{checkpoint['checkpoint']}\n{checkpoint['data']}\n" if len(checkpoints) > 1 else ""
        unit = checkpoint["metric"].replace("_", " ") + (", %" if checkpoint["is_share"] else "")
        for axis in own[:, 0]:
            axis.set_ylabel(about + unit)
    _legends(figure, axes[-1], [name for own in panels.values() for name in own], few)
    return figure


def _legends(figure: Figure, axes: Sequence[Axes], methods: Sequence[str], few: bool) -> None:
    """What every panel shows is explained once, methods below their own panels, or all together where they are few."""
    entries = [dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)) for axis in axes]
    shared = {label: handle for label, handle in entries[0].items() if few or label not in methods}
    figure.legend(shared.values(), shared.keys(), loc="outside lower center", ncols=5, fontsize=8)
    for axis, own in zip(axes, [] if few else entries, strict=False):
        own = {label: handle for label, handle in own.items() if label in methods}
        where = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 1 + (len(own) > 1)}
        axis.legend(own.values(), own.keys(), fontsize=8, columnspacing=1.0, handlelength=1.8, **where)


def _panels(checkpoints: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The methods of each panel: all in one where they are few, else those of a stage."""
    stages = {name: stage for one in checkpoints for name, stage in one["stages"].items()}
    against = {one["against"] for one in checkpoints}
    methods = [name for name in stages if name not in against | {FULL} and not is_control(name)]
    if len(methods) <= ONE_PANEL:
        return {"": methods}
    panels: dict[str, list[str]] = {}
    for name in methods:
        panels.setdefault(stages[name] or "own reducers", []).append(name)
    return panels


def _draw(axis: Axes, checkpoint: dict[str, Any], methods: Sequence[str], cost: str) -> None:
    """One panel: its methods, and what every panel shows."""
    unit, divisor = unit_of([row[cost] for row in checkpoint["settings"]], "FLOPs") if cost == "flops" else ("", 1.0)
    for name in filter(is_control, checkpoint["reducers"]):
        style = {"color": CONTROL_COLOUR, "linestyle": "--", "linewidth": 1.1, "markersize": 6, "zorder": 1.5}
        marker = CONTROL_MARKERS[name.partition(":")[0]]
        _draw_curve(axis, checkpoint, name, cost, divisor, label=f"{name} (control)", marker=marker, **style)
    for number, name in enumerate(methods):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        style["linestyle"] = "-" if number < len(COLOURS) else "-."
        _draw_curve(axis, checkpoint, name, cost, divisor, label=name, linewidth=1.3, markersize=4, **style)
    if checkpoint["against"] is not None and not is_control(checkpoint["against"]):
        style = {"color": AGAINST_COLOUR, "linewidth": 2.4, "marker": "o", "markersize": 5, "zorder": 3}
        _draw_curve(axis, checkpoint, checkpoint["against"], cost, divisor, label=checkpoint["against"], **style)
    for row in checkpoint["settings"]:
        if row["reducer"] == FULL:
            scale = 100 if checkpoint["is_share"] else 1
            style = {"color": CONTROL_COLOUR, "linestyle": "none", "markersize": 10, "markerfacecolor": "none"}
            axis.plot(
                row[cost] / divisor, scale * row["score"], marker="*", label="everything kept", zorder=4, **style
            )
            axis.axhline(scale * row["score"], color=CONTROL_COLOUR, linewidth=0.8, linestyle=":", zorder=1)
    tokens = "visual tokens of a prompt, mean"
    if cost == "num_keep":
        tokens = f"visual tokens kept, of {checkpoint['num_patches']}"
    axis.set_xlabel(f"{unit} an example" if cost == "flops" else tokens)


def _draw_curve(
    axis: Axes, checkpoint: dict[str, Any], reducer: str, cost: str, divisor: float, label: str, **style: Any
) -> None:
    """A line through a reducer's settings by cost, and dotted on to everything kept; bars are intervals."""
    rows = sorted((row for row in checkpoint["settings"] if row["reducer"] == reducer), key=lambda row: row[cost])
    if not rows:
        return
    scale = 100 if checkpoint["is_share"] else 1
    places = [row[cost] / divisor for row in rows]
    scores, low, high = ([scale * row[name] for row in rows] for name in ("score", "low", "high"))
    axis.plot(places, scores, label=label, **style)
    full = [row for row in checkpoint["settings"] if row["reducer"] == FULL]
    if full and all(row["num_keep"] != full[0]["num_keep"] for row in rows):
        end = [places[-1], full[0][cost] / divisor], [scores[-1], scale * full[0]["score"]]
        axis.plot(*end, color=style["color"], linestyle=":", linewidth=0.8, alpha=0.6, zorder=1.1)
    axis.vlines(places, low, high, color=style["color"], linewidth=0.9, alpha=0.6, zorder=1.2)
