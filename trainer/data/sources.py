"""Conversations from where they lie, in one form and one mixture.

A source is a file of LLaVA's, a folder of parquet files, tar shards, a saved data set or one on the Hub. Its records
become rows of the common form without an image being decoded, and rows of several sources are drawn at random by
weight. If every source is map-style the mixture is one; if one is streamed the mixture is a stream, whose
`state_dict()` says exactly which row comes next.
"""

import functools
import glob
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...tasks.conversation_rows import ROW_VERSION, UNDERSTOOD, common_row, row_features, tar_row, turns_column
from ...tasks.drawn_tasks import TASK_NAMES, drawn_task
from ...tasks.stored_images import hub_caches, with_undecoded_images
from .llava_json import load_llava_instruct

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Format of a source -> its fields beside `path`, `format` and `weight`.
FIELDS = {
    "digit-scenes": ("split", "num_questions", "seed", "image_size", "cache_dir", "kinds"),
    "pages": ("split", "num_questions", "seed", "cache_dir", "kinds"),
    "json": ("images", "trust_image_paths"),
    "saved": ("images", "trust_image_paths"),
    "parquet": ("images", "trust_image_paths", "streaming"),
    "webdataset": ("streaming",),
    "hub": ("name", "split", "revision", "images", "trust_image_paths", "streaming"),
}
# What a field has to be, where what takes it does not say.
TYPES = {
    **{"images": str | Path, "trust_image_paths": bool, "streaming": bool, "format": str},
    **{"name": str, "split": str, "revision": str, "cache_dir": str | Path},
}


def load_conversations(sources: list[dict[str, Any]], seed: int = 0) -> "Dataset | IterableDataset":
    """
    Loads sources of conversations and mixes them.

    With weights, each row comes from source i with probability weight_i / sum of weights, and the mixture ends when
    every source has given all of its rows at least once (`"all_exhausted"`): small sources are repeated as their
    weight demands, and no row of any source is left out. An epoch of it has about max_i(rows_i / probability_i) rows.
    Without weights, sources of known size are mixed in proportion to their size, and every row comes exactly once.

    Args:
        sources: each `{"path": ..., ...}` with the fields of its format:

            | format | `path` | other fields |
            |---|---|---|
            | `json` | JSON or JSON lines in LLaVA's or another understood form | `images`: folder (the file's own) |
            | `parquet` | file, pattern, or folder | `streaming` (false), `images` (its folder) |
            | `webdataset` | tar file, pattern, or folder: see [`tar_row`] | `streaming` (false) |
            | `saved` | folder written by `Dataset.save_to_disk` | `images` (itself) |
            | `hub` | as for `load_dataset` | `name`, `split` ("train"), `revision`, `streaming` (false), `images` |
            | `digit-scenes` | `"digit-scenes"` | those of `load_digit_questions` |
            | `pages` | `"pages"` | those of `load_page_questions` |

            `format` is recognised by the path where it is not given. `weight` is above 0, and given for all sources
            or for none; with several sources of which one is streamed it has to be given. `images` is the folder that
            paths of images and videos are relative to, by default what stands behind it in brackets, of a local `hub`
            path that folder, else the caches of the Hub and of `datasets`. A row with a path that leads out of it,
            absolute, with `..` or by a link, is rejected; `trust_image_paths: true`, beside `images`, has them
            followed. Map-style parquet, tars and Hub data are copied into the cache of
            `datasets` twice, as read and in the common form; streamed ones are not copied.
        seed: of the drawing.

    Returns:
        Rows of [`row_features`]: `id`, `images`, `videos` (both undecoded), `image_folder`, `messages` and `problem`.
        A `Dataset` if no source is streamed, else an `IterableDataset` with `state_dict` and `load_state_dict`. Order
        within a source is kept.

    Raises:
        ValueError: if there is no source, a source has an unknown field or none of the understood columns, does not
            exist, is empty or cannot be read, or weights are missing or not above 0.
    """
    from datasets.exceptions import DatasetGenerationError

    if not sources:
        raise ValueError("`sources` is empty; pass at least one, such as {'path': 'llava_v1_5_mix665k.json'}.")
    loaded = []
    for number, source in enumerate(sources):
        try:
            loaded.append(_load(source))
        except (ValueError, FileNotFoundError, ConnectionError) as error:
            raise ValueError(f"`sources[{number}]`: {error}") from error
        except DatasetGenerationError as error:
            # `datasets` wraps what went wrong; what helps is the cause.
            raise ValueError(f"`sources[{number}]`, {source['path']!r}, cannot be read: {error.__cause__}") from error
    return _mixed(loaded, _weights(sources), seed)


def _load(source: dict[str, Any]) -> "Dataset | IterableDataset":
    """One source in the common form."""
    if not isinstance(source, dict) or not isinstance(source.get("path"), str) or not source["path"]:
        raise ValueError(f"a source is {source!r}; expected is a dictionary with a `path`.")
    path = source["path"]
    kind = source.get("format") or _format(path)
    if kind not in FIELDS:
        raise ValueError(f"`format` is {kind!r}; allowed are {', '.join(map(repr, FIELDS))}.")
    allowed = ("path", "format", "weight", *FIELDS[kind])
    if unknown := set(source) - set(allowed):
        raise ValueError(f"a {kind!r} source has unknown fields {sorted(unknown)}; allowed are {', '.join(allowed)}.")
    for name, expected in TYPES.items():
        if source.get(name) is not None and not isinstance(source[name], expected):
            raise ValueError(f"`{name}` is {source[name]!r}; expected is {_named(expected)}.")
    given = {name: source[name] for name in FIELDS[kind] if source.get(name) is not None}
    images, trusts = given.pop("images", None), given.pop("trust_image_paths", False)
    if kind == "json":
        return load_llava_instruct(path, images, trust_image_paths=trusts)
    return conversation_rows(_records(kind, path, given), path, images, trusts)


