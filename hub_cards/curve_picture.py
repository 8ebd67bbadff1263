"""The picture on a model card: what a token budget costs in accuracy, and what it saves.

Every reducer of an evaluation file is a line over the budgets it was measured at, with its 95 % intervals: on the left
against the visual tokens kept, on the right, where the file counts them, against the FLOPs of an answer. What looks at
nothing is grey.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P")
CONTROLS = {"random": "x", "grid": "+", "downsample": "1"}
# The reducer that keeps everything has one setting, which belongs to all lines.
FULL = "full"
NUM_COLOURS_IN_FILE = 64
ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")

STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
}


def save_curve(evaluation: dict[str, Any], path: str | Path) -> None:
    """
    Draws accuracy against cost as a PNG of a few tens of kilobytes. The same evaluation gives the same file.

    Args:
        evaluation: content of an evaluation file; see [`TrainingRecord`].
        path: to write.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = evaluation["rows"]
    costs = ["num_keep"] + ["flops"] * all(row.get("flops") is not None for row in rows)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(costs) + 1.4, 3.0), layout="constrained", dpi=110)
        panels = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
        for axes, cost in zip(panels, costs, strict=True):
            _draw(axes, rows, cost)
        panels[0].set_ylabel(f"{evaluation.get('metric', 'accuracy').replace('_', ' ')}, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    picture = Image.fromarray(pixels).quantize(NUM_COLOURS_IN_FILE, dither=Image.Dither.NONE)
    picture.save(path, format="PNG", optimize=True)


def _draw(axes: "Axes", rows: list[dict[str, Any]], cost: str) -> None:
    """One panel: a line for each reducer, from its smallest budget up to everything kept."""
    scale = 1.0 if cost == "num_keep" else _power_of_thousand(max(row["flops"] for row in rows))
    names = [name for name in dict.fromkeys(row["reducer"] for row in rows) if name != FULL]
    methods = [name for name in names if name not in CONTROLS]
    for name in names:
        style: dict[str, Any] = {"color": "#808080", "linestyle": "--", "marker": CONTROLS.get(name)}
        if name in methods:
            number = methods.index(name)
            # Seven colours and six markers: the pairs come round after 42.
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        points = sorted((row for row in rows if row["reducer"] == name), key=lambda row: row[cost])
        places = [row[cost] / scale for row in points]
        accuracy, low, high = ([100 * row[field] for row in points] for field in ACCURACY)
        axes.plot(places, accuracy, label=name, linewidth=1.2, markersize=4, **style)
        axes.vlines(places, low, high, color=style["color"], linewidth=0.6)
    for row in rows:
        if row["reducer"] == FULL:
            axes.plot(row[cost] / scale, 100 * row["accuracy"], "k*", markersize=8, label="everything kept")
    unit = {1e6: "M", 1e9: "G", 1e12: "T", 1e15: "P"}.get(scale, "")
    axes.set_xlabel("visual tokens kept" if cost == "num_keep" else f"{unit}FLOPs of an answer")
    axes.grid(alpha=0.25, linewidth=0.5)


def _power_of_thousand(value: float) -> float:
    return next((power for power in (1e15, 1e12, 1e9, 1e6) if value >= power), 1.0)
