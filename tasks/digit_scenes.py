"""Digit scenes: a small visual question answering task made of real handwriting.

A scene is a cluttered, muted picture with two to six handwritten digits on it. Inside one scene no two digits
share a value or a colour, no two overlap, and one is clearly the largest. So every question below has exactly one
right answer, and the answer can be recomputed from the list of objects:

====================  ==========================================  ===========
kind                  question                                    answer
====================  ==========================================  ===========
``colour_of_digit``   what colour is the 7 ?                      a colour
``digit_of_colour``   which digit is red ?                        0 ... 9
``count``             how many digits are there ?                 2 ... 6
``existence``         is there a 7 ?                              yes / no
``relation``          is the red digit above the blue digit ?     yes / no
``largest``           which digit is the largest ?                0 ... 9
====================  ==========================================  ===========

Why this task suits visual token pruning: the digits cover about a fifth of the picture, everything else is clutter
that no question asks about, and most questions are about one or two of the digits. A model that drops the right
patches loses nothing, and a model that drops the wrong ones cannot guess, since no answer is given more than about
one time in five.

The handwriting is scikit-learn's ``load_digits`` (1797 pictures of 8 x 8 pixels, installed with the library, so
nothing is downloaded). Its pictures are divided between the splits: a digit seen in training is never shown in
validation or test, in any size or colour.

Everything is decided by ``(split, seed, index, image_size)``: a scene can be drawn again alone, and the first
hundred scenes of a larger set are the smaller set.

>>> scene = draw_scene("train", index=0)
>>> questions = ask_questions(scene, np.random.default_rng(0))
>>> [question.kind for question in questions] == list(QUESTION_KINDS)
True
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

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

BACKGROUND_DIGIT = 10
"""The digit label of a patch that no digit covers."""

BACKGROUND_COLOUR = len(COLOURS)
"""The colour label of a patch that no digit covers."""

SPLITS: tuple[str, ...] = ("train", "validation", "test")

QUESTION_KINDS: tuple[str, ...] = (
    "colour_of_digit",
    "digit_of_colour",
    "count",
    "existence",
    "relation",
    "largest",
)

_NUMERALS: tuple[str, ...] = tuple(str(digit) for digit in range(10))
_QUESTION_WORDS = "what colour is the which digit how many digits are there a left of above largest ?"

# Asked in training alone: how far from the left or from above a digit is, in tenths of the picture. Relations between
# two places are hard to learn before either place is, and relations name digits by value or by colour.
TRAINING_KINDS: tuple[str, ...] = ("position", "position_of_colour")

VOCABULARY: tuple[str, ...] = tuple(sorted({*COLOURS, *_NUMERALS, *_QUESTION_WORDS.split(), "yes", "no", ","}))
"""Every word that a question, an answer or a caption can contain, sorted."""

SMALLEST_IMAGE_SIZE = 96
LARGEST_IMAGE_SIZE = 168
DATASET_PATCH_SIZE = 8
"""Side in pixels of the patches that ``load_digit_scenes`` labels."""

LARGEST_RATIO = 1.25
"""How many times longer the largest digit is, at least, than the second largest."""

# All lengths below are for a picture of 96 pixels and grow with it, so that a larger picture shows the same kind
# of scene in finer detail.
_SHORTEST_SIDE = 14.0
_LONGEST_ORDINARY_SIDE = 22.0
_LONGEST_SIDE = 30.0
_GAP = 3.0
_RELATION_DISTANCE = 8.0

_PATCH_COVERAGE = 0.2
_FIRST_SPLIT_ENDS = 0.7
_SECOND_SPLIT_ENDS = 0.8
# Part of what the data set cache is keyed by. Raise it whenever a change below alters what is drawn or asked:
# otherwise scenes built by the old code would be read back from the cache.
_RECIPE = 1


@dataclass(frozen=True)
class SceneObject:
    """One digit of a scene.

    Attributes:
        digit: Its value, 0 to 9.
        colour: Its colour's name, one of ``COLOURS``.
        box: Left, top, right and bottom in whole pixels; right and bottom are exclusive.
        instance: Which of scikit-learn's 1797 handwritten digits it is.
    """

    digit: int
    colour: str
    box: tuple[int, int, int, int]
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
    """A picture and what is on it.

    Attributes:
        image: The RGB picture, ``image_size`` pixels square.
        objects: Its two to six digits, in no meaningful order.
        index: Its place in its split.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    index: int


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: One of ``QUESTION_KINDS``.
        question: Words of ``VOCABULARY``, separated by single spaces.
        answer: One word of ``VOCABULARY``.
    """

    kind: str
    question: str
    answer: str


# ---------------------------------------------------------------------------------------------------------------------
# Handwriting
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Glyph:
    """A handwritten digit made ready for drawing: its picture with an empty margin, and the places of its ink."""

    image: Image.Image
    ink: np.ndarray


@cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    pictures, digits = load_digits(return_X_y=True)
    return pictures.reshape(-1, 8, 8), digits


@cache
def digit_instances(split: str) -> tuple[tuple[int, ...], ...]:
    """Which handwritten digits a split may draw.

    Of every digit value, 70 % of the pictures belong to train, 10 % to validation and 20 % to test. The division
    is fixed: no seed changes it.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        Ten tuples, one per digit value, of indices into scikit-learn's ``load_digits``.

    Raises:
        ValueError: If the split is unknown.
    """
    part = _split_number(split)
    _, digits = _handwriting()
    order = np.random.default_rng(0).permutation(len(digits))
    pools = []
    for digit in range(10):
        instances = order[digits[order] == digit]
        ends = (0, round(_FIRST_SPLIT_ENDS * len(instances)), round(_SECOND_SPLIT_ENDS * len(instances)), None)
        pools.append(tuple(int(instance) for instance in instances[ends[part] : ends[part + 1]]))
    return tuple(pools)


@cache
def _glyph(instance: int) -> _Glyph:
    # The margin lets the interpolation run out to nothing on every side.
    picture = np.pad(_handwriting()[0][instance], 2)
    rows, columns = np.nonzero(picture >= 4)
    image = Image.fromarray(np.round(picture * (255 / 16)).astype(np.uint8))
    return _Glyph(image, np.stack([columns, rows]) + 0.5)


@dataclass(frozen=True)
class _Stamp:
    """One digit in the shape and size in which it will be drawn: opacity per pixel, height x width, 0 to 1."""

    digit: int
    instance: int
    opacity: np.ndarray


def _shape_stamp(instance: int, digit: int, side: int, rng: np.random.Generator) -> _Stamp:
    """Turn, stretch and enlarge a handwritten digit so that the longer side of its ink is ``side`` pixels."""
    glyph = _glyph(instance)
    angle = math.radians(rng.uniform(-12, 12))
    stretch = rng.uniform(0.88, 1.12)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shape = turn * [[stretch, stretch], [1, 1]]
    places = shape @ glyph.ink
    # The ink of a pixel reaches somewhat past the pixel's middle, to each side.
    corner = places.min(axis=1) - 0.7
    extent = places.max(axis=1) + 0.7 - corner
    scale = side / extent.max()
    width, height = (int(length) for length in np.round(extent * scale))
    # Pillow asks where in the source each drawn pixel comes from, hence the inverse.
    inverse = np.linalg.inv(shape)
    (a, b), (d, e) = inverse / scale
    c, f = inverse @ corner
    drawn = glyph.image.transform(
        (width, height), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC
    )
    # Enlarging eight pixels blurs them. The steeper slope brings the edges back, and starting it late keeps the
    # small loops of a 6 or an 8 open.
    opacity = np.clip(np.asarray(drawn, dtype=np.float32) * (2.1 / 255) - 0.55, 0, 1)
    return _Stamp(digit, instance, opacity)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def draw_scene(split: str, index: int, seed: int = 0, image_size: int = 96) -> Scene:
    """Draw one scene.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        index: Which scene of the split, 0 or more.
        seed: Which of the endless sequences of scenes, 0 or more.
        image_size: Side of the square picture in pixels: 96 to 168, a multiple of 8.

    Returns:
        The scene; the same arguments always give the same one.

    Raises:
        ValueError: If an argument is outside what is allowed.
    """
    _check_image_size(image_size)
    rng = _generator(split, index, seed)
    stamps = _choose_stamps(split, image_size / SMALLEST_IMAGE_SIZE, rng)
    boxes = _place_boxes([stamp.opacity.shape for stamp in stamps], image_size, rng)
    colours = [COLOURS[number] for number in rng.permutation(len(COLOURS))[: len(stamps)]]
    pixels = _draw_background(image_size, rng)
    objects = []
    for stamp, box, colour in zip(stamps, boxes, colours, strict=True):
        _blend_stamp(pixels, stamp.opacity, box, colour, rng)
        objects.append(SceneObject(stamp.digit, colour, box, stamp.instance))
    # The largest digit was placed first; without this the order would tell which it is.
    shuffled = tuple(objects[number] for number in rng.permutation(len(objects)))
    return Scene(Image.fromarray(pixels.astype(np.uint8)), shuffled, index)


def _choose_stamps(split: str, zoom: float, rng: np.random.Generator) -> list[_Stamp]:
    """Choose two to six digits of distinct values, the largest first."""
    digits = rng.permutation(10)[: rng.integers(2, 7)]
    sides = np.sort(np.round(rng.uniform(_SHORTEST_SIDE, _LONGEST_ORDINARY_SIDE, len(digits)) * zoom))[::-1]
    smallest_largest = math.ceil(max(sides[1] * LARGEST_RATIO, 20 * zoom))
    sides[0] = rng.integers(smallest_largest, round(_LONGEST_SIDE * zoom) + 1)
    pools = digit_instances(split)
    return [
        _shape_stamp(pools[digit][rng.integers(len(pools[digit]))], int(digit), int(side), rng)
        for digit, side in zip(digits, sides, strict=True)
    ]


def _place_boxes(
    shapes: Sequence[tuple[int, ...]], image_size: int, rng: np.random.Generator
) -> list[tuple[int, int, int, int]]:
    """Find disjoint places for digits of the given heights and widths."""
    gap = _GAP * image_size / SMALLEST_IMAGE_SIZE
    distance = _relation_distance(image_size)
    # The boxes need less than half of the picture, so that a dead end is rare and starting afresh soon succeeds.
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for height, width in shapes:
            corners = rng.integers(1, (image_size - width, image_size - height), (24, 2)).tolist()
            candidates = ((left, top, left + width, top + height) for left, top in corners)
            free = next((box for box in candidates if _is_free(box, boxes, gap)), None)
            if free is None:
                break
            boxes.append(free)
        if len(boxes) == len(shapes) and _are_apart(boxes[0], boxes[1], distance):
            return boxes


def _is_free(box: tuple[int, int, int, int], others: list[tuple[int, int, int, int]], gap: float) -> bool:
    left, top, right, bottom = box
    return all(
        left >= other[2] + gap or other[0] >= right + gap or top >= other[3] + gap or other[1] >= bottom + gap
        for other in others
    )


def _are_apart(first: tuple[int, int, int, int], second: tuple[int, int, int, int], distance: float) -> bool:
    """Whether two boxes can be asked about in a relation question, which every scene must allow."""
    across = abs(first[0] + first[2] - second[0] - second[2]) / 2
    down = abs(first[1] + first[3] - second[1] - second[3]) / 2
    return max(across, down) >= distance


def _relation_distance(image_size: int) -> float:
    return _RELATION_DISTANCE * image_size / SMALLEST_IMAGE_SIZE


def _muted_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Dark colours close to grey, far from every digit colour: ``count`` x 3, 0 to 255."""
    return rng.uniform(22, 82, (count, 1)) + rng.uniform(-13, 13, (count, 3))


