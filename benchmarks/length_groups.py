"""How much of a batch is padding: rows as they come, grouped by length before reduction, and grouped after it.

Lengths are drawn to look like those of LLaVA-1.5's instruction data, in round numbers: 6% of rows are text alone and
long, the others have one image of 576 tokens and a short text; both are lognormal and cut at 2048 tokens. Budgets
are U[0.2, 1]. A global batch is made of parts, one for each process, that are padded to their own longest row.

    python benchmarks/length_groups.py --json benchmarks/results/length_groups.json
"""

import math
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from adavtp.modeling.budget.token_budget import num_tokens_to_keep
from adavtp.trainer.data.budget_stream import BudgetStream
from adavtp.trainer.data.group_by_length import length_groups
from circumstances import circumstances, console, write_json

NUM_VISUAL_TOKENS, MAX_LENGTH = 576, 2048
SHARE_OF_TEXT_ROWS = 0.06
# Median of text tokens, and standard deviation of their logarithm.
WITH_IMAGE, TEXT_ALONE = (150.0, 0.6), (800.0, 0.7)
ORDERS = ("as they come", "length before reduction", "length after reduction")


def drawn_lengths(num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text tokens and images of rows, `[num_rows]` each."""
    generator = torch.Generator().manual_seed(seed)
    has_image = torch.rand(num_rows, generator=generator) >= SHARE_OF_TEXT_ROWS
    noise = torch.randn(num_rows, generator=generator)
    rows = [median * torch.exp(deviation * noise) for median, deviation in (WITH_IMAGE, TEXT_ALONE)]
    text = torch.where(has_image, rows[0], rows[1]).round().long()
    limit = MAX_LENGTH - NUM_VISUAL_TOKENS * has_image.long()
    return text.clamp(min=20).minimum(limit), has_image.long()


def padding(order: str, per: str, block_size: int, batch_size: int, num_processes: int, seed: int) -> float:
    """The share of padding in the decoder's batches, of one block."""
    size = batch_size * num_processes
    num_batches = block_size // size
    text, images = drawn_lengths(block_size, seed)
    stream = BudgetStream((0.2, 1.0), per, seed)
    drawn = (
        stream.numbered(range(num_batches))[:, None] if per == "batch" else stream.numbered(range(block_size))[None]
    )
    kept = num_tokens_to_keep(drawn.flatten(), NUM_VISUAL_TOKENS, drawn.numel()).view_as(drawn)
    after, before = (
        (text + images * num_visual).expand(num_batches, block_size) for num_visual in (kept, NUM_VISUAL_TOKENS)
    )
    generator = torch.Generator().manual_seed(seed)
    if order == ORDERS[0]:
        groups = torch.randperm(block_size, generator=generator).view(num_batches, size)
    else:
        groups = torch.tensor(length_groups(after if order == ORDERS[2] else before, size, generator))
    tokens = after.gather(1, groups).view(-1, batch_size)
    return 1 - float(tokens.sum() / (tokens.amax(dim=-1) * batch_size).sum())


def main(
    batch_size: Annotated[int, typer.Option(help="Samples of a process's batch.")] = 16,
    num_processes: Annotated[int, typer.Option(help="Processes that share a global batch.")] = 8,
    block_size: Annotated[int, typer.Option(help="Rows that are grouped together.")] = 2048,
    num_blocks: Annotated[int, typer.Option(help="Blocks that are measured.")] = 16,
    seed: Annotated[int, typer.Option(help="Of lengths, budgets and order.")] = 0,
    json: Annotated[Path | None, typer.Option(help="File for the result.")] = None,
) -> None:
    """Measure the share of padding in the decoder's batches."""
    rows: list[dict[str, Any]] = []
    for per in ("sample", "batch"):
        for order in ORDERS:
            start = time.perf_counter()
            seeds = range(seed * num_blocks, (seed + 1) * num_blocks)
            shares = [padding(order, per, block_size, batch_size, num_processes, block) for block in seeds]
            rows.append(
                {
                    "budget_per": per,
                    "order": order,
                    "padding": statistics.mean(shares),
                    "standard_error": statistics.stdev(shares) / math.sqrt(num_blocks),
                    "milliseconds_per_block": 1000 * (time.perf_counter() - start) / num_blocks,
                }
            )
    table = Table("a budget for each", "batches by", "padding", "time of a block")
    for row in rows:
        shown = f"{row['padding']:.1%} ± {row['standard_error']:.1%}"
        table.add_row(row["budget_per"], row["order"], shown, f"{row['milliseconds_per_block']:.0f} ms")
    console().print(table)
    sizes = {"batch_size": batch_size, "num_processes": num_processes, "block_size": block_size}
    lengths = {"share_of_text_rows": SHARE_OF_TEXT_ROWS, "with_image": WITH_IMAGE, "text_alone": TEXT_ALONE}
    described = circumstances("length_groups.py", sys.argv[1:], seed, torch.device("cpu"))
    write_json(json, described | sizes | {"num_blocks": num_blocks, "lengths": lengths, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
