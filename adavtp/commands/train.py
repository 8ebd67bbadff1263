"""`adavtp train`: a recipe from its first stage to its evaluation."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from .console import console, folder_to_write
from .evaluate import evaluate_checkpoint


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", exists=True, dir_okay=False)],
    output: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints. Default: runs/<recipe>.", callback=folder_to_write)
    ] = None,
) -> None:
    """
    Carry out a training recipe, or go on with one that was interrupted.

    Under `accelerate launch` or `torchrun` processes share the work. The recipe's `evaluation` is then left to a
    command of its own, which is printed.
    """
    from accelerate import PartialState

    from ..trainer.recipes.recipe import DEFAULT_TASK, Recipe
    from ..trainer.recipes.run import run_recipe

    asked = Recipe.from_file(recipe)
    checkpoint = run_recipe(asked, output or Path("runs") / recipe.stem)
    if not PartialState().is_main_process:
        return
    console.print(f"Checkpoint: {checkpoint}")
    evaluation, task = asked.evaluation, asked.model.get("task", DEFAULT_TASK)
    if evaluation and PartialState().num_processes > 1:
        # Training may have spread every model that is loaded from now on over the processes.
        budgets, reducers = (" ".join(map(str, evaluation[name])) for name in ("budgets", "reducers"))
        asks = f"--data {task} --budgets {budgets} --reducers {reducers}"
        console.print(f"Evaluate it: adavtp evaluate {checkpoint} {asks}")
    elif evaluation:
        measured = evaluate_checkpoint(
            *(str(checkpoint), task, evaluation["budgets"], evaluation["reducers"]),
            output=checkpoint / "evaluation",
            questions=evaluation["questions"],
        )
        # Beside the weights, where the model card looks for it.
        shutil.copy(measured.folder / "evaluation.json", checkpoint)
