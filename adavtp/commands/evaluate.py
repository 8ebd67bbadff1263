"""`adavtp evaluate`: a checkpoint's answers to every question, at every budget, with every reducer."""

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from .console import (
    command_as_typed,
    console,
    load_checkpoint,
    parse_budget,
    parse_reducer,
    progress,
    reference_checkpoint,
    refusals_shown,
)

if TYPE_CHECKING:
    from accelerate import PartialState

    from ..evaluation.answering import Seconds
    from ..evaluation.asked_settings import AskedSetting
    from ..evaluation.examples import EvaluationData, Example
    from ..evaluation.run_results import SettingResult
    from ..evaluation.runs import Run

DIGIT_SCENES = "digit-scenes"
DIGIT_SCENES_QUESTIONS = 2400
BUDGETS = ["1.0", "0.8", "0.6", "0.4", "0.2"]
REDUCERS = ["full", "adaptive", "random"]

# Examples whose pictures and kept patches a run has, for its report.
SHOWN = 12


class ManyValues(TyperCommand):
    """A command whose options take several values after one name: `--budgets 0.2 0.4`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """See [`TyperCommand`]."""
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, repeated_options(args, several))


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


def evaluate(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or Hub repository. Default: the digit-scenes reference.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="digit-scenes; a data set on the Hub, a folder or a file (parquet, json, jsonl) in conversational "
            "form; or a benchmark's local files: vqav2:FOLDER, gqa:, textvqa:, vizwiz:, scienceqa:, pope:, mme:."
        ),
    ] = DIGIT_SCENES,
    budgets: Annotated[
        list[str],
        typer.Option(
            "--budgets",
            "--budget",
            help="Several: fractions such as 0.4, numbers of tokens such as 115, or exact fractions such as 115/576.",
        ),
    ] = BUDGETS,  # noqa: B006
    reducers: Annotated[
        list[str],
        typer.Option(
            "--reducers",
            "--reducer",
            help="Several: reducers as in fastv:layer=2, stacks as in tome,adaptive, or full, which keeps everything.",
        ),
    ] = REDUCERS,  # noqa: B006
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: runs/evaluation_CHECKPOINT_DATA.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="Only the first so many. Default: all; of digit scenes 2400.", min=1)
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Part of the data. Default: test, or that with public answers.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of image files, where it is not with the data.")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric module. Default: the data's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 32,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of an answer.", min=1)] = 16,
    latency_repeats: Annotated[
        int, typer.Option(help="Also measure time and memory, as `adavtp measure`, in so many rounds.", min=0)
    ] = 0,
) -> None:
    """
    Answer questions at every budget with every reducer; write each answer, what it cost, and a summary.

    The folder has `answers.jsonl`, a line for each question and setting, `run.json`, `evaluation.json` for the model
    card, and pictures of the first questions. Interrupted, the same command goes on where it stopped. Under
    `accelerate launch` or `torchrun`, processes share the questions.
    """
    from accelerate import PartialState

    with refusals_shown():
        evaluate_checkpoint(
            *(checkpoint, data, [budget_of(text) for text in budgets], [parse_reducer(text) for text in reducers]),
            output=output,
            questions=questions,
            split=split,
            images=images,
            metric=metric,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            latency_repeats=latency_repeats,
        )
    PartialState().destroy_process_group()


def budget_of(text: str) -> float | int | Fraction:
    """`0.4` is a fraction, `115` a number of tokens, and `115/576` the fraction that keeps 115 of 576."""
    if "/" not in text:
        return parse_budget(text)
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise typer.BadParameter(
            f"{text!r} is no fraction such as 115/576. (A checkpoint comes before options that take several values.)"
        ) from error


def budget_for(text: str, num_patches: int) -> float | int:
    """The budget that a text means for images of `num_patches` visual tokens, of exact fractions their number."""
    from ..evaluation.settings import exact_budget, num_keep_of

    budget = budget_of(text)
    return exact_budget(budget, num_keep_of(budget, num_patches))


def evaluate_checkpoint(
    checkpoint: str | None,
    data: str,
    budgets: list[float | int | Fraction],
    reducers: list[Any],
    output: Path | None = None,
    questions: int | None = None,
    split: str | None = None,
    images: Path | None = None,
    metric: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    latency_repeats: int = 0,
) -> "Run":
    """
    What `adavtp evaluate` does, with budgets and reducers in the form of
    [`adavtp.evaluation.asked_settings.asked_settings`]. All other arguments are the command's.

    Returns:
        The run, finished.

    Raises:
        ValueError: if an argument is not allowed, or the folder has another run; the message says which.
    """
    import torch
    from accelerate import PartialState

    from ..evaluation.accuracy import circumstances
    from ..evaluation.answering import Scorer, answer_examples, inputs_of, score_together
    from ..evaluation.asked_settings import asked_settings, reachable_settings
    from ..evaluation.comparison import as_trained, checkpoint_hash
    from ..evaluation.runs import Run
    from ..evaluation.settings import FULL

    # Left to itself, `accelerate` takes processes that `torchrun` started without a GPU for strangers.
    process, started = PartialState(cpu=not torch.cuda.is_available()), time.perf_counter()
    folder = checkpoint or str(reference_checkpoint())
    name = Path(folder).name if Path(folder).is_dir() else folder
    with process.main_process_first():
        asked_data = named_data(data, split, images, questions)
        scorer = Scorer(metric or asked_data.metric)
        model, processor = load_checkpoint(folder)
    model.to(process.device)
    with_image = next((example for example in asked_data.examples if example.images), None)
    first = None if with_image is None else inputs_of(processor, [with_image]).to(model.device)
    stacks = [reducer if reducer == FULL else as_trained(model.config, reducer) for reducer in reducers]
    settings, unreachable = reachable_settings(model, first, asked_settings(model.config, stacks, budgets))
    if not settings:
        raise ValueError("; ".join(f"{one['reducer']} at {one['budget']:g}: {one['reason']}" for one in unreachable))
    device = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "cpu"
    about = circumstances()
    run = Run.begin(
        output or Path("runs") / re.sub(r"[^\w.-]+", "_", f"evaluation_{name}_{data}"),
        {
            "command": command_as_typed(),
            "versions": about["versions"],
            "machine": f"{about['machine']}, {device}, {str(model.dtype).removeprefix('torch.')}",
            "checkpoint": name,
            "checkpoint_hash": checkpoint_hash(folder),
            "data": data,
            "split": asked_data.split,
            "data_hash": asked_data.hash(),
            "num_examples": len(asked_data.examples),
            "metric": scorer.name,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "settings": [asked.as_dict() for asked in settings],
            "unreachable": unreachable,
            "num_patches": model.config.num_patches,
            "num_layers": model.config.text_config.num_hidden_layers,
            "shown": min(SHOWN, len(asked_data.examples)),
        },
    )
    process.wait_for_everyone()
    if process.is_main_process:
        run.write_header()
        run.merge()
    process.wait_for_everyone()
    seconds = answer_examples(
        *(model, processor, asked_data.examples, settings, run, scorer),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        shown=SHOWN,
        process=process,
        progress=_progress(process, "Answering ..."),
    )
    _finish(run, process, seconds, time.perf_counter() - started)
    if process.is_main_process:
        score_together(run, scorer, asked_data.examples)
        if latency_repeats:
            _measure(
                run, model, inputs_of(processor, [with_image or asked_data.examples[0]]), settings, latency_repeats
            )
        _report(run, asked_data.examples)
    process.wait_for_everyone()
    return run


def named_data(name: str, split: str | None, images: Path | None, questions: int | None = None) -> "EvaluationData":
    """What is asked: digit scenes, or what [`adavtp.evaluation.data_names.read_data`] reads; the first so many."""
    from ..evaluation.data_names import DEFAULT_SPLIT, read_data
    from ..evaluation.examples import ConversationExamples, EvaluationData
    from ..tasks.digit_scenes import load_digit_questions

    if name != DIGIT_SCENES:
        return read_data(name, split, images).first(questions)
    rows = load_digit_questions(split or DEFAULT_SPLIT, questions or DIGIT_SCENES_QUESTIONS)
    return EvaluationData(name, split or DEFAULT_SPLIT, ConversationExamples(rows.rename_column("kind", "category")))


def _progress(process: "PartialState", description: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A bar of the main process's share."""
    return progress(description) if process.is_main_process else iter


