"""What choosing visual tokens costs: each method's own time beside the vision tower's, and its memory.

Of every registered method, on random weights in LLaVA-1.5-7B's shapes, what it does that a model without it would not:

- Behind the tower: its forward on ready features, with the queries and keys of the tower layers that it reads.
- `adaptive`: the tower with the budget token in it and the controller, less the tower alone.
- Inside the tower: the reduced run, less a run that is told how many tokens each half of each layer will get and cuts
  off the rest: the same savings without choosing or merging. The whole run is compared with the tower, too.
- Inside the decoder: scoring and choosing at the first cut, with the budget a mean over layers. It is compared with
  one decoder layer, too; a method with several cuts does this at each of them, on fewer tokens.

What is a difference of two runs of the tower is only as sharp as the machine is quiet: see its quartiles. Stock LLaVA
projects every token, so that the projection is no method's own. `aim` is `aim_merge` and `aim_prune`.

    OMP_NUM_THREADS=1 python benchmarks/reducers.py --batch-sizes 1 --clock process
    python benchmarks/reducers.py --device cuda --dtype bfloat16 --repeats 15 --json reducers_gpu.json
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel, DynamicCache, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

import overhead
from adavtp import AdaVTPConfig, TokenReducer, VisionFeatures
from adavtp.modeling.budget.token_budget import num_tokens_to_keep
from adavtp.modeling.decoder.reducer import DecoderReducer
from adavtp.modeling.decoder.view import DecoderView
from adavtp.modeling.families.llava import LLAVA
from adavtp.modeling.reducers.base import REDUCERS, STAGES, build_reducer
from adavtp.modeling.vision.encode import BudgetToken, TowerPass, encode_image
from adavtp.modeling.vision.tower import TowerAttention, tower_layers
from circumstances import circumstances, console, write_json
from interleaved import CLOCKS, Spread, interleaved_medians, paired_ratio

PATCH_SIZE = 14
TARGET, TARGET_OF_GREEDY = 0.02, 0.05
GREEDY = ("divprune", "cdpruner", "scope")
METHODS = sorted(
    name for name, reducer in REDUCERS.items() if name != "aim" and LLAVA.why_not(AdaVTPConfig(), reducer) is None
)
TOWER, LAYER, TOLD = "the tower", "a decoder layer", "{}, told"


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaVA with a CLIP-shaped tower and a Llama-shaped decoder, and the text around the image."""

    num_patches: int = 576
    width: int = 1024
    heads: int = 16
    layers: int = 24
    text_width: int = 4096
    text_heads: int = 32
    text_mlp_width: int = 11008
    text_layers: int = 32
    text_before: int = 35
    text_after: int = 25


def configuration(shape: Shape) -> AdaVTPConfig:
    """The configuration of a model of this shape. Nothing here embeds or predicts a word."""
    image_size = PATCH_SIZE * math.isqrt(shape.num_patches)
    tower = (shape.layers, shape.width, shape.heads, image_size, PATCH_SIZE)
    decoder = (shape.text_layers, shape.text_width, shape.text_heads, shape.text_heads, shape.text_mlp_width)
    return overhead.configuration(overhead.Shape(*tower, *decoder, vocab_size=64))


@dataclass
class Parts:
    """
    The parts of a model that methods run beside or inside, with random weights.

    Attributes:
        config: of the whole model.
        tower: all its layers, though the topmost does not run.
        projector: into the decoder's space.
        budget_token: of `adaptive`.
        decoder: the decoder's first two layers, between which tokens leave.
    """

    config: AdaVTPConfig
    tower: PreTrainedModel
    projector: nn.Module
    budget_token: BudgetToken
    decoder: PreTrainedModel

    @classmethod
    def built(cls, shape: Shape, device: torch.device, dtype: torch.dtype) -> "Parts":
        """Makes them where and as they are used."""
        config = configuration(shape)
        two_layers = copy.deepcopy(config.text_config)
        two_layers.num_hidden_layers = 2
        with device:
            return cls(
                config,
                AutoModel.from_config(config.vision_config, dtype=dtype).eval(),
                LlavaMultiModalProjector(config).to(dtype).eval(),
                BudgetToken(config).to(dtype).eval(),
                AutoModel.from_config(two_layers, dtype=dtype).eval(),
            )


