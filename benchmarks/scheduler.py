"""Do layers, heads and channels that a plan leaves out save the time that they cost? Against everything, in one run.

A LLaVA-shaped model with random weights reads a prompt whose image is encoded already, and answers it: with every
layer, with half of the layers, with half of the heads and MLP channels of every layer, with two fifths of the visual
tokens, and with two of these together. What is timed is `generate` of one token, the prefill, and of more; what these
take beyond the first is decoding. Beside each ratio stands the one that counted FLOPs promise.

    python benchmarks/scheduler.py --json benchmarks/results/scheduler.json
    python benchmarks/scheduler.py --preset 7b --device cuda --dtype bfloat16 --json scheduler_7b.json
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adavtp import AdaVTPForConditionalGeneration, ExecutionPlan
from adavtp.modeling.costs.model_costs import ModelCosts
from circumstances import circumstances, console, write_json
from interleaved import Spread, interleaved_medians, paired_ratio
from overhead import PRESETS, Shape, configuration

# What is aimed at: how many times as fast prefill and decoding are.
TARGETS = {"depth 0.5": (1.6, 1.7), "width 0.5": (1.4, 1.4)}
TOKEN_BUDGET = 0.4


@dataclass
class Timed:
    """
    One setting.

    Attributes:
        num_visual: visual tokens of the prompt.
        plan: what runs.
        prefill, answer: seconds of one token, and of all.
        counted_prefill, counted_decoding: FLOPs of the decoder.
    """

    num_visual: int
    plan: ExecutionPlan
    prefill: Spread | None = None
    answer: Spread | None = None
    counted_prefill: float = 0.0
    counted_decoding: float = 0.0

    @property
    def decoding(self) -> Spread:
        """Seconds of all tokens but the first, round by round."""
        pairs = zip(self.answer.repeats, self.prefill.repeats, strict=True)
        return Spread.of([whole - first for whole, first in pairs])


def settings_of(model: AdaVTPForConditionalGeneration, num_patches: int) -> dict[str, Timed]:
    """What is compared, by name; everything comes first."""
    whole, depth, width = (ExecutionPlan.whole(model.config) for _ in range(3))
    depth.layers[:, 1::2] = False
    num_heads, num_groups = width.heads.shape[-1], width.mlp_groups.shape[-1]
    width.heads[..., num_heads // 2 :], width.mlp_groups[..., num_groups // 2 :] = False, False
    few = max(1, int(TOKEN_BUDGET * num_patches))
    return {
        "everything": Timed(num_patches, whole),
        "depth 0.5": Timed(num_patches, depth),
        "width 0.5": Timed(num_patches, width),
        f"tokens {TOKEN_BUDGET}": Timed(few, whole),
        f"depth 0.5, tokens {TOKEN_BUDGET}": Timed(few, depth),
        f"width 0.5, tokens {TOKEN_BUDGET}": Timed(few, width),
    }


def answering(
    model: AdaVTPForConditionalGeneration, timed: Timed, num_text: int, num_new: int, generator: torch.Generator
) -> Callable[[], object]:
    """Answers a prompt of random words behind an image that is encoded already, with so many new tokens."""
    config, device = model.config, model.device
    words = torch.randint(1, config.image_token_id, (1, num_text), generator=generator)
    ids = torch.cat([torch.full((1, timed.num_visual), config.image_token_id), words], dim=1).to(device)
    features = torch.randn(timed.num_visual, config.text_config.hidden_size, generator=generator)
    features = features.to(device, model.dtype)
    how = {"do_sample": False, "max_new_tokens": num_new, "min_new_tokens": num_new, "plan": timed.plan}

    def answer() -> torch.Tensor:
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=[features])}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_encoder_outputs=encoded, **how)

    return answer


def measure(arguments: argparse.Namespace, shape: Shape) -> dict[str, Timed]:
    """Times and counts all settings."""
    torch.manual_seed(arguments.seed)
    with arguments.device:
        dtype = getattr(torch, arguments.dtype)
        model = AdaVTPForConditionalGeneration._from_config(configuration(shape), dtype=dtype).eval()
    model.generation_config.pad_token_id = 0
    settings = settings_of(model, (shape.image_size // shape.patch_size) ** 2)
    num_text, costs = shape.text_before + shape.text_after, ModelCosts.of(model.config)
    for timed in settings.values():
        budget = {"token_budget": 1.0} if timed.num_visual == settings["everything"].num_visual else {}
        budget = budget or {"token_budget": timed.num_visual, "reducer": "grid"}
        cost = costs.of_prompt(num_text, new_tokens=arguments.new_tokens, plan=timed.plan, **budget)
        timed.counted_prefill, timed.counted_decoding = cost.prefill, cost.total - cost.with_new_tokens(1)
    calls = {
        (name, part): answering(model, timed, num_text, number, torch.Generator().manual_seed(arguments.seed))
        for name, timed in settings.items()
        for part, number in (("prefill", 1), ("answer", arguments.new_tokens))
    }
    spreads = interleaved_medians(calls, arguments.repeats, arguments.warmup, device=arguments.device)
    for (name, part), spread in spreads.items():
        setattr(settings[name], part, spread)
    return settings


def rows_of(settings: dict[str, Timed]) -> list[dict[str, Any]]:
    """What of each setting is reported, ready for JSON: how many times as fast it is, and how many times as cheap."""
    everything = settings["everything"]
    return [
        {
            "setting": name,
            "visual_tokens": timed.num_visual,
            "prefill_seconds": asdict(timed.prefill),
            "decoding_seconds": asdict(timed.decoding),
            "prefill_ratio": asdict(paired_ratio(everything.prefill, timed.prefill)),
            "decoding_ratio": asdict(paired_ratio(everything.decoding, timed.decoding)),
            "counted_prefill_ratio": everything.counted_prefill / timed.counted_prefill,
            "counted_decoding_ratio": everything.counted_decoding / timed.counted_decoding,
            "targets": TARGETS.get(name),
        }
        for name, timed in settings.items()
    ]


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """A row for each setting: how many times as fast as everything, medians and quartiles, and what was counted."""
    table = Table("setting", "tokens", "prefill", "counted", "decoding", "counted", "aimed at")
    table.title = "times as fast as everything"
    for row in rows:
        prefill, decoding = (Spread(**row[f"{part}_ratio"]) for part in ("prefill", "decoding"))
        aimed = "" if row["targets"] is None else " and ".join(f"{target:.1f}" for target in row["targets"])
        table.add_row(
            *(row["setting"], str(row["visual_tokens"])),
            *(prefill.shown(digits=2), f"{row['counted_prefill_ratio']:.2f}"),
            *(decoding.shown(digits=2), f"{row['counted_decoding_ratio']:.2f}", aimed),
        )
    return table


def parse(command_line: Sequence[str]) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--new-tokens", type=int, default=33, help="generated, the first by the prefill")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are timed")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line says; prints it, writes it, and returns it."""
    command_line = sys.argv[1:] if command_line is None else command_line
    arguments = parse(command_line)
    result = circumstances("scheduler.py", command_line, arguments.seed, arguments.device)
    names = ("dtype", "new_tokens", "repeats", "warmup")
    result["settings"] = {name: getattr(arguments, name) for name in names}
    result["shape"] = asdict(PRESETS[arguments.preset])
    result["speed"] = rows_of(measure(arguments, PRESETS[arguments.preset]))
    console().print(table_of(result["speed"]))
    write_json(arguments.json, result)
    return result


if __name__ == "__main__":
    main()
