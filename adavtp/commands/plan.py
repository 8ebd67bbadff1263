"""`adavtp plan`: what a training run will need, memory and hours, before a GPU is rented."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .console import command_as_typed, console
from .flops import MOST_PATCHES, Checkpoint, ImageSize, Preset, model_config, size_of_text

if TYPE_CHECKING:
    from ..evaluation.training_costs import MeasuredStep, Run

ALL_BUT_VISION, LOSSES = ["controller", "projector", "decoder"], ["lm"]
BUDGET_RANGE, UTILISATIONS = [0.2, 1.0], [0.25, 0.35, 0.45]
MEASURED = Path("benchmarks/results/training.json")

TrainParts = Annotated[
    list[str], typer.Option("--train-parts", help="Several of controller, projector, vision and decoder.")
]
Lora = Annotated[
    int | None, typer.Option(help="Rank of adapters that train in the decoder's place.", min=1, max=2**16)
]
MicroBatch = Annotated[
    int | None, typer.Option(help="Samples on a GPU at once. Default: as many as fit, of 1, 2, 4 ... 32.")
]
Utilisation = Annotated[
    list[float], typer.Option("--utilisation", help="Several: shares of the peak that are reached.")
]
Document = Annotated[
    Path | None,
    typer.Option(
        help="Write the plan for LLaVA-1.5 7B and 13B on 8 GPUs here, in place of one run's. Of the other options it "
        "takes --utilisation, --text-tokens, --longest, --reserve and --measured.",
        dir_okay=False,
    ),
]


def plan(
    preset: Preset = None,
    checkpoint: Checkpoint = None,
    image_size: ImageSize = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.", min=1)] = 8,
    gpu_memory: Annotated[float, typer.Option(help="Of one, in GiB.", min=1)] = 80,
    strategy: Annotated[str, typer.Option(help="ddp, zero2, zero3 or fsdp2.")] = "zero3",
    train_parts: TrainParts = ALL_BUT_VISION,
    lora: Lora = None,
    quantize: Annotated[bool, typer.Option("--nf4", help="The decoder's frozen weights in four bits.")] = False,
    budget_range: Annotated[
        list[float], typer.Option("--budget-range", help="Two: lowest and highest budget.")
    ] = BUDGET_RANGE,
    per: Annotated[str, typer.Option(help="A budget for each batch or for each sample.")] = "batch",
    gates: Annotated[
        str, typer.Option(help="Where the choice gets its gradient: features or attention.")
    ] = "features",
    loss: Annotated[list[str], typer.Option("--loss", help="Several of lm, distillation and relevance.")] = LOSSES,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing.")] = True,
    micro_batch: MicroBatch = None,
    samples: Annotated[int, typer.Option(help="Of an epoch, each with one image.")] = 665_000,
    text_tokens: Annotated[int, typer.Option(help="Of a sample, on average.", min=0, max=MOST_PATCHES)] = 200,
    longest: Annotated[int, typer.Option(help="Columns of the longest sample at full budget.")] = 2048,
    peak: Annotated[float, typer.Option(help="TFLOPs a second of a GPU; 312 is an A100's in bfloat16.")] = 312.0,
    utilisation: Utilisation = UTILISATIONS,
    reserve: Annotated[float, typer.Option(help="GiB for context, libraries and fragmentation.", min=0)] = 4.0,
    measured: Annotated[
        Path | None, typer.Option(help="Result of benchmarks/training.py, whose overhead is added.")
    ] = None,
    document: Document = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan a training run: memory on each GPU by part, FLOPs of a sample, hours of an epoch, and the plain model's."""
    from ..evaluation.training_costs import GIB, MeasuredStep, Run
    from ..evaluation.training_memory import Layout
    from ..modeling.costs.training_step import Step

    file = measured or (MEASURED if MEASURED.is_file() else None)
    found = None if file is None else MeasuredStep.of_file(file)
    if document is not None:
        if preset is not None or checkpoint is not None:
            raise ValueError("`--document` has its own models; leave `--preset` and `--checkpoint` out.")
        _write_page(document, found, measured or MEASURED, (utilisation, text_tokens, longest, reserve))
        return
    run = Run(
        config=model_config(preset, checkpoint, None),
        step=Step(train_parts, lora, checkpointing, gates, tuple(loss)),
        layout=Layout(strategy, gpus, reserve * GIB),
        budget_range=tuple(budget_range),
        per=per,
        samples=samples,
        text_tokens=text_tokens,
        longest=longest,
        quantize=quantize,
        image_size=size_of_text(image_size),
    )
    rows = micro_batch or run.largest_micro_batch(gpu_memory * GIB) or 1
    _print_plan(replace(run, micro_batch=rows), gpu_memory, peak, utilisation, found, as_json)


