"""How data are named on the command line.

`vqav2:FOLDER` and its like are local copies of a benchmark's files; a `.parquet`, `.json` or `.jsonl` file, or a
folder, holds rows in the conversational form; anything else is a data set on the Hub.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk

from ...tasks.stored_images import hub_caches, with_undecoded_images
from .benchmarks import BENCHMARKS, read_benchmark
from .examples import ConversationExamples, EvaluationData

DEFAULT_SPLIT = "test"
FILE_FORMATS = (".parquet", ".json", ".jsonl")


def read_data(
    name: str, split: str | None = None, images: Path | None = None, trust_image_paths: bool = False
) -> EvaluationData:
    """
    Reads what is to be asked.

    Args:
        name: see above.
        split: by default `"test"`, or of a benchmark the one whose answers are public. A file and what
            `Dataset.save_to_disk` wrote have no splits.
        images: folder that paths of images are relative to; by default the folder of a file, or where the benchmark
            has them.
        trust_image_paths: follow paths of images that lead out of that folder, absolute, with `..` or by a link.

    Raises:
        ValueError: if there are no such data, or they have another form; the message says what is expected.
    """
    benchmark, colon, folder = name.partition(":")
    if colon and benchmark in BENCHMARKS:
        return read_benchmark(benchmark, Path(folder), split, images, trust_image_paths)
    path = Path(name)
    if path.is_file():
        rows, folder, split = _rows_of_file(path), path.parent, split or path.stem
    elif path.suffix in FILE_FORMATS:
        raise ValueError(f"`data` is {name!r}, and there is no such file.")
    else:
        split = split or DEFAULT_SPLIT
        rows, folder = _rows_of_data_set(name, split), path if path.is_dir() else Path(hub_caches()[0])
    if not isinstance(rows, list):
        rows = with_undecoded_images(rows)
    examples = ConversationExamples(rows, images or folder, trust_image_paths=trust_image_paths)
    return EvaluationData(name, split, examples)


def _rows_of_file(path: Path) -> Sequence[Any]:
    if path.suffix not in FILE_FORMATS:
        raise ValueError(f"`data` is {str(path)!r}; files that can be read are {', '.join(FILE_FORMATS)}.")
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=str(path), split="train")
    try:
        # Some editors write a mark before the first character.
        text = path.read_text(encoding="utf-8-sig")
        # Not `splitlines`: strings may have line breaks of Unicode's in them.
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`data` is {str(path)!r}, which is not {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"`data` is {str(path)!r}; expected is a list of objects, one for each question.")
    return rows


def _rows_of_data_set(name: str, split: str) -> Sequence[Any]:
    path = Path(name)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = load_from_disk(name)
        if isinstance(loaded, DatasetDict) and split not in loaded:
            raise ValueError(f"`split` is {split!r}; {name!r} has {', '.join(loaded)}.")
        return loaded[split] if isinstance(loaded, DatasetDict) else loaded
    try:
        return load_dataset(name, split=split)
    except Exception as error:
        benchmarks = ", ".join(f"{benchmark}:FOLDER" for benchmark in BENCHMARKS)
        raise ValueError(
            f"`data` is {name!r} and `split` {split!r}, which cannot be read ({error}). Allowed are pages, "
            f"digit-scenes, {benchmarks}, a file ({', '.join(FILE_FORMATS)}), a folder, or a data set on the Hub."
        ) from error
