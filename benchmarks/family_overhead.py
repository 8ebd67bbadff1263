"""What a token budget costs other families on top of the work that it leaves, against their stock classes.

Asked of models of the shapes of Qwen2.5-VL and LLaVA-NeXT, scaled to a processor, with random weights:

- Full prefill and decode: is budget 1.0 free? The class with a budget against the stock class on the same prompt, and
  on steps behind it.
- Pruned prefill: is choosing cheap? `forward(..., token_budget=b)` against the stock class that is told which tokens
  stay, with their positions. Both encode the whole image.

Both classes share their weights and compute the logits of the last position alone.

    python benchmarks/family_overhead.py --json benchmarks/results/family_overhead.json
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
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from adavtp.modeling.costs.weightless import family_prompt, looks_of
from adavtp.modeling.modeling_families import model_class_of
from adavtp.modeling.prompt import PreparedInputs
from circumstances import circumstances, console, write_json
from interleaved import CLOCKS, Spread, interleaved_medians, paired_ratio

TARGET_PRUNED, TARGET_FULL = 1.05, 1.02
IMAGE, VOCAB_SIZE = 100, 4096

_TEXT = {"vocab_size": VOCAB_SIZE, "num_key_value_heads": 4, "max_position_embeddings": 4096}
_SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 8}
_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_AXES = {"rope_type": "default", "rope_theta": 1e6}


def qwen2_5_vl(size: str) -> tuple[PreTrainedConfig, tuple[int, int]]:
    """Its windows of 8 x 8 patches, all layers but some, and the image's height and width."""
    text, tower = (_SMALL, (8, 320, 1280, 5)) if size == "small" else (_TINY, (2, 24, 48, 3))
    depth, width, mlp, heads = tower
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    rest = head_dim // 2 - 2 * (3 * head_dim // 16)
    sections = [rest, 3 * head_dim // 16, 3 * head_dim // 16]
    vision = {"depth": depth, "hidden_size": width, "intermediate_size": mlp, "num_heads": heads, "patch_size": 14}
    vision |= {"out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [depth // 2 - 1, depth - 1]}
    ids = {"image_token_id": IMAGE, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}
    axes = {"rope_parameters": _AXES | {"mrope_section": sections}}
    config = AutoConfig.for_model("qwen2_5_vl", **ids, vision_config=vision, text_config=_TEXT | text | axes)
    return config, (448, 672) if size == "small" else (56, 84)


def llava_next(size: str) -> tuple[PreTrainedConfig, tuple[int, int]]:
    """A view of the whole and two tiles of 336 pixels."""
    text, width, layers, side = (_SMALL, 384, 12, 336) if size == "small" else (_TINY, 24, 3, 56)
    vision = {"model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 4 * width}
    vision |= {"num_hidden_layers": layers, "num_attention_heads": width // 12 if size == "tiny" else 6}
    vision |= {"image_size": side, "patch_size": 14}
    config = AutoConfig.for_model(
        "llava_next",
        image_token_index=IMAGE,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, side]],
        vision_config=vision,
        text_config=_TEXT | text | {"model_type": "llama"},
    )
    return config, (side, 2 * side)


SHAPES: dict[str, Callable[[str], tuple[PreTrainedConfig, tuple[int, int]]]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "llava_next": llava_next,
}


def build(config: PreTrainedConfig) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The class with a budget, and the stock class on the same weights: where they lie in memory is a few percent."""
    model_class = model_class_of(config.model_type)
    ours = model_class(model_class.config_class.from_dict(config.to_dict())).eval()
    stock = AutoModelForImageTextToText.from_config(config).eval()
    stock.load_state_dict(ours.state_dict(), strict=False, assign=True)
    return ours, stock


class Told:
    """
    What the reference of the pruned prefill is told, by our model.

    Attributes:
        columns: ids, mask and positions of what stays.
        rows: of the encoder's output, those that stay.
    """

    def __init__(self, ours: PreTrainedModel, inputs: dict[str, torch.Tensor], budget: float) -> None:
        prepare, prepared = ours.prepare_inputs, []
        ours.prepare_inputs = lambda *asked, **named: prepared.append(prepare(*asked, **named)) or prepared[0]
        try:
            ours(**inputs, token_budget=budget)
        finally:
            del ours.prepare_inputs
        of_prompt: PreparedInputs = prepared[0]
        prompt = of_prompt.prompt
        self.columns = {
            "input_ids": prompt.input_ids,
            "attention_mask": prompt.attention_mask,
            "position_ids": prompt.position_ids,
        }
        every = torch.cat(list(ours.encoded("image", inputs).pooler_output))
        self.rows = torch.cdist(of_prompt.visual.features.double(), every.double()).argmin(dim=-1)


@torch.no_grad()
def measure(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Every timing, ratio and difference of one shape, ready for JSON."""
    torch.manual_seed(arguments.seed)
    config, image_size = SHAPES[name](arguments.size)
    ours, stock = build(config)
    looks = looks_of(ours, [image_size])
    inputs = family_prompt(ours, looks, arguments.text_tokens)
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape)

    def prefill(model: PreTrainedModel, **budget: float) -> Callable[[], Any]:
        return lambda: model(**inputs, use_cache=True, logits_to_keep=1, **budget)

    def steps(model: PreTrainedModel, **budget: float) -> Callable[[], Any]:
        cache = prefill(model, **budget)().past_key_values
        word = inputs["input_ids"][:, -1:]

        def run() -> Any:
            for _ in range(arguments.steps):
                outputs = model(input_ids=word, past_key_values=cache)
            cache.crop(-arguments.steps)
            return outputs

        return run

    def compared(first: Callable[[], Any], second: Callable[[], Any], target: float) -> dict[str, Any]:
        timings = interleaved_medians({"ours": first, "stock": second}, arguments.repeats, clock=arguments.clock)
        return {
            "largest_logit_difference": float((first().logits - second().logits).abs().max()),
            "seconds": {key: asdict(spread) for key, spread in timings.items()},
            "ratio": asdict(paired_ratio(timings["ours"], timings["stock"])),
            "target_ratio": target,
        }

    rows = {
        "prefill, budget 1.0": compared(prefill(ours, token_budget=1.0), prefill(stock), TARGET_FULL),
        "decode, budget 1.0": compared(steps(ours, token_budget=1.0), steps(stock), TARGET_FULL),
    }
    for budget in arguments.budgets:
        told = Told(ours, inputs, budget)

        def reference(told: Told = told) -> Any:
            named = {key: value for key, value in looks.inputs.items() if key != "pixel_values"}
            encoded = stock.model.get_image_features(inputs["pixel_values"], **named, return_dict=True)
            encoded.pooler_output = [torch.cat(list(encoded.pooler_output))[told.rows]]
            outputs = {"mm_encoder_outputs": {"image": encoded}, "use_cache": True, "logits_to_keep": 1}
            return stock(**told.columns, **outputs)

        rows[f"prefill, budget {budget:g}"] = compared(prefill(ours, token_budget=budget), reference, TARGET_PRUNED)
    return {"visual_tokens": sum(looks.sizes), "columns": inputs["input_ids"].shape[1], "rows": rows}


def show(result: dict[str, Any], output: Console) -> None:
    """Prints the result as a table."""
    table = Table("shape", "what", "ours, ms", "stock, ms", "ratio", "target")
    for name, shape in result["shapes"].items():
        for what, row in shape["rows"].items():
            timings = [Spread(**row["seconds"][key]).shown(1000) for key in ("ours", "stock")]
            table.add_row(name, what, *timings, Spread(**row["ratio"]).shown(digits=3), f"<= {row['target_ratio']}")
    machine = result["machine"]
    output.print(f"{machine['gpu'] or machine['processor']}: medians and quartiles ({result['command']})")
    output.print(table)


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line says; prints it, writes it, and returns it."""
    command_line = sys.argv[1:] if command_line is None else command_line
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=["small", "tiny"], default="small", help="of the models")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16, help="of decoding, that are timed together")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="fractions, 0 to 1")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are measured")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: seconds of processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args(command_line)
    result = circumstances("family_overhead.py", command_line, arguments.seed, torch.device("cpu"))
    names = ("size", "text_tokens", "steps", "budgets", "repeats", "clock")
    result["settings"] = {name: getattr(arguments, name) for name in names}
    result["shapes"] = {name: measure(arguments, name) for name in SHAPES}
    show(result, console())
    write_json(arguments.json, result)
    return result


if __name__ == "__main__":
    main()
