"""Drawing a scene: which digits, where, in which colours, on what clutter."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..splits import random_numbers
from .handwriting import Stamp, digit_instances, shape_stamp
from .scene import (
    COLOUR_VALUES,
    COLOURS,
    SMALLEST_IMAGE_SIZE,
    Box,
    Scene,
    SceneObject,
    relation_distance,
    require_image_size,
)

# All lengths are for a picture of 96 pixels and grow with it, so that a larger picture shows the same kind of scene in
# finer detail.
_SHORTEST_SIDE, _LONGEST_ORDINARY_SIDE, _LONGEST_SIDE = 14.0, 22.0, 30.0
_GAP = 3.0
# How many times longer the largest digit is, at least, than the second largest.
_LARGEST_RATIO = 1.25


def draw_scene(split: str, index: int, seed: int = 0, image_size: int = 96) -> Scene:
    """
    Draws one scene; the same arguments always give the same one.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        index: which scene of the split, 0 or more.
        seed: which of the endless sequences of scenes, 0 or more.
        image_size: side of the square picture in pixels: 96 to 168, a multiple of 8.

    Raises:
        ValueError: if an argument is outside what is allowed.
    """
    require_image_size(image_size)
    rng = random_numbers(split, index, seed)
    stamps = _choose_stamps(split, image_size / SMALLEST_IMAGE_SIZE, rng)
    boxes = _place_boxes([stamp.opacity.shape for stamp in stamps], image_size, rng)
    colours = [COLOURS[number] for number in rng.permutation(len(COLOURS))[: len(stamps)]]
    pixels = _draw_background(image_size, rng)
    objects = []
    for stamp, box, colour in zip(stamps, boxes, colours, strict=True):
        _paint(pixels, stamp.opacity, box, colour, rng)
        objects.append(SceneObject(stamp.digit, colour, box, stamp.instance))
    # The largest digit was placed first; without this the order would tell which it is.
    shuffled = tuple(objects[number] for number in rng.permutation(len(objects)))
    return Scene(Image.fromarray(pixels.astype(np.uint8)), shuffled, index)


def _choose_stamps(split: str, zoom: float, rng: np.random.Generator) -> list[Stamp]:
    """Two to six digits of distinct values, the largest first."""
    digits = rng.permutation(10)[: rng.integers(2, 7)]
    sides = np.sort(np.round(rng.uniform(_SHORTEST_SIDE, _LONGEST_ORDINARY_SIDE, len(digits)) * zoom))[::-1]
    smallest_largest = math.ceil(max(sides[1] * _LARGEST_RATIO, 20 * zoom))
    sides[0] = rng.integers(smallest_largest, round(_LONGEST_SIDE * zoom) + 1)
    pools = digit_instances(split)
    return [
        shape_stamp(pools[digit][rng.integers(len(pools[digit]))], int(digit), int(side), rng)
        for digit, side in zip(digits, sides, strict=True)
    ]


def _place_boxes(shapes: Sequence[tuple[int, ...]], image_size: int, rng: np.random.Generator) -> list[Box]:
    """Disjoint places for digits of the given heights and widths; the first two can be asked about in a relation."""
    gap = _GAP * image_size / SMALLEST_IMAGE_SIZE
    # The boxes need less than half of the picture, so that a dead end is rare and starting afresh soon succeeds.
    while True:
        boxes: list[Box] = []
        for height, width in shapes:
            corners = rng.integers(1, (image_size - width, image_size - height), (24, 2)).tolist()
            candidates = ((left, top, left + width, top + height) for left, top in corners)
            free = next((box for box in candidates if _is_free(box, boxes, gap)), None)
            if free is None:
                break
            boxes.append(free)
        if len(boxes) == len(shapes) and _are_apart(boxes[0], boxes[1], relation_distance(image_size)):
            return boxes


def _is_free(box: Box, others: list[Box], gap: float) -> bool:
    left, top, right, bottom = box
    return all(
        left >= other[2] + gap or other[0] >= right + gap or top >= other[3] + gap or other[1] >= bottom + gap
        for other in others
    )


def _are_apart(first: Box, second: Box, distance: float) -> bool:
    across = abs(first[0] + first[2] - second[0] - second[2]) / 2
    down = abs(first[1] + first[3] - second[1] - second[3]) / 2
    return max(across, down) >= distance


def _muted_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Dark colours close to grey, far from every digit colour: `[count, 3]`, 0 to 255."""
    return rng.uniform(22, 82, (count, 1)) + rng.uniform(-13, 13, (count, 3))


def _draw_background(image_size: int, rng: np.random.Generator) -> np.ndarray:
    """A gradient, lines, rectangles, ellipses and noise, all muted: float32 `[image_size, image_size, 3]`."""
    corners = _muted_colours(rng, 4).reshape(2, 2, 3).astype(np.uint8)
    image = Image.fromarray(corners).resize((image_size, image_size), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    count = int(rng.integers(8, 17))
    fills = [tuple(fill) for fill in _muted_colours(rng, count).astype(int).tolist()]
    shapes = rng.integers(0, 3, count).tolist()
    starts = rng.uniform(-0.1, 1, (count, 2)) * image_size
    ends = starts + rng.uniform(0.05, 0.45, (count, 2)) * image_size
    widths = rng.integers(1, 4, count).tolist()
    rising = rng.random(count) < 0.5
    for number, fill in enumerate(fills):
        (left, top), (right, bottom) = starts[number].tolist(), ends[number].tolist()
        if shapes[number] == 0:
            vertical = (bottom, top) if rising[number] else (top, bottom)
            draw.line((left, vertical[0], right, vertical[1]), fill=fill, width=widths[number])
        elif shapes[number] == 1:
            draw.rectangle((left, top, right, bottom), fill=fill)
        else:
            draw.ellipse((left, top, right, bottom), fill=fill)
    noise = rng.standard_normal((image_size, image_size, 1), dtype=np.float32) * 4
    return np.clip(np.asarray(image, dtype=np.float32) + noise, 0, 255)


def _paint(pixels: np.ndarray, opacity: np.ndarray, box: Box, colour: str, rng: np.random.Generator) -> None:
    """Puts a digit into `pixels` in place, in a shade near its named colour."""
    left, top, right, bottom = box
    shade = np.clip(COLOUR_VALUES[colour] + rng.uniform(-10, 10, 3), 0, 255).astype(np.float32)
    region = pixels[top:bottom, left:right]
    region += opacity[:, :, None] * (shade - region)
