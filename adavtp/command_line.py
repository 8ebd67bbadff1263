"""The command line. Commands with much to say have files of their own; all are registered here."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .commands.console import (
    command_as_typed,
    console,
    load_checkpoint,
    parse_budget,
    parse_reducer,
    progress,
    reference_checkpoint,
    refusals_shown,
)
from .commands.convert import convert
from .commands.evaluate import ManyValues, evaluate
from .commands.experiment import experiment
from .commands.flops import flops
from .commands.measure import measure
from .commands.merge import merge
from .commands.plan import plan
from .commands.publish import publish, publish_data
from .commands.report import report
from .commands.space import space
from .commands.train import train

app = typer.Typer(
    help="How much a vision-language model looks is a dial you turn at run time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    convert,
    evaluate,
    experiment,
    flops,
    measure,
    merge,
    plan,
    publish,
    publish_data,
    report,
    space,
    train,
):
    app.command(cls=ManyValues)(command)

DEMO_BUDGETS = (1.0, 0.8, 0.6, 0.4, 0.2)
COMPARED_BUDGETS = [0.1, 0.2, 0.4, 0.6, 0.8]
# In the reference's four decoder layers, reducers inside the decoder cannot go below 0.25, and there all look alike.
GALLERY_BUDGET = 0.4

NEEDS_IN_WORDS = {
    "attention": "attention row",
    "budget": "budget",
    "cls": "CLS",
    "pixel_values": "pixel values",
    "question": "question",
    "question_ids": "question ids",
    "tower_patches": "tower patches",
}

CheckpointOption = Annotated[
    str | None, typer.Option(help="Checkpoint folder or Hub repository. Default: the digit-scenes reference.")
]
CheckpointArgument = Annotated[
    str | None, typer.Argument(help="Checkpoint folder or Hub repository. Default: the digit-scenes reference.")
]
ComparedReducers = Annotated[
    list[str] | None,
    typer.Option(
        help="Reducer as in fastv:layer=2, or a stack as in tome,adaptive; may be repeated. Default: all registered "
        "but those that are parts of another."
    ),
]


def _results_table(results: list, num_questions: int) -> Table:
    table = Table(title=f"{num_questions} held-out questions (ms: per answer)")
    for column in ("reducer", "budget", "K", "accuracy", "95% CI", "decoder tokens", "ms"):
        table.add_column(column, justify="left" if column == "reducer" else "right", no_wrap=True)
    for result in results:
        if result.unreachable is not None:
            table.add_row(result.reducer, f"{result.budget:g}", str(result.num_keep), "unreachable", *["-"] * 3)
            continue
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


def _print_unreachable(results: list) -> None:
    for result in results:
        if result.unreachable is not None:
            console.print(f"{result.reducer} at {result.budget:g}: {escape(result.unreachable)}", style="dim")


@app.command()
def demo(
    questions: Annotated[int, typer.Option(help="Number of held-out questions.", min=6)] = 300,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs/demo"),
    checkpoint: CheckpointOption = None,
) -> None:
    """Answer held-out questions about digit scenes at five budgets; print a table, write two pictures."""
    from .evaluation.accuracy import answer_questions
    from .evaluation.pictures import save_accuracy_curve, save_kept_patches
    from .tasks.digit_scenes import load_digit_questions

    output.mkdir(parents=True, exist_ok=True)
    model, processor = load_checkpoint(checkpoint)
    console.print("Drawing scenes from held-out handwriting ...")
    data = load_digit_questions("test", questions)
    results, _ = answer_questions(
        model,
        processor,
        data,
        DEMO_BUDGETS,
        reducers=("adaptive", "random"),
        progress=progress("Answering at five budgets ..."),
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
    reducer: Annotated[
        list[str] | None,
        typer.Option(help="What chooses, with parameters as in fastv:layer=2. Several make a stack, in their order."),
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(
            help="Write the image with its kept patches here: the brighter, the more decoder layers see a patch. Of "
            "reducers that merge, the patches in whose place tokens stand."
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of the answer.", min=1)] = 32,
) -> None:
    """Ask a question about an image at a token budget."""
    from .evaluation.accuracy import visual_tokens_seen
    from .evaluation.comparison import as_trained
    from .evaluation.pictures import draw_kept_patches, image_as_seen, patch_shares

    model, processor = load_checkpoint(checkpoint)
    choice: dict[str, Any] = {"token_budget": parse_budget(budget)}
    with refusals_shown():
        if reducer:
            choice["reducer"] = as_trained(model.config, parse_reducer(",".join(reducer)))
        inputs = processor.of_questions(str(image), prompt).to(model.device)
        selection = model.select_tokens(**inputs, **choice)
        answer = model.generate(str(image), prompt, **choice, max_new_tokens=max_new_tokens)
    console.print(answer, highlight=False)
    num_layers = model.config.text_config.num_hidden_layers
    over_layers = ", mean over decoder layers" if selection.depth is not None else ""
    tokens = float(visual_tokens_seen(selection, num_layers)[0])
    console.print(f"{tokens:g} of {model.config.num_patches} visual tokens{over_layers}", style="dim")
    if show is not None:
        shares = patch_shares(selection, num_layers)[0]
        draw_kept_patches(image_as_seen(processor, inputs["pixel_values"][0]), shares).save(show)


@app.command()
def reducers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List every registered reducer: where it acts, what it needs, its parameters and its paper."""
    from .evaluation.comparison import reducer_table

    rows = reducer_table()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=f"{len(rows)} reducers")
    for column in ("reducer", "stage", "trained", "own rule", "needs", "parameters", "paper"):
        table.add_column(column, no_wrap=column in ("reducer", "trained"))
    for row in rows:
        table.add_row(
            row["name"],
            row["stage"] + (f", part of {row['part_of']}" if row["part_of"] else ""),
            "yes" if row["trained"] else "",
            "yes" if row["own_rule"] else "",
            ", ".join(NEEDS_IN_WORDS.get(need, need) for need in row["needs"]),
            escape(", ".join(f"{key}={value}" for key, value in row["parameters"].items())),
            row["paper"],
        )
    console.print(table)
    console.print("own rule: keeps as many as it sees fit where no budget is given.", style="dim")


