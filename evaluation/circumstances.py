"""With which versions, on what machine and with which weights something is measured."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download

# Bytes; shards of large models are not read whole.
_HASHED_AT_ONCE = 2**24


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
