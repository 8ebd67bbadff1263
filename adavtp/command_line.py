"""The command line. Commands with much to say have files of their own; all are registered here."""

from pathlib import Path
from typing import Annotated

import typer

from .commands.ask import ask
from .commands.console import Command, console, trusts_remote_code
from .commands.convert import convert
from .commands.evaluate import evaluate
from .commands.experiment import experiment
from .commands.families import families
from .commands.flops import flops
from .commands.measure import measure
from .commands.merge import merge
from .commands.plan import plan
from .commands.presets import compare, demo
from .commands.publish import publish, publish_data
from .commands.reducers import reducers
from .commands.report import report
from .commands.space import space
from .commands.train import train

app = typer.Typer(
    help="How much a vision-language model looks is a dial you turn at run time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
LOOKING = (demo, ask, families, reducers, evaluate, report, compare, experiment, measure, flops)
for command in (*LOOKING, plan, train, convert, merge, publish, publish_data, space):
    app.command(cls=Command)(command)


@app.command(cls=Command)
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, such as a recipe's last stage.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    name: Annotated[str | None, typer.Option(help="Repository id for the card. Default: the folder's name.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The run's recipe.", exists=True)] = None,
    log: Annotated[list[Path] | None, typer.Option(help="A stage's training_log.json; in order.")] = None,
    evaluation: Annotated[list[Path] | None, typer.Option(help="Results of `adavtp evaluate`.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence in the Hub's spelling, such as llama2.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Model on the Hub that it was made from.")] = None,
) -> None:
    """Write a folder for the Hub: weights, code, processor, and a card with the measured numbers."""
    from .hub_cards.export import export_checkpoint

    folder = export_checkpoint(
        checkpoint, output, name, recipe, log, evaluation, base_model, license, trusts_remote_code()
    )
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    console.print(f"{folder}: {len(list(folder.iterdir()))} files, {size:.1f} MB")


if __name__ == "__main__":
    app()
