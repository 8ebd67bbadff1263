"""What a reducer is shown of an image."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from .tower import TowerAttention

# Fields with one entry for each image, whatever its number of tokens.
BY_IMAGE = (
    "cls",
    "budget",
    "question",
    "question_ids",
    "question_tokens",
    "is_question_token",
    "pixel_values",
    "fingerprint",
    "sample",
    "unit",
    "grids",
    "frames",
)


OF_DEVICE = (
    "patches",
    "positions",
    "tower_patches",
    "cls",
    "budget",
    "question",
    "question_ids",
    "question_tokens",
    "is_question_token",
    "pixel_values",
)


@dataclass
class Question:
    """
    The text that asks about each unit of a call, in those forms that somebody wants.

    Attributes:
        mean: `[num_units, text_hidden_size]`, its mean embedding.
        ids: `[num_units, sequence]` int64, its ids, -1 in all other columns.
        tokens: `[num_units, longest question, text_hidden_size]`, its embeddings one by one.
        is_token: `[num_units, longest question]` bool, false in front of shorter ones.
    """

    mean: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    is_token: torch.Tensor | None = None


@dataclass
class NativeDial:
    """
    The dial that a family's model has of its own, on the units of one call.

    Attributes:
        grids: for each unit, by setting, the rows and columns in which its tokens would stand.
        encode: what a setting makes of the units of some numbers: tokens `[num_tokens, hidden_size]` of each.
    """

    grids: list[dict[str, tuple[int, int]]]
    encode: Callable[[str, list[int]], list[torch.Tensor]]


@dataclass
class VisionFeatures:
    """
    Images as a reducer sees them. Only `patches` and `positions` are always there; the rest is there if the reducer
    `needs` it.

    Attributes:
        patches: `[num_images, num_tokens, hidden_size]`, the tokens to choose from: the tower's patch features (with
            several feature layers, side by side), or at stage `"projector"` their projections.
        positions: `[num_images, num_tokens]` int64, ascending: the patch of the image that each token stands for.
            `0, 1, ..., N - 1` unless another reducer came before.
        cls: `[num_images, 1, hidden_size]`, the tower's CLS token; at stage `"projector"` its projection.
        tower_patches: `[num_images, num_tokens, tower's feature width]`, at stage `"projector"` what the tokens were
            before their projection.
        budget: `[num_images, tower's hidden_size]`, the budget as it came out of its meeting with the image.
        question: `[num_images, text_hidden_size]`, the mean embedding of the text of the prompt that shows the image.
        question_ids: `[num_images, sequence]` int64, the ids of that text, -1 in all other columns.
        question_tokens: `[num_images, longest question, text_hidden_size]`, the embeddings of that text one by one.
        is_question_token: `[num_images, longest question]` bool, false in front of shorter texts; with
            `question_tokens`.
        pixel_values: `[num_images, channels, height, width]`.
        fingerprint: `[num_images]` int64 on the CPU, a number that depends on an image's pixels alone.
        attention: of the tower layers that the reducer's `attention_layers` names.
        sample: `[num_images]` int64, the prompt that each image belongs to.
        unit: `[num_images]` int64 on the CPU, the number of each image among the units of the call.
        native: the family's own dial on the units of the call.
        num_patches: N of a whole image, of the largest where they differ.
        grids: `[num_images, 2]` int64 on the CPU, rows and columns in which the N patches of each image stand; by
            default those of a square.
        frames: `[num_images]` int64 on the CPU, the frames of each, whose grids stand one below the other; by default
            all are images.
    """

    patches: torch.Tensor
    positions: torch.Tensor
    cls: torch.Tensor | None = None
    tower_patches: torch.Tensor | None = None
    budget: torch.Tensor | None = None
    question: torch.Tensor | None = None
    question_ids: torch.Tensor | None = None
    question_tokens: torch.Tensor | None = None
    is_question_token: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    fingerprint: torch.Tensor | None = None
    attention: dict[int, TowerAttention] = field(default_factory=dict)
    sample: torch.Tensor | None = None
    unit: torch.Tensor | None = None
    native: NativeDial | None = None
    num_patches: int = 0
    grids: torch.Tensor | None = None
    frames: torch.Tensor | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the whole images; those of one call of a reducer all have the same."""
        if self.grids is not None and len(self.grids):
            rows, columns = self.grids[0].tolist()
            return rows, columns
        side = math.isqrt(self.num_patches)
        return side, side

    @property
    def frame_size(self) -> int:
        """Tokens of a whole frame; those of one call of a reducer all have the same."""
        rows, columns = self.grid
        return rows * columns // (1 if self.frames is None else int(self.frames[0]))

    def to(self, device: torch.device) -> "VisionFeatures":
        """On another device, but for what is always on the CPU."""
        tensors = {name: getattr(self, name) for name in OF_DEVICE if getattr(self, name) is not None}
        attention = {layer: view.to(device) for layer, view in self.attention.items()}
        return replace(self, attention=attention, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def images(self, rows: torch.Tensor, num_tokens: int) -> "VisionFeatures":
        """Only the images at `rows`, of which each has `num_tokens` tokens; columns behind those are cut off."""
        return replace(
            self,
            patches=self.patches[rows, :num_tokens],
            positions=self.positions[rows, :num_tokens],
            tower_patches=None if self.tower_patches is None else self.tower_patches[rows, :num_tokens],
            attention={layer: attention.images(rows, num_tokens) for layer, attention in self.attention.items()},
            **{name: None if getattr(self, name) is None else getattr(self, name)[rows] for name in BY_IMAGE},
        )


def fingerprint(pixels: torch.Tensor) -> int:
    """
    A number that depends on an image's pixels alone. It is the sum of their bit patterns, which is exact, so that it
    does not depend on the order of addition.
    """
    return int(pixels.float().contiguous().view(torch.int32).long().sum())
