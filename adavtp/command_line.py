"""The command line. Commands with much to say have files of their own; all are registered here."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from .commands.ask import ask
from .commands.console import Command, console, refusals_shown
from .commands.convert import convert
from .commands.evaluate import DIGIT_SCENES, evaluate, evaluate_checkpoint
from .commands.experiment import experiment
from .commands.flops import flops
from .commands.measure import measure
from .commands.merge import merge
from .commands.plan import plan
from .commands.presets import compare, demo, gallery
from .commands.publish import publish, publish_data
from .commands.reducers import reducers
from .commands.report import report
from .commands.space import space

app = typer.Typer(
    help="How much a vision-language model looks is a dial you turn at run time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
LOOKING = (demo, ask, reducers, evaluate, report, compare, gallery, experiment, measure, flops)
for command in (*LOOKING, plan, convert, merge, publish, publish_data, space):
    app.command(cls=Command)(command)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", exists=True, dir_okay=False)],
    output: Annotated[Path | None, typer.Option(help="Folder for checkpoints. Default: runs/<recipe>.")] = None,
) -> None:
    """
    Carry out a training recipe, or go on with one that was interrupted.

    Under `accelerate launch` or `torchrun` processes share the work. The recipe's `evaluation` is then left to a
    command of its own, which is printed.
    """
    from accelerate import PartialState

    from .trainer.recipe import Recipe
    from .trainer.recipe_run import run_recipe

    with refusals_shown():
        plan = Recipe.from_file(recipe)
    checkpoint = run_recipe(plan, output or Path("runs") / recipe.stem)
    if not PartialState().is_main_process:
        return
    console.print(f"Checkpoint: {checkpoint}")
    if plan.evaluation and PartialState().num_processes > 1:
        # Training may have spread every model that is loaded from now on over the processes.
        budgets, reducers = (" ".join(map(str, plan.evaluation[name])) for name in ("budgets", "reducers"))
        console.print(f"Evaluate it: adavtp evaluate {checkpoint} --budgets {budgets} --reducers {reducers}")
    elif plan.evaluation:
        measured = evaluate_checkpoint(
            str(checkpoint),
            DIGIT_SCENES,
            plan.evaluation["budgets"],
            plan.evaluation["reducers"],
            output=checkpoint / "evaluation",
            questions=plan.evaluation["questions"],
        )
        # Beside the weights, where the model card looks for it.
        shutil.copy(measured.folder / "evaluation.json", checkpoint)


@app.command()
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

    folder = export_checkpoint(checkpoint, output, name, recipe, log, evaluation, base_model, license)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    console.print(f"{folder}: {len(list(folder.iterdir()))} files, {size:.1f} MB")


if __name__ == "__main__":
    app()