def _print_plan(
    run: "Run",
    gpu_memory: float,
    peak: float,
    utilisations: list[float],
    measured: "MeasuredStep | None",
    as_json: bool,
) -> None:
    overhead = None if measured is None else measured.overhead
    rows = [run.hours(peak * 1e12, share, overhead) for share in utilisations]
    counted = run.as_dict()
    if as_json:
        others = {"hours": rows, "micro_batch": run.micro_batch, "overhead": overhead, "gpus": run.layout.gpus}
        typer.echo(json.dumps(counted | others))
        return
    console.print(_memory_table(run, gpu_memory))
    console.print(_flops_table(run))
    console.print(_hours_table(rows, run, peak, measured))


def _write_page(document: Path, measured: "MeasuredStep | None", file: Path, asked: tuple) -> None:
    """The page; what choosing tokens was measured to cost stands in a file beside the other's."""
    from ..evaluation.training_plan_page import plan_page

    beside = file.with_name("overhead.json")
    choice = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(plan_page(command_as_typed(), measured, choice, *asked), encoding="utf-8")
    console.print(f"Page: {document}")


def _memory_table(run: "Run", gpu_memory: float) -> Table:
    from ..evaluation.training_costs import GIB

    total = sum(run.memory.values())
    fits = "fits" if total <= gpu_memory * GIB else "DOES NOT FIT"
    table = Table(
        title=f"Memory on each of {run.layout.gpus} GPUs, {run.layout.strategy}, {run.micro_batch} sample(s) at once",
        caption=f"{fits} into {gpu_memory:g} GiB; at the longest samples, {run.longest} columns at full budget",
    )
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in run.memory.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("total", f"{total / GIB:.2f}")
    return table


def _flops_table(run: "Run") -> Table:
    low, high = run.budget_range
    table = Table(
        title=f"TFLOPs of a sample with {run.text_tokens} text tokens, budgets U[{low:g}, {high:g}] per {run.per}",
        caption="forward; its way back; what checkpointing runs again",
    )
    for column in ("part", "forward", "backward", "again", "total"):
        table.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
    flops = run.flops
    for name, part in flops.parts.items():
        table.add_row(name, *(f"{amount / 1e12:.3f}" for amount in (*part, part.total)))
    table.add_section()
    table.add_row("total", "", "", "", f"{flops.total / 1e12:.3f}")
    if run.plain_flops is not None:
        plain = run.plain_flops.total
        table.add_row("plain model", "", "", "", f"{plain / 1e12:.3f}")
        table.add_row("ratio", "", "", "", f"{plain / flops.total:.3f}")
    return table


def _hours_table(
    rows: list[dict[str, float | None]], run: "Run", peak: float, measured: "MeasuredStep | None"
) -> Table:
    says = "no measured overhead: no benchmarks/results/training.json here, name one with --measured"
    if measured is not None:
        says = escape(f"overhead {measured.overhead:.3f} from {measured.file}: {measured.command}")
    table = Table(
        title=f"Hours of an epoch of {run.samples} samples on {run.layout.gpus} GPUs of {peak:g} TFLOPs a second",
        caption=f"utilisation is an assumption; {says}",
    )
    for column in ("utilisation", "by count", "with measured overhead", "plain model, all tokens"):
        table.add_column(column, justify="right")
    for row in rows:
        shown = (row[name] for name in ("counted", "with_overhead", "plain"))
        table.add_row(f"{row['utilisation']:g}", *("-" if hours is None else f"{hours:.1f}" for hours in shown))
    return table
