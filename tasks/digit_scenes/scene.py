"""What a digit scene is: a picture with digits on it, and what its patches show."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..splits import is_whole

COLOUR_VALUES: dict[str, tuple[int, int, int]] = {
    "red": (238, 32, 36),
    "orange": (255, 142, 20),
    "yellow": (250, 238, 50),
    "green": (40, 205, 60),
    "cyan": (50, 230, 235),
    "blue": (45, 95, 255),
    "magenta": (240, 60, 225),
    "white": (248, 248, 248),
}
"""The eight digit colours, as red, green and blue out of 255."""

COLOURS: tuple[str, ...] = tuple(COLOUR_VALUES)
"""Colour names; a colour's place here is its index in the patch labels."""

# Labels of a patch that no digit covers.
BACKGROUND_DIGIT, BACKGROUND_COLOUR = 10, len(COLOURS)
_PATCH_COVERAGE = 0.2

SMALLEST_IMAGE_SIZE, LARGEST_IMAGE_SIZE = 96, 168
# How far apart two digits' middles are that a relation is asked of, in a picture of 96 pixels.
_RELATION_DISTANCE = 8.0

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SceneObject:
    """
    One digit of a scene.

    Attributes:
        digit: its value, 0 to 9.
        colour: its colour's name, one of `COLOURS`.
        box: left, top, right and bottom in whole pixels; right and bottom are exclusive.
        instance: which of scikit-learn's 1797 handwritten digits it is.
    """

    digit: int
    colour: str
    box: Box
    instance: int

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box: x to the right, y downwards, in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def side(self) -> int:
        """The longer side of the box in pixels; "largest" compares this."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)


@dataclass(frozen=True)
class Scene:
    """
    A picture and what is on it.

    Attributes:
        image: the RGB picture, `image_size` pixels square.
        objects: its two to six digits, in no meaningful order.
        index: its place in its split.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    index: int


def patch_labels(scene: Scene, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """
    A patch belongs to the digit whose box covers most of it, provided that the box covers a fifth of it. Boxes rather
    than ink, so that the inside of a 0 counts as part of the 0.

    Args:
        patch_size: side of the square patches in pixels; it must divide the picture's side.

    Returns:
        Digits, 0 to 9 or `BACKGROUND_DIGIT`, and colours, indices into `COLOURS` or `BACKGROUND_COLOUR`: int64
        `[num_patches]`, row by row from the top left.

    Raises:
        ValueError: if `patch_size` does not divide the picture's side.
    """
    side = scene.image.width
    if not is_whole(patch_size) or patch_size < 1 or side % patch_size:
        raise ValueError(f"patch_size is {patch_size}; allowed are the whole divisors of the picture's side, {side}")
    starts = np.arange(0, side, patch_size)
    boxes = np.array([item.box for item in scene.objects])
    across = np.minimum(boxes[:, 2:3], starts + patch_size) - np.maximum(boxes[:, 0:1], starts)
    down = np.minimum(boxes[:, 3:4], starts + patch_size) - np.maximum(boxes[:, 1:2], starts)
    covered = (down.clip(0)[:, :, None] * across.clip(0)[:, None, :]).reshape(len(boxes), -1)
    owner = np.where(covered.max(axis=0) >= _PATCH_COVERAGE * patch_size**2, covered.argmax(axis=0), len(boxes))
    digits = np.array([item.digit for item in scene.objects] + [BACKGROUND_DIGIT])
    colours = np.array([COLOURS.index(item.colour) for item in scene.objects] + [BACKGROUND_COLOUR])
    return digits[owner], colours[owner]


def relation_distance(image_size: int) -> float:
    """How many pixels two digits' middles are apart, at least, for one to be left of or above the other."""
    return _RELATION_DISTANCE * image_size / SMALLEST_IMAGE_SIZE


def require_image_size(image_size: int) -> None:
    """Raises `ValueError` for a size in which no scene can be drawn."""
    if not is_whole(image_size) or image_size not in range(SMALLEST_IMAGE_SIZE, LARGEST_IMAGE_SIZE + 1, 8):
        raise ValueError(
            f"image_size is {image_size!r}; allowed are multiples of 8 from {SMALLEST_IMAGE_SIZE} to"
            f" {LARGEST_IMAGE_SIZE}"
        )
