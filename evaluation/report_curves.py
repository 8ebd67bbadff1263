"""The curves of a report: score against counted FLOPs, and against the number of tokens kept, with 95% intervals.

What looks at nothing is drawn in dashed grey in every panel, so that no method is seen without it. A few methods share
one panel; many are spread over panels by the stage at which they act. A method is known by colour and marker together,
in colours that colour-blind readers can tell apart (Okabe and Ito).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import unit_of
from .report_numbers import CONTROLS, FULL, is_control

ONE_PANEL = 8
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
AGAINST_COLOUR = "#D55E00"
CONTROL_COLOUR = "#808080"
CONTROL_MARKERS = dict(zip(CONTROLS, ("x", "+", "1"), strict=True))

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


def save_curves(numbers: dict[str, Any], folder: Path) -> None:
    """
    Writes `curves.png` and `curves.svg`.

    Args:
        numbers: from [`report_numbers`]. Every checkpoint has two rows of panels.
        folder: that exists.
    """
    with mpl.rc_context(STYLE):
        figure = _figure(numbers["checkpoints"])
        figure.savefig(folder / "curves.png", dpi=160)
        figure.savefig(folder / "curves.svg", transparent=True, metadata=dict.fromkeys(_SVG_METADATA))


_SVG_METADATA = ("Creator", "Date", "Format", "Type")


def _figure(checkpoints: Sequence[dict[str, Any]]) -> Figure:
    panels = _panels(checkpoints)
    few = len(panels) == 1
    num_rows, num_columns = (len(checkpoints), 2) if few else (2 * len(checkpoints), len(panels))
    width, height = (5.2, 4.0) if few else (3.5, 3.1)
    figure = Figure(figsize=(width * num_columns, height * num_rows + (0.9 if few else 2.0)), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, sharey="row")
    for number, checkpoint in enumerate(checkpoints):
        own = axes[[number]] if few else axes[2 * number : 2 * number + 2]
        places = [(own[0][0], own[0][1])] if few else list(zip(*own, strict=True))
        for (by_flops, by_tokens), (stage, methods) in zip(places, panels.items(), strict=True):
            _draw(by_flops, checkpoint, methods, "flops")
            _draw(by_tokens, checkpoint, methods, "num_keep")
            if stage:
                by_flops.set_title(f"stage: {stage}", fontsize=10)
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
    unit, divisor = unit_of([row["flops"] for row in checkpoint["settings"]], "FLOPs")
    if cost == "num_keep":
        divisor = 1.0
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
    below = [score - end for score, end in zip(scores, low, strict=True)]
    above = [end - score for score, end in zip(scores, high, strict=True)]
    bars = {"color": style["color"], "linestyle": "none", "linewidth": 0.9, "alpha": 0.6}
    axis.errorbar(places, scores, [below, above], elinewidth=0.9, capsize=0, zorder=1.2, **bars)
