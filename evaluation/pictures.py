"""Pictures: which patches a budget keeps, and what accuracy it costs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from .accuracy import BudgetResult

_DROPPED_BRIGHTNESS = 0.18


def draw_kept_patches(image: Image.Image, keep: torch.Tensor, scale: int = 3) -> Image.Image:
    """
    The image with its dropped patches dark.

    Args:
        image: as the model saw it; it is drawn as a square.
        keep: `[num_patches]` bool, a square grid row by row.
        scale: screen pixels for a pixel of the image.

    Returns:
        RGB image, `scale` times as large.

    Raises:
        ValueError: if the patches are not a square grid.
    """
    side = int(len(keep) ** 0.5)
    if side * side != len(keep):
        raise ValueError(f"`keep` has {len(keep)} patches; they have to be a square grid to be drawn on an image.")
    size = (image.width * scale, image.width * scale)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    brightness = np.where(keep.cpu().numpy().reshape(side, side), 1.0, _DROPPED_BRIGHTNESS).astype(np.float32)
    mask = Image.fromarray(brightness).resize(size, Image.Resampling.NEAREST)
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
            axis.imshow(draw_kept_patches(image, selection.keep[0]))
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
        results: from [`answer_questions`]. The full budget belongs to every reducer's line.
        path: of the picture; its suffix says the format.
    """
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axis = figure.subplots()
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
