"""Digit scenes as data sets: a scene with many questions in a row, or a conversation of one question.

What was built once is read back from the cache of `datasets`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import List

from ..rows import NUMBER, QUESTION_FEATURES, TEXT, built, conversation, encoded_image
from ..splits import random_numbers, require_at_least, split_number
from .drawing import draw_scene
from .questions import QUESTION_KINDS, ask_questions, caption, require_kinds
from .scene import patch_labels, require_image_size

DATASET_PATCH_SIZE = 8
# Part of what the cache is keyed by. Raise it whenever a change alters what is drawn or asked: otherwise scenes built
# by the old code would be read back.
_RECIPE = 1

_SCENE_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": TEXT,
        "objects": List({"digit": NUMBER, "colour": TEXT, "box": List(NUMBER)}),
        "questions": List(TEXT),
        "answers": List(TEXT),
        "kinds": List(TEXT),
        "patch_digits": List(NUMBER),
        "patch_colours": List(NUMBER),
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
    """
    A data set with one row per scene and several questions about each.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        num_scenes: number of rows, 1 or more.
        seed: which of the endless sequences of scenes, 0 or more.
        image_size: side of the square pictures in pixels: 96 to 168, a multiple of 8.
        cache_dir: where `datasets` keeps what it builds; its own default if `None`.
        kinds: the kinds of question asked about every scene, of `QUESTION_KINDS` and `TRAINING_KINDS`, repetitions
            allowed. If `None`, eight: one of every kind, then two more of different kinds.

    Returns:
        Rows of `image`, `caption`, `objects` (a list of `digit`, `colour` and `box`), `questions`, `answers` and
        `kinds` (as many of each as `kinds`), and `patch_digits` and `patch_colours` (see [`patch_labels`], for patches
        of 8 pixels).

    Raises:
        ValueError: if an argument is outside what is allowed.
    """
    require_at_least("num_scenes", num_scenes, 1)
    asked = _arguments(num_scenes, split, seed, image_size, kinds)
    return built(_generate_scenes, _SCENE_FEATURES, asked, cache_dir)


def load_digit_questions(
    split: str,
    num_questions: int,
    seed: int = 0,
    image_size: int = 96,
    cache_dir: str | Path | None = None,
    kinds: Sequence[str] | None = None,
) -> datasets.Dataset:
    """
    A data set of conversations: one question and its answer per row. Row i shows scene i, and its kind is the
    (i mod n)th of the n `kinds`.

    Args:
        num_questions: number of rows, 1 or more.
        split, seed, image_size, cache_dir: as in [`load_digit_scenes`].
        kinds: the kinds of question, repetitions allowed; by default `QUESTION_KINDS`.

    Returns:
        Rows of `images` (a list of one), `messages` (the user's picture and question, then the assistant's answer, in
        the form that chat templates read; a picture's `text` is `None`), `question`, `answer` and `kind`.

    Raises:
        ValueError: if an argument is outside what is allowed.
    """
    require_at_least("num_questions", num_questions, 1)
    asked = _arguments(num_questions, split, seed, image_size, kinds)
    return built(_generate_questions, QUESTION_FEATURES, asked, cache_dir)


def _arguments(count: int, split: str, seed: int, image_size: int, kinds: Sequence[str] | None) -> dict[str, Any]:
    split_number(split)
    require_at_least("seed", seed, 0)
    require_image_size(image_size)
    require_kinds(kinds or ())
    asked = {"count": count, "split": split, "seed": seed, "image_size": image_size, "recipe": _RECIPE}
    return asked | {"kinds": tuple(kinds) if kinds else None}


def _generate_scenes(
    count: int, split: str, seed: int, image_size: int, recipe: int, kinds: tuple[str, ...] | None = None
) -> Iterator[dict[str, Any]]:
    for index in range(count):
        scene = draw_scene(split, index, seed, image_size)
        rng = random_numbers(split, index, seed, for_questions=True)
        # There is only one way to ask for the count, so that the two additional questions are of other kinds.
        others = [kind for kind in QUESTION_KINDS if kind != "count"]
        more = [others[number] for number in rng.permutation(len(others))[:2]]
        asked = ask_questions(scene, rng, kinds or (*QUESTION_KINDS, *more))
        digits, colours = patch_labels(scene, DATASET_PATCH_SIZE)
        yield {
            "image": encoded_image(scene.image),
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
        rng = random_numbers(split, index, seed, for_questions=True)
        (item,) = ask_questions(scene, rng, [kinds[index % len(kinds)]])
        yield conversation(scene.image, item.question, item.answer, item.kind)
