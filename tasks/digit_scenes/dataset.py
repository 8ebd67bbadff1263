"""Digit scenes as data sets: a scene with many questions in a row, or a conversation of one question.

What was built once is read back from the cache of `datasets`.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import List, Value
from PIL import Image

from .drawing import draw_scene
from .questions import QUESTION_KINDS, ask_questions, caption, require_kinds
from .scene import patch_labels, random_numbers, require_at_least, require_image_size, split_number

DATASET_PATCH_SIZE = 8
# Part of what the cache is keyed by. Raise it whenever a change alters what is drawn or asked: otherwise scenes built
# by the old code would be read back.
_RECIPE = 1

_TEXT, _NUMBER = Value("string"), Value("int64")
_SCENE_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": _TEXT,
        "objects": List({"digit": _NUMBER, "colour": _TEXT, "box": List(_NUMBER)}),
        "questions": List(_TEXT),
        "answers": List(_TEXT),
        "kinds": List(_TEXT),
        "patch_digits": List(_NUMBER),
        "patch_colours": List(_NUMBER),
    }
)
_QUESTION_FEATURES = datasets.Features(
    {
        "images": List(datasets.Image()),
        "messages": List({"role": _TEXT, "content": List({"type": _TEXT, "text": _TEXT})}),
        "question": _TEXT,
        "answer": _TEXT,
        "kind": _TEXT,
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
    asked = {"count": num_scenes, "split": split, "seed": seed, "image_size": image_size, "recipe": _RECIPE}
    return _built(_generate_scenes, _SCENE_FEATURES, asked, kinds, cache_dir)


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
    asked = {"count": num_questions, "split": split, "seed": seed, "image_size": image_size, "recipe": _RECIPE}
    return _built(_generate_questions, _QUESTION_FEATURES, asked, kinds, cache_dir)


def _built(
    generate: Callable[..., Iterator[dict[str, Any]]],
    features: datasets.Features,
    asked: dict[str, Any],
    kinds: Sequence[str] | None,
    cache_dir: str | Path | None,
) -> datasets.Dataset:
    split_number(asked["split"])
    require_at_least("seed", asked["seed"], 0)
    require_image_size(asked["image_size"])
    require_kinds(kinds or ())
    return datasets.Dataset.from_generator(
        generate,
        features=features,
        cache_dir=None if cache_dir is None else str(cache_dir),
        # Absent where it is `None`: it is part of what the cache is keyed by.
        gen_kwargs=asked | ({"kinds": tuple(kinds)} if kinds else {}),
        split=datasets.NamedSplit(asked["split"]),
    )


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
        rng = random_numbers(split, index, seed, for_questions=True)
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
