"""Pictures of what was kept, the image with its dropped patches dark; grids of these from a run; and of what ran."""

from itertools import product, zip_longest
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..modeling.decoder.execution_plan import ExecutionPlan
from ..modeling.vision.shown_image import WHOLE, ShownImage
from .reducer_table import known_of_label, reducer_table
from .runs import Answer, Run, setting_of
from .settings import FULL

# Pixels.
_HEIGHT = 288
_GALLERY_COLUMNS = 7


def _picture(run: Run, answer: Answer) -> Image.Image:
    """The picture of an answer's example with what was not kept of it dark."""
    shown, grids = run.shown_image(answer.index)
    sizes = [rows * columns for rows, columns in grids]
    if len(answer.layers_seen or []) != sum(sizes):
        return shown.image
    shares = (torch.tensor(answer.layers_seen) / run.header["num_layers"]).split(sizes)
    return shown.drawn([own.reshape(grid) for own, grid in zip(shares, grids, strict=True)], _HEIGHT)


def _draw(axis: Axes, picture: Image.Image, above: str, below: str, colour: str) -> None:
    axis.imshow(picture)
    axis.set_title(above, fontsize=9)
    axis.set_xlabel(below, fontsize=10, color=colour)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_answer(axis: Axes, run: Run, answer: Answer, above: str) -> None:
    """What was kept, and below it the answer, green if it is right and else red, with the right ones."""
    right = "" if answer.score else f"  ({', '.join(answer.answers)})"
    _draw(axis, _picture(run, answer), above, answer.prediction + right, "green" if answer.score else "red")


def save_plan(plan: ExecutionPlan, path: str | Path, number: int = 0) -> None:
    """
    Draws what ran of a decoder: a row for each layer, from the first at the bottom, with a cell for each attention
    head and, to the right, for each group of MLP channels; lit where it ran.

    Args:
        plan: with one row or several.
        path: of the picture.
        number: of the plan's row.
    """
    tables = {"attention heads": plan.heads[number], "groups of MLP channels": plan.mlp_groups[number]}
    widths = [table.shape[-1] for table in tables.values()]
    figure = Figure(figsize=(1.5 + 0.22 * sum(widths), 1.0 + 0.25 * len(plan.layers[number])), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=widths, sharey=True)
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        ran = table & plan.layers[number, :, None]
        axis.pcolormesh(ran.float(), cmap="cividis", vmin=0, vmax=1, edgecolors="white", linewidth=1)
        axis.set_xlabel(name, fontsize=9)
        axis.set_xticks([])
    axes[0].set_ylabel("layer", fontsize=9)
    axes[0].set_yticks([place + 0.5 for place in range(len(table))], [str(place) for place in range(len(table))])
    figure.savefig(path, dpi=150)


def where_methods_differ(run: Run) -> int:
    """
    Of the examples whose pictures a run has, the first on which it matters most what chooses: at as many budgets as on
    no other, one reducer's answer is right and another's wrong. Those that are answered wrongly with everything kept
    come last.
    """
    answers = run.answers_of_settings()

    def order(index: int) -> tuple[bool, int]:
        scores: dict[float | int, set[float]] = {}
        for (reducer, budget), own in answers.items():
            scores.setdefault(FULL if reducer == FULL else budget, set()).add(own[index].score)
        return max(scores.pop(FULL, {0.0})) > 0, sum(len(own) > 1 for own in scores.values())

    return max(range(run.header["shown"]), key=order)


def save_kept_patches(run: Run, index: int, path: str | Path) -> None:
    """
    Writes a picture of one example: the image, the question and the answer with everything kept; beside it a row for
    each reducer and a column for each budget, with what was kept and the answer, green if it is right and else red.

    Args:
        run: with `"full"`, and every other reducer at the same budgets.
        index: of an example whose picture the run has.
        path: of the PNG.
    """
    answers = {key: own[index] for key, own in run.answers_of_settings().items()}
    everything = next(answer for (reducer, _), answer in answers.items() if reducer == FULL)
    rows = list(dict.fromkeys(reducer for reducer, _ in answers if reducer != FULL))
    budgets = list(dict.fromkeys(budget for reducer, budget in answers if reducer != FULL))
    figure = Figure(figsize=(2.1 * (len(budgets) + 2), 2.45 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(len(rows), 1 + len(budgets), width_ratios=[2, *[1] * len(budgets)])
    figure.suptitle(everything.question.replace(" ?", "?"), fontsize=12)
    _draw_answer(figure.add_subplot(grid[:, 0]), run, everything, "everything kept" + _tokens(everything))
    for (row, reducer), (column, budget) in product(enumerate(rows), enumerate(budgets, start=1)):
        answer, axis = answers[reducer, budget], figure.add_subplot(grid[row, column])
        _draw_answer(axis, run, answer, f"budget {budget:g}{_tokens(answer)}" if row == 0 else "")
        axis.set_ylabel(reducer if column == 1 else "", fontsize=10)
    figure.savefig(path, dpi=110)


def _tokens(answer: Answer) -> str:
    return "" if answer.num_keep is None else f", {answer.num_keep} tokens"


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
    dark = ShownImage(run.shown_image(index)[0].image, [WHOLE]).drawn([torch.zeros(1, 1)])
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
