"""What AdaVTP costs on top of the work that the budget leaves: prefill time and K-V cache, against stock code.

Three questions, asked of a LLaVA-shaped model with random weights:

- Pruned prefill: is choosing tokens cheap? `forward(..., token_budget=b)` against the stock vision tower, cut off
  behind the feature layer, the stock projector on K tokens and the stock text model on them. The reference is told
  which tokens to take, so every step of ours that a clairvoyant would not need counts against us.
- Full prefill: is budget 1.0 free? Against stock LLaVA as it is, which runs every layer of the tower, and, for a fair
  comparison, against stock LLaVA with its tower cut off behind the feature layer.
- K-V cache: does it hold exactly what K predicts?

All models share their weights, run with the same inputs and compute the logits of the last position alone.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --preset 7b --device cuda --dtype bfloat16 --json overhead_7b.json
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Cache, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from adavtp import AdaVTPConfig, AdaVTPForConditionalGeneration
from circumstances import circumstances, console, write_json
from interleaved import CLOCKS, Spread, interleaved_medians, paired_ratio

TARGET_PRUNED, TARGET_FULL = 1.05, 1.02


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaVA: CLIP-shaped tower, Llama-shaped text model, and the text around the image."""

    vision_layers: int
    vision_width: int
    vision_heads: int
    image_size: int
    patch_size: int
    text_layers: int
    text_width: int
    text_heads: int
    text_key_value_heads: int
    text_mlp_width: int
    vocab_size: int
    text_before: int = 35
    text_after: int = 29


PRESETS = {
    "tiny": Shape(3, 32, 4, 32, 8, 2, 32, 4, 2, 64, 64, text_before=3, text_after=5),
    "small": Shape(12, 384, 6, 336, 14, 8, 512, 8, 8, 1376, 2048),
    "7b": Shape(24, 1024, 16, 336, 14, 32, 4096, 32, 32, 11008, 32064),
}


@dataclass
class Models:
    """
    One set of weights, run in three ways.

    Attributes:
        ours: AdaVTP.
        stock: stock LLaVA.
        stock_cut: stock LLaVA whose tower ends at the feature layer.
    """

    ours: AdaVTPForConditionalGeneration
    stock: LlavaForConditionalGeneration
    stock_cut: LlavaForConditionalGeneration


def configuration(shape: Shape) -> AdaVTPConfig:
    """The configuration of a model of this shape, everything else LLaVA-1.5's or AdaVTP's default."""
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    text = LlamaConfig(
        hidden_size=shape.text_width,
        intermediate_size=shape.text_mlp_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        num_key_value_heads=shape.text_key_value_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    return AdaVTPConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=shape.vocab_size - 1,
        image_seq_length=(shape.image_size // shape.patch_size) ** 2,
        tie_word_embeddings=False,
    )


def build_models(shape: Shape, device: torch.device, dtype: torch.dtype) -> Models:
    """Random weights, made where and as they are used, and shared by the three models."""
    config = configuration(shape)
    with device:
        ours = AdaVTPForConditionalGeneration._from_config(config, dtype=dtype).eval()
    stock_cut_config = stock_configuration(config)
    # The feature layer is -2, the output of the last layer but one; with one layer less it is -1.
    stock_cut_config.vision_config.num_hidden_layers -= 1
    stock_cut_config.vision_feature_layer = -1
    return Models(ours, with_weights_of(ours, stock_configuration(config)), with_weights_of(ours, stock_cut_config))


def stock_configuration(config: AdaVTPConfig) -> LlavaConfig:
    """Stock LLaVA's of the same sizes."""
    return LlavaConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=copy.deepcopy(config.text_config),
        image_token_index=config.image_token_id,
        image_seq_length=config.image_seq_length,
        tie_word_embeddings=False,
    )


def with_weights_of(ours: AdaVTPForConditionalGeneration, config: LlavaConfig) -> LlavaForConditionalGeneration:
    """
    Stock LLaVA of this configuration on our parameters, so that what trains here trains there. Its modules are its
    own: transformers puts hooks on them, and a module in two models would carry them twice.
    """
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration._from_config(config, dtype=ours.dtype).eval()
    stock.load_state_dict(ours.state_dict(keep_vars=True), strict=False, assign=True)
    for name, buffer in list(stock.named_buffers()):
        if buffer.is_meta:
            module, _, own_name = name.rpartition(".")
            setattr(stock.get_submodule(module), own_name, ours.get_buffer(name))
    return stock


