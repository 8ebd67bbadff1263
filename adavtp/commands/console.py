"""What all commands share: the console, how budgets and reducers are written, how a checkpoint is loaded."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from ..evaluation.written_settings import budget_of_text, reducer_of_text

if TYPE_CHECKING:
    from ..modeling.modeling_adavtp import ReducerSpec

console = Console()


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


def progress(description: str) -> Callable[[Iterable[int]], Iterator[int]]:
    def wrap(batches: Iterable[int]) -> Iterator[int]:
        yield from track(batches, description=description, console=console)

    return wrap


def parse_budget(value: str) -> float | int:
    """`0.4` is a fraction, `57` a number of tokens, as in Python."""
    return _parsed(budget_of_text, value)


def parse_reducer(value: str) -> "ReducerSpec":
    """
    A reducer as it is written on the command line: a name, a name with parameters as in `fastv:layer=2:rows=last`, or
    several with commas between them, a stack.
    """
    return _parsed(reducer_of_text, value)


def _parsed(parse: Callable[[str], Any], value: str) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def refusals_shown() -> Iterator[None]:
    """A value that is refused ends the command with the reason and exit code 2."""
    try:
        yield
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(2) from error


def command_as_typed() -> str:
    """The command that is running, as it was typed."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