def _draw_background(image_size: int, rng: np.random.Generator) -> np.ndarray:
    """A gradient, lines, rectangles, ellipses and noise, all muted: float32, image_size x image_size x 3."""
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


def _blend_stamp(
    pixels: np.ndarray,
    opacity: np.ndarray,
    box: tuple[int, int, int, int],
    colour: str,
    rng: np.random.Generator,
) -> None:
    """Paint a digit into ``pixels`` in place, in a shade near its named colour."""
    left, top, right, bottom = box
    shade = np.clip(COLOUR_VALUES[colour] + rng.uniform(-10, 10, 3), 0, 255).astype(np.float32)
    region = pixels[top:bottom, left:right]
    region += opacity[:, :, None] * (shade - region)


# ---------------------------------------------------------------------------------------------------------------------
# Words and labels
# ---------------------------------------------------------------------------------------------------------------------


def caption(scene: Scene) -> str:
    """The digits from left to right by their centres, such as ``"red 7 , blue 3 , white 0"``."""
    objects = sorted(scene.objects, key=lambda item: item.centre)
    return " , ".join(f"{item.colour} {item.digit}" for item in objects)


def ask_questions(scene: Scene, rng: np.random.Generator, kinds: Sequence[str] = QUESTION_KINDS) -> list[Question]:
    """Ask one question per requested kind.

    A kind may be requested more than once; its questions then differ, as far as the scene has enough of them.

    Args:
        scene: The scene to ask about.
        rng: Decides which of the possible questions are asked.
        kinds: The kinds to ask, of ``QUESTION_KINDS`` and ``TRAINING_KINDS``.

    Returns:
        The questions, in the order of ``kinds``.

    Raises:
        ValueError: If a kind is unknown.
    """
    asked: list[Question] = []
    for kind in kinds:
        if kind not in _ASKERS:
            raise ValueError(f"kinds contains {kind!r}; allowed are {', '.join(_ASKERS)}")
        for _ in range(30):
            question, answer = _ASKERS[kind](scene, rng)
            if all(question != earlier.question for earlier in asked):
                break
        asked.append(Question(kind, question, answer))
    return asked


