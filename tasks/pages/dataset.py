"""Pages as data sets: a page with many questions in a row, or a conversation of one question.

What was built once is read back from the cache of `datasets`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import List, Value

from ..rows import QUESTION_FEATURES, TEXT, built, conversation, encoded_image
from ..splits import random_numbers, require_at_least, split_number
from .drawing import TEXT_SHARE, draw_page, require_contents
from .page import FORMS, MOST_ENTRIES, NUM_CELLS, PATCH_LABELS, patch_labels
from .questions import QUESTION_KINDS, SHORT_KINDS, ask_questions, kinds_of_page, require_kinds

# Part of what the cache is keyed by. Raise it whenever a change alters what is drawn or asked: otherwise pages built
# by the old code would be read back.
_RECIPE = 4

_PATCHES = List(Value("int16"))
_PAGE_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "form": TEXT,
        "questions": List(TEXT),
        "answers": List(TEXT),
        "kinds": List(TEXT),
        "answer_patches": List(_PATCHES),
        **dict.fromkeys(PATCH_LABELS, _PATCHES),
    }
)


def load_pages(
    split: str,
    num_pages: int,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    kinds: Sequence[str] | None = None,
    num_questions: int = 12,
    max_entries: int = MOST_ENTRIES,
    text_share: float = TEXT_SHARE,
    forms: Sequence[str] = FORMS,
) -> datasets.Dataset:
    """
    A data set with one row per page and several questions about each.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        num_pages: number of rows, 1 or more.
        seed: which of the endless sequences of pages, 0 or more.
        cache_dir: where `datasets` keeps what it builds; its own default if `None`.
        kinds: the kinds of question, repetitions allowed; those that a page can be asked take turns on it. By default
            `SHORT_KINDS`.
        num_questions: how many questions every page is asked; fewer where it has not as many that differ.
        max_entries, text_share, forms: as in [`draw_page`]; forms take turns, repetitions allowed.

    Returns:
        Rows of `image`, `form`, `questions`, `answers` and `kinds`, `answer_patches` (for each question the patches,
        counted row by row, that its answer is read from), and the names in `PATCH_LABELS` (see [`patch_labels`]).

    Raises:
        ValueError: if an argument is outside what is allowed.
    """
    require_at_least("num_pages", num_pages, 1)
    require_at_least("num_questions", num_questions, 1)
    require_contents(max_entries, text_share, forms)
    asked = {"num_questions": num_questions, "max_entries": max_entries, "text_share": text_share}
    asked["forms"] = tuple(forms)
    return built(_generate_pages, _PAGE_FEATURES, _arguments(num_pages, split, seed, kinds) | asked, cache_dir)


def load_page_questions(
    split: str,
    num_questions: int,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    kinds: Sequence[str] | None = None,
) -> datasets.Dataset:
    """
    A data set of conversations: one question and its answer per row. Row i shows page i; its kind is the next in turn
    of those `kinds` that pages of its form can be asked.

    Args:
        num_questions: number of rows, 1 or more.
        split, seed, cache_dir: as in [`load_pages`].
        kinds: the kinds of question, repetitions allowed; by default `QUESTION_KINDS`.

    Returns:
        Rows of `images` (a list of one), `messages` (the user's picture and question, then the assistant's answer, in
        the form that chat templates read; a picture's `text` is `None`), `question`, `answer` and `kind`.

    Raises:
        ValueError: if an argument is outside what is allowed.
    """
    require_at_least("num_questions", num_questions, 1)
    return built(_generate_questions, QUESTION_FEATURES, _arguments(num_questions, split, seed, kinds), cache_dir)


def _arguments(count: int, split: str, seed: int, kinds: Sequence[str] | None) -> dict[str, Any]:
    split_number(split)
    require_at_least("seed", seed, 0)
    require_kinds(kinds or ())
    return {"count": count, "split": split, "seed": seed, "kinds": tuple(kinds) if kinds else None, "recipe": _RECIPE}


def _generate_pages(
    count: int,
    split: str,
    seed: int,
    recipe: int,
    num_questions: int,
    max_entries: int,
    text_share: float,
    forms: tuple[str, ...],
    kinds: tuple[str, ...] = SHORT_KINDS,
) -> Iterator[dict[str, Any]]:
    for index in range(count):
        page = draw_page(split, index, seed, max_entries, text_share, forms)
        rng = random_numbers(split, index, seed, for_questions=True)
        possible = kinds_of_page(page, kinds)
        order = rng.permutation(len(possible)).tolist()
        wanted = [possible[order[number % len(order)]] for number in range(num_questions)] if possible else []
        # There is only one way to ask for the count.
        asked = list({item.question: item for item in ask_questions(page, rng, wanted)}.values())
        yield {
            "image": encoded_image(page.image),
            "form": page.form,
            "questions": [item.question for item in asked],
            "answers": [item.answer for item in asked],
            "kinds": [item.kind for item in asked],
            "answer_patches": [[row * NUM_CELLS + column for row, column in item.places] for item in asked],
            **patch_labels(page),
        }


def _generate_questions(
    count: int, split: str, seed: int, recipe: int, kinds: tuple[str, ...] = QUESTION_KINDS
) -> Iterator[dict[str, Any]]:
    for index in range(count):
        page = draw_page(split, index, seed)
        rng = random_numbers(split, index, seed, for_questions=True)
        # The forms of pages take turns, and so do the kinds: every form meets every kind.
        possible = kinds_of_page(page, kinds)
        if not possible:
            raise ValueError(f"kinds is {list(kinds)}, and a page of the form {page.form!r} can be asked none of them")
        (item,) = ask_questions(page, rng, [possible[index // len(FORMS) % len(possible)]])
        yield conversation(page.image, item.question, item.answer, item.kind)
