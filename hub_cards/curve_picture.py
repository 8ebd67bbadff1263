"""The picture on a model card: what a token budget costs in accuracy, and what it saves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

NUM_COLOURS_IN_FILE = 64


def save_curve(evaluation: Mapping[str, Any], path: str | Path) -> None:
    """
    Draws accuracy against cost as a PNG of a few tens of kilobytes. The same evaluation gives the same file.

    Args:
        evaluation: content of an evaluation file; see [`TrainingRecord`].
        path: to write.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from ..evaluation.report.curves import STYLE, curves_figure, curves_of_evaluation

    with mpl.rc_context(STYLE):
        canvas = FigureCanvasAgg(curves_figure([curves_of_evaluation(evaluation)]))
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    picture = Image.fromarray(pixels).quantize(NUM_COLOURS_IN_FILE, dither=Image.Dither.NONE)
    picture.save(path, format="PNG", optimize=True)