def _any_object(scene: Scene, rng: np.random.Generator) -> SceneObject:
    return scene.objects[rng.integers(len(scene.objects))]


def _ask_colour_of_digit(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    item = _any_object(scene, rng)
    return f"what colour is the {item.digit} ?", item.colour


def _ask_digit_of_colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    item = _any_object(scene, rng)
    return f"which digit is {item.colour} ?", str(item.digit)


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return "how many digits are there ?", str(len(scene.objects))


def _ask_existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    present = [item.digit for item in scene.objects]
    exists = rng.random() < 0.5
    choices = [digit for digit in range(10) if (digit in present) == exists]
    return f"is there a {choices[rng.integers(len(choices))]} ?", "yes" if exists else "no"


def _ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    distance = _relation_distance(scene.image.width)
    # Every decidable pair, the one that is further left or above first.
    pairs = [
        (axis, first, second)
        for axis in (0, 1)
        for first in scene.objects
        for second in scene.objects
        if second.centre[axis] - first.centre[axis] >= distance
    ]
    axis, first, second = pairs[rng.integers(len(pairs))]
    holds = rng.random() < 0.5
    if not holds:
        first, second = second, first
    by_colour = rng.random() < 0.5
    names = [f"{item.colour} digit" if by_colour else str(item.digit) for item in (first, second)]
    relation = ("left of", "above")[axis]
    return f"is the {names[0]} {relation} the {names[1]} ?", "yes" if holds else "no"


def _ask_position(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    item, axis = _any_object(scene, rng), int(rng.integers(2))
    tenth = int(10 * item.centre[axis] / scene.image.width)
    return f"how {('left', 'above')[axis]} is the {item.digit} ?", str(tenth)


def _ask_position_of_colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    item, axis = _any_object(scene, rng), int(rng.integers(2))
    tenth = int(10 * item.centre[axis] / scene.image.width)
    return f"how {('left', 'above')[axis]} is the {item.colour} digit ?", str(tenth)


def _ask_largest(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    item = max(scene.objects, key=lambda item: item.side)
    if rng.random() < 0.5:
        return "which digit is the largest ?", str(item.digit)
    return "what colour is the largest digit ?", item.colour


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str]]] = {
    "colour_of_digit": _ask_colour_of_digit,
    "digit_of_colour": _ask_digit_of_colour,
    "count": _ask_count,
    "existence": _ask_existence,
    "relation": _ask_relation,
    "largest": _ask_largest,
    "position": _ask_position,
    "position_of_colour": _ask_position_of_colour,
}


