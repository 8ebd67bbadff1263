"""Pictures of what was kept: the image with its dropped patches dark, and grids of these drawn from a run."""

from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..modeling.budget.selection import Selection
from .reducer_table import known_of_label, reducer_table
from .runs import Answer, Run, setting_of
from .settings import FULL

_DROPPED_BRIGHTNESS = 0.18
_GALLERY_COLUMNS = 7


def patch_shares(selection: Selection, num_layers: int) -> torch.Tensor:
    """
    How bright a picture shows each patch: the share of decoder layers that see it.

    Where tokens were merged, these are the patches in whose place a token stands; what went into it is not shown.

    Returns:
        `[num_images, num_patches]` float32 in [0, 1]; 0 or 1 unless a reducer acts inside the decoder.
    """
    return selection.keep.float() if selection.depth is None else selection.depth.float() / num_layers


def draw_kept_patches(
    image: Image.Image, shares: torch.Tensor, scale: int = 3, grid_size: tuple[int, int] | None = None
) -> Image.Image:
    """
    The image with its dropped patches dark.

    Args:
        image: as the model saw it; without a `grid_size` it is drawn as a square.
        shares: `[num_patches]` in [0, 1] or bool, a grid row by row: 0 is dropped and dark, 1 is as it was.
        scale: screen pixels for a pixel of the image.
        grid_size: rows and columns of patches; by default they are a square grid.

    Returns:
        RGB image, `scale` times as large.

    Raises:
        ValueError: if the patches are not such a grid, or a share is not in [0, 1].
    """
    height = image.width if grid_size is None else image.height
    side = int(len(shares) ** 0.5)
    rows, columns = grid_size or (side, side)
    if rows * columns != len(shares):
        form = "a square grid" if grid_size is None else f"{rows} rows of {columns}"
        raise ValueError(f"`shares` has {len(shares)} patches; they have to be {form} to be drawn on an image.")
    grid = shares.cpu().float().numpy().reshape(rows, columns)
    if not ((grid >= 0) & (grid <= 1)).all():
        raise ValueError(f"`shares` has values from {grid.min():g} to {grid.max():g}; allowed are 0 to 1.")
    size = (image.width * scale, height * scale)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    brightness = _DROPPED_BRIGHTNESS + (1.0 - _DROPPED_BRIGHTNESS) * grid
    mask = Image.fromarray(brightness.astype(np.float32)).resize(size, Image.Resampling.NEAREST)
    return Image.fromarray((pixels * np.asarray(mask)[..., None]).astype(np.uint8))


def why_not_drawn(selection: Selection) -> str | None:
    """Why what was kept of a prompt's one image cannot be drawn on it; `None` if it can."""
    if len(selection.sizes) == 1 and selection.grids is not None:
        return None
    return f"It came in {len(selection.sizes)} parts, tiles or views, whose places on it are not known here."


def _draw(axis: Axes, picture: Image.Image, above: str, below: str, colour: str) -> None:
    axis.imshow(picture)
    axis.set_title(above, fontsize=9)
    axis.set_xlabel(below, fontsize=10, color=colour)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_answer(axis: Axes, run: Run, answer: Answer, above: str) -> None:
    """What was kept, and below it the answer, green if it is right and else red, with the right ones."""
    right, picture = "" if answer.score else f"  ({', '.join(answer.answers)})", Image.open(run.picture(answer.index))
    # What was kept of the parts of a picture is not drawn.
    if run.header["num_patches"] is not None:
        picture = draw_kept_patches(picture, torch.tensor(answer.layers_seen) / run.header["num_layers"])
    _draw(axis, picture, above, answer.prediction + right, "green" if answer.score else "red")


def save_kept_patches(run: Run, reducer: str, num_examples: int, path: str | Path) -> None:
    """
    Writes a picture with a row for each of a run's first examples and a column for each budget: what a reducer kept,
    and the answer.

    Args:
        run: with pictures of so many examples.
        reducer: as on the command line; where everything is kept it is `"full"`.
        path: of the PNG.
    """
    settings = [entry for entry in run.header["settings"] if entry["reducer"] in (FULL, reducer)]
    answers = run.answers_of_settings()
    figure = Figure(figsize=(2.1 * len(settings), 2.55 * num_examples), layout="constrained")
    for index, row in enumerate(figure.subplots(num_examples, len(settings), squeeze=False)):
        for axis, entry in zip(row, settings, strict=True):
            tokens = "" if entry["num_keep"] is None else f", {entry['num_keep']} tokens"
            above = f"budget {entry['budget']:g}{tokens}" if index == 0 else ""
            _draw_answer(axis, run, answers[setting_of(entry)][index], above)
        question = answers[setting_of(settings[0])][index].question
        row[0].set_ylabel(question.replace(" ?", "?"), fontsize=8, wrap=True)
    figure.savefig(path, dpi=110)


def save_gallery(run: Run, budget: float | int, path: str | Path, index: int = 0) -> None:
    """
    Writes a picture of what every reducer keeps of one image at one budget, with its name, its stage and the answer;
    where a reducer could not be run, a dark image.

    Args:
        run: with `"full"`.
        budget: as it was asked for.
        path: of the PNG.
        index: of the example.
    """
    table, answers = reducer_table(), run.answers_of_settings()
    refused = {setting_of(entry): entry["reason"] for entry in run.header["unreachable"]}
    keys = [key for key in [*answers, *refused] if key[1] == budget and key[0] != FULL]
    order = {row["name"]: place for place, row in enumerate(table)}
    keys.sort(key=lambda key: (key[0] != "adaptive", order.get(key[0].partition(":")[0], len(order))))
    everything = next(own for (reducer, _), own in answers.items() if reducer == FULL)[index]
    num_rows = -(-(1 + len(keys)) // _GALLERY_COLUMNS)
    figure = Figure(figsize=(1.75 * _GALLERY_COLUMNS, 2.2 * num_rows + 0.4), layout="constrained")
    right = ", ".join(everything.answers)
    figure.suptitle(f"{everything.question.replace(' ?', '?')}  ({right}) at a budget of {budget:g}", fontsize=11)
    first, *axes = figure.subplots(num_rows, _GALLERY_COLUMNS, squeeze=False).flat
    _draw_answer(first, run, everything, "the image")
    dark = draw_kept_patches(Image.open(run.picture(index)), torch.zeros(1))
    for axis, key in zip_longest(axes, keys):
        if key is None:
            axis.set_axis_off()
            continue
        above = "\n".join(filter(None, [key[0], known_of_label(key[0], table, "stage")]))
        if key in refused:
            below = "not trained here" if "trained" in refused[key] else "budget out of reach"
            _draw(axis, dark, above, below, "grey")
        else:
            _draw_answer(axis, run, answers[key][index], above)
    figure.savefig(path, dpi=110)
