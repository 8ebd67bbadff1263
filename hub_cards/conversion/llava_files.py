"""The files of a published checkpoint: where they are, and their tensors.

A checkpoint is a local folder or a repository on the Hub. Its weights lie in one file or in several with an index
beside them, as safetensors or as pickles.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...modeling.hub.own_files import indexed_files, require_own_files
from ..publish import HTTPError

# In the order in which transformers looks for them.
LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# The last is what LLaVA's training leaves without the language model.
_WEIGHTS = (
    ["model*.safetensors"],
    ["pytorch_model*.bin"],
    ["adapter_model.*", "non_lora_trainables.bin", "mm_projector.bin"],
)
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*chat_templates/*.jinja"]
_SHOWN = 5


def read_json(file: Path) -> dict[str, Any]:
    """
    A file's fields; none where there is no file.

    Raises:
        ValueError: if it is no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{str(file)!r} holds a {type(fields).__name__}; expected is a JSON object.")
    return fields


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a weight file by name. They are mapped into memory and not read into it: one costs nothing before
    it is computed with, and all of them no more than the file.

    Args:
        path: a safetensors file, or a pickle that `torch.save` wrote, of which only tensors are read.

    Raises:
        OSError: if the file is damaged, or a pickle of something else than tensors by name.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise OSError(f"{str(path)!r} is not a whole safetensors file ({error}); download it again.") from error
    try:
        # Pickles from before torch 1.6 are no zip files, and can only be read whole.
        tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise OSError(f"{str(path)!r} cannot be read as a pickle of tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise OSError(f"{str(path)!r} holds a {type(tensors).__name__}; expected are tensors by name.")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """
    The weight files of a folder, in the order of their names.

    Raises:
        OSError: if there are none, or a file or a tensor that an index lists is missing.
    """
    for single, index in LAYOUTS:
        if (folder / index).is_file():
            return _indexed_files(folder / index)
        if (folder / single).is_file():
            return [folder / single]
    expected = ", ".join(repr(name) for names in LAYOUTS for name in names)
    raise OSError(f"{str(folder)!r} has no weights; expected is one of {expected}.")


def _indexed_files(index: Path) -> list[Path]:
    place = indexed_files(index)
    files = [index.parent / name for name in sorted(set(place.values()))]
    if absent := [path.name for path in files if not path.is_file()]:
        raise OSError(f"{str(index)!r} lists files that are not beside it: {', '.join(absent[:_SHOWN])}.")
    for path in files:
        if lost := sorted({name for name, file in place.items() if file == path.name} - tensors_of(path).keys()):
            raise OSError(f"{str(path)!r} lacks tensors that the index says it has: {', '.join(lost[:_SHOWN])}.")
    return files


def checkpoint_folder(source: str, weights: bool = True, revision: str | None = None) -> Path:
    """
    A checkpoint as a local folder, see [`_folder_of`], whose files name none outside of it.

    Raises:
        ValueError: if one does.
    """
    folder = _folder_of(source, weights, revision)
    require_own_files(folder)
    return folder


def _folder_of(source: str, weights: bool, revision: str | None) -> Path:
    """
    A checkpoint as a local folder. From the Hub, only what is needed is downloaded: configuration, tokenizer, image
    processor, and of the weights the safetensors files where there are some.

    Args:
        source: a folder or a repository id.
        weights: whether its weights are needed.
        revision: branch, tag or commit, on the Hub.

    Raises:
        OSError: if there is neither such a folder nor such a repository, or the Hub is out of reach and an earlier
            download is not there either.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        patterns = _SMALL_FILES + (_weight_patterns(source, revision) if weights else [])
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise OSError(f"{source!r} is neither a folder nor a repository on the Hub that can be read.") from error
    except HfHubHTTPError:
        raise
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError) as unreachable:
        try:
            return _cached_folder(source, weights, revision)
        except LocalEntryNotFoundError:
            raise OSError(
                f"{source!r} is no folder here, and the Hub cannot be asked for it: {unreachable}"
            ) from unreachable


def _weight_patterns(source: str, revision: str | None) -> list[str]:
    names = HfApi().list_repo_files(source, revision=revision)
    for layout, patterns in zip(LAYOUTS, _WEIGHTS, strict=False):
        if any(name in names for name in layout):
            return patterns
    return _WEIGHTS[2]


def _cached_folder(source: str, weights: bool, revision: str | None) -> Path:
    """What an earlier download left, where the Hub is out of reach: safetensors files if they are there."""
    for patterns in _WEIGHTS if weights else [[]]:
        wanted = _SMALL_FILES + patterns
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted, local_files_only=True))
        if any(path for pattern in patterns for path in folder.glob(pattern)):
            break
    return folder