@dataclass
class Scene:
    """
    A batch of noise at every point where a method may act.

    Attributes:
        num_keep: `[batch]` int64, K.
        features: what methods behind the tower and behind the projector are shown, by stage, without attention.
        entering: what enters the tower layers whose queries and keys some method reads, by layer, each
            `[batch, 1 + num_patches, hidden_size]`.
        view: the decoder between its first two layers.
    """

    num_keep: torch.Tensor
    features: dict[str, VisionFeatures]
    entering: dict[int, torch.Tensor]
    view: DecoderView

    @property
    def pixel_values(self) -> torch.Tensor:
        """`[batch, 3, height, width]`."""
        return self.features["vision"].pixel_values

    @property
    def budget(self) -> torch.Tensor:
        """`[batch]`, the fractions that are kept."""
        return self.num_keep / self.features["vision"].num_patches


def make_scene(parts: Parts, shape: Shape, budget: float, batch_size: int) -> Scene:
    """Looks at images of noise, once and with nothing reduced."""
    config, like = parts.config, next(parts.tower.parameters())
    size = config.vision_config.image_size
    pixel_values = torch.randn(batch_size, 3, size, size, device=like.device, dtype=like.dtype)
    tower = TowerPass(parts.tower, config)
    states = [tower.embed(pixel_values)]
    for layer in range(len(tower.layers)):
        states.append(tower.run_layer(layer, states[-1]))
    sequence = states[-1]
    reading = (build_reducer(name, parts.config) for name in METHODS if "attention" in REDUCERS[name].needs)
    entering = {layer: states[layer] for reducer in reading for layer in reducer.attention_layers}
    patches, cls = tower.patches(sequence), tower.cls(sequence)
    seen = VisionFeatures(
        patches,
        torch.arange(shape.num_patches, device=like.device).expand(batch_size, -1),
        cls=cls,
        question=torch.randn(batch_size, shape.text_width, device=like.device, dtype=like.dtype),
        pixel_values=pixel_values,
        sample=torch.arange(batch_size, device=like.device),
        num_patches=shape.num_patches,
    )
    projected = replace(seen, patches=parts.projector(patches), cls=parts.projector(cls), tower_patches=patches)
    num_keep = num_tokens_to_keep(budget, shape.num_patches, batch_size).to(like.device)
    features = {"vision": seen, "projector": projected}
    return Scene(num_keep, features, entering, make_view(parts.decoder, shape, projected.patches))


def make_view(decoder: PreTrainedModel, shape: Shape, visual: torch.Tensor) -> DecoderView:
    """Prompts of random text around the visual tokens `[batch, num_patches, hidden_size]`, behind the first layer."""
    batch_size, num_patches, width = visual.shape
    before, after = (visual.new_empty(batch_size, n, width).normal_() for n in (shape.text_before, shape.text_after))
    embeds = torch.cat([before, visual, after], dim=1)
    column = torch.arange(embeds.shape[1], device=embeds.device).expand(batch_size, -1)
    positions = decoder.rotary_emb(embeds, column)
    # As in the prefill of `generate`, where a cache holds the keys that the layer below made.
    cache = DynamicCache(config=decoder.config)
    behind = decoder.layers[0](embeds, position_embeddings=positions, past_key_values=cache, use_cache=True)
    return DecoderView(
        previous_layer=decoder.layers[0],
        next_layer=decoder.layers[1],
        norm=decoder.norm,
        previous_hidden_states=embeds,
        hidden_states=behind,
        position_embeddings=positions,
        is_real=torch.ones_like(column, dtype=torch.bool),
        is_visual=(column >= shape.text_before) & (column < shape.text_before + num_patches),
        last=column[:, -1],
        inputs_embeds=embeds,
        previous_keys=cache.layers[0].keys,
    )


