"""Does decoding get slower because visual tokens left inside the decoder? Tokens per second, against `full`.

Every decoder-stage reducer at budget 0.5, on models with random weights of two sizes: the reference checkpoint's,
where the work beside the matrix products counts most, and a mid size with LLaVA-1.5's 576 visual tokens. For each, one
prompt alone, and a batch of four of different lengths, whose rows are padded. Settings take turns in an order that is
shuffled for every repeat, and ratios are taken repeat by repeat, so that what else the machine does hits all of them:
see [`adavtp.evaluation.measurements.measure`]. Aimed at is a ratio of 1.0 or more everywhere.

    python benchmarks/decoding.py --json benchmarks/results/decoding.json
    python benchmarks/decoding.py --device cuda --dtype bfloat16 --json decoding_gpu.json
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from adavtp import AdaVTPForConditionalGeneration
from adavtp.evaluation.measurements import Measurement, measure
from adavtp.evaluation.settings import FULL, Setting
from adavtp.modeling.reducers.base import REDUCERS
from circumstances import circumstances, console, write_json
from overhead import PRESETS, Shape, configuration, make_inputs

SIZES = {
    "tiny": PRESETS["tiny"],
    "small": Shape(2, 128, 4, 96, 8, 4, 128, 4, 4, 384, 64, text_before=3, text_after=13),
    "mid": Shape(4, 384, 6, 336, 14, 12, 512, 8, 8, 1376, 2048),
}
BATCHES = {"one prompt": 1, "ragged batch": 4}
BUDGET, TARGET = 0.5, 1.0


def decoder_stage_reducers() -> list[str]:
    """The names of the registered reducers that act inside the decoder, alone or after merging before it."""
    return [name for name, reducer in REDUCERS.items() if reducer.stage == "decoder" or name == "aim"]


def ragged_inputs(shape: Shape, model: torch.nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    """Prompts of which each is one word shorter than the one before, padded on the left."""
    inputs = make_inputs(shape, model.config, batch_size, model.device)
    column = torch.arange(inputs["input_ids"].shape[1], device=model.device)
    row = torch.arange(batch_size, device=model.device)[:, None]
    inputs["attention_mask"] = (column >= row.clamp(max=shape.text_before - 1)).long()
    return inputs


def measure_size(arguments: argparse.Namespace, shape: Shape) -> dict[str, list[Measurement]]:
    """Measures all reducers on a model of one size; by the name of the batch."""
    torch.manual_seed(arguments.seed)
    with arguments.device:
        model = AdaVTPForConditionalGeneration._from_config(
            configuration(shape), dtype=getattr(torch, arguments.dtype)
        ).eval()
    # No row is padded behind an answer, but `generate` warns where no word is named for it.
    model.generation_config.pad_token_id = 0
    settings = [Setting(FULL), *(Setting(name, BUDGET) for name in arguments.reducers)]
    return {
        name: measure(
            model,
            ragged_inputs(shape, model, batch_size),
            settings,
            arguments.new_tokens,
            arguments.repeats,
            arguments.warmup,
            arguments.seed,
        )
        for name, batch_size in BATCHES.items()
    }


def rows_of(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """What of each measurement is about decoding, ready for JSON."""
    return [
        {key: value for key, value in asdict(one).items() if key in ("reducer", "budget") or "tokens_per" in key}
        for one in measurements
    ]


def table_of(size: str, batches: dict[str, list[dict[str, Any]]]) -> Table:
    """Speed of one size, a row for each reducer: medians, and the quartiles of ratios."""
    table = Table("reducer", *(f"{name}: {what}" for name in batches for what in ("tokens/s", "ratio to full")))
    table.title = f"{size}, budget {BUDGET:g}, aimed at {TARGET:.1f} or more"
    for rows in zip(*batches.values(), strict=True):
        cells = [rows[0]["reducer"]]
        for row in rows:
            ratio, low, high = (row[f"tokens_per_second_ratio{end}"] for end in ("", "_low", "_high"))
            cells += [f"{row['tokens_per_second']:.0f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
        table.add_row(*cells)
    return table


def parse(command_line: Sequence[str]) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "mid"])
    parser.add_argument("--reducers", nargs="+", default=decoder_stage_reducers())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--new-tokens", type=int, default=48, help="generated for each prompt")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are timed")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line says; prints it, writes it, and returns it."""
    command_line = sys.argv[1:] if command_line is None else command_line
    arguments = parse(command_line)
    result = circumstances("decoding.py", command_line, arguments.seed, arguments.device)
    names = ("dtype", "reducers", "new_tokens", "repeats", "warmup")
    result["settings"] = {"budget": BUDGET, "target_ratio": TARGET, "batches": BATCHES} | {
        name: getattr(arguments, name) for name in names
    }
    result["sizes"] = {}
    for size in arguments.sizes:
        batches = {name: rows_of(rows) for name, rows in measure_size(arguments, SIZES[size]).items()}
        result["sizes"][size] = {"shape": asdict(SIZES[size]), "tokens_per_second": batches}
        console().print(table_of(size, batches))
    write_json(arguments.json, result)
    return result


if __name__ == "__main__":
    main()
