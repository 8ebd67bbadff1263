"""Choosing K of N tokens at once, by Gumbel top-K, against K draws one after another.

The reference is the loop of AdaLLaVA's scheduler (arXiv 2503.10905): each draw adds fresh Gumbel noise to the scores,
leaves out what is drawn already, takes the largest, and passes the gradient straight through to the softmax. Both
choose exactly K tokens, with the same distribution over sets; the loop takes K passes over the scores and keeps each
of them for the backward pass.

    python benchmarks/gumbel_top_k.py
    python benchmarks/gumbel_top_k.py --device cuda --json gumbel_top_k.json
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from adavtp.modeling.budget.top_k import gumbel_noise, sample_top_k
from circumstances import circumstances, console, write_json
from interleaved import CLOCKS, Spread, interleaved_medians, paired_ratio


def draw_one_by_one(scores: torch.Tensor, num_keep: int, temperature: float) -> torch.Tensor:
    """
    Draws tokens without replacement by straight-through Gumbel-softmax.

    Args:
        scores: `[batch, num_tokens]`, unnormalised log-probabilities.
        num_keep: draws.
        temperature: of the softmax that carries the gradient.

    Returns:
        `[batch, num_tokens]`, 1 where a token was drawn and 0 elsewhere.
    """
    drawn = torch.zeros_like(scores)
    for _ in range(num_keep):
        noisy = (scores + gumbel_noise(scores)) / temperature
        soft = noisy.masked_fill(drawn.detach() > 0.5, float("-inf")).softmax(dim=-1)
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
        drawn = drawn + hard + (soft - soft.detach())
    return drawn


def draw_at_once(scores: torch.Tensor, num_keep: int, temperature: float) -> torch.Tensor:
    """The same by Gumbel top-K; see [`sample_top_k`]."""
    counts = torch.full((len(scores),), num_keep, device=scores.device)
    return sample_top_k(scores, counts, temperature, training=True)[1]


def measure(arguments: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """
    Times both ways, forward alone and with the backward pass.

    Args:
        arguments: of the command line.
        batch_size: rows of scores.

    Returns:
        Seconds and speed-ups, and how many tokens each way chose per row, ready for JSON.
    """
    torch.manual_seed(arguments.seed)
    shape = (batch_size, arguments.num_tokens)
    scores = torch.randn(shape, device=arguments.device, requires_grad=True)
    weight = torch.randn(shape, device=arguments.device)
    ways = {"at_once": draw_at_once, "one_by_one": draw_one_by_one}

    def forward(way: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return way(scores, arguments.num_keep, arguments.temperature)

    def with_backward(way: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((way(scores, arguments.num_keep, arguments.temperature) * weight).sum(), scores)

    result = {
        "batch_size": batch_size,
        "num_chosen": {name: sorted(set(forward(way).sum(dim=-1).round().tolist())) for name, way in ways.items()},
    }
    for part, run in {"forward": forward, "forward_backward": with_backward}.items():
        calls = {name: (lambda run=run, way=way: run(way)) for name, way in ways.items()}
        seconds = interleaved_medians(calls, arguments.repeats, clock=arguments.clock, device=arguments.device)
        result[part] = {
            "seconds": {name: asdict(spread) for name, spread in seconds.items()},
            "speed_up": asdict(paired_ratio(seconds["one_by_one"], seconds["at_once"])),
        }
    return result


def show(result: dict[str, Any], output: Console) -> None:
    """Prints the result as a table."""
    table = Table("batch", "pass", "at once, ms", "one by one, ms", "times as fast")
    for row in result["batches"]:
        for part in ("forward", "forward_backward"):
            seconds = [Spread(**row[part]["seconds"][name]).shown(1000, 2) for name in ("at_once", "one_by_one")]
            speed_up = Spread(**row[part]["speed_up"]).shown()
            table.add_row(str(row["batch_size"]), part.replace("_", " + "), *seconds, speed_up)
    settings, machine = result["settings"], result["machine"]
    output.print(
        f"{settings['num_keep']} of {settings['num_tokens']} tokens on {machine['gpu'] or machine['processor']}: "
        f"medians and quartiles ({result['command']})"
    )
    output.print(table)


def parse(command_line: Sequence[str]) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-tokens", type=int, default=576)
    parser.add_argument("--num-keep", type=int, default=288)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=9, help="rounds that are measured")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: seconds of processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args(command_line)
    if not 1 <= arguments.num_keep <= arguments.num_tokens:
        parser.error(f"`--num-keep` is {arguments.num_keep}; allowed are 1 to {arguments.num_tokens}.")
    return arguments


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line says; prints it, writes it, and returns it."""
    command_line = sys.argv[1:] if command_line is None else command_line
    arguments = parse(command_line)
    result = circumstances("gumbel_top_k.py", command_line, arguments.seed, arguments.device)
    result["settings"] = {
        name: getattr(arguments, name) for name in ("num_tokens", "num_keep", "temperature", "repeats", "clock")
    }
    result["batches"] = [measure(arguments, batch_size) for batch_size in arguments.batch_sizes]
    show(result, console())
    write_json(arguments.json, result)
    return result


if __name__ == "__main__":
    main()