def make_inputs(shape: Shape, config: AdaVTPConfig, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts of random text with one image of noise each."""
    image = torch.full((batch_size, config.num_patches), config.image_token_id)
    before, after = (
        torch.randint(3, shape.vocab_size - 1, (batch_size, length))
        for length in (shape.text_before, shape.text_after)
    )
    pixel_values = torch.randn(batch_size, 3, shape.image_size, shape.image_size)
    input_ids = torch.cat([before, image, after], dim=1)
    return {"input_ids": input_ids.to(device), "pixel_values": pixel_values.to(device)}


@dataclass
class Told:
    """
    What the reference of the pruned prefill is told: which tokens to take, and where they stand.

    Attributes:
        positions: `[batch, num_keep]`.
        position_ids: `[batch, text_before + num_keep + text_after]`.
    """

    positions: torch.Tensor
    position_ids: torch.Tensor

    @classmethod
    def by(cls, ours: AdaVTPForConditionalGeneration, inputs: dict[str, torch.Tensor], budget: float) -> "Told":
        """Asks our model."""
        positions = ours.select_tokens(**inputs, token_budget=budget).positions
        is_image = inputs["input_ids"][0] == ours.config.image_token_id
        first = int(is_image.int().argmax())
        text = (~is_image).nonzero()[:, 0].expand(len(positions), -1)
        return cls(positions, torch.cat([text[:, :first], positions + first, text[:, first:]], dim=1))


def pruned_reference(
    models: Models, inputs: dict[str, torch.Tensor], told: Told, text_before: int
) -> tuple[torch.Tensor, Cache]:
    """Prefill of the told tokens by stock parts alone. Returns the last position's logits, and the cache."""
    parts, input_ids = models.stock_cut.model, inputs["input_ids"]
    pixel_values = inputs["pixel_values"].to(parts.vision_tower.dtype)
    patches = parts.vision_tower(pixel_values).last_hidden_state[:, 1:]
    kept = patches.gather(1, told.positions[..., None].expand(-1, -1, patches.shape[-1]))
    visual = parts.multi_modal_projector(kept)
    num_patches = patches.shape[1]
    embed = parts.get_input_embeddings()
    before, after = embed(input_ids[:, :text_before]), embed(input_ids[:, text_before + num_patches :])
    outputs = parts.language_model(
        inputs_embeds=torch.cat([before, visual, after], dim=1), position_ids=told.position_ids, use_cache=True
    )
    return models.stock_cut.lm_head(outputs.last_hidden_state[:, -1:]), outputs.past_key_values


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def predicted_cache_bytes(shape: Shape, num_keep: int, batch_size: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of the text and `num_keep` visual tokens, from the shape alone."""
    tokens = shape.text_before + num_keep + shape.text_after
    per_token = 2 * shape.text_layers * shape.text_key_value_heads * (shape.text_width // shape.text_heads)
    return batch_size * tokens * per_token * dtype.itemsize


def predicted_num_keep(budget: float, num_patches: int) -> int:
    """K of a ratio, worked out here once more so that the prediction does not rest on the code that it checks."""
    return max(1, math.floor(Fraction(str(budget)) * num_patches))


@torch.no_grad()
def measure(arguments: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """
    Runs the benchmark.

    Args:
        arguments: of the command line.
        shape: the model's.

    Returns:
        Every timing, ratio, difference and size, ready for JSON.
    """
    torch.manual_seed(arguments.seed)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    models = build_models(shape, device, dtype)
    inputs = make_inputs(shape, models.ours.config, arguments.batch_size, device)

    def prefill(model: nn.Module, **budget: float) -> Callable[[], Any]:
        return lambda: model(**inputs, use_cache=True, logits_to_keep=1, **budget)

    def timed(**callables: Callable[[], Any]) -> dict[str, Spread]:
        return interleaved_medians(callables, arguments.repeats, clock=arguments.clock, device=device)

    pruned = []
    for budget in arguments.budgets:
        told = Told.by(models.ours, inputs, budget)
        ours = prefill(models.ours, token_budget=budget)

        def reference(told: Told = told) -> tuple[torch.Tensor, Cache]:
            return pruned_reference(models, inputs, told, shape.text_before)

        num_keep = predicted_num_keep(budget, models.ours.config.num_patches)
        row = {
            "budget": budget,
            "num_keep": num_keep,
            "cache_bytes": cache_bytes(ours().past_key_values),
            "predicted_cache_bytes": predicted_cache_bytes(shape, num_keep, arguments.batch_size, dtype),
            "largest_logit_difference": _largest_difference(ours().logits, reference()[0]),
        }
        pruned.append(row | _compared(timed(ours=ours, reference=reference), "reference", TARGET_PRUNED))

    ours, stock, stock_cut = prefill(models.ours, token_budget=1.0), prefill(models.stock), prefill(models.stock_cut)
    timings = timed(ours=ours, stock=stock, stock_cut=stock_cut)
    full = {
        name: {"largest_logit_difference": _largest_difference(ours().logits, other().logits)}
        | _compared({"ours": timings["ours"], name: timings[name]}, name, TARGET_FULL)
        for name, other in {"stock": stock, "stock_cut": stock_cut}.items()
    }
    return {"pruned_prefill": pruned, "full_prefill": full}


def _largest_difference(ours: torch.Tensor, other: torch.Tensor) -> float:
    return float((ours.float() - other.float()).abs().max())


def _compared(timings: dict[str, Spread], other: str, target: float) -> dict[str, Any]:
    """Seconds of ours and of the other, and their ratio, beside the ratio that is aimed at."""
    ratio = paired_ratio(timings["ours"], timings[other])
    return {
        "seconds": {name: asdict(spread) for name, spread in timings.items()},
        "ratio": asdict(ratio),
        "target_ratio": target,
    }


def show(result: dict[str, Any], output: Console) -> None:
    """Prints the result as tables."""
    pruned = Table("budget", "K", "ours, ms", "stock parts told K tokens, ms", "ratio", "target", "K-V cache")
    for row in result["pruned_prefill"]:
        exact = row["cache_bytes"] == row["predicted_cache_bytes"]
        pruned.add_row(
            f"{row['budget']:g}",
            str(row["num_keep"]),
            *_cells(row, "reference"),
            f"{row['cache_bytes'] / 2**20:.2f} MiB, {'as predicted' if exact else 'NOT AS PREDICTED'}",
        )
    full = Table("budget 1.0 against", "ours, ms", "stock, ms", "ratio", "target")
    names = {"stock": "stock LLaVA", "stock_cut": "stock LLaVA, tower cut off behind the feature layer"}
    for name, row in result["full_prefill"].items():
        full.add_row(names[name], *_cells(row, name))
    machine = result["machine"]
    output.print(f"Prefill on {machine['gpu'] or machine['processor']}: medians and quartiles ({result['command']})")
    output.print(pruned)
    output.print(full)


def _cells(row: dict[str, Any], other: str) -> list[str]:
    ours, theirs = (Spread(**row["seconds"][name]).shown(1000) for name in ("ours", other))
    return [ours, theirs, Spread(**row["ratio"]).shown(digits=3), f"<= {row['target_ratio']}"]


def parse(command_line: Sequence[str]) -> tuple[argparse.Namespace, Shape]:
    """The command line's arguments, and the shape that preset and sizes make together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small", help="the model's sizes")
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="in place of the preset's")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that are measured")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="fractions, 0 to 1")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: seconds of processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args(command_line)
    given = {field.name: getattr(arguments, field.name) for field in fields(Shape)}
    return arguments, replace(
        PRESETS[arguments.preset], **{name: value for name, value in given.items() if value is not None}
    )


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line says; prints it, writes it, and returns it."""
    command_line = sys.argv[1:] if command_line is None else command_line
    arguments, shape = parse(command_line)
    result = circumstances("overhead.py", command_line, arguments.seed, arguments.device)
    result["settings"] = {"shape": asdict(shape)} | {
        name: getattr(arguments, name) for name in ("dtype", "batch_size", "repeats", "budgets", "clock")
    }
    result |= measure(arguments, shape)
    show(result, console())
    write_json(arguments.json, result)
    return result


if __name__ == "__main__":
    main()
