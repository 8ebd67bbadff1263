"""A checkpoint's files are those of its own folder.

A folder comes from somewhere, and files in it name others: an index names weight files, a configuration names code, a
link names what it likes. Followed anywhere, such names would read, and publish, what nobody meant to give away.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from transformers.utils import cached_file

from .saving import CODE_FOLDER

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_CONFIGURATIONS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_SUFFIXES = (".jinja", ".json", ".md", ".model", ".py", ".txt", ".yaml")
_OF_WEIGHTS = (".bin", ".safetensors")
_FOLDERS = (CODE_FOLDER, "additional_chat_templates", "chat_templates")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def require_own_files(source: str | PathLike[str] | None, weights: bool = True, **kwargs: Any) -> None:
    """
    That what a checkpoint names lies in it.

    Args:
        source: a folder, or a repository on the Hub.
        weights: whether its weights are read.
        kwargs: those of `from_pretrained`.

    Raises:
        ValueError: if an index, an `auto_map` or a link leads out of the folder, or an index is none.
    """
    if source is None:
        return
    if not Path(source).is_dir():
        index = INDEXES[0] if kwargs.get("use_safetensors") is not False else INDEXES[1]
        of_hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        checks = ("gated_repo", "missing_entries", "connection_errors")
        of_hub |= {f"_raise_exceptions_for_{check}": False for check in checks}
        if (path := cached_file(source, index, **of_hub)) is not None:
            indexed_files(Path(path))
        return
    folder = Path(source, kwargs.get("subfolder") or "")
    for path in [path for place in ("", *_FOLDERS) for path in sorted((folder / place).glob("*"))]:
        if path.suffix in (*_SUFFIXES, *(_OF_WEIGHTS if weights else ())) or path.name in _FOLDERS:
            require_own_file(path, source)
    for path in folder.glob("*.index*.json") if weights else ():
        for name in indexed_files(path).values():
            require_own_file(folder / name, source)
    for name in _CONFIGURATIONS:
        _check_auto_map(folder / name)


@contextmanager
def failures_in_words(what: str, source: str | PathLike[str] | None) -> Iterator[None]:
    """Whatever a reader stumbles over in a checkpoint's files is a `ValueError` that says whose they are."""
    try:
        yield
    # Readers raise what they like where a file holds a list and should hold fields, or a size is none.
    except Exception as error:
        in_words = isinstance(error, (ValueError, OSError, ImportError, torch.OutOfMemoryError))
        # Parsers do not say which file they read.
        if in_words and not isinstance(error, (json.JSONDecodeError, UnicodeError)):
            raise
        # Under a meta device transformers loads nothing, whatever the files hold, and says so.
        if torch.empty(0).is_meta:
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"The {what} in {str(source)!r} cannot be read ({said}); correct its files, or copy or download "
            "them again."
        ) from error


def require_own_file(path: Path, folder: str | PathLike[str]) -> None:
    """
    That a file is not a link to somewhere outside of its folder. The Hub's cache has files as links to its blobs.

    Raises:
        ValueError: if it is.
    """
    allowed = [os.path.realpath(folder)]
    for parent in Path(os.path.abspath(folder)).parents:
        if parent.name == "snapshots":
            allowed.append(os.path.join(os.path.realpath(parent.parent), "blobs"))
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in allowed):
        raise ValueError(
            f"{str(path)!r} is a link that leads out of its folder; put the file itself there if it belongs to it."
        )


def indexed_files(index: Path) -> dict[str, str]:
    """
    The weight files that an index names, by tensor.

    Raises:
        ValueError: if it is no index, or names a file that is not in its folder.
    """
    content = _json_of(index)
    place = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(place, dict) or not place:
        raise ValueError(f"{str(index)!r} is no index of weight files; expected is a JSON object with a `weight_map`.")
    for name in place.values():
        if not _is_inside(name):
            raise ValueError(f"`weight_map` in {str(index)!r} names {name!r}; allowed are files in the same folder.")
    return place


def _check_auto_map(configuration: Path) -> None:
    content = _json_of(configuration)
    named = content.get("auto_map") if isinstance(content, dict) else None
    entries = named.values() if isinstance(named, dict) else [named]
    references = [entry for some in entries for entry in (some if isinstance(some, list) else [some])]
    for reference in [reference for reference in references if reference is not None]:
        # `owner/name--module.Class` is a module of another repository, as transformers writes it.
        if not isinstance(reference, str) or not _is_inside(reference.rpartition("--")[2]):
            raise ValueError(
                f"`auto_map` in {str(configuration)!r} names {reference!r}; allowed are modules in the same folder."
            )


def _is_inside(name: Any) -> bool:
    """Whether a name stays in the folder that it is looked up in, on any system."""
    path = PureWindowsPath(name) if isinstance(name, str) else None
    return path is not None and bool(path.parts) and not path.anchor and ".." not in path.parts


def _json_of(file: Path) -> Any:
    """What a file holds; nothing where it is none. Whoever needs it says so."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
