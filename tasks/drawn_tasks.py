"""The tasks that AdaVTP draws itself, by the names that commands and recipes call them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..modeling.processing_adavtp import AdaVTPProcessor

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class DrawnTask:
    """
    Attributes:
        load_examples: rows of an image with many questions, and labels of its patches.
        load_questions: conversations of one question each.
        build_processor: of image size and patch size, the processor of a new model.
        patch_labels: columns of `load_examples` that label patches -> number of classes, the last of which says that
            there is nothing to tell.
        patch_words: for each of them the token of each class but the last, where a decoder can be told so what a patch
            shows; empty where it cannot.
        patch_roles: for each of them a number from 0 to 3, what its words are to the patch: 0 its own.
        short_kinds: kinds of question whose answers are a few tokens long.
        num_questions: how many questions an evaluation asks unless it is told.
        max_new_tokens: what the longest answer needs.
        kind_metrics: kinds of question with long answers -> the metric module that says how much of one is right,
            where exact match only says whether all of it is.
    """

    load_examples: Callable[..., "Dataset"]
    load_questions: Callable[..., "Dataset"]
    build_processor: Callable[[int, int], AdaVTPProcessor]
    patch_labels: dict[str, int]
    patch_words: dict[str, tuple[str, ...]]
    patch_roles: dict[str, int]
    short_kinds: tuple[str, ...]
    num_questions: int
    max_new_tokens: int
    kind_metrics: dict[str, str] = field(default_factory=dict)


# Loaded where they are named: `datasets` and what draws are needed by those alone who draw.
def _digit_scenes() -> DrawnTask:
    from . import digit_scenes
    from .digit_scenes.processor import build_digit_processor

    labels = {
        "patch_digits": digit_scenes.BACKGROUND_DIGIT + 1,
        "patch_colours": digit_scenes.BACKGROUND_COLOUR + 1,
    }
    return DrawnTask(
        load_examples=digit_scenes.load_digit_scenes,
        load_questions=digit_scenes.load_digit_questions,
        build_processor=build_digit_processor,
        patch_labels=labels,
        patch_words={},
        patch_roles={},
        short_kinds=digit_scenes.QUESTION_KINDS,
        num_questions=2400,
        max_new_tokens=16,
    )


def _pages() -> DrawnTask:
    from . import pages
    from .pages.processor import build_page_processor

    return DrawnTask(
        load_examples=pages.load_pages,
        load_questions=pages.load_page_questions,
        build_processor=build_page_processor,
        patch_labels=pages.PATCH_LABELS,
        patch_words=pages.PATCH_WORDS,
        patch_roles=pages.PATCH_ROLES,
        short_kinds=pages.SHORT_KINDS,
        num_questions=2400,
        # The longest answer has 60 glyphs.
        max_new_tokens=64,
        kind_metrics={"read_line": "character_accuracy", "read_entries": "entry_f1"},
    )


_TASKS: dict[str, Callable[[], DrawnTask]] = {"digit-scenes": _digit_scenes, "pages": _pages}
TASK_NAMES: tuple[str, ...] = tuple(_TASKS)


def drawn_task(name: str) -> DrawnTask:
    """The task of a name. Raises `ValueError` for an unknown one."""
    if name not in _TASKS:
        raise ValueError(f"task is {name!r}; allowed are {', '.join(TASK_NAMES)}")
    return _TASKS[name]()
