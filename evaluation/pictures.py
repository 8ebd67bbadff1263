"""Pictures: which patches a budget keeps, and what accuracy it costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..modeling.budget.selection import Selection
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration, ReducerSpec
from ..modeling.processing_adavtp import AdaVTPProcessor
from .accuracy import BudgetResult, answer_batch
from .comparison import missing_weights, reason_not_to_measure
from .settings import reducer_label

_DROPPED_BRIGHTNESS = 0.18

# Matplotlib's ten without its grey, which is random choice.
_COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")


def patch_shares(selection: Selection, num_layers: int) -> torch.Tensor:
    """
    How bright a picture shows each patch: the share of decoder layers that see it.

    Where tokens were merged, these are the patches in whose place a token stands; what went into it is not shown.

    Args:
        selection: of `num_images` images.
        num_layers: of the decoder.

    Returns:
        `[num_images, num_patches]` float32 in [0, 1]; 0 or 1 unless a reducer acts inside the decoder.
    """
    return selection.keep.float() if selection.depth is None else selection.depth.float() / num_layers


def draw_kept_patches(image: Image.Image, shares: torch.Tensor, scale: int = 3) -> Image.Image:
    """
    The image with its dropped patches dark.

    Args:
        image: as the model saw it; it is drawn as a square.
        shares: `[num_patches]` in [0, 1] or bool, a square grid row by row: 0 is dropped and dark, 1 is as it was.
        scale: screen pixels for a pixel of the image.

    Returns:
        RGB image, `scale` times as large.

    Raises:
        ValueError: if the patches are not a square grid, or a share is not in [0, 1].
    """
    side = int(len(shares) ** 0.5)
    if side * side != len(shares):
        raise ValueError(f"`shares` has {len(shares)} patches; they have to be a square grid to be drawn on an image.")
    grid = shares.cpu().float().numpy().reshape(side, side)
    if not ((grid >= 0) & (grid <= 1)).all():
        raise ValueError(f"`shares` has values from {grid.min():g} to {grid.max():g}; allowed are 0 to 1.")
    size = (image.width * scale, image.width * scale)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    brightness = _DROPPED_BRIGHTNESS + (1.0 - _DROPPED_BRIGHTNESS) * grid
    mask = Image.fromarray(brightness.astype(np.float32)).resize(size, Image.Resampling.NEAREST)
    return Image.fromarray((pixels * np.asarray(mask)[..., None]).astype(np.uint8))


def image_as_seen(processor: AdaVTPProcessor, pixel_values: torch.Tensor) -> Image.Image:
    """
    The picture that a model was shown: resized and cropped, with normalisation undone.

    Args:
        processor: that made `pixel_values`.
        pixel_values: `[3, height, width]`.
    """
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    pixels = pixel_values.cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return Image.fromarray(pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def save_kept_patches(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    expected: Sequence[str],
    budgets: Sequence[float],
    path: str | Path,
) -> None:
    """
    Writes a picture with a row for each question and a column for each budget: kept patches and the answer.

    Args:
        model: in evaluation mode.
        processor: the model's.
        images, questions, expected: one image, question and right answer for each row.
        budgets: fractions in [0, 1].
        path: of the PNG.
    """
    figure = Figure(figsize=(2.1 * len(budgets), 2.55 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(budgets), squeeze=False)
    for row, (image, question, right) in enumerate(zip(images, questions, expected, strict=True)):
        inputs = processor.of_questions(image, question).to(model.device)
        for column, budget in enumerate(budgets):
            selection = model.select_tokens(
                inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], token_budget=budget
            )
            answer = model.generate(image, question, token_budget=budget, max_new_tokens=4, do_sample=False)
            axis = axes[row, column]
            shares = patch_shares(selection, model.config.text_config.num_hidden_layers)
            axis.imshow(draw_kept_patches(image, shares[0]))
            _label(axis, f"budget {budget:g}, {int(selection.num_keep[0])} tokens" if row == 0 else "", answer, right)
            if column == 0:
                axis.set_ylabel(question.replace(" ?", "?"), fontsize=8, wrap=True)
    figure.savefig(path, dpi=110)


def _label(axis: Axes, title: str, answer: str, expected: str) -> None:
    axis.set_title(title, fontsize=9)
    is_right = answer.strip() == expected
    axis.set_xlabel(
        answer if is_right else f"{answer}  ({expected})", fontsize=10, color="green" if is_right else "red"
    )
    axis.set_xticks([])
    axis.set_yticks([])


def save_accuracy_curve(results: Sequence[BudgetResult], path: str | Path) -> None:
    """
    Writes accuracy against budget, one line for each reducer, with 95% confidence intervals.

    Args:
        results: from [`answer_questions`]. The full budget belongs to every reducer's line; budgets that a reducer
            cannot reach are left out of it.
        path: of the picture; its suffix says the format.
    """
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axis = figure.subplots()
    results = [result for result in results if result.unreachable is None]
    full = [result for result in results if result.budget == 1.0]
    for reducer in dict.fromkeys(result.reducer for result in results):
        own = [result for result in results if result.reducer == reducer and result.budget != 1.0] + full
        own = sorted({result.budget: result for result in own}.values(), key=lambda result: result.budget)
        accuracy = np.array([result.accuracy for result in own])
        below = accuracy - np.array([result.accuracy_low for result in own])
        above = np.array([result.accuracy_high for result in own]) - accuracy
        axis.errorbar(
            [result.budget for result in own],
            100 * accuracy,
            100 * np.stack([below, above]),
            marker="o",
            capsize=3,
            label=reducer,
        )
    axis.set_xlabel("token budget (fraction of visual tokens kept)")
    axis.set_ylabel("accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=130)


def save_gallery(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    image: Image.Image,
    question: str,
    expected: str,
    methods: Mapping[str, str | None],
    reducers: Sequence[ReducerSpec],
    budget: float,
    path: str | Path,
) -> None:
    """
    Writes a picture of what every reducer keeps of one image, with its name, its stage and the answer.

    Args:
        model: in evaluation mode.
        processor: the model's.
        image, question, expected: one question and its right answer.
        methods: for each reducer's label what is written below its name, such as its stage.
        reducers: see [`answer_questions`].
        budget: fraction in [0, 1].
        path: of the PNG.
    """
    inputs = processor.of_questions(image, question).to(model.device)
    seen = image_as_seen(processor, inputs["pixel_values"][0])
    num_columns = 7
    num_rows = -(-(len(reducers) + 1) // num_columns)
    figure = Figure(figsize=(1.75 * num_columns, 2.2 * num_rows + 0.4), layout="constrained")
    figure.suptitle(f"{question.replace(' ?', '?')}  ({expected}) at a budget of {budget:g}", fontsize=11)
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axis in axes[len(reducers) + 1 :]:
        axis.set_axis_off()
    everything = answer_batch(model, processor, inputs, "adaptive", 1.0)[0]
    _draw_cell(axes[0], draw_kept_patches(seen, torch.ones(1)), "the image", everything, expected)
    for axis, reducer in zip(axes[1:], reducers, strict=False):
        title = "\n".join(filter(None, [reducer_label(reducer), methods.get(reducer_label(reducer))]))
        _draw_method(axis, model, processor, inputs, seen, reducer, budget, title, expected)
    figure.savefig(path, dpi=110)


def _draw_method(
    axis: Axes,
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    inputs: Mapping[str, torch.Tensor],
    seen: Image.Image,
    reducer: ReducerSpec,
    budget: float,
    title: str,
    expected: str,
) -> None:
    """One reducer's cell; where it cannot meet the budget, a dark image that says so."""
    num_layers, num_patches = model.config.text_config.num_hidden_layers, model.config.num_patches
    if reason_not_to_measure(model, inputs, reducer, budget) is not None:
        reason = "budget out of reach" if missing_weights(model.config, reducer) is None else "not trained here"
        _draw_cell(axis, draw_kept_patches(seen, torch.zeros(num_patches)), title, reason, None)
        return
    selection = model.select_tokens(**inputs, token_budget=budget, reducer=reducer)
    answer = answer_batch(model, processor, inputs, reducer, budget)[0]
    _draw_cell(axis, draw_kept_patches(seen, patch_shares(selection, num_layers)[0]), title, answer, expected)


