"""From a row of conversational data to what a batch is made of: token ids, targets and decoded images.

In hundreds of thousands of rows some images are cut off, some files are missing and some conversations do not fit.
Such a row is rejected with its id and a reason that says what to do, and is never repaired, shortened or passed over
in silence. How long a row is can be asked before any image is opened.
"""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from jinja2 import TemplateError
from PIL import Image, ImageOps, UnidentifiedImageError

from ..modeling.processing_adavtp import AdaVTPProcessor, readable_images
from .conversation import count_tokens, encode_conversation, image_placeholders

Result = TypeVar("Result")


class RejectedSample(ValueError):
    """
    A row that cannot be trained on.

    Attributes:
        id: of the row.
        reason: what is wrong with it.
        kind: of the reason: `"conversation"`, `"image"` or `"length"`.
    """

    def __init__(
        self, id: str, reason: str, kind: Literal["conversation", "image", "length"] = "conversation"
    ) -> None:
        super().__init__(f"Sample {id!r}: {reason}")
        self.id, self.reason, self.kind = id, reason, kind

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # A data loader's workers hand exceptions over pickled, and by default that keeps the message alone.
        return type(self), (self.id, self.reason, self.kind)


@dataclass
class ReadConversation:
    """
    Attributes:
        id: of the row.
        input_ids: token ids, with every image's placeholders at full budget.
        labels: the same length; the token where the assistant speaks, -100 elsewhere.
        images: upright, RGB, in the order of their placeholders.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    images: list[Image.Image]


class ConversationReader:
    """
    Reads rows with the columns `id`, `images` and `messages`, as [`load_conversations`] gives them.

    Args:
        processor: tokenizer, image processor and chat template; the image processor makes images of one size.
        max_length: tokens that a row may have at most, counted at full budget; `None` for no limit.

    Raises:
        ValueError: if `max_length` is below 1, or the number of an image's tokens depends on the image.
    """

    def __init__(self, processor: AdaVTPProcessor, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` is {max_length}; allowed are whole numbers from 1, or None for no limit.")
        self.processor, self.max_length = processor, max_length
        self.num_image_tokens = image_placeholders(processor)

    def lengths(self, row: dict[str, Any]) -> tuple[int, int]:
        """
        How long a row is. No image is opened.

        Returns:
            The number of tokens that are not an image's, and the number of images. Of N visual tokens for an image at
            budget b, the row has `num_text_tokens + num_images * floor(b * N)` tokens.

        Raises:
            RejectedSample: for what can be seen without opening images.
        """
        num_images = self._num_images(row)
        num_text_tokens, num_shown = self._in_template(row, count_tokens, row["messages"])
        self._check(_id(row), num_text_tokens, num_shown, num_images)
        return num_text_tokens, num_images

    def read(self, row: dict[str, Any]) -> ReadConversation:
        """
        Encodes a row and decodes its images. Photographs are turned upright as their EXIF orientation says, as they
        are when the model is asked about a file.

        Raises:
            RejectedSample: if the conversation cannot be read, its images and its placeholders do not agree, it has
                more than `max_length` tokens, or an image is missing or broken.
        """
        num_images = self._num_images(row)
        encoded = self._in_template(row, encode_conversation, row["messages"], self.num_image_tokens)
        num_placeholders = encoded.input_ids.count(self.processor.image_token_id)
        num_text_tokens = len(encoded.input_ids) - num_placeholders
        self._check(_id(row), num_text_tokens, num_placeholders // self.num_image_tokens, num_images)
        images = [_decoded(image, f"images[{number}]", _id(row)) for number, image in enumerate(_images(row))]
        return ReadConversation(_id(row), encoded.input_ids, encoded.labels, images)

    def _num_images(self, row: dict[str, Any]) -> int:
        """The number of a row's images, if it is a conversation that shows as many."""
        num_images = len(_images(row))
        if problem := row.get("problem") or _problem(row["messages"], num_images):
            raise RejectedSample(_id(row), problem)
        return num_images

    def _in_template(self, row: dict[str, Any], take: Callable[..., Result], *arguments: Any) -> Result:
        try:
            return take(self.processor, *arguments)
        except (TemplateError, ValueError) as error:
            raise RejectedSample(_id(row), f"the conversation does not fit the chat template: {error}") from error

    def _check(self, id: str, num_text_tokens: int, num_shown: int, num_images: int) -> None:
        if num_shown != num_images:
            raise RejectedSample(
                id,
                f"the conversation in the chat template shows {num_shown} image(s) and the row has {num_images}; a "
                f"text may not have {self.processor.image_token!r} in it, and the template has to print every image",
            )
        num_visual = num_images * self.num_image_tokens
        if self.max_length is not None and num_text_tokens + num_visual > self.max_length:
            raise RejectedSample(
                id,
                f"{num_text_tokens + num_visual} tokens, {num_visual} of them visual, are more than `max_length`, "
                f"{self.max_length}",
                "length",
            )


def _id(row: dict[str, Any]) -> str:
    return str(row.get("id", "without id"))


def _images(row: dict[str, Any]) -> list[Any]:
    # A data set that keeps one image in a column has None there for a row without one.
    return [image for image in row.get("images") or [] if image is not None]


def _problem(messages: list[dict[str, Any]] | None, num_images: int) -> str | None:
    """What is wrong with a conversation apart from its words, or `None`."""
    if not messages:
        return "there are no messages"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [("user", "assistant")[index % 2] for index in range(len(turns))]:
        return f"the turns are {', '.join(roles)}; user and assistant take turns, the user first"
    if "assistant" not in roles:
        return "the assistant says nothing, so that there is nothing to learn"
    shown = Counter(message["role"] for message in messages for part in _parts(message) if part["type"] == "image")
    if others := sorted(set(shown) - {"user"}):
        return f"an image is shown by {' and '.join(others)}; only the user shows images"
    if shown["user"] != num_images:
        return f"the messages show {shown['user']} image(s) and the row has {num_images}"
    return None


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _decoded(image: Any, name: str, id: str) -> Image.Image:
    """An image as `datasets` stores it (or already a PIL image), upright and as RGB."""
    try:
        opened = image if isinstance(image, Image.Image) else _opened(_content(image))
        return readable_images([_upright(opened)])[0]
    except (OSError, ValueError) as error:
        place = image.get("path") if isinstance(image, dict) else None
        where = f"{name} ({place})" if place else name
        raise RejectedSample(id, f"{where}: {str(error).removeprefix('`images[0]` ')}", "image") from error


def _upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    # As decoders do, Pillow's reader of EXIF raises what it likes: SyntaxError, struct.error.
    except Exception as error:
        raise ValueError(f"its EXIF data cannot be read: {error}") from error


def _content(image: Any) -> bytes:
    if not isinstance(image, dict):
        raise ValueError(f"is a {type(image).__name__}; expected is a dictionary of `bytes` and `path`")
    content, path = image.get("bytes"), image.get("path")
    if content is None and path is None:
        raise ValueError("there are neither bytes nor a path")
    if content is None:
        if not Path(path).is_file():
            raise ValueError("there is no such file; see that `images` names the folder that paths are relative to")
        content = Path(path).read_bytes()
    if not content:
        raise ValueError("the file is empty")
    return content


def _opened(content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return image
    except UnidentifiedImageError as error:
        raise ValueError(f"no image format that Pillow knows begins with {content[:16]!r}") from error
    # Decoders raise what they like for a broken file: OSError, SyntaxError, ValueError, struct.error.
    except Exception as error:
        raise ValueError(f"cannot be decoded: {error}") from error
