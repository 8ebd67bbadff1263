"""Sources of small conversations, read by index, streamed and mixed, and streams over them."""

import io
from collections.abc import Sequence
from typing import Any

import datasets
from PIL import Image
from tiny_conversations import assistant, digit_processor, picture, user

from adavtp.trainer.conversation_reader import ConversationReader
from adavtp.trainer.conversation_rows import row_features
from adavtp.trainer.conversation_stream import ConversationStream

SOURCES = ["indexed", "streamed", "mixed"]


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def stored_rows(num_rows: int, images_per_row: Sequence[int] = (1, 0, 2)) -> list[dict[str, Any]]:
    """Rows in the common form, as they are stored: `row 0` and so on, with questions of one to seven words."""
    rows = []
    for index in range(num_rows):
        num_images = images_per_row[index % len(images_per_row)]
        rows.append(
            {
                "id": f"row {index}",
                "images": [{"bytes": png(picture(10 * index + n)), "path": None} for n in range(num_images)],
                "messages": [user(" ".join(["red"] * (1 + index * 5 % 7)), num_images), assistant("yes")],
                "problem": None,
            }
        )
    return rows


def source(kind: str, rows: list[dict[str, Any]], num_shards: int = 2) -> Any:
    """The rows as a data set: "indexed", "streamed", or "mixed", two streams that are interleaved at random."""
    if kind == "mixed":
        middle = len(rows) // 2
        halves = [source("streamed", half) for half in (rows[:middle], rows[middle:])]
        return datasets.interleave_datasets(
            halves, probabilities=[0.3, 0.7], seed=1, stopping_strategy="all_exhausted_without_replacement"
        )
    data = datasets.Dataset.from_list(rows, features=row_features())
    return data if kind == "indexed" else data.to_iterable_dataset(num_shards=num_shards)


def tiny_stream(rows: Any, reader: ConversationReader | None = None, **arguments: Any) -> ConversationStream:
    """A stream of batches of four in blocks of eight rows."""
    defaults = {"batch_size": 4, "per": "sample", "block_size": 8, "seed": 1}
    return ConversationStream(rows, reader or ConversationReader(digit_processor()), **defaults | arguments)
