"""What all commands share: the console, how a mistake is answered, options of several values, loading a checkpoint."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from typer.core import TyperCommand
from yaml import YAMLError

from ..evaluation.circumstances import without_place
from ..evaluation.settings import UNTRAINED_REDUCER
from ..hub_cards.publish import HubRefused
from ..hub_cards.published_folder import require_no_adapter
from ..modeling.hub.loading import is_stock

console = Console()

TRUST, DEBUG = "--trust-remote-code", "--debug"
# Of every command.
FLAGS = {
    TRUST: "run the code that a checkpoint brings, such as reducers of its own.",
    DEBUG: "show the traceback of an error.",
}
# What nobody means, and what is counted with would not hold.
LARGEST_NUMBER = 2**31
_TRUSTS: ContextVar[bool] = ContextVar(TRUST, default=False)

# Drawn tasks -> folders of the checkpoints for them that come with the package. The first is the reference, which
# commands take where no other is named.
REFERENCES = {"pages": "adavtp-pages", "digit-scenes": "adavtp-digits"}
REFERENCE_TASK = next(iter(REFERENCES))

_CHECKPOINT = f"Checkpoint folder or Hub repository. Default: the reference, for the task {REFERENCE_TASK}."
CheckpointArgument = Annotated[str | None, typer.Argument(help=_CHECKPOINT)]
CheckpointOption = Annotated[str | None, typer.Option("--checkpoint", help=_CHECKPOINT)]
DrawnTaskOption = Annotated[str, typer.Option("--data", help=f"Drawn task: {' or '.join(REFERENCES)}.")]
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
    A command whose options take several values after one name, `--budgets 0.2 0.4`; that answers a mistake with one
    sentence; and that runs a checkpoint's own code only when it is told to.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings | {"epilog": " ".join(map(": ".join, FLAGS.items()))})

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """See [`TyperCommand`]."""
        for name in FLAGS:
            ctx.meta[name] = name in args
        args = [argument for argument in args if argument not in FLAGS]
        for place, argument in enumerate(args):
            # What was meant is mostly a variable of the shell that is not set, and "" would be read as the default.
            if not argument or (argument.startswith("--") and argument.endswith("=")):
                before = f", behind {args[place - 1]!r}" if place and not argument else f", of {argument[:-1]!r}"
                raise typer.BadParameter(f"A value is empty{before if argument or place else ''}; name one.")
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        # Whether a path is there is asked now, and some cannot be asked for.
        with mistakes_shown(ctx.meta[DEBUG]):
            rest = super().parse_args(ctx, repeated_options(args, several))
        for option in self.params:
            given = ctx.params.get(option.name)
            for value in given if isinstance(given, list | tuple) else [given]:
                # `nan` is neither below nor above a limit.
                if isinstance(value, int | float) and not abs(value) < LARGEST_NUMBER:
                    raise typer.BadParameter(f"{option.opts[0]} is {value:.4g}; allowed are numbers below 2**31.")
        return rest

    def invoke(self, ctx: typer.Context) -> Any:
        """See [`TyperCommand`]."""
        consent = _TRUSTS.set(ctx.meta[TRUST])
        try:
            with mistakes_shown(ctx.meta[DEBUG]):
                return super().invoke(ctx)
        finally:
            _TRUSTS.reset(consent)


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


def trusts_remote_code() -> bool:
    """Whether the running command may run the code that a checkpoint brings."""
    return _TRUSTS.get()


@contextmanager
def mistakes_shown(with_traceback: bool = False) -> Iterator[None]:
    """
    A user's mistake is a sentence and exit code 2; what the Hub refuses, a sentence and code 1. An error that is
    neither is our fault, code 1, and says so. What does not fit into memory is the user's to make smaller.
    """
    try:
        yield
    except Exception as error:
        # What typer raises to end a command says how.
        if with_traceback or isinstance(error, typer.Abort) or hasattr(error, "exit_code"):
            raise
        is_mistake = isinstance(error, (ValueError, OSError, ImportError, YAMLError)) or _is_out_of_memory(error)
        if is_mistake or isinstance(error, HubRefused):
            console.print(f"[red]{escape(_sentence(error))}[/red]")
        else:
            console.print(
                f"[red]{type(error).__name__}: {escape(str(error))}[/red]\nThis is a fault of AdaVTP and not yours. "
                "Please report it, with what the same command prints with --debug."
            )
        raise typer.Exit(2 if is_mistake and not isinstance(error, HubRefused) else 1) from error


def _is_out_of_memory(error: Exception) -> bool:
    # A GPU's has a class of its own, whose base torch raises for the CPU.
    return isinstance(error, MemoryError) or any(text in str(error) for text in ("out of memory", "allocate memory"))


def _sentence(error: Exception) -> str:
    if _is_out_of_memory(error):
        return f"This does not fit into memory; ask for less at once. {error}".strip()
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{str(error.filename)!r} cannot be read or written: {error.strerror}."
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"This needs {error.name}, which is not installed: `pip install {error.name.partition('.')[0]}`."
    return str(error)


def folder_to_write(folder: Path | None) -> Path | None:
    """A callback of options: `typer.BadParameter` where no folder can be, now and not when the work is done."""
    if folder is not None:
        there = next((place for place in (folder, *folder.parents) if place.exists()), None)
        if there is not None and not there.is_dir():
            raise typer.BadParameter(f"{str(folder)!r} cannot be a folder: {str(there)!r} is a file.")
    return folder


def reference_checkpoint(task: str = REFERENCE_TASK) -> Path:
    """Folder of the checkpoint for a drawn task that comes with the package."""
    from .. import hub_cards

    return Path(hub_cards.__file__).parent / REFERENCES[task]


def load_checkpoint(checkpoint: str | None) -> tuple:
    """
    Model in evaluation mode and processor, through the Auto classes as any user loads them; of other families than
    LLaVA the class with a budget. In one that was released without a budget, [`UNTRAINED_REDUCER`] chooses.

    Raises:
        typer.BadParameter: if there is no such checkpoint, or a file of it is broken.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoint = str(checkpoint or reference_checkpoint())
    require_no_adapter(checkpoint)
    trusts = trusts_remote_code()
    try:
        # Of another kind of model, the Auto classes would build whatever its configuration leaves out in full size.
        kind = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trusts).model_type
        if kind == "llava":
            raise typer.BadParameter(
                f"`checkpoint` is {checkpoint!r}, a {kind!r} model; expected is an 'adavtp' model or one of another "
                "family (`adavtp families`); `adavtp convert` makes a checkpoint of it."
            )
        model_class = AutoModel if kind == "adavtp" else AdaVTPForConditionalGeneration
        # A family's checkpoint as it was released has no weights for the controller.
        chosen = {"reducer": UNTRAINED_REDUCER} if is_stock(checkpoint) else {}
        model = model_class.from_pretrained(checkpoint, **chosen, trust_remote_code=trusts).eval()
        processor = model.processor
    except (ValueError, typer.BadParameter):
        raise
    # Loaders raise what they like for a broken file.
    except Exception as error:
        said = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise typer.BadParameter(f"`checkpoint` is {checkpoint!r}, which could not be loaded: {said}") from error
    return model, processor


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
    """The command that is running, as it was typed, for others to read: of absolute paths only their last names."""
    return shlex.join([Path(sys.argv[0]).name, *map(without_place, sys.argv[1:])])