def _named(expected: Any) -> str:
    return "true or false" if expected is bool else "text"


def _format(path: str) -> str:
    if path in TASK_NAMES:
        return path
    endings = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": "webdataset"}
    if Path(path).suffix in endings:
        return endings[Path(path).suffix]
    folder = Path(path)
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return "saved"
    if any(folder.glob("*.parquet")):
        return "parquet"
    return "webdataset" if any(folder.glob("*.tar")) else "hub"


def _records(kind: str, path: str, given: dict[str, Any]) -> "Dataset | IterableDataset":
    """A source as `datasets` loads it."""
    import datasets

    if kind in TASK_NAMES:
        return drawn_task(kind).load_questions(**given)
    if kind == "saved":
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict):
            raise ValueError(f"`path` is '{path}', which has the splits {', '.join(saved)}; pass one's own folder.")
        return saved
    if kind == "hub":
        return datasets.load_dataset(path, **{"split": "train"} | given)
    if kind == "parquet":
        return datasets.load_dataset("parquet", data_files=_files(path, ".parquet"), split="train", **given)
    from .tar_shards import TarSamples

    files = _files(path, ".tar")
    _require_whole_tars(files)
    builder = TarSamples(data_files=files)
    if given.get("streaming"):
        return builder.as_streaming_dataset(split="train")
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def _files(path: str, ending: str) -> list[str]:
    if "://" in path:
        return [path]
    place = Path(path)
    found = place.rglob(f"*{ending}") if place.is_dir() else map(Path, glob.glob(path, recursive=True))
    files = sorted(str(file) for file in found if file.is_file())
    if not files:
        raise ValueError(f"`path` is '{path}', where there is no file; expected are {ending} files.")
    return files


def _require_whole_tars(files: list[str]) -> None:
    """A tar that was cut off would be read up to there and no error said. A whole one ends in 1024 zero bytes."""
    for path in map(Path, files):
        if path.suffix != ".tar" or not path.is_file():
            continue
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 1024))
            if file.read() != bytes(1024):
                raise ValueError(f"'{path}' does not end as a tar does, in 1024 zero bytes; get the whole file.")


def conversation_rows(
    records: "Dataset | IterableDataset",
    path: str,
    image_folder: str | Path | None = None,
    trust_image_paths: bool = False,
) -> "Dataset | IterableDataset":
    """
    Records of any understood columns as rows of the common form; of a stream, as they come by.

    Args:
        records: as `datasets` loaded them.
        path: from where.
        image_folder, trust_image_paths: see [`common_row`]; by default where `path` is.

    Raises:
        ValueError: if none of the columns has conversations.
    """
    columns = records.column_names or list(next(iter(records), {}))
    if "members" not in columns and turns_column(columns) is None:
        raise ValueError(f"`path` is '{path}', with the columns {columns}; understood are {UNDERSTOOD}.")
    folder = _folder_of(path) if image_folder is None else image_folder
    row = functools.partial(
        _row,
        columns=columns,
        path=path,
        image_folder=str(folder),
        trust_image_paths=trust_image_paths,
        version=ROW_VERSION,
    )
    records = with_undecoded_images(records)
    return records.map(row, with_indices=True, remove_columns=columns, features=row_features())


def _folder_of(path: str) -> Path:
    """Where images of a source lie that does not say."""
    if "://" not in path:
        # Of a pattern, what is above its first name that has one.
        folder = Path(path if not glob.has_magic(path) else path[: re.search(r"[*?[]", path).start()] + "x").absolute()
        if folder.is_dir():
            return folder
        if folder.parent.is_dir() and (glob.has_magic(path) or folder.is_file()):
            return folder.parent
    return Path(hub_caches()[0])


def _row(
    record: dict[str, Any],
    index: int,
    columns: list[str],
    path: str,
    image_folder: str,
    trust_image_paths: bool,
    version: int,
) -> dict[str, Any]:
    if "members" in columns:
        return tar_row(record["__key__"], record["members"])
    given = {name: record[name] for name in columns}
    return common_row(given, f"{path}:{index}", image_folder, trust_image_paths)


def _weights(sources: list[dict[str, Any]]) -> list[float] | None:
    weights = [source.get("weight") for source in sources]
    if all(weight is None for weight in weights):
        return None
    for number, weight in enumerate(weights):
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise ValueError(
                f"`sources[{number}]`: `weight` is {weight!r}; allowed are numbers above 0, for all sources or none."
            )
    return [weight / sum(weights) for weight in weights]


def _mixed(
    loaded: list["Dataset | IterableDataset"], probabilities: list[float] | None, seed: int
) -> "Dataset | IterableDataset":
    from datasets import Dataset, interleave_datasets

    if len(loaded) == 1:
        return loaded[0]
    are_map_style = all(isinstance(rows, Dataset) for rows in loaded)
    if are_map_style and probabilities is None:
        total = sum(map(len, loaded))
        shares = [len(rows) / total for rows in loaded]
        return interleave_datasets(loaded, shares, seed, stopping_strategy="all_exhausted_without_replacement")
    if probabilities is None:
        raise ValueError(
            "`sources` has no weights, and the size of a streamed source is not known; give each source a `weight`."
        )
    if not are_map_style:
        loaded = [rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows for rows in loaded]
    return interleave_datasets(loaded, probabilities, seed, stopping_strategy="all_exhausted")
