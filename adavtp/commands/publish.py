"""`adavtp publish` and `adavtp publish-data`: a checkpoint, or a drawn task, as a repository on the Hub."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..hub_cards.publish import Publication, require_licence, require_repository_id, upload
from .console import REFERENCE_TASK, DrawnTaskOption, command_as_typed, console

RepositoryArgument = Annotated[str, typer.Argument(metavar="REPO_ID", help="Repository: user/name.")]
PrivateOption = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would go. Needs no token and no network.")
]


def publish(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.", exists=True, file_okay=False)],
    repo_id: RepositoryArgument,
    private: PrivateOption = False,
    dry_run: DryRunOption = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="Licence in the Hub's spelling, such as llama2. Default: that of the folder's card, or of its base."
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Model on the Hub that it was made from. Default: what its recipe or log says.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="The run's recipe.", exists=True, dir_okay=False)] = None,
    log: Annotated[
        list[Path] | None, typer.Option(help="A stage's training_log.json; in order.", exists=True, dir_okay=False)
    ] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="The evaluation.json of `adavtp evaluate`.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """
    Publish a checkpoint on the Hub, with a card made from its own files.

    Weights (safetensors alone), configuration, processor and code go as they are; recipe, training logs and
    evaluations where the folder has them or they are named. Optimizer states and other pickles stay behind.
    """
    from ..hub_cards.licence import origin_of
    from ..hub_cards.published_folder import files_by_kind, published_folder
    from ..hub_cards.training_record import TrainingRecord

    with tempfile.TemporaryDirectory() as temporary:
        require_repository_id(repo_id)
        record = TrainingRecord.found_in(checkpoint, recipe, log or None, evaluation or None)
        origin = origin_of(checkpoint, record, base_model, license)
        require_licence(origin, "--license")
        folder = Path(temporary)
        stays_behind = published_folder(checkpoint, folder, repo_id, record, origin)
        _print_summary(repo_id, "model", private, files_by_kind(folder))
        console.print(f"licence {origin.license}, base model {origin.base_model or 'none'}", highlight=False)
        if not record.evaluations:
            console.print("The card will say 'Not measured': name an evaluation.json with --evaluation.", style="dim")
        if stays_behind:
            console.print(f"stays behind: {escape(', '.join(stays_behind))}", style="dim", highlight=False)
        if not dry_run:
            _print_published(upload(folder, repo_id, "Model, processor, code and card", private=private))


def publish_data(
    repo_id: RepositoryArgument,
    data: DrawnTaskOption = REFERENCE_TASK,
    train: Annotated[int, typer.Option(help="Questions of the training split.", min=1)] = 12000,
    validation: Annotated[int, typer.Option(help="Questions of the validation split.", min=1)] = 1200,
    test: Annotated[int, typer.Option(help="Questions of the test split.", min=1)] = 2400,
    seed: Annotated[int, typer.Option(help="Which of the endless sequences of pictures.", min=0)] = 0,
    private: PrivateOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """
    Publish a drawn task as a data set on the Hub: parquet files of three splits, and a card.

    The first N questions of a split are the same for every size, so that a smaller set is a part of a larger one.
    """
    from datasets import disable_progress_bars

    from ..hub_cards.dataset_card import DATA_FILES, dataset_folder
    from ..tasks.drawn_tasks import drawn_task

    with tempfile.TemporaryDirectory() as temporary:
        require_repository_id(repo_id)
        disable_progress_bars()
        sizes = {"train": train, "validation": validation, "test": test}
        load_questions = drawn_task(data).load_questions
        with console.status("Drawing ..."):
            splits = {split: load_questions(split, size, seed) for split, size in sizes.items()}
        folder = dataset_folder(data, splits, Path(temporary), repo_id, command_as_typed())
        files = {"card": [folder / "README.md"], "data": sorted((folder / "data").iterdir())}
        _print_summary(repo_id, "dataset", private, files)
        console.print(", ".join(f"{split}: {size} questions" for split, size in sizes.items()), highlight=False)
        if not dry_run:
            title = f"Questions of the drawn task {data}"
            replaced = ("README.md", *DATA_FILES)
            _print_published(upload(folder, repo_id, title, "dataset", private=private, replaced=replaced))


def _print_summary(repo_id: str, repo_type: str, private: bool, files: Mapping[str, Sequence[Path]]) -> None:
    """What will go: kinds of files with their names, number and size."""
    visibility = "private" if private else "public"
    table = Table(title=f"{repo_id}: {visibility} {repo_type} repository", title_justify="left")
    for column in ("what", "files", "bytes", "names"):
        table.add_column(column, justify="right" if column in ("files", "bytes") else "left", overflow="fold")
    for kind, paths in files.items():
        if paths:
            table.add_row(kind, str(len(paths)), f"{_size(paths):,}", _names(paths))
    everything = [path for paths in files.values() for path in paths]
    table.add_section()
    table.add_row("together", str(len(everything)), f"{_size(everything):,}", "")
    console.print(table)


def _size(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _names(paths: Sequence[Path], most: int = 4) -> str:
    names = [path.name for path in paths]
    return escape(", ".join(names if len(names) <= most else [*names[: most - 2], "...", names[-1]]))


def _print_published(publication: Publication) -> None:
    visibility = "private" if publication.private else "public"
    console.print(f"Published ({visibility}): {publication.url}", highlight=False, soft_wrap=True)
    console.print(f"Commit: {publication.commit.oid}", style="dim", highlight=False)
