"""LLaVA's instruction files (LLaVA-Instruct-150k, mix665k and all that are written like them) as a data set.

    [{"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]}]

A file of a gigabyte is read record by record and written once, as an Arrow file in the cache of `datasets` that is
mapped into memory from then on; the images stay files. What the file says is kept by the hash of its content.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ...tasks.conversation_rows import ROW_VERSION, common_row, row_features

if TYPE_CHECKING:
    from datasets import Dataset

# Characters read at once.
CHUNK = 2**20
# Digits of a number that Python reads.
_LONGEST_NUMBER = 4300


def load_llava_instruct(
    path: str | Path,
    images: str | Path | None = None,
    cache_dir: str | Path | None = None,
    trust_image_paths: bool = False,
) -> "Dataset":
    """
    Builds, or finds in the cache, the rows of a file of conversations.

    A record that cannot be read, and a line that is no JSON in a file of lines, becomes a row with its `problem`.

    Args:
        path: a JSON file with a list of records, or with one record a line. Records have LLaVA's form, or any other
            that [`common_row`] understands.
        images: folder that paths of images and videos are relative to, by default the file's own. It need not be
            complete: a missing image is noticed when its row is read. So is a path that leads out of the folder,
            absolute, with `..` or by a link: the row is rejected.
        cache_dir: where `datasets` keeps what it builds; its own default if `None`.
        trust_image_paths: follow paths that lead out of the folder, too.

    Returns:
        Map-style rows of the common form, in the file's order. The id of a record without one is `file.json:N`, with
        N its number in the file from 0 (for lines: the line's number from 1).

    Raises:
        ValueError: if there is no such file or folder, or the file has no records or is neither a JSON list nor JSON
            lines.
    """
    path = Path(path)
    folder = path.parent if images is None else Path(images)
    if not path.is_file():
        raise ValueError(f"`path` is '{path}', and there is no such file; expected is a JSON file of conversations.")
    if not folder.is_dir():
        raise ValueError(f"`images` is '{folder}', and there is no such folder; pass the folder of the images.")
    from datasets import Dataset, NamedSplit
    from datasets.exceptions import DatasetGenerationError

    with path.open("rb") as file:
        content_hash = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        return Dataset.from_generator(
            _rows,
            features=row_features(),
            cache_dir=None if cache_dir is None else str(cache_dir),
            gen_kwargs={
                "path": str(path.resolve()),
                "image_folder": str(folder.resolve()),
                "trust_image_paths": trust_image_paths,
                "content_hash": content_hash,
                "version": ROW_VERSION,
            },
            split=NamedSplit("train"),
        )
    except DatasetGenerationError as error:
        # `datasets` wraps what the generator raised; what helps is the cause.
        raise ValueError(str(error.__cause__)) from error


def _rows(
    path: str, image_folder: str, trust_image_paths: bool, content_hash: str, version: int
) -> Iterator[dict[str, Any]]:
    place = None
    for place, record in read_records(Path(path)):
        if isinstance(record, Exception):
            yield common_row(None, place) | {"problem": f"the line is no JSON: {record}"}
        else:
            yield common_row(record, place, image_folder, trust_image_paths)
    if place is None:
        raise ValueError(f"`path` is '{path}', a list without records; expected are conversations.")


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """
    The records of a JSON list or of JSON lines with their places, `file.json:N`, a chunk of the file in memory. A line
    that is no JSON gives its error; a file that is empty or not JSON raises `ValueError`.
    """
    # Bytes that are no UTF-8 become characters that `common_row` rejects, so that they cost their own record alone.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        begin = 1
        while (first := file.read(1)).isspace():
            begin += 1
        if not first:
            raise ValueError(f"`path` is '{path}', which is empty; expected are records of conversations.")
        if first != "[":
            file.seek(0)
        for number, record in _list_records(file, path, begin) if first == "[" else _line_records(file, path):
            yield f"{path.name}:{number}", record


def _line_records(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_int=_whole_number)
        except (ValueError, RecursionError) as error:
            # By its name a file has lines; of any other, the first one tells whether it has.
            if number == 1 and path.suffix != ".jsonl":
                raise ValueError(
                    f"`path` is '{path}', which is neither a JSON list nor has one JSON object a line: {error}."
                ) from error
            record = error
        yield number, record


def _whole_number(digits: str) -> int | str:
    """Python refuses to read longer ones, which would cost the whole file; as text they cost nothing."""
    return int(digits) if len(digits) <= _LONGEST_NUMBER else digits


def _list_records(file: TextIO, path: Path, begin: int) -> Iterator[tuple[int, Any]]:
    """
    The items of a list whose opening bracket, character number `begin`, has been read. An item that the text in memory
    cuts off is parsed again with more of the file.
    """
    decoder, number, chunk = json.JSONDecoder(parse_int=_whole_number), 0, CHUNK
    text, place, is_end = "", 0, False
    while True:
        place = _next_character(text, place)
        if text[place : place + 1] == "]":
            _require_end(text[place + 1 :], file, path, number)
            return
        try:
            record, end = decoder.raw_decode(text, place)
            end = _next_character(text, end)
            is_whole = text[end : end + 1] in (",", "]")
            problem = f"after item {number} there is {text[end : end + 20]!r}, expected is ',' or ']'"
        except json.JSONDecodeError as error:
            is_whole, problem, end = False, f"item {number}: {error.msg}", error.pos
        except RecursionError as error:
            raise ValueError(f"`path` is '{path}', in which item {number} is nested too deeply to be read.") from error
        if is_whole:
            yield number, record
            place = end + (text[end] == ",")
            number, chunk = number + 1, CHUNK
            continue
        if is_end:
            raise ValueError(f"`path` is '{path}', which is no whole JSON list; {problem}{_at(path, begin + end)}.")
        begin += place
        more = file.read(chunk)
        # A broken item is found broken only when the whole rest has been looked at: in growing chunks, so that the
        # time stays in proportion to the file.
        text, place, is_end, chunk = text[place:] + more, 0, not more, 2 * chunk


def _at(path: Path, place: int) -> str:
    """Line and column, from 1, of the character behind so many."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        before = file.read(place)
    return f" (line {before.count(chr(10)) + 1}, column {place - before.rfind(chr(10))})"


def _require_end(text: str, file: TextIO, path: Path, number: int) -> None:
    """A second list behind the first, of files that were put together, would not be read."""
    while text or (text := file.read(CHUNK)):
        if rest := text.strip():
            raise ValueError(
                f"`path` is '{path}', in which {rest[:20]!r} stands behind a list of {number}; expected is one list."
            )
        text = ""


def _next_character(text: str, place: int) -> int:
    """Where the next character is that is not white space."""
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place
