"""The digits of a scene as somebody wrote them, in the shape and size in which they are drawn.

The handwriting is scikit-learn's ``load_digits``: 1797 pictures of 8 x 8 pixels, installed with the library. They are
divided between the splits: a digit seen in training is never shown in validation or test, in any size or colour.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from ..splits import split_number

# Where the shares of train and validation end; the rest is test.
_SPLIT_ENDS = (0.7, 0.8)


@dataclass(frozen=True)
class Stamp:
    """One digit ready to be drawn. `opacity` `[height, width]` is from 0 to 1."""

    digit: int
    instance: int
    opacity: np.ndarray


@cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    pictures, digits = load_digits(return_X_y=True)
    return pictures.reshape(-1, 8, 8), digits


@cache
def digit_instances(split: str) -> tuple[tuple[int, ...], ...]:
    """
    Which handwritten digits a split may draw. Of every digit value, 70 % of the pictures belong to train, 10 % to
    validation and 20 % to test; no seed changes that.

    Args:
        split: `"train"`, `"validation"` or `"test"`.

    Returns:
        Ten tuples, one per digit value, of indices into scikit-learn's `load_digits`.

    Raises:
        ValueError: if the split is unknown.
    """
    part, (_, digits) = split_number(split), _handwriting()
    order = np.random.default_rng(0).permutation(len(digits))
    pools = []
    for digit in range(10):
        instances = order[digits[order] == digit]
        ends = (0, *(round(end * len(instances)) for end in _SPLIT_ENDS), None)
        pools.append(tuple(instances[ends[part] : ends[part + 1]].tolist()))
    return tuple(pools)


@cache
def _picture_and_ink(instance: int) -> tuple[Image.Image, np.ndarray]:
    """A handwritten digit with an empty margin, and the places `[2, num_pixels]` of its ink."""
    # The margin lets the interpolation run out to nothing on every side.
    picture = np.pad(_handwriting()[0][instance], 2)
    rows, columns = np.nonzero(picture >= 4)
    image = Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8))
    return image, np.stack([columns, rows]) + 0.5


def shape_stamp(instance: int, digit: int, side: int, rng: np.random.Generator) -> Stamp:
    """Turns, stretches and enlarges a handwritten digit so that the longer side of its ink is `side` pixels."""
    image, ink = _picture_and_ink(instance)
    angle = math.radians(rng.uniform(-12, 12))
    stretch = rng.uniform(0.88, 1.12)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shape = turn * [[stretch, stretch], [1, 1]]
    places = shape @ ink
    # The ink of a pixel reaches somewhat past the pixel's middle, to each side.
    corner = places.min(axis=1) - 0.7
    extent = places.max(axis=1) + 0.7 - corner
    scale = side / extent.max()
    width, height = (int(length) for length in np.round(extent * scale))
    # Pillow asks where in the source each drawn pixel comes from, hence the inverse.
    inverse = np.linalg.inv(shape)
    (a, b), (d, e) = inverse / scale
    c, f = inverse @ corner
    drawn = image.transform((width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC)
    # Enlarging eight pixels blurs them. The steeper slope brings the edges back, and starting it late keeps the small
    # loops of a 6 or an 8 open.
    return Stamp(digit, instance, np.clip(np.asarray(drawn, dtype=np.float32) * (2.1 / 255) - 0.55, 0, 1))