def _finish(run: "Run", process: "PartialState", seconds: "Seconds", whole: float) -> None:
    """Puts all processes' answers into one file, and adds up their time."""
    from accelerate.utils import gather_object

    spent = gather_object([(seconds.model, seconds.evaluation)])
    process.wait_for_everyone()
    run.header["seconds"] += whole
    run.header["model_seconds"] += sum(model for model, _ in spent)
    run.header["evaluation_seconds"] += sum(evaluation for _, evaluation in spent)
    if process.is_main_process:
        run.merge()
        run.write_header()
    process.wait_for_everyone()


def _measure(run: "Run", model: Any, inputs: Any, settings: list["AskedSetting"], repeats: int) -> None:
    """Adds measured time and memory of each setting to the run, for one question at a time."""
    from ..evaluation.measurements import as_rows, measure

    measured = measure(
        *(model, inputs.to(model.device), [asked.setting for asked in settings]),
        repeats=repeats,
        progress=progress("Measuring ..."),
    )
    # The setting has the exact number of tokens in place of a fraction such as 115/576.
    rows = [row | {"budget": asked.budget} for row, asked in zip(as_rows(measured), settings, strict=True)]
    known = {(row["reducer"], row["budget"]): row for row in [*(run.header.get("measurements") or []), *rows]}
    run.header["measurements"] = list(known.values())
    run.write_header()


