"""Questions with pictures and right answers.

An example is what an evaluation asks. Here they come from rows in the conversational form of Hugging Face, where the
last turn of the assistant is the right answer; `benchmarks.py` reads the files of the usual benchmarks. Which
data a run was made of is known by a hash of all of it, so that answers to different questions never meet in one table.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ...tasks.conversation_rows import UnreadableRecord, read_conversation, turns_column
from ...tasks.stored_images import embedded_image, image_file, opened_image

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
        category_metrics: categories -> the metric module that says more of their answers, for reports.
        max_new_tokens: length limit of an answer, unless an evaluation is told.
    """

    name: str
    split: str
    examples: Sequence[Example]
    metric: str = DEFAULT_METRIC
    category_metrics: dict[str, str] = field(default_factory=dict)
    max_new_tokens: int = 16

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
            folder, trusts = examples.image_folder, examples.trust_image_paths
            return replace(self, examples=ConversationExamples(examples.rows, folder, number, trusts))
        return replace(self, examples=examples[:number])


def _image_identity(image: Any) -> bytes:
    if isinstance(image, Path):
        return f"{image.name} {image.stat().st_size}".encode()
    return f"{image.mode} {image.size}".encode() + image.tobytes()


class ConversationExamples(Sequence[Example]):
    """
    Rows in the conversational form, read when an example is looked at.

    A row has a conversation in one of the forms that training reads (see [`common_row`]), of which the last turn is
    the assistant's and the right answer; or, with its images, `prompt` and `completion`, both messages or both text.
    It may have `id` or `question_id`, `category`, `choices`, and `answers`, a list that takes the place of the
    assistant's turn.

    Args:
        rows: a data set or a list of dictionaries.
        image_folder: what paths of images are relative to.
        num_examples: how many of the rows, from the first; by default all.
        trust_image_paths: follow paths of images that lead out of `image_folder`.

    Raises:
        ValueError: when a row is looked at that has another form, or names an image that is not there or not in the
            folder; the message says which row.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        image_folder: Path = Path(),
        num_examples: int | None = None,
        trust_image_paths: bool = False,
    ) -> None:
        self.rows, self.image_folder, self.trust_image_paths = rows, image_folder, trust_image_paths
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
        messages, images = _conversation(row, where)
        before, answers = _question_and_answers(row, messages, where)
        if not isinstance(row.get("category"), str | int | None):
            raise ValueError(f"{where} has `category` {row['category']!r}; expected is text.")
        images = [self._image(image, where) for image in images if image is not None]
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

    def _image(self, image: Any, where: str) -> Any:
        """An image that is none yet: stored bytes decoded, a name as the path of a file that is there."""
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path") or image.get("url")
        try:
            if isinstance(image, str) and (embedded := embedded_image(image)) is not None:
                image = embedded
            if isinstance(image, bytes):
                return opened_image(image)
        except ValueError as error:
            raise ValueError(f"{where} shows an image that cannot be read: {error}") from error
        if isinstance(image, str | Path):
            return existing_image(str(image), self.image_folder, where, self.trust_image_paths)
        if not isinstance(image, Image.Image):
            raise ValueError(f"{where} shows {image!r}; expected is an image, or the path of one.")
        return image


def _conversation(row: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages with lists of parts, without the empty fields that the common form gives every part; the images."""
    record = dict(row)
    if row.get("prompt") is not None:
        before, after = _as_messages(row["prompt"], "user"), _as_messages(row.get("completion") or [], "assistant")
        if not isinstance(before, list) or not isinstance(after, list):
            raise ValueError(f"{where} has a `prompt` or a `completion` that is neither text nor messages.")
        record["messages"] = [*before, *after]
    elif turns_column([name for name, value in row.items() if value is not None]) is None:
        raise ValueError(
            f"{where} has the fields {', '.join(row)}; expected are `messages`, or `prompt` and `completion`."
        )
    try:
        messages, given = read_conversation(record)
        if given["video"] or any(part["type"] == "video" for message in messages for part in message["content"]):
            raise UnreadableRecord("it shows a video, and questions are asked about images; show frames as images")
    except UnreadableRecord as error:
        raise ValueError(f"{where} cannot be read: {error}.") from error
    return [
        message | {"content": [_without_empty(part) for part in message["content"]]} for message in messages
    ], given["image"]


def _without_empty(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if value is not None}


def _as_messages(said: Any, role: str) -> Any:
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _question_and_answers(
    row: Mapping[str, Any], messages: list[dict[str, Any]], where: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """The conversation before the answer, and the right answers."""
    answers = _texts(row, "answers", where)
    is_answered = messages[-1]["role"] == "assistant"
    before, after = (messages[:-1], messages[-1:]) if is_answered else (messages, [])
    if not before or before[-1]["role"] != "user":
        raise ValueError(f"{where} has no user's turn before the answer.")
    if answers is None:
        if not after:
            raise ValueError(f"{where} does not end with a turn of the assistant's, which is the right answer.")
        answers = ["".join(part["text"] for part in after[0]["content"] if part["type"] == "text").strip()]
    return before, answers


def _texts(row: Mapping[str, Any], field: str, where: str) -> list[str] | None:
    """A column of lists of strings, which may be missing or empty."""
    texts = row.get(field)
    if texts is None or texts == []:
        return None
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where} has `{field}` {texts!r}; expected is a list of strings.")
    return list(texts)


def existing_image(name: str, folder: Path, where: str, trust_paths: bool = False) -> Path:
    """
    The path of an image file that is there, by its name in the data; else `ValueError`, whose message begins with
    `where`.
    """
    try:
        path = image_file(name, folder, trust_paths)
    except ValueError as error:
        raise ValueError(f"{where} shows {name[:200]!r}: {error}.") from error
    if not os.path.isfile(path):
        raise ValueError(f"{where} shows {path}, and there is no such file.")
    return path
