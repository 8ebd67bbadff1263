"""`adavtp measure`: what each reducer and budget costs on this machine, read off the clock."""

import json
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ..evaluation import measurements
from ..evaluation.circumstances import circumstances
from ..evaluation.measurements import Measurement, as_rows
from ..evaluation.settings import asked_settings, budget_of_text, reachable_settings, reducer_of_text, tokens_per_image
from ..modeling.processing_adavtp import inputs_of_questions
from .console import (
    REFERENCE_TASK,
    BudgetsOption,
    CheckpointArgument,
    DrawnTaskOption,
    ReducersOption,
    command_as_typed,
    console,
    load_checkpoint,
    narrow_table,
    progress,
)

# As many as load at least; one question of each kind.
NUM_QUESTIONS = 6


def measure(
    checkpoint: CheckpointArgument = None,
    data: DrawnTaskOption = REFERENCE_TASK,
    budgets: BudgetsOption = ["0.2", "0.4"],  # noqa: B006
    reducers: ReducersOption = ["full", "adaptive"],  # noqa: B006
    batch_size: Annotated[int, typer.Option(help="Questions answered together.", min=1)] = 1,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated for each, whatever the model says.", min=2)] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds that are timed.", min=1)] = 7,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16. Default: the checkpoint's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """
    Measure time to first token, tokens per second, peak memory and keys and values, at each reducer and budget.

    The questions are of a drawn task's test split; `full` keeps everything, and ratios are to it. Settings take
    turns; what is printed is the median over repeats, with quartiles.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _require_device(device)
    model, processor = load_checkpoint(checkpoint)
    model.to(device=torch.device(device), dtype=_dtype(dtype) or model.dtype)
    inputs = _inputs(processor, data, batch_size).to(model.device)
    values = [budget_of_text(text) for text in budgets]
    asked = asked_settings(tokens_per_image(model), [reducer_of_text(text) for text in reducers], values)
    settings, unreachable = reachable_settings(model, inputs, asked)
    rounds = iter if as_json else progress("Measuring ...")
    measured = measurements.measure(model, inputs, settings, new_tokens, repeats, progress=rounds)
    if as_json:
        rows = {"measurements": as_rows(measured), "unreachable": unreachable}
        print(json.dumps({"command": command_as_typed(), **circumstances(), **rows}, indent=1))
        return
    console.print(measurement_table(measured))
    for row in unreachable:
        console.print(f"{row['reducer']} at {row['budget']:g}: {row['reason']}", style="dim", markup=False)


def _require_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).item()
    # Where a device is not there, torch raises what it likes.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"`device` is {name!r}, which is not there: {str(error).splitlines()[0]}") from error


def _dtype(name: str | None) -> Any:
    dtype = getattr(torch, name) if name and hasattr(torch, name) else None
    # Those of 8 bits are for storing alone.
    if name and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"`dtype` is {name!r}; allowed are torch's floating-point types, such as 'bfloat16'.")
    return dtype


def _inputs(processor: Any, data: str, batch_size: int) -> Any:
    from ..tasks.drawn_tasks import drawn_task

    rows = drawn_task(data).load_questions("test", max(batch_size, NUM_QUESTIONS))[:batch_size]
    return inputs_of_questions(processor, [images[0] for images in rows["images"]], list(rows["question"]))


def measurement_table(measurements: list[Measurement]) -> Table:
    """Measurements as a table narrow enough for any terminal: medians and, below them, quartiles."""
    first = measurements[0]
    table = narrow_table(
        f"{first.device}, {first.dtype}, batch of {first.batch_size}, {first.new_tokens} new tokens, "
        f"{first.repeats} repeats; weights {first.weight_bytes / 2**20:.1f} MiB",
        ("budget", "first\ntoken, ms", "\nof full", "\ntokens/s", "\nof full", "peak\nMiB", "K-V\nMiB"),
    )
    for row in measurements:
        table.add_row(
            row.reducer,
            "-" if row.budget is None else f"{row.budget:g}",
            _shown(row, "time_to_first_token_ms", 1),
            _shown(row, "time_to_first_token_ratio", 2),
            _shown(row, "tokens_per_second", 0),
            _shown(row, "tokens_per_second_ratio", 2),
            f"{row.peak_memory_bytes / 2**20:.2f}",
            f"{row.kv_bytes / 2**20:.2f}",
        )
    return table


def _shown(measurement: Measurement, name: str, digits: int) -> str:
    median, low, high = (getattr(measurement, name + end) for end in ("", "_low", "_high"))
    return "-" if median is None else f"{median:.{digits}f}\n{low:.{digits}f}-{high:.{digits}f}"