def patch_labels(scene: Scene, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Say for every patch which digit it shows, and in which colour.

    A patch belongs to the digit whose box covers most of it, provided that the box covers a fifth of it. Boxes
    rather than ink, so that the inside of a 0 counts as part of the 0.

    Args:
        scene: The scene.
        patch_size: Side of the square patches in pixels; it must divide the picture's side.

    Returns:
        Two int64 arrays of one entry per patch, row by row from the top left. The first holds digit values, 0 to 9,
        or ``BACKGROUND_DIGIT``; the second indices into ``COLOURS``, or ``BACKGROUND_COLOUR``.

    Raises:
        ValueError: If ``patch_size`` does not divide the picture's side.
    """
    side = scene.image.width
    if not _is_whole(patch_size) or patch_size < 1 or side % patch_size:
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


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------

_SCENE_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "objects": datasets.List(
            {
                "digit": datasets.Value("int64"),
                "colour": datasets.Value("string"),
                "box": datasets.List(datasets.Value("int64")),
            }
        ),
        "questions": datasets.List(datasets.Value("string")),
        "answers": datasets.List(datasets.Value("string")),
        "kinds": datasets.List(datasets.Value("string")),
        "patch_digits": datasets.List(datasets.Value("int64")),
        "patch_colours": datasets.List(datasets.Value("int64")),
    }
)

_QUESTION_FEATURES = datasets.Features(
    {
        "images": datasets.List(datasets.Image()),
        "messages": datasets.List(
            {
                "role": datasets.Value("string"),
                "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
            }
        ),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "kind": datasets.Value("string"),
    }
)


def load_digit_scenes(
    split: str,
    num_scenes: int,
    seed: int = 0,
    image_size: int = 96,
    cache_dir: str | Path | None = None,
    kinds: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Build, or read back from the cache, a data set with one row per scene and several questions about each.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        num_scenes: Number of rows, 1 or more.
        seed: Which of the endless sequences of scenes, 0 or more.
        image_size: Side of the square pictures in pixels: 96 to 168, a multiple of 8.
        cache_dir: Where ``datasets`` keeps what it builds; its own default if ``None``.
        kinds: The kinds of question asked about every scene, of ``QUESTION_KINDS`` and ``TRAINING_KINDS``,
            repetitions allowed. If ``None``, eight: one of every kind, then two more of different kinds.

    Returns:
        Rows of ``image``, ``caption``, ``objects`` (a list of ``digit``, ``colour`` and ``box``), ``questions``,
        ``answers`` and ``kinds`` (as many of each as ``kinds``), and ``patch_digits`` and ``patch_colours`` (see
        ``patch_labels``, for patches of 8 pixels).

    Raises:
        ValueError: If an argument is outside what is allowed.
    """
    more = _checked_kinds(kinds)
    return _build(
        _generate_scenes, _SCENE_FEATURES, "num_scenes", num_scenes, split, seed, image_size, cache_dir, **more
    )


def load_digit_questions(
    split: str,
    num_questions: int,
    seed: int = 0,
    image_size: int = 96,
    cache_dir: str | Path | None = None,
    kinds: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Build, or read back from the cache, a data set of conversations: one question and its answer per row.

    Row i shows scene i, and its kind is the (i mod n)th of the n ``kinds``.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        num_questions: Number of rows, 1 or more.
        seed: Which of the endless sequences of scenes, 0 or more.
        image_size: Side of the square pictures in pixels: 96 to 168, a multiple of 8.
        cache_dir: Where ``datasets`` keeps what it builds; its own default if ``None``.
        kinds: The kinds of question, of ``QUESTION_KINDS`` and ``TRAINING_KINDS``, repetitions allowed. If ``None``,
            ``QUESTION_KINDS``.

    Returns:
        Rows of ``images`` (a list of one), ``messages`` (the user's picture and question, then the assistant's
        answer, in the form that chat templates read; a picture's ``text`` is ``None``), ``question``, ``answer``
        and ``kind``.

    Raises:
        ValueError: If an argument is outside what is allowed.
    """
    more = _checked_kinds(kinds)
    return _build(
        _generate_questions,
        _QUESTION_FEATURES,
        "num_questions",
        num_questions,
        split,
        seed,
        image_size,
        cache_dir,
        **more,
    )


def _checked_kinds(kinds: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """The argument for the generators, absent where it is ``None``: it is part of what the cache is keyed by."""
    for kind in kinds or ():
        if kind not in _ASKERS:
            raise ValueError(f"kinds contains {kind!r}; allowed are {', '.join(_ASKERS)}")
    return {"kinds": tuple(kinds)} if kinds else {}


def _build(
    generate: Callable[..., Iterator[dict[str, Any]]],
    features: datasets.Features,
    count_name: str,
    count: int,
    split: str,
    seed: int,
    image_size: int,
    cache_dir: str | Path | None,
    **more: Any,
) -> datasets.Dataset:
    _split_number(split)
    _check_at_least(count_name, count, 1)
    _check_at_least("seed", seed, 0)
    _check_image_size(image_size)
    return datasets.Dataset.from_generator(
        generate,
        features=features,
        cache_dir=None if cache_dir is None else str(cache_dir),
        gen_kwargs={"count": count, "split": split, "seed": seed, "image_size": image_size, "recipe": _RECIPE} | more,
        split=datasets.NamedSplit(split),
    )


def _generate_scenes(
    count: int, split: str, seed: int, image_size: int, recipe: int, kinds: tuple[str, ...] | None = None
) -> Iterator[dict[str, Any]]:
    for index in range(count):
        scene = draw_scene(split, index, seed, image_size)
        rng = _generator(split, index, seed, for_questions=True)
        # There is only one way to ask for the count, so that the two additional questions are of other kinds.
        others = [kind for kind in QUESTION_KINDS if kind != "count"]
        more = [others[number] for number in rng.permutation(len(others))[:2]]
        asked = ask_questions(scene, rng, kinds or (*QUESTION_KINDS, *more))
        digits, colours = patch_labels(scene, DATASET_PATCH_SIZE)
        yield {
            "image": _encode(scene.image),
            "caption": caption(scene),
            "objects": [{"digit": item.digit, "colour": item.colour, "box": item.box} for item in scene.objects],
            "questions": [item.question for item in asked],
            "answers": [item.answer for item in asked],
            "kinds": [item.kind for item in asked],
            "patch_digits": digits,
            "patch_colours": colours,
        }


def _generate_questions(
    count: int, split: str, seed: int, image_size: int, recipe: int, kinds: tuple[str, ...] = QUESTION_KINDS
) -> Iterator[dict[str, Any]]:
    for index in range(count):
        scene = draw_scene(split, index, seed, image_size)
        rng = _generator(split, index, seed, for_questions=True)
        (item,) = ask_questions(scene, rng, [kinds[index % len(kinds)]])
        prompt = [{"type": "image", "text": None}, {"type": "text", "text": item.question}]
        reply = [{"type": "text", "text": item.answer}]
        yield {
            "images": [_encode(scene.image)],
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}],
            "question": item.question,
            "answer": item.answer,
            "kind": item.kind,
        }


def _encode(image: Image.Image) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    # The noise hardly compresses, so that a higher level would cost time and save next to nothing.
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def _split_number(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
    return SPLITS.index(split)


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_at_least(name: str, value: int, least: int) -> None:
    if not _is_whole(value) or value < least:
        raise ValueError(f"{name} is {value!r}; allowed are whole numbers from {least}")


def _check_image_size(image_size: int) -> None:
    if not _is_whole(image_size) or image_size not in range(SMALLEST_IMAGE_SIZE, LARGEST_IMAGE_SIZE + 1, 8):
        raise ValueError(
            f"image_size is {image_size!r}; allowed are multiples of 8 from {SMALLEST_IMAGE_SIZE} to"
            f" {LARGEST_IMAGE_SIZE}"
        )


def _generator(split: str, index: int, seed: int, for_questions: bool = False) -> np.random.Generator:
    part = _split_number(split)
    _check_at_least("index", index, 0)
    _check_at_least("seed", seed, 0)
    # Questions draw from a stream of their own, so that a new kind of question leaves the pictures as they are.
    return np.random.default_rng([seed, part, index, 1] if for_questions else [seed, part, index])
