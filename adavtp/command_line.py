"""The command line: `adavtp demo | ask | train | evaluate | export`."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

app = typer.Typer(
    help="How much a vision-language model looks is a dial you turn at run time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

DEMO_BUDGETS = (1.0, 0.8, 0.6, 0.4, 0.2)

CheckpointOption = Annotated[
    str | None, typer.Option(help="Checkpoint folder or Hub repository. Default: the digit-scenes reference.")
]


def reference_checkpoint() -> Path:
    """Folder of the reference checkpoint that comes with the package."""
    from . import hub_cards

    return Path(hub_cards.__file__).parent / "adavtp-digits"


def _load(checkpoint: str | None) -> tuple:
    """Model in evaluation mode and processor, through the Auto classes as any user loads them."""
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoint = str(checkpoint or reference_checkpoint())
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    model.processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    return model, model.processor


def _progress(description: str) -> Callable[[Iterable[int]], Iterator[int]]:
    def wrap(batches: Iterable[int]) -> Iterator[int]:
        yield from track(batches, description=description, console=console)

    return wrap


def _budget(value: str) -> float | int:
    """`0.4` is a fraction, `57` a number of tokens, as in Python."""
    try:
        return int(value) if value.lstrip("+-").isdigit() else float(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is neither a fraction such as 0.4 nor a number of tokens.") from error


def _results_table(results: list, num_questions: int) -> Table:
    table = Table(title=f"{num_questions} held-out questions (ms: per answer)")
    for column in ("reducer", "budget", "K", "accuracy", "95% CI", "decoder tokens", "ms"):
        table.add_column(column, justify="left" if column == "reducer" else "right", no_wrap=True)
    for result in results:
        table.add_row(
            result.reducer,
            f"{result.budget:g}",
            str(result.num_keep),
            f"{100 * result.accuracy:.1f}%",
            f"{100 * result.accuracy_low:.1f}-{100 * result.accuracy_high:.1f}",
            f"{result.decoder_tokens:.0f}",
            f"{result.milliseconds:.1f}",
        )
    return table


@app.command()
def demo(
    questions: Annotated[int, typer.Option(help="Number of held-out questions.", min=6)] = 300,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs/demo"),
    checkpoint: CheckpointOption = None,
) -> None:
    """Answer held-out questions about digit scenes at five budgets; print a table, write two pictures."""
    from .evaluation.accuracy import answer_questions
    from .evaluation.pictures import save_accuracy_curve, save_kept_patches
    from .trainer.digit_scenes import load_digit_questions

    output.mkdir(parents=True, exist_ok=True)
    model, processor = _load(checkpoint)
    console.print("Drawing scenes from held-out handwriting ...")
    data = load_digit_questions("test", questions)
    results, _ = answer_questions(
        model,
        processor,
        data,
        DEMO_BUDGETS,
        reducers=("adaptive", "random"),
        progress=_progress("Answering at five budgets ..."),
    )
    console.print(_results_table(results, len(data)))
    shown = data.select(range(6))
    with console.status("Drawing pictures ..."):
        images = [row["images"][0] for row in shown]
        save_kept_patches(
            model, processor, images, shown["question"], shown["answer"], DEMO_BUDGETS, output / "kept_patches.png"
        )
        save_accuracy_curve(results, output / "accuracy.png")
    console.print(f"Pictures: {output / 'kept_patches.png'} and {output / 'accuracy.png'}")


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="Image file.", exists=True, dir_okay=False)],
    prompt: Annotated[str, typer.Argument(help="Question.")],
    budget: Annotated[str, typer.Option(help="Fraction of visual tokens such as 0.4, or their number.")] = "1.0",
    show: Annotated[Path | None, typer.Option(help="Write the image with its kept patches here.")] = None,
    checkpoint: CheckpointOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.", min=1)] = 32,
) -> None:
    """Ask a question about an image at a token budget."""
    model, processor = _load(checkpoint)
    token_budget = _budget(budget)
    try:
        inputs = processor.of_questions(str(image), prompt).to(model.device)
        selection = model.select_tokens(
            inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], token_budget=token_budget
        )
        answer = model.generate(str(image), prompt, token_budget=token_budget, max_new_tokens=max_new_tokens)
    except ValueError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from error
    console.print(answer, highlight=False)
    console.print(f"{int(selection.num_keep[0])} of {model.config.num_patches} visual tokens", style="dim")
    if show is not None:
        from .evaluation.pictures import draw_kept_patches, image_as_seen

        draw_kept_patches(image_as_seen(processor, inputs["pixel_values"][0]), selection.keep[0]).save(show)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", exists=True, dir_okay=False)],
    output: Annotated[Path | None, typer.Option(help="Folder for checkpoints. Default: runs/<recipe>.")] = None,
) -> None:
    """Carry out a training recipe, or go on with one that was interrupted."""
    from .trainer.recipe import Recipe, run_recipe

    plan = Recipe.from_file(recipe)
    checkpoint = run_recipe(plan, output or Path("runs") / recipe.stem)
    console.print(f"Checkpoint: {checkpoint}")
    if plan.evaluation:
        _evaluate(str(checkpoint), checkpoint / "evaluation.json", **plan.evaluation)


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or Hub repository.")],
    output: Annotated[Path, typer.Option(help="File for the results (JSON).")] = Path("evaluation.json"),
    questions: Annotated[int, typer.Option(help="Number of test questions.", min=6)] = 2400,
    budget: Annotated[list[float], typer.Option(help="Budget; may be repeated.")] = list(DEMO_BUDGETS),  # noqa: B006
    reducer: Annotated[list[str], typer.Option(help="Reducer; may be repeated.")] = ["adaptive", "random"],  # noqa: B006
) -> None:
    """Measure accuracy on the digit-scenes test split at several budgets, and write it to a file."""
    _evaluate(checkpoint, output, questions, budget, reducer)


def _evaluate(checkpoint: str, output: Path, questions: int, budgets: list[float], reducers: list[str]) -> None:
    from .evaluation.accuracy import answer_questions, as_report
    from .trainer.digit_scenes import load_digit_questions

    model, processor = _load(checkpoint)
    data = load_digit_questions("test", questions)
    results, _ = answer_questions(model, processor, data, budgets, reducers, progress=_progress("Answering ..."))
    console.print(_results_table(results, len(data)))
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    output.write_text(json.dumps(as_report(results, command, "test", len(data)), indent=1))
    console.print(f"Results: {output}")


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, such as a recipe's last stage.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    name: Annotated[str | None, typer.Option(help="Repository id for the card. Default: the folder's name.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The run's recipe.", exists=True)] = None,
    log: Annotated[list[Path] | None, typer.Option(help="A stage's training_log.json; in order.")] = None,
    evaluation: Annotated[list[Path] | None, typer.Option(help="Results of `adavtp evaluate`.")] = None,
) -> None:
    """Write a folder for the Hub: weights, code, processor, and a card with the measured numbers."""
    from .hub_cards.export import export_checkpoint

    folder = export_checkpoint(checkpoint, output, name, recipe, log, evaluation)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    console.print(f"{folder}: {len(list(folder.iterdir()))} files, {size:.1f} MB")
