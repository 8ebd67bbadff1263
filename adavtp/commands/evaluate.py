"""`adavtp evaluate`: a checkpoint's answers to every question, at every budget, with every reducer."""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.table import Table

from ..evaluation.answering import answer_examples, inputs_of, score_together
from ..evaluation.circumstances import checkpoint_hash, checkpoint_name, circumstances, without_place
from ..evaluation.data.examples import ConversationExamples, EvaluationData, Example
from ..evaluation.measurements import as_rows, measure
from ..evaluation.metric_modules import load_metric
from ..evaluation.reducer_table import as_trained, reducers_to_compare
from ..evaluation.runs import Run
from ..evaluation.settings import (
    COMPUTE,
    FULL,
    TOKENS,
    Setting,
    WrittenBudget,
    asked_settings,
    budget_of_text,
    reachable_settings,
    reducer_of_text,
    tokens_per_image,
)
from ..evaluation.summary import evaluation_record, metric_figures, unfinished
from .console import (
    REFERENCE_TASK,
    BudgetsOption,
    CheckpointArgument,
    ReducersOption,
    command_as_typed,
    console,
    folder_to_write,
    load_checkpoint,
    narrow_table,
    progress,
    reference_checkpoint,
)

BUDGETS = ["1.0", "0.8", "0.6", "0.4", "0.2"]
# Reports ask the control `downsample` which questions are hard: those that a smaller picture does not answer.
REDUCERS = ["full", "adaptive", "random", "downsample"]

# Examples whose pictures and kept patches a run has, for its report.
SHOWN = 12


def evaluate(
    checkpoint: CheckpointArgument = None,
    data: Annotated[
        str,
        typer.Option(
            help="pages or digit-scenes; a data set on the Hub, a folder or a file (parquet, json, jsonl) in "
            "conversational form; or a "
            "benchmark's local files: vqav2:FOLDER, gqa:, textvqa:, vizwiz:, scienceqa:, pope:, mme:."
        ),
    ] = REFERENCE_TASK,
    budgets: BudgetsOption = BUDGETS,  # noqa: B006
    reducers: ReducersOption = REDUCERS,  # noqa: B006
    compute_budgets: Annotated[
        list[float] | None,
        typer.Option(
            "--compute-budgets",
            "--compute-budget",
            help="Several: in place of --budgets, shares of the FLOPs with which the full model reads a prompt.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="What chooses the decoder's units: even, first or random. Default: the model's own."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the run. Default: runs/evaluation_CHECKPOINT_DATA.", callback=folder_to_write),
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="Only the first so many. Default: all; of drawn tasks 2400.", min=1)
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kinds", "--kind", help="Several: kinds of question, of a drawn task. Default: all."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Part of the data. Default: test, or that with public answers.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of image files, where it is not with the data.")] = None,
    trust_image_paths: Annotated[
        bool, typer.Option("--trust-image-paths", help="Follow paths and links in the data that leave that folder.")
    ] = False,
    metric: Annotated[str | None, typer.Option(help="Metric module. Default: the data's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 32,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Length limit of an answer. Default: 16, or what a drawn task's longest needs.", min=1),
    ] = None,
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
    asked = [budget_of_text(text) for text in budgets] if compute_budgets is None else compute_budgets
    evaluate_checkpoint(
        *(checkpoint, data, asked, [reducer_of_text(text) for text in reducers]),
        dial=TOKENS if compute_budgets is None else COMPUTE,
        scheduler=scheduler,
        output=output,
        questions=questions,
        kinds=kinds,
        split=split,
        images=images,
        trust_image_paths=trust_image_paths,
        metric=metric,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        latency_repeats=latency_repeats,
    )
    PartialState().destroy_process_group()


