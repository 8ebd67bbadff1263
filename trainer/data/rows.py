"""The common form of conversational data: what every source's records become before anything else looks at them.

    {"id": "000000033471", "images": [{"bytes": None, "path": "coco/train2017/000000033471.jpg"}], "problem": None,
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]}]}

Images stay as they were stored, undecoded. A record that cannot be put into this form still becomes a row, with the
reason in `problem`, so that whoever reads the rows can count it; nothing is dropped here.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Features

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

UNDERSTOOD = (
    "'conversations' (LLaVA: turns of 'from' and 'value') with 'image' or 'images'; 'messages' (turns of 'role' and "
    "'content') with 'image' or 'images'; 'texts' (pairs of 'user' and 'assistant') with 'images'"
)


def row_features() -> "Features":
    """The columns of the common form, for `datasets`."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    return Features(
        {
            "id": text,
            "images": List(Image(decode=False)),
            "messages": List({"role": text, "content": List({"type": text, "text": text})}),
            "problem": text,
        }
    )


def turns_column(columns: Collection[str]) -> str | None:
    """Which of the columns has the turns: `"messages"`, `"conversations"`, `"texts"`, or `None` if none has."""
    return next((name for name in ("messages", "conversations", "texts") if name in columns), None)


def common_row(record: Any, default_id: str, image_folder: Path | None = None) -> dict[str, Any]:
    """
    A record of any understood form as a row of the common form.

    Args:
        record: `{"conversations": ..., "image": ...}` and the like; see [`UNDERSTOOD`].
        default_id: the row's id where the record has no `id`, or one that is not a string or a whole number.
        image_folder: what paths of images are relative to; `None` leaves them as they are.

    Returns:
        `id`, `images`, `messages` and `problem`. Where `problem` is not `None`, there are no messages.
    """
    row = {"id": default_id, "images": [], "messages": [], "problem": None}
    try:
        row["id"] = _id(record, default_id)
        images = _images(record, image_folder)
        return row | {"messages": _messages(record, len(images)), "images": images}
    except _UnreadableRecord as problem:
        return row | {"problem": str(problem)}


class _UnreadableRecord(ValueError):
    """Why a record cannot be put into the common form."""


def _id(record: Any, default_id: str) -> str:
    if not isinstance(record, dict):
        raise _UnreadableRecord(f"the record is {_shown(record)}; expected is an object with {UNDERSTOOD}")
    given = record.get("id")
    return _whole(str(given)) if isinstance(given, str | int) and not isinstance(given, bool) else default_id


def _images(record: dict[str, Any], image_folder: Path | None) -> list[dict[str, Any]]:
    """`image` or `images`, one or several, each a path, bytes, or both in the form of `datasets`."""
    given = record.get("images")
    if given is None:
        given = record.get("image")
    given = [] if given is None or given == "" else given if isinstance(given, list) else [given]
    return [_image(image, image_folder) for image in given]


def _image(image: Any, image_folder: Path | None) -> dict[str, Any]:
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if isinstance(image, str):
        image = {"bytes": None, "path": _whole(image)}
    if not isinstance(image, dict):
        raise _UnreadableRecord(f"an image is {_shown(image)}; expected is a path or an encoded image")
    content, path = image.get("bytes"), image.get("path")
    if content is None and path is not None and image_folder is not None:
        path = str(image_folder / path)
    return {"bytes": content, "path": path}


def _messages(record: dict[str, Any], num_images: int) -> list[dict[str, Any]]:
    column = turns_column([name for name, value in record.items() if value is not None])
    turns = record[column] if column else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        found = f"`{column}` is {_shown(turns)}" if column else f"the record has the fields {_shown(sorted(record))}"
        raise _UnreadableRecord(f"{found}; understood are {UNDERSTOOD}")
    if column == "texts":
        turns = [{"role": role, "content": turn.get(role)} for turn in turns for role in ("user", "assistant")]
    messages = [_message(turn) for turn in turns]
    return messages if column == "conversations" else _with_images_first(messages, num_images)


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in ROLES:
        raise _UnreadableRecord(f"a turn is by {_shown(role)}; understood are {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"role": ROLES[role], "content": content_parts(content)}
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return {"role": ROLES[role], "content": [_part(part) for part in content]}
    raise _UnreadableRecord(f"a turn says {_shown(content)}; expected is text, or a list of parts")


def _part(part: dict[str, Any]) -> dict[str, str | None]:
    kind, text = part.get("type"), part.get("text")
    if kind == "image":
        return {"type": "image", "text": None}
    if kind != "text" or not isinstance(text, str):
        raise _UnreadableRecord(f"a part of a message is {_shown(part)}; understood are types 'image' and 'text'")
    return {"type": "text", "text": _whole(text)}


def content_parts(text: str) -> list[dict[str, str | None]]:
    """
    A turn's text as parts, with an image wherever `<image>` stands in it. The line break that LLaVA's files write
    between the placeholder and the text belongs to the placeholder, for a chat template writes its own.
    """
    first, *others = re.split(rf"\n?{PLACEHOLDER}\n?", _whole(text))
    parts: list[dict[str, str | None]] = [{"type": "text", "text": first}] if first or not others else []
    for other in others:
        parts.append({"type": "image", "text": None})
        if other:
            parts.append({"type": "text", "text": other})
    return parts


def _whole(text: str) -> str:
    """JSON can spell half of a surrogate pair, and a file can have bytes that are no text: none can be written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _UnreadableRecord(
            f"{_shown(text)} is no Unicode text: character {error.start} is half of a surrogate pair, or was a byte "
            "that is no UTF-8"
        ) from None
    return text


def _with_images_first(messages: list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Where no message says where the images are, they stand before the first words of the user, as TRL has it."""
    if any(part["type"] == "image" for message in messages for part in message["content"]):
        return messages
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is not None:
        first["content"] = [{"type": "image", "text": None}] * num_images + first["content"]
    return messages


def _shown(value: Any) -> str:
    # Also escapes what cannot be written to a file.
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
