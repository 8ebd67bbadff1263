"""`adavtp merge`: from an adapter and its base to a checkpoint that needs neither."""

from pathlib import Path
from typing import Annotated

import typer

from .console import console, trusts_remote_code


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.", exists=True, file_okay=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write: a new or an empty one.")],
    base: Annotated[
        str | None,
        typer.Option(help="Checkpoint that the adapter was trained on. Default: the one that it names."),
    ] = None,
) -> None:
    """
    Merge an adapter into its base checkpoint; write a folder that loads without adavtp and peft.

    The base is loaded as it is stored, also where the adapter was trained over four bits of it: what is merged is not
    rounded to them.
    """
    from transformers.utils import logging

    from ..trainer.adapter_folders import base_of, merge_adapter

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = base_of(adapter) if base is None else base
    with console.status(f"Merging {adapter} into {base} ..."):
        folder = merge_adapter(adapter, output, base, trusts_remote_code())
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    console.print(f"{folder}: {base} with {adapter}, {size:.1f} MB of weights")
