"""What the tasks beside this file show and ask, from rows with `image`, `question`, `answer` and `choices`."""

from typing import Any


def images(row: dict[str, Any]) -> list[Any]:
    """The scene."""
    return [row["image"]]


def no_image_or_more(row: dict[str, Any]) -> list[Any]:
    """Nothing, the scene, or the scene twice, in turns."""
    return [row["image"]] * (row["index"] % 3)


def right_choice(row: dict[str, Any]) -> int:
    """The place of the answer among the choices."""
    return row["choices"].index(row["answer"])