def _draw_cell(axis: Axes, picture: Image.Image, title: str, answer: str, expected: str | None) -> None:
    axis.imshow(picture)
    _label(axis, title, answer, answer.strip() if expected is None else expected)
    if expected is None:
        axis.xaxis.label.set_color("grey")


def save_comparison_curves(record: Mapping[str, Any], path: str | Path) -> None:
    """
    Writes accuracy against budget of every measured reducer, one panel for each stage, with 95% intervals.

    Args:
        record: from [`compare_reducers`].
        path: of the picture.
    """
    rows = [row for row in record["settings"] if "accuracy" in row and row["budget"] in record["budgets"]]
    labels = [label for label in record["reducers"] if any(row["reducer"] == label for row in rows)]
    stages = list(dict.fromkeys(record["stages"][label] for label in labels))
    num_columns = min(3, len(stages)) or 1
    num_rows = max(1, -(-len(stages) // num_columns))
    figure = Figure(figsize=(4.8 * num_columns, 4.0 * num_rows), layout="constrained")
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flat)
    for axis in axes[len(stages) :]:
        axis.set_axis_off()
    for axis, stage in zip(axes, stages, strict=False):
        axis.set_title(f"stage: {stage}", fontsize=10)
        # The two that everything is to be compared with are in every panel.
        for label, colour in (("adaptive", "black"), ("random", "grey")):
            if label in labels:
                _draw_line(axis, rows, label, colour, "--" if label == "random" else "-")
        own = [label for label in labels if record["stages"][label] == stage]
        others = [label for label in own if label not in ("adaptive", "random")]
        for number, label in enumerate(others):
            colour = _COLOURS[number % len(_COLOURS)]
            _draw_line(axis, rows, label, colour, "-" if number < len(_COLOURS) else ":")
        axis.set_xlabel("token budget")
        axis.set_ylabel("accuracy, %")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _draw_line(axis: Axes, rows: Sequence[Mapping[str, Any]], label: str, colour: str, style: str) -> None:
    own = sorted((row for row in rows if row["reducer"] == label), key=lambda row: row["budget"])
    accuracy = np.array([row["accuracy"] for row in own])
    below = accuracy - np.array([row["accuracy_low"] for row in own])
    above = np.array([row["accuracy_high"] for row in own]) - accuracy
    axis.errorbar(
        [row["budget"] for row in own],
        100 * accuracy,
        100 * np.stack([below, above]),
        color=colour,
        linestyle=style,
        marker="o",
        markersize=3,
        capsize=2,
        label=label,
    )