class CountingPass(TowerPass):
    """A pass through the tower that writes down how many tokens each half of each layer gets."""

    def __init__(self, tower: PreTrainedModel, config: AdaVTPConfig) -> None:
        super().__init__(tower, config)
        self.attended, self.finished = [0] * len(self.layers), [0] * len(self.layers)

    def run_layer(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """See [`TowerPass.run_layer`]."""
        self.attended[index] = self.finished[index] = hidden_states.shape[1]
        return super().run_layer(index, hidden_states)

    def attend(self, index: int, hidden_states: torch.Tensor, key_bias: torch.Tensor | None = None) -> torch.Tensor:
        """See [`TowerPass.attend`]."""
        self.attended[index] = hidden_states.shape[1]
        return super().attend(index, hidden_states, key_bias)

    def finish(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """See [`TowerPass.finish`]."""
        self.finished[index] = hidden_states.shape[1]
        return super().finish(index, hidden_states)


def run_told(
    tower: TowerPass, pixel_values: torch.Tensor, attended: Sequence[int], finished: Sequence[int]
) -> torch.Tensor:
    """
    Runs the tower on ever fewer tokens, the first ones that are there.

    Args:
        tower: the pass.
        pixel_values: `[batch, 3, height, width]`.
        attended, finished: tokens in each layer's attention, and in its MLP, never rising.
    """
    sequence = tower.embed(pixel_values)
    for layer, (in_attention, in_mlp) in enumerate(zip(attended, finished, strict=True)):
        sequence = tower.attend(layer, sequence[:, :in_attention])
        sequence = tower.finish(layer, sequence[:, :in_mlp])
    return sequence


def calls_of(name: str, reducer: TokenReducer, parts: Parts, scene: Scene) -> dict[str, Callable[[], Any]]:
    """What is timed of a method: its run by its name, and inside the tower also the run that is told."""
    if reducer.stage == "encoder":
        return _calls_inside_tower(name, reducer, parts, scene)
    if reducer.stage == "decoder":
        _, num_keep = first_cut(reducer, parts.config, scene)

        def run_cut() -> Any:
            view = replace(scene.view, carried={})
            return reducer.reduce(view, reducer.scores(view, cut=0), num_keep)

        return {name: run_cut}
    features = scene.features[reducer.stage]
    layers = reducer.attention_layers if "attention" in reducer.needs else ()

    def run_behind_tower() -> Any:
        attention = {
            layer: TowerAttention.of_layer(
                tower_layers(parts.tower)[layer],
                scene.entering[layer],
                has_cls=True,
                with_received="received" in reducer.needs,
            )
            for layer in layers
        }
        return reducer(replace(features, attention=attention), scene.num_keep)

    def run_with_budget() -> Any:
        with_budget = encode_image(
            parts.tower, scene.pixel_values, parts.config, parts.budget_token, scene.budget, features.question
        )
        return reducer(with_budget, scene.num_keep)

    return {name: run_with_budget if "budget" in reducer.needs else run_behind_tower}


def _calls_inside_tower(name: str, reducer: TokenReducer, parts: Parts, scene: Scene) -> dict[str, Callable[[], Any]]:
    counting = CountingPass(parts.tower, parts.config)
    reducer(counting, scene.pixel_values, scene.num_keep)
    tower = TowerPass(parts.tower, parts.config)

    def run() -> Any:
        encoded = reducer(tower, scene.pixel_values, scene.num_keep)
        return reducer.selection(encoded, tower.patches(encoded.sequence), parts.config.num_patches)

    def told() -> torch.Tensor:
        return run_told(tower, scene.pixel_values, counting.attended, counting.finished)

    return {name: run, TOLD.format(name): told}


def first_cut(reducer: DecoderReducer, config: AdaVTPConfig, scene: Scene) -> tuple[int, torch.Tensor]:
    """
    The first layer before which tokens may leave, and how many `[batch]` it then gets; by the method's own rule where
    the budget, as a mean over layers, is out of its reach.
    """
    num_layers, num_patches = config.text_config.num_hidden_layers, config.num_patches
    try:
        counts = reducer.layer_counts(num_patches, int(scene.num_keep[0]), num_layers)
    except ValueError:
        counts = reducer.layer_counts(num_patches, None, num_layers)
    layer = reducer.cuts(num_layers)[0]
    return layer, torch.full_like(scene.num_keep, counts[layer])


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """
    The most memory that a call has in use at one time beyond what was in use before, in bytes. It counts what torch
    allocates for tensors: not the weights, which are there already, nor what a library sets aside for itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use, most = 0, 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        in_use += change.nbytes()
        most = max(most, in_use)
    return most


@torch.no_grad()
def measure(
    arguments: argparse.Namespace, shape: Shape, parts: Parts, batch_size: int, methods: Sequence[str]
) -> dict[str, Any]:
    """
    Times methods, the tower and, if a method acts in the decoder, one of its layers in turns.

    Args:
        arguments: of the command line.
        shape: the model's.
        parts: of the model.
        batch_size: images, each in a prompt of its own.
        methods: names.

    Returns:
        Seconds, shares and bytes, ready for JSON.
    """
    torch.manual_seed(arguments.seed)
    device, scene = arguments.device, make_scene(parts, shape, arguments.budget, batch_size)
    view = scene.view
    calls: dict[str, Callable[[], Any]] = {TOWER: lambda: encode_image(parts.tower, scene.pixel_values, parts.config)}
    if any(REDUCERS[name].stage == "decoder" for name in methods):
        calls[LAYER] = lambda: view.next_layer(view.hidden_states, position_embeddings=view.position_embeddings)
    reducers = {
        name: build_reducer(name, parts.config).to(device, view.hidden_states.dtype).eval() for name in methods
    }
    for name, reducer in reducers.items():
        calls |= calls_of(name, reducer, parts, scene)
    # Every call once before it is timed, so that this is the warm-up as well.
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    seconds = interleaved_medians(calls, arguments.repeats, warm_up=0, clock=arguments.clock, device=device)
    return {
        "batch_size": batch_size,
        "num_keep": int(scene.num_keep[0]),
        "beside": {
            name: {"seconds": asdict(seconds[name]), "peak_bytes": peaks[name]}
            for name in (TOWER, LAYER)
            if name in seconds
        },
        "methods": {
            name: {"stage": reducer.stage, "peak_bytes": peaks[name]}
            | own_shares(name, reducer, seconds)
            | (_at_cut(reducer, parts.config, scene) if reducer.stage == "decoder" else {})
            for name, reducer in reducers.items()
        },
    }


def own_shares(name: str, reducer: TokenReducer, seconds: dict[str, Spread]) -> dict[str, Any]:
    """A method's own seconds, as such and as shares, and what they should be at most."""
    without = TOLD.format(name) if reducer.stage == "encoder" else TOWER if "budget" in reducer.needs else None
    own = seconds[name]
    if without is not None:
        pairs = zip(seconds[name].repeats, seconds[without].repeats, strict=True)
        own = Spread.of([run - rest for run, rest in pairs])
    share, target = paired_ratio(own, seconds[TOWER]), TARGET_OF_GREEDY if name in GREEDY else TARGET
    result = {"seconds": asdict(own), "share_of_tower": asdict(share)}
    if reducer.stage == "encoder":
        result["whole_run_by_tower"] = asdict(paired_ratio(seconds[name], seconds[TOWER]))
    if reducer.stage == "decoder":
        result["share_of_decoder_layer"] = asdict(paired_ratio(own, seconds[LAYER]))
    return result | {"target_share": target, "meets_target": share.median <= target}


def _at_cut(reducer: DecoderReducer, config: AdaVTPConfig, scene: Scene) -> dict[str, int]:
    layer, num_keep = first_cut(reducer, config, scene)
    num_cuts = len(reducer.cuts(config.text_config.num_hidden_layers))
    return {"num_cuts": num_cuts, "first_cut": layer, "num_keep_behind_it": int(num_keep[0])}


def show(result: dict[str, Any], output: Console) -> None:
    """Prints the result as a table for each batch size."""
    machine, shape = result["machine"], result["settings"]["shape"]
    output.print(f"Methods on {machine['gpu'] or machine['processor']}: medians and quartiles ({result['command']})")
    for batch in result["batches"]:
        output.print(f"Batch of {batch['batch_size']}, {batch['num_keep']} of {shape['num_patches']} tokens")
        for name, row in batch["beside"].items():
            output.print(f"{name}: {Spread(**row['seconds']).shown(1000)} ms, {_mebibytes(row)} MiB")
        table = Table("method", "stage", "its own, ms", "% of the tower", "target", "MiB", "beside that")
        for name, row in batch["methods"].items():
            table.add_row(
                name,
                row["stage"],
                Spread(**row["seconds"]).shown(1000),
                Spread(**row["share_of_tower"]).shown(100, 2),
                f"<= {row['target_share']:.0%}: {'met' if row['meets_target'] else 'MISSED'}",
                _mebibytes(row),
                _beside(row),
            )
        output.print(table)


def _mebibytes(row: dict[str, Any]) -> str:
    return f"{row['peak_bytes'] / 2**20:.1f}"


def _beside(row: dict[str, Any]) -> str:
    if row["stage"] == "encoder":
        return f"the whole run is {Spread(**row['whole_run_by_tower']).shown(100)} % of the tower"
    if row["stage"] == "decoder":
        share = Spread(**row["share_of_decoder_layer"]).shown(100)
        cuts = f"cut {row['first_cut']}, the first of {row['num_cuts']}" if row["num_cuts"] > 1 else "the only cut"
        return f"{share} % of a decoder layer; {cuts}, leaves {row['num_keep_behind_it']}"
    return ""


def parse(command_line: Sequence[str]) -> tuple[argparse.Namespace, Shape]:
    """The command line's arguments, and the model's shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--first-only", choices=STAGES, nargs="+", default=[], help="stages left out behind the first batch size"
    )
    parser.add_argument("--budget", type=_budget, default=192, help="tokens, or with a decimal point their share")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are measured")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: seconds of processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args(command_line)
    if math.isqrt(arguments.num_patches) ** 2 != arguments.num_patches:
        parser.error(f"`--num-patches` is {arguments.num_patches}; allowed are squares.")
    return arguments, Shape(**{field.name: getattr(arguments, field.name) for field in fields(Shape)})


def _budget(text: str) -> float | int:
    return int(text) if text.isdecimal() else float(text)


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line says; prints it, writes it, and returns it."""
    command_line = sys.argv[1:] if command_line is None else command_line
    arguments, shape = parse(command_line)
    result = circumstances("reducers.py", command_line, arguments.seed, arguments.device)
    names = ("methods", "batch_sizes", "first_only", "budget", "dtype", "repeats", "clock")
    result["settings"] = {"shape": asdict(shape)} | {name: getattr(arguments, name) for name in names}
    torch.manual_seed(arguments.seed)
    parts = Parts.built(shape, arguments.device, getattr(torch, arguments.dtype))
    rest = [name for name in arguments.methods if REDUCERS[name].stage not in arguments.first_only]
    result["batches"] = [
        measure(arguments, shape, parts, batch_size, rest if number else arguments.methods)
        for number, batch_size in enumerate(arguments.batch_sizes)
    ]
    show(result, console())
    write_json(arguments.json, result)
    return result


if __name__ == "__main__":
    main()