def _report(run: "Run", examples: "Sequence[Example]") -> None:
    """Prints the summary, and writes it in the form that model cards read."""
    from ..evaluation.accuracy import as_report
    from ..evaluation.metric_figures import metric_figures
    from ..evaluation.run_results import results, unfinished

    rows, header = results(run), run.header
    header["figures"] = metric_figures(run, examples)
    run.write_header()
    console.print(results_table(rows, header["num_examples"], header["metric"]))
    for row in rows:
        if row.unreachable is not None:
            console.print(f"{row.reducer} at {row.budget:.4g}: {escape(row.unreachable)}", style="dim")
    for asked, number in unfinished(run):
        answered = f"{number} of {header['num_examples']} answered by an earlier command"
        console.print(f"{asked['reducer']} at {asked['budget']:.4g}: {answered}; ask for it again", style="dim")
    _print_figures(header["figures"])
    # A card calls the reference's data by their usual name.
    dataset = header["data"].replace(DIGIT_SCENES, "digit scenes")
    report = as_report(rows, header["command"], header["split"], header["num_examples"])
    report |= {"dataset": dataset, "metric": header["metric"], "figures": header["figures"]}
    (run.folder / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"Run: {run.folder}")


def _print_figures(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "reason" in row:
            said = escape(row["reason"])
        else:
            said = ", ".join(f"{name} {figure:.4g}" for name, figure in row["figures"].items())
        console.print(f"{row['reducer']} at {row['budget']:.4g}: {said}", style="dim")


def results_table(results: list["SettingResult"], num_examples: int, metric: str) -> Table:
    """A row for each setting: score with interval, and what an answer cost."""
    table = Table(title=f"{num_examples} questions, {metric}", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("reducer", overflow="fold")
    for column in ("budget", "K", "score, %", "95% CI", "visual\ntokens", "GFLOPs", "ms per\nanswer"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        if result.unreachable is not None:
            table.add_row(result.reducer, f"{result.budget:.4g}", str(result.num_keep), *["-"] * 5)
            continue
        table.add_row(
            result.reducer,
            f"{result.budget:.4g}",
            str(result.num_keep),
            f"{100 * result.accuracy:.1f}",
            f"{100 * result.accuracy_low:.1f}-{100 * result.accuracy_high:.1f}",
            f"{result.visual_tokens:.1f}",
            f"{result.flops / 1e9:.3g}",
            f"{result.milliseconds:.1f}",
        )
    return table