def evaluate_checkpoint(
    checkpoint: str | None,
    data: str,
    budgets: Sequence[WrittenBudget],
    reducers: Sequence[Any] | None,
    output: Path | None = None,
    questions: int | None = None,
    kinds: Sequence[str] | None = None,
    split: str | None = None,
    images: Path | None = None,
    trust_image_paths: bool = False,
    metric: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    latency_repeats: int = 0,
    dial: str = TOKENS,
    scheduler: str | None = None,
) -> Run:
    """
    What `adavtp evaluate` does, with budgets and reducers as [`adavtp.evaluation.settings.asked_settings`] takes them;
    of reducers `None` stands for all that can be compared. `dial` is what the budgets are of, see
    [`adavtp.evaluation.settings.Setting`]. All other arguments are the command's.

    Returns:
        The run, finished.

    Raises:
        ValueError: if an argument is not allowed, or the folder has another run; the message says which.
    """
    # Left to itself, `accelerate` takes processes that `torchrun` started without a GPU for strangers.
    process, started = PartialState(cpu=not torch.cuda.is_available()), time.perf_counter()
    folder = checkpoint or str(reference_checkpoint())
    with process.main_process_first():
        asked = named_data(data, split, images, questions, trust_image_paths, kinds)
        metric, max_new_tokens = metric or asked.metric, max_new_tokens or asked.max_new_tokens
        load_metric(metric)
        model, processor = load_checkpoint(folder)
    model.to(process.device)
    shown = next((example for example in asked.examples if example.images), None)
    first = None if shown is None else inputs_of(processor, [shown]).to(model.device)
    num_patches = tokens_per_image(model) if dial == TOKENS else None
    chosen = [FULL, *reducers_to_compare(model.config)] if reducers is None else reducers
    stacks = [one if one == FULL else as_trained(model.config, one) for one in chosen]
    wanted = asked_settings(num_patches, stacks, budgets, dial, scheduler)
    settings, unreachable = reachable_settings(model, first, wanted)
    header = _header(folder, asked, model, settings, unreachable) | {"num_patches": num_patches}
    header |= {} if dial == TOKENS else {"dial": dial}
    header |= {} if scheduler is None else {"scheduler": scheduler}
    header |= {"metric": metric, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    default = Path("runs") / re.sub(r"[^\w.-]+", "_", f"evaluation_{checkpoint_name(folder)}_{data}")
    run = Run.begin(output or default, header)
    _on_main_process(process, run.write_header, run.merge)
    seconds = answer_examples(
        *(model, processor, asked.examples, settings, run),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        shown=SHOWN,
        process=process,
        # A bar of the main process's share.
        progress=progress("Answering ...") if process.is_main_process else iter,
    )
    # All processes' time.
    model_seconds, evaluation_seconds = map(sum, zip(*gather_object([seconds]), strict=True))
    spent = {"seconds": time.perf_counter() - started}
    spent |= {"model_seconds": model_seconds, "evaluation_seconds": evaluation_seconds}
    run.header |= {name: run.header[name] + own for name, own in spent.items()}
    _on_main_process(process, run.merge, run.write_header)
    if process.is_main_process:
        score_together(run, asked.examples)
        if latency_repeats:
            _measure(run, model, first or inputs_of(processor, asked.examples[:1]), settings, latency_repeats)
        _report(run, asked.examples)
    process.wait_for_everyone()
    return run


def named_data(
    name: str,
    split: str | None,
    images: Path | None,
    questions: int | None = None,
    trust_image_paths: bool = False,
    kinds: Sequence[str] | None = None,
) -> EvaluationData:
    """
    What is asked: a drawn task, of which `kinds` may say the kinds of question, or what
    [`adavtp.evaluation.data.names.read_data`] reads; the first so many.
    """
    from ..evaluation.data.names import DEFAULT_SPLIT, read_data
    from ..tasks.drawn_tasks import TASK_NAMES, drawn_task

    if kinds and name not in TASK_NAMES:
        known = " and ".join(TASK_NAMES)
        raise ValueError(f"`kinds` is {list(kinds)} and `data` {name!r}; kinds are those of {known} alone.")
    if name not in TASK_NAMES:
        return read_data(name, split, images, trust_image_paths).first(questions)
    task = drawn_task(name)
    rows = task.load_questions(split or DEFAULT_SPLIT, questions or task.num_questions, kinds=kinds)
    return EvaluationData(
        *(name, split or DEFAULT_SPLIT, ConversationExamples(rows.rename_column("kind", "category"))),
        category_metrics=task.kind_metrics,
        max_new_tokens=task.max_new_tokens,
    )


def _header(
    folder: str, asked: EvaluationData, model: Any, settings: list[Setting], unreachable: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `run.json` says of data, checkpoint, settings and machine."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    about = circumstances()
    return {
        "command": command_as_typed(),
        "versions": about["versions"],
        "machine": f"{about['machine']}, {device}, {str(model.dtype).removeprefix('torch.')}",
        "checkpoint": checkpoint_name(folder),
        "checkpoint_hash": checkpoint_hash(folder),
        "data": without_place(asked.name),
        "split": asked.split,
        "data_hash": asked.hash(),
        "category_metrics": asked.category_metrics,
        "num_examples": len(asked.examples),
        "settings": [
            dict(zip(("reducer", "budget"), one.key, strict=True), num_keep=one.num_keep) for one in settings
        ],
        "unreachable": unreachable,
        "num_layers": model.config.get_text_config().num_hidden_layers,
        "shown": min(SHOWN, len(asked.examples)),
    }


def _on_main_process(process: PartialState, *steps: Callable[[], None]) -> None:
    """One process does it, while all others wait."""
    process.wait_for_everyone()
    if process.is_main_process:
        for step in steps:
            step()
    process.wait_for_everyone()


def _measure(run: Run, model: Any, inputs: Any, settings: list[Setting], repeats: int) -> None:
    """Adds measured time and memory of each setting to the run, for one question at a time."""
    measured = measure(model, inputs.to(model.device), settings, repeats=repeats, progress=progress("Measuring ..."))
    # The model was asked for the exact number of tokens in place of a fraction such as 115/576.
    rows = [row | {"budget": one.key[1]} for row, one in zip(as_rows(measured), settings, strict=True)]
    known = {(row["reducer"], row["budget"]): row for row in [*(run.header.get("measurements") or []), *rows]}
    run.header["measurements"] = list(known.values())
    run.write_header()


def _report(run: Run, examples: Sequence[Example]) -> None:
    """Prints the summary, and writes it in the form that model cards read."""
    header = run.header
    header["figures"] = metric_figures(run, examples)
    run.write_header()
    record = evaluation_record(run)
    (run.folder / "evaluation.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(results_table(record))
    said = [(row, row["reason"]) for row in record["unreachable"]]
    for row, number in unfinished(run):
        said.append((row, f"{number} of {header['num_examples']} answered by an earlier command; ask for it again"))
    for row in record["figures"]:
        figures = [f"{name} {figure:.4g}" for name, figure in row.get("figures", {}).items()]
        said.append((row, row.get("reason") or ", ".join(figures)))
    for row, text in said:
        console.print(f"{row['reducer']} at {row['budget']:.4g}: {text}", style="dim", markup=False)
    console.print(f"Run: {run.folder}")


def results_table(record: dict[str, Any]) -> Table:
    """A row for each setting of `evaluation.json`: score with interval, and what an answer cost."""
    title = f"{record['num_questions']} questions, {record['metric']}"
    columns = ("budget", "K", "score, %", "95% CI", "visual\ntokens", "GFLOPs", "ms per\nanswer")
    table = narrow_table(title, columns)
    for row in record["rows"]:
        table.add_row(
            row["reducer"],
            f"{row['budget']:.4g}",
            "-" if row["num_keep"] is None else str(row["num_keep"]),
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['accuracy_low']:.1f}-{100 * row['accuracy_high']:.1f}",
            f"{row['visual_tokens']:.1f}",
            "-" if row["flops"] is None else f"{row['flops'] / 1e9:.3g}",
            f"{row['milliseconds']:.1f}",
        )
    for row in record["unreachable"]:
        table.add_row(row["reducer"], f"{row['budget']:.4g}", *["-"] * 6)
    return table
