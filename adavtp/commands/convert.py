"""`adavtp convert`: a LLaVA checkpoint becomes an AdaVTP folder, weight file by weight file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ..evaluation.settings import reducer_of_text
from .console import console

if TYPE_CHECKING:
    from ..hub_cards.conversion.convert import Conversion, Shard

_NAMES_SHOWN = 3


def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub repository of a LLaVA or LLaVA-NeXT checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Fields of the AdaVTP configuration, as in token_budget=0.5 or reducer=fastv:layer=2."
        ),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(help="CLIP folder or repository, for LLaVA's own format. Default: the one the source names."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder or repository of the language model, or the LLaVA, that SOURCE was trained from, where that "
            "is an adapter (LoRA) or a projector alone."
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="Jinja file in place of the source's chat template.", exists=True, dir_okay=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the values of the new modules.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")] = None,
) -> None:
    """
    Make an AdaVTP folder of a LLaVA checkpoint. Weights keep their files and dtypes; memory stays near one file.

    Reads llava-hf/llava-1.5-7b-hf and its like, folders of LLaVA's own code such as liuhaotian/llava-v1.5-7b, and
    LLaVA-NeXT, of whose tiles only the first is used; with --base, adapters and projectors that LLaVA's training left.
    The output appears when it is whole.
    """
    from transformers.utils import logging

    from ..hub_cards.conversion.convert import convert_checkpoint

    logging.set_verbosity_error()
    try:
        done = convert_checkpoint(
            source,
            output,
            vision_tower=vision_tower,
            base=base,
            fields=dict(map(parse_field, fields or [])),
            chat_template=None if chat_template is None else chat_template.read_text(encoding="utf-8"),
            seed=seed,
            revision=revision,
            progress=_track,
        )
    except OSError as error:
        raise typer.BadParameter(f"{source!r} could not be converted: {error}") from error
    console.print(conversion_table(done, output))
    for note in done.notes:
        console.print(note, style="dim", markup=False)


def parse_field(text: str) -> tuple[str, Any]:
    """
    `NAME=VALUE`, the value as in JSON or, where it is none, a string; `reducer` as elsewhere on the command line.

    Raises:
        ValueError: if there is no `=`.
    """
    name, found, value = text.partition("=")
    if not found or not name:
        raise ValueError(f"`--set` is {text!r}; expected is NAME=VALUE, as in token_budget=0.5.")
    if name == "reducer":
        return name, reducer_of_text(value)
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _track(shards: "list[Shard]") -> "Iterator[Shard]":
    yield from track(shards, description="Writing ...", console=console)


def conversion_table(done: "Conversion", output: Path) -> Table:
    """What was done, a line for each kind of thing."""
    on_base = "" if done.base is None else f" on {done.base}"
    table = Table(title=escape(f"{done.source}{on_base} ({done.layout}) -> {output}"), show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("")
    converted = f", {done.converted} of them converted to {done.dtype}" if done.converted else ""
    table.add_row("taken over", f"{done.tensors} tensors{converted}")
    table.add_row("written", f"{done.bytes / 2**20:,.1f} MiB in {done.files} file(s), {done.dtype}")
    for module, parameters in done.new_parameters.items():
        table.add_row(f"new: {module}", f"{parameters:,} parameters, seed {done.seed}")
    if done.new_rows:
        table.add_row("new rows", f"{done.new_rows} of the embeddings and of the head")
    reasons = [(kind, item) for kind in ("tensors", "fields") for item in getattr(done, f"dropped_{kind}")]
    for kind, reason in dict.fromkeys((kind, item.reason) for kind, item in reasons):
        names = [item.name for is_, item in reasons if (is_, item.reason) == (kind, reason)]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        table.add_row(f"left out: {kind}", escape(f"{', '.join(names[:_NAMES_SHOWN])}{more}: {reason}"))
    largest = f"largest file {done.largest_file / 2**20:,.1f} MiB"
    table.add_row("peak memory", f"{done.peak_memory / 2**20:,.1f} MiB above the start, {largest}")
    return table
