"""Questions with pictures and right answers.

An example is what an evaluation asks. Here they come from rows in the conversational form of Hugging Face, where the
last turn of the assistant is the right answer; `benchmarks.py` reads the files of the usual benchmarks. Which
data a run was made of is known by a hash of all of it, so that answers to different questions never meet in one table.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

DEFAULT_METRIC = "exact_match"


@dataclass
class Example:
    """
    One question.

    Attributes:
        id: what the data calls it, or its place in them.
        images: PIL images or paths, in the order of the question; none for a question about text.
        question: as the model is asked it, with what it is told about the form of the answer.
        answers: the right ones, one or more.
        category: the kind of question, or `None`.
        choices: what may be chosen from, in order, or `None` for an open question.
        messages: the conversation up to the answer, where it is more than images and one question; else `None`.
    """

    id: str
    images: list[Any]
    question: str
    answers: list[str]
    category: str | None = None
    choices: list[str] | None = None
    messages: list[dict[str, Any]] | None = None


@dataclass
class EvaluationData:
    """
    What is asked, and how answers are scored.

    Attributes:
        name: as it was asked for.
        split: which part of the data this is.
        examples: in a fixed order; images may be loaded when an example is looked at.
        metric: name of the metric module that scores them.
    """

    name: str
    split: str
    examples: Sequence[Example]
    metric: str = DEFAULT_METRIC

    def hash(self) -> str:
        """SHA-256 of all questions, answers and images; of image files, their names and sizes in bytes."""
        digest = hashlib.sha256()
        for example in self.examples:
            written = [example.id, example.question, example.answers, example.category, example.choices]
            digest.update(json.dumps([*written, example.messages]).encode())
            for image in example.images:
                digest.update(_image_identity(image))
        return digest.hexdigest()

    def first(self, num_examples: int | None) -> "EvaluationData":
        """The same with at most the first so many examples, at others nobody looks; `None` for all."""
        examples = self.examples
        number = len(examples) if num_examples is None else min(num_examples, len(examples))
        if isinstance(examples, ConversationExamples):
            return replace(self, examples=ConversationExamples(examples.rows, examples.image_folder, number))
        return replace(self, examples=examples[:number])


def _image_identity(image: Any) -> bytes:
    if isinstance(image, Path):
        return f"{image.name} {image.stat().st_size}".encode()
    return f"{image.mode} {image.size}".encode() + image.tobytes()


class ConversationExamples(Sequence[Example]):
    """
    Rows in the conversational form, read when an example is looked at.

    A row has `images` (or one `image`; none for text) and either `messages`, of which the last is the assistant's and
    the right answer, or `prompt` and `completion`, both messages or both text. It may have `id` or `question_id`,
    `category`, `choices`, and `answers`, a list that takes the place of the assistant's turn.

    Args:
        rows: a data set or a list of dictionaries.
        image_folder: what paths of images are relative to.
        num_examples: how many of the rows, from the first; by default all.

    Raises:
        ValueError: when a row is looked at that has another form, or names an image that is not there; the message
            says which row.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], image_folder: Path = Path(), num_examples: int | None = None
    ) -> None:
        self.rows, self.image_folder = rows, image_folder
        self.num_examples = len(rows) if num_examples is None else num_examples

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            places = range(len(self))[index]
            # A data set reads several rows at once faster than one after another.
            read = getattr(self.rows, "__getitems__", lambda some: [self.rows[place] for place in some])
            return [self._example(*row) for row in zip(places, read(list(places)), strict=True)]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._example(index, self.rows[index])

    def _example(self, index: int, row: Mapping[str, Any]) -> Example:
        own_id = next((row[name] for name in ("id", "question_id") if row.get(name) is not None), index)
        where = f"Example {own_id!r} (row {index})"
        before, answers = _question_and_answers(row, where)
        images = row.get("images") if row.get("images") is not None else [row.get("image")]
        images = [_image(image, self.image_folder, where) for image in images if image is not None]
        before = [_in_parts(message) for message in _with_places(before, len(images))]
        parts = [part for message in before for part in message["content"]]
        places = [part["type"] == "image" for part in parts]
        if sum(places) != len(images):
            raise ValueError(
                f"{where} has {len(images)} image(s) and {sum(places)} place(s) for them in its messages."
            )
        # A processor asks one question in the form of its chat template: images first, then the text.
        is_plain = len(before) == 1 and places == sorted(places, reverse=True) and places.count(False) == 1
        if not is_plain and not images:
            raise ValueError(f"{where} has several turns and no image; allowed without images is one question.")
        question = "".join(part["text"] for part in before[-1]["content"] if part["type"] == "text")
        return Example(
            id=str(own_id),
            images=images,
            question=question,
            answers=answers,
            category=row.get("category"),
            choices=_texts(row, "choices", where),
            messages=None if is_plain else before,
        )


def _question_and_answers(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The conversation before the answer, and the right answers."""
    answers = _texts(row, "answers", where)
    if row.get("prompt") is not None:
        before, after = _as_messages(row["prompt"], "user"), _as_messages(row.get("completion") or [], "assistant")
    elif row.get("messages"):
        messages = list(row["messages"])
        is_answered = messages[-1]["role"] == "assistant"
        before, after = (messages[:-1], messages[-1:]) if is_answered else (messages, [])
    else:
        raise ValueError(
            f"{where} has the fields {', '.join(row)}; expected are `messages`, or `prompt` and `completion`."
        )
    if not before or before[-1]["role"] != "user":
        raise ValueError(f"{where} has no user's turn before the answer.")
    if answers is None:
        if len(after) != 1 or after[0]["role"] != "assistant":
            raise ValueError(f"{where} does not end with a turn of the assistant's, which is the right answer.")
        answers = ["".join(part["text"] for part in _in_parts(after[0])["content"] if part["type"] == "text").strip()]
    return before, answers


def _texts(row: Mapping[str, Any], field: str, where: str) -> list[str] | None:
    """A column of lists of strings, which may be missing or empty."""
    texts = row.get(field)
    if texts is None or len(texts) == 0:
        return None
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where} has `{field}` {texts!r}; expected is a list of strings.")
    return list(texts)


def _as_messages(text: str | Sequence[Mapping[str, Any]], role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else [dict(message) for message in text]


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with a list of parts, without the empty fields that a data set gives every part."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {"role": message["role"], "content": parts}


def _with_places(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Where all messages are plain text, the images stand before the first of the user's."""
    if not num_images or not all(isinstance(message["content"], str) for message in messages):
        return messages
    first = next(place for place, message in enumerate(messages) if message["role"] == "user")
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": messages[first]["content"]}]
    return [*messages[:first], {"role": "user", "content": parts}, *messages[first + 1 :]]


def _image(image: Any, folder: Path, where: str) -> Any:
    if isinstance(image, Mapping):
        image = Image.open(io.BytesIO(image["bytes"])) if image.get("bytes") else image.get("path")
    return existing_image(folder / image, where) if isinstance(image, str | Path) else image


def existing_image(path: Path, where: str) -> Path:
    """The path of an image file that is there; else `ValueError`, whose message begins with `where`."""
    if not path.is_file():
        raise ValueError(f"{where} shows {path}, and there is no such file.")
    return path
