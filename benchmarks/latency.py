"""What reducers and budgets are worth on the clock: time to first token, decoding speed and memory at LLaVA's sizes.

The model has random weights in the shapes of the preset, made where they are used, so that nothing is downloaded: how
long a model takes depends on its shapes, not on what it has learned. Everything is measured through `generate`, as
[`adavtp.evaluation.measurements.measure`] says. `full` keeps everything; ratios are to it. Settings that cannot be met
stand in the result with the reason.

    python -m pip install --no-deps --no-build-isolation --editable .
    python benchmarks/latency.py --preset llava-1.5-7b --device cuda --dtype bfloat16 \
        --json benchmarks/results/latency.json

The first line is for a machine that has torch and transformers, but no network.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from adavtp import AdaVTPConfig, AdaVTPForConditionalGeneration
from adavtp.commands.measure import measurement_table
from adavtp.evaluation.measurements import as_rows, measure
from adavtp.evaluation.settings import (
    asked_settings,
    budget_of_text,
    reachable_settings,
    reducer_of_text,
    tokens_per_image,
)
from circumstances import circumstances, console, write_json
from overhead import PRESETS as SHAPES
from overhead import configuration, make_inputs

PRESETS = {"llava-1.5-7b": SHAPES["7b"], "small": SHAPES["small"], "tiny": SHAPES["tiny"]}
REDUCERS = ["full", "adaptive", "prumerge", "prumerge+", "fastv", "random"]
BUDGETS = ["0.2", "0.4", "0.6", "0.8"]


def build_model(config: AdaVTPConfig, device: torch.device, dtype: torch.dtype) -> AdaVTPForConditionalGeneration:
    """Random weights, made where and as they are used."""
    with device:
        model = AdaVTPForConditionalGeneration._from_config(config, dtype=dtype).eval()
    # No row is ever padded here, but `generate` warns where no word is named for it.
    model.generation_config.pad_token_id = 0
    return model


def measure_batch(
    model: AdaVTPForConditionalGeneration, arguments: argparse.Namespace, batch_size: int
) -> dict[str, Any]:
    """
    Measures all settings on one batch of noise.

    Args:
        model: with random weights.
        arguments: of the command line.
        batch_size: prompts, with one image each.

    Returns:
        `batch_size`, `measurements` and `unreachable`, ready for JSON but for the measurements.
    """
    torch.manual_seed(arguments.seed)
    inputs = make_inputs(PRESETS[arguments.preset], model.config, batch_size, model.device)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    reducers, budgets = map(reducer_of_text, arguments.reducers), map(budget_of_text, arguments.budgets)
    asked = asked_settings(tokens_per_image(model), list(reducers), list(budgets))
    settings, unreachable = reachable_settings(model, inputs, asked)

    def rounds(numbers: Iterable[int]) -> Iterator[int]:
        yield from track(numbers, f"Batch of {batch_size} ...", console=console())

    measurements = measure(
        model,
        inputs,
        settings,
        arguments.new_tokens,
        arguments.repeats,
        arguments.warmup,
        arguments.seed,
        rounds,
    )
    return {"batch_size": batch_size, "measurements": measurements, "unreachable": unreachable}


def parse(command_line: Sequence[str]) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small", help="the model's sizes")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--reducers", nargs="+", default=REDUCERS, help="as in fastv:layer=2 or tome,adaptive; full")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, help="fractions such as 0.4, or numbers of tokens")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--new-tokens", type=int, default=32, help="generated for each prompt")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that are timed")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line says; prints it, writes it, and returns it."""
    command_line = sys.argv[1:] if command_line is None else command_line
    arguments = parse(command_line)
    result = circumstances("latency.py", command_line, arguments.seed, arguments.device)
    shape = PRESETS[arguments.preset]
    names = ("preset", "dtype", "reducers", "budgets", "batch_sizes", "new_tokens", "repeats", "warmup")
    result["settings"] = {"shape": asdict(shape)} | {name: getattr(arguments, name) for name in names}
    torch.manual_seed(arguments.seed)
    model = build_model(configuration(shape), arguments.device, getattr(torch, arguments.dtype))
    result["batches"] = [measure_batch(model, arguments, batch_size) for batch_size in arguments.batch_sizes]
    for batch in result["batches"]:
        console().print(measurement_table(batch["measurements"]))
        for row in batch["unreachable"]:
            console().print(f"{row['reducer']} at {row['budget']:g}: {row['reason']}", style="dim", markup=False)
        batch["measurements"] = as_rows(batch["measurements"])
    write_json(arguments.json, result)
    return result


if __name__ == "__main__":
    main()