@app.command(cls=ManyValues)
def compare(
    checkpoint: CheckpointArgument = None,
    output: Annotated[Path, typer.Option(help="Folder for the page, its pictures and the measurements.")] = Path(
        "docs"
    ),
    questions: Annotated[int, typer.Option(help="Number of test questions.", min=6)] = 2400,
    budgets: Annotated[
        list[float], typer.Option("--budgets", "--budget", help="Several: fractions.")
    ] = COMPARED_BUDGETS,
    reducer: ComparedReducers = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 100,
) -> None:
    """
    Compare reducers on the digit-scenes test split; write reducers.md, its two pictures, and reducers.json.

    The JSON file grows while answers come in. Interrupted, the same command goes on where it stopped; with more
    budgets or reducers it measures only those. It begins anew for other questions or a checkpoint with other files;
    after a change to a reducer's code, delete it.
    """
    from .evaluation.comparison import checkpoint_hash, compare_reducers
    from .evaluation.comparison_page import comparison_page
    from .evaluation.pictures import save_comparison_curves
    from .tasks.digit_scenes import load_digit_questions

    model, processor = load_checkpoint(checkpoint)
    folder = checkpoint or str(reference_checkpoint())
    data, file = load_digit_questions("test", questions), output / "reducers.json"
    about = {
        "command": command_as_typed(),
        "checkpoint": Path(folder).name if Path(folder).is_dir() else folder,
        "split": "test",
        "file": file.name,
    }
    output.mkdir(parents=True, exist_ok=True)
    with refusals_shown():
        _require_budgets(budgets)
        stacks = _stacks_to_compare(model, reducer)
        record = compare_reducers(
            *(model, processor, data, sorted(set(budgets)), stacks, file, checkpoint_hash(folder), about),
            batch_size=batch_size,
            progress=progress("Answering ..."),
        )
        _save_gallery(model, processor, stacks, GALLERY_BUDGET, output / "reducers_gallery.png")
    save_comparison_curves(record, output / "reducers_accuracy.png")
    page = comparison_page(record, record["command"], "reducers_gallery.png", "reducers_accuracy.png")
    (output / "reducers.md").write_text(page)
    console.print(f"Page: {output / 'reducers.md'}, measurements: {file}")


def _require_budgets(budgets: list[float]) -> None:
    if wrong := [budget for budget in budgets if not 0.0 <= budget < 1.0]:
        raise ValueError(
            f"`budgets` has {wrong[0]}; allowed are fractions from 0.0 to below 1.0; the full budget always runs."
        )


def _stacks_to_compare(model: Any, values: list[str] | None) -> list[Any]:
    from .evaluation.comparison import as_trained, reducers_to_compare

    if not values:
        return reducers_to_compare(model.config)
    return [as_trained(model.config, parse_reducer(value)) for value in values]


@app.command()
def gallery(
    checkpoint: CheckpointArgument = None,
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("docs/reducers_gallery.png"),
    budget: Annotated[float, typer.Option(help="Fraction of visual tokens.")] = GALLERY_BUDGET,
    reducer: ComparedReducers = None,
) -> None:
    """
    Draw what every reducer keeps of one scene, with its stage and the answer.

    The brighter a patch, the more decoder layers see it. Of reducers that merge, the patches in whose place tokens
    stand are bright.
    """
    model, processor = load_checkpoint(checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    with refusals_shown():
        _save_gallery(model, processor, _stacks_to_compare(model, reducer), budget, output)
    console.print(f"Picture: {output}")


def _save_gallery(model: Any, processor: Any, stacks: list[Any], budget: float, path: Path) -> None:
    from .evaluation.comparison import stages
    from .evaluation.pictures import save_gallery
    from .tasks.digit_scenes import load_digit_questions

    row = load_digit_questions("test", 6)[0]
    save_gallery(
        *(model, processor, row["images"][0], row["question"], row["answer"], stages(stacks), stacks, budget, path)
    )


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
