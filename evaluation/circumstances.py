"""With which versions, on what machine and with which weights something is measured."""

import hashlib
import platform
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download

# Bytes; shards of large models are not read whole.
_HASHED_AT_ONCE = 2**24

# A path from the root, a home or a drive, behind what stands before it in an argument, as in vqav2:/data/vqa.
_PLACE = re.compile(r"((?:[\w.-]+[:=])*?)((?:/|~|[A-Za-z]:[\\/]|\\\\).*)", re.DOTALL)
_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://")


def circumstances() -> dict[str, Any]:
    """`versions` and `machine` of this process."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "adavtp": version("adavtp"),
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def checkpoint_name(checkpoint: str | Path) -> str:
    """What runs and reports call a checkpoint: a folder's name, or the Hub repository's."""
    return Path(checkpoint).name if Path(checkpoint).is_dir() else str(checkpoint)


def without_place(text: str) -> str:
    """
    A file or folder by its name alone, where its path would tell others whose machine it lies on; also behind a `:` or
    a `=`. Relative paths, addresses and everything else stay as they are.
    """
    found = None if _ADDRESS.match(text) else _PLACE.fullmatch(text)
    return text if found is None else found[1] + re.split(r"[\\/]", found[2].rstrip("\\/"))[-1]


def command_without_places(command: str) -> str:
    """Commands, a line for each, with [`without_place`] for each of their arguments."""
    try:
        lines = [shlex.split(line) for line in command.split("\n")]
    except ValueError:
        return without_place(command)
    return "\n".join(shlex.join(map(without_place, line)) for line in lines)


def checkpoint_hash(checkpoint: str | Path) -> str:
    """SHA-256 of a checkpoint's configuration and weights; a folder's, or those of a Hub repository in the cache."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(checkpoint), local_files_only=True))
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(_HASHED_AT_ONCE):
                digest.update(block)
    return digest.hexdigest()
