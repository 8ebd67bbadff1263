"""What the data sets of all tasks have in common: how they are built and cached, and a conversation's columns."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import List, Value
from PIL import Image

TEXT, NUMBER = Value("string"), Value("int64")

QUESTION_FEATURES = datasets.Features(
    {
        "images": List(datasets.Image()),
        "messages": List({"role": TEXT, "content": List({"type": TEXT, "text": TEXT})}),
        "question": TEXT,
        "answer": TEXT,
        "kind": TEXT,
    }
)
"""A conversation of one question, in the form that chat templates read."""


def built(
    generate: Callable[..., Iterator[dict[str, Any]]],
    features: datasets.Features,
    arguments: dict[str, Any],
    cache_dir: str | Path | None,
) -> datasets.Dataset:
    """
    The rows that `generate` makes of its arguments, `split` among them, or the ones it made of them before.

    Args:
        arguments: those that are `None` are left out. All others are what the cache is keyed by.
        cache_dir: where `datasets` keeps what it builds; its own default if `None`.
    """
    return datasets.Dataset.from_generator(
        generate,
        features=features,
        cache_dir=None if cache_dir is None else str(cache_dir),
        gen_kwargs={name: value for name, value in arguments.items() if value is not None},
        split=datasets.NamedSplit(arguments["split"]),
    )


def conversation(image: Image.Image, question: str, answer: str, kind: str) -> dict[str, Any]:
    """A row of `QUESTION_FEATURES`: the user's picture and question, then the assistant's answer."""
    prompt = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    reply = [{"type": "text", "text": answer}]
    return {
        "images": [encoded_image(image)],
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}],
        "question": question,
        "answer": answer,
        "kind": kind,
    }


def encoded_image(image: Image.Image) -> dict[str, bytes | None]:
    """A picture as `datasets.Image` keeps it."""
    buffer = io.BytesIO()
    # The noise hardly compresses, so that a higher level would cost time and save next to nothing.
    image.save(buffer, format="PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
