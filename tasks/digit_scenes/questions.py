"""What is asked about a scene, in which words, and what is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .scene import COLOURS, Scene, relation_distance

QUESTION_KINDS: tuple[str, ...] = ("colour_of_digit", "digit_of_colour", "count", "existence", "relation", "largest")
# Asked in training alone: how far from the left or from above a digit is, in tenths of the picture. Relations between
# two places are hard to learn before either place is, and relations name digits by value or by colour.
TRAINING_KINDS: tuple[str, ...] = ("position", "position_of_colour")

_QUESTION_WORDS = "what colour is the which digit how many digits are there a left of above largest ?"
VOCABULARY: tuple[str, ...] = tuple(
    sorted({*COLOURS, *map(str, range(10)), *_QUESTION_WORDS.split(), "yes", "no", ","})
)
"""Every word that a question, an answer or a caption can contain, sorted."""


@dataclass(frozen=True)
class Question:
    """A question in words of `VOCABULARY`, separated by single spaces, and its answer, one of them."""

    kind: str
    question: str
    answer: str


def caption(scene: Scene) -> str:
    """The digits from left to right by their centres, such as `"red 7 , blue 3 , white 0"`."""
    objects = sorted(scene.objects, key=lambda item: item.centre)
    return " , ".join(f"{item.colour} {item.digit}" for item in objects)


def ask_questions(scene: Scene, rng: np.random.Generator, kinds: Sequence[str] = QUESTION_KINDS) -> list[Question]:
    """
    Asks one question per requested kind. A kind may be requested more than once; its questions then differ, as far as
    the scene has enough of them.

    Args:
        rng: decides which of the possible questions are asked.
        kinds: the kinds to ask, of `QUESTION_KINDS` and `TRAINING_KINDS`.

    Raises:
        ValueError: if a kind is unknown.
    """
    require_kinds(kinds)
    asked: list[Question] = []
    for kind in kinds:
        for _ in range(30):
            question, answer = _ASKERS[kind](scene, rng)
            if all(question != earlier.question for earlier in asked):
                break
        asked.append(Question(kind, question, answer))
    return asked


def require_kinds(kinds: Sequence[str]) -> None:
    """Raises `ValueError` for a kind that is unknown."""
    for kind in kinds:
        if kind not in _ASKERS:
            raise ValueError(f"kinds contains {kind!r}; allowed are {', '.join(_ASKERS)}")


def _any_of(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[rng.integers(len(values))]


def _ask_colour_of_digit(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    item = _any_of(scene.objects, rng)
    return f"what colour is the {item.digit} ?", item.colour


def _ask_digit_of_colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    item = _any_of(scene.objects, rng)
    return f"which digit is {item.colour} ?", str(item.digit)


def _ask_count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return "how many digits are there ?", str(len(scene.objects))


def _ask_existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    present = [item.digit for item in scene.objects]
    exists = rng.random() < 0.5
    digit = _any_of([digit for digit in range(10) if (digit in present) == exists], rng)
    return f"is there a {digit} ?", "yes" if exists else "no"


def _ask_relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    distance = relation_distance(scene.image.width)
    # Every decidable pair, the one that is further left or above first.
    pairs = [
        (axis, first, second)
        for axis in (0, 1)
        for first in scene.objects
        for second in scene.objects
        if second.centre[axis] - first.centre[axis] >= distance
    ]
    axis, first, second = _any_of(pairs, rng)
    holds = rng.random() < 0.5
    if not holds:
        first, second = second, first
    by_colour = rng.random() < 0.5
    names = [f"{item.colour} digit" if by_colour else str(item.digit) for item in (first, second)]
    return f"is the {names[0]} {('left of', 'above')[axis]} the {names[1]} ?", "yes" if holds else "no"


def _ask_largest(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    item = max(scene.objects, key=lambda item: item.side)
    if rng.random() < 0.5:
        return "which digit is the largest ?", str(item.digit)
    return "what colour is the largest digit ?", item.colour


def _ask_position(scene: Scene, rng: np.random.Generator, by_colour: bool = False) -> tuple[str, str]:
    item, axis = _any_of(scene.objects, rng), int(rng.integers(2))
    name = f"{item.colour} digit" if by_colour else item.digit
    tenth = int(10 * item.centre[axis] / scene.image.width)
    return f"how {('left', 'above')[axis]} is the {name} ?", str(tenth)


def _ask_position_of_colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return _ask_position(scene, rng, by_colour=True)


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
