"""What all commands share: the console, how a mistake is answered, options of several values, loading a checkpoint."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from typer.core import TyperCommand

from ..hub_cards.publish import HubRefused

console = Console()

_CHECKPOINT = "Checkpoint folder or Hub repository. Default: the digit-scenes reference."
CheckpointArgument = Annotated[str | None, typer.Argument(help=_CHECKPOINT)]
CheckpointOption = Annotated[str | None, typer.Option("--checkpoint", help=_CHECKPOINT)]
BudgetsOption = Annotated[
    list[str],
    typer.Option(
        "--budgets",
        "--budget",
        help="Several: fractions such as 0.4, numbers of tokens such as 115, or exact fractions such as 115/576.",
    ),
]
ReducersOption = Annotated[
    list[str],
    typer.Option(
        "--reducers",
        "--reducer",
        help="Several: reducers as in fastv:layer=2, stacks as in tome,adaptive, or full, which keeps everything.",
    ),
]


class Command(TyperCommand):
    """
    A command whose options take several values after one name, `--budgets 0.2 0.4`, and that answers what is refused
    with the reason.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """See [`TyperCommand`]."""
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, repeated_options(args, several))

    def invoke(self, ctx: typer.Context) -> Any:
        """See [`TyperCommand`]."""
        with refusals_shown():
            return super().invoke(ctx)


def repeated_options(arguments: list[str], several: set[str]) -> list[str]:
    """
    A command line with an option's name before each of its values.

    Args:
        arguments: as they were typed.
        several: names of options that take more than one value; the values end at the next name.
    """
    written, name = [], None
    for argument in arguments:
        if argument.startswith("--"):
            own = argument.partition("=")[0]
            name = own if own in several else None
        elif name is not None and written[-1] != name:
            written.append(name)
        written.append(argument)
    return written


@contextmanager
def refusals_shown() -> Iterator[None]:
    """A value that is refused ends the command with code 2, what the Hub refuses with code 1; both with the reason."""
    try:
        yield
    except (ValueError, HubRefused) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(1 if isinstance(error, HubRefused) else 2) from error


def reference_checkpoint() -> Path:
    """Folder of the reference checkpoint that comes with the package."""
    from .. import hub_cards

    return Path(hub_cards.__file__).parent / "adavtp-digits"


def load_checkpoint(checkpoint: str | None) -> tuple:
    """
    Model in evaluation mode and processor, through the Auto classes as any user loads them.

    Raises:
        typer.BadParameter: if there is no such checkpoint, or a file of it is broken.
    """
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoint = str(checkpoint or reference_checkpoint())
    if (Path(checkpoint) / "adapter_config.json").is_file():
        raise typer.BadParameter(
            f"`checkpoint` is {checkpoint!r}, an adapter; `adavtp merge {checkpoint} FOLDER` makes a checkpoint of it "
            "and its base."
        )
    try:
        model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
        model.processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    except OSError as error:
        raise typer.BadParameter(f"`checkpoint` is {checkpoint!r}, which could not be loaded: {error}") from error
    return model, model.processor


def progress(description: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """A bar over what is iterated."""

    def wrap(batches: Iterable[Any]) -> Iterator[Any]:
        yield from track(batches, description=description, console=console)

    return wrap


def narrow_table(title: str, columns: Sequence[str]) -> Table:
    """A table for any terminal: reducers, whose names may fold, and columns of numbers."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("reducer", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def command_as_typed() -> str:
    """The command that is running, as it was typed."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
