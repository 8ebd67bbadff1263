"""`adavtp space`: the page of the Hub Space on this machine, or its folder for upload."""

import importlib.util
import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..modeling.hub.loading import is_stock
from .console import CheckpointArgument, console, reference_checkpoint, trusts_remote_code


def space(
    checkpoint: CheckpointArgument = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the page. Default: the first free one from 7860.", min=1, max=65535)
    ] = None,
    share: Annotated[bool, typer.Option(help="Also make a public link, through Gradio's server.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the Space of CHECKPOINT, a repository id, here instead; start nothing.")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help="For --export: folder with images and questions.json, pairs of image file and question. Default: "
            "those that are there already, else pages.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
) -> None:
    """
    Open a page with an image, a question, and a slider for the budget; it shows answer, kept patches and cost.

    An exported folder is uploaded with `hf upload OWNER/SPACE FOLDER --repo-type space`.
    """
    if export is not None:
        _export(export, checkpoint, examples)
        return
    if examples is not None:
        raise typer.BadParameter("`--examples` goes with `--export`; the one that runs here has pages.")
    if importlib.util.find_spec("gradio") is None:
        console.print(
            "The page needs Gradio, which is not installed: [bold]pip install 'gradio>=6.31,<7'[/bold], or this "
            "package with its extra \\[space]."
        )
        raise typer.Exit(2)
    if checkpoint is not None and not trusts_remote_code():
        raise typer.BadParameter(
            f"`checkpoint` is {checkpoint!r}; the page loads it as the Hub does, with the code that it brings. Add "
            "--trust-remote-code if you trust it."
        )
    checkpoint = checkpoint or str(reference_checkpoint())
    if Path(checkpoint).is_dir() and is_stock(checkpoint):
        raise typer.BadParameter(
            f"`checkpoint` is {checkpoint!r}, which has no code for a budget; `adavtp export` (of a LLaVA `adavtp "
            "convert`) makes a folder that has."
        )
    if port is not None:
        _require_free(port)
    try:
        _serve(checkpoint, port, share)
    except OSError as error:
        raise typer.BadParameter(f"`checkpoint` is {checkpoint!r}, which could not be loaded: {error}") from error


def _serve(checkpoint: str, port: int | None, share: bool) -> None:
    """Until it is interrupted. Nothing is sent anywhere, unless `share` asks for it."""
    from ..hub_cards.space_folder import SPACE

    os.environ["ADAVTP_CHECKPOINT"] = str(Path(checkpoint).resolve()) if Path(checkpoint).exists() else checkpoint
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_SHARE"] = str(share)
    if port is not None:
        # This one or none, where Gradio would go on to the next.
        os.environ |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_NUM_PORTS": "1"}
    # As `python app.py` does it, which is what the Hub runs.
    sys.path.insert(0, str(SPACE))
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")


def _require_free(port: int) -> None:
    """Before the checkpoint is loaded, which can take minutes."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise typer.BadParameter(f"`port` is {port}, which cannot be used: {error.strerror}.") from error


def _export(folder: Path, checkpoint: str | None, examples: Path | None) -> None:
    from ..hub_cards.space_folder import SPACE, space_folder

    if checkpoint is None:
        raise typer.BadParameter("`--export` needs CHECKPOINT, the id of a repository that the Space is to load.")
    if Path(checkpoint).is_dir():
        raise typer.BadParameter(
            f"`checkpoint` is {checkpoint!r}, a folder on this machine, where a Space cannot reach it; publish it and "
            "name its repository, 'owner/name'."
        )
    there = folder / "examples"
    space_folder(folder, checkpoint, examples or (there if there.is_dir() else SPACE / "examples"))
    console.print(
        f"{folder}: upload it with `hf upload OWNER/SPACE {folder} --repo-type space`", highlight=False, soft_wrap=True
    )
