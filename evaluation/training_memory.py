"""The memory that a training run needs on each GPU.

Weights, gradients and optimizer states follow from how many parameters train and who keeps them in which precision.
Activations are what autograd saves, noted while a weightless model runs forward. The worst moment is at the logits, in
float32 once as log-probabilities and twice as gradients; or, where checkpointing keeps only what enters the layers, at
one layer that runs again. What the CUDA context, the communication library and fragmentation take has no formula: it
is a reserve that the caller states.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling.costs.counting import FlopsByPart, remembered
from ..modeling.costs.training_step import (
    Step,
    layers_that_run,
    let_train,
    linear_maps,
    parts_that_train,
    training_prompt,
)
from ..modeling.costs.weightless import ProductsAreNoise, keep_frozen_in, meta_model
from ..modeling.parts import modules_of_parts

# Bytes of a trained and of a frozen weight; of a trained one's copy in half precision, its gradient, and AdamW's two
# moments. DeepSpeed keeps the float32 weight with the moments.
BYTES = {"ddp": (4, 2, 2, 4, 8), "zero2": (2, 2, 0, 2, 12), "zero3": (2, 2, 0, 2, 12), "fsdp2": (4, 2, 0, 4, 8)}
# DeepSpeed's own defaults, in numbers: `reduce_bucket_size` and `stage3_max_live_parameters`.
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
# A 4-bit number, and its share of what scales a block of 64: 8 bits, and 32 bits for 256 blocks (QLoRA, 2305.14314).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Log-probabilities, their gradient and that of the logits.
LOGIT_BYTES = 12


@dataclass(frozen=True)
class Weights:
    """
    How many parameters there are.

    Attributes:
        trained: that train, adapters included.
        frozen: that do not.
        quantized: of a frozen decoder, in four bits.
        layer, head: of one decoder layer, and of embeddings or head: what is put together at a time where weights are
            spread over GPUs.
    """

    trained: int
    frozen: int
    quantized: int
    layer: int
    head: int

    @classmethod
    def of(cls, config: PreTrainedConfig, step: Step, quantize: bool = False) -> "Weights":
        """
        Counts them.

        Args:
            config: the model's.
            step: says what trains.
            quantize: whether the linear maps of the decoder's layers are in four bits (NF4).

        Raises:
            ValueError: if the decoder's own weights are to train in four bits.
        """
        if quantize and step.trains("decoder"):
            raise ValueError("`quantize` is True and the decoder's own weights train; four bits are for adapters.")
        parts, layer, maps, head = _parameters(config)
        # r (in + out) for every linear map of every layer.
        adapters = (step.lora_rank or 0) * sum(map(sum, maps))
        train = adapters + sum(number for part, number in parts.items() if step.trains(part))
        quantized = sum(wide * out for wide, out in maps) if quantize else 0
        return cls(train, parts.total() + adapters - train - quantized, quantized, layer, head)


@remembered
def _parameters(config: PreTrainedConfig) -> tuple[Counter[str], int, list[tuple[int, int]], int]:
    """How many each part has; the largest decoder layer; the sizes of all layers' linear maps; those of the head."""
    model, parts = meta_model(config), Counter()
    part_of = parts_that_train(model)
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
    layers, head = model.get_decoder().layers, model.get_output_embeddings()
    maps = [(linear.in_features, linear.out_features) for layer in layers for linear in linear_maps(layer).values()]
    largest = max(sum(map(torch.numel, layer.parameters())) for layer in layers)
    return parts, largest, maps, head.weight.numel()


@dataclass(frozen=True)
class Layout:
    """
    Where a run keeps what.

    Attributes:
        strategy: `"ddp"`: everything on every GPU. `"zero2"` (DeepSpeed): gradients and optimizer states are spread.
            `"zero3"` (DeepSpeed), `"fsdp2"` (torch, through accelerate): weights too.
        gpus: among which.
        reserve: bytes for what has no formula.
    """

    strategy: str
    gpus: int
    reserve: float = 0.0

    def __post_init__(self) -> None:
        if self.strategy not in BYTES:
            raise ValueError(f"`strategy` is {self.strategy!r}; allowed: {', '.join(BYTES)}.")
        if self.gpus < 1:
            raise ValueError(f"`gpus` is {self.gpus}; allowed are 1 or more.")
        if self.reserve < 0:
            raise ValueError(f"`reserve` is {self.reserve}; allowed are 0 or more bytes.")


def kept_by_weights(weights: Weights, layout: Layout) -> dict[str, float]:
    """
    Weights, gradients, AdamW's two moments and what moves them, in bytes on each GPU, for bfloat16 mixed precision.

    ZeRO-2 spreads gradients and moments over the GPUs, ZeRO-3 and FSDP2 weights too; four-bit weights are whole on
    every GPU.

    Raises:
        ValueError: if four bits are to be spread by DeepSpeed ZeRO-3.
    """
    strategy, gpus = layout.strategy, layout.gpus
    if strategy == "zero3" and weights.quantized:
        raise ValueError("`strategy` is 'zero3' and weights are in four bits, which it cannot spread; use 'ddp'.")
    of_trained, of_frozen, of_copy, of_gradient, of_moments = BYTES[strategy]
    share_of_weights = gpus if strategy in ("zero3", "fsdp2") else 1
    share = 1 if strategy == "ddp" else gpus
    whole = (of_trained * weights.trained + of_frozen * weights.frozen) / share_of_weights
    copies = {"half-precision copies": float(of_copy * weights.trained)} if of_copy else {}
    return {
        "weights": whole + NF4_BYTES * weights.quantized,
        **copies,
        "gradients": of_gradient * weights.trained / share,
        "optimizer": of_moments * weights.trained / share,
        "communication": float(_communication(weights, layout)),
    }


def _communication(weights: Weights, layout: Layout) -> float:
    """
    DDP: buckets in which gradients are averaged. ZeRO: two buckets, and for ZeRO-3 the parameters that are put
    together at a time. FSDP2: this layer, the next and the head in half precision, and this layer's gradients.
    """
    trained = weights.trained
    if layout.strategy == "ddp":
        return 4 * trained if layout.gpus > 1 else 0
    if layout.strategy == "fsdp2":
        together = 0 if weights.quantized else 2 * (2 * weights.layer + weights.head)
        return together + min(2 * weights.layer, 2 * trained)
    buckets = 4 * min(REDUCE_BUCKET, trained)
    return buckets if layout.strategy == "zero2" else 2 * min(LIVE_PARAMETERS, trained + weights.frozen) + buckets


# ---------------------------------------------------------------- activations


def activations(
    config: PreTrainedConfig,
    step: Step,
    *,
    rows: int,
    text_tokens: int,
    token_budget: float = 1.0,
    image_size: tuple[int, int] | None = None,
    padded: bool | None = None,
    dtype: torch.dtype = torch.bfloat16,
    autocast: bool = False,
) -> dict[str, float]:
    """
    Bytes that are alive at the worst moment of the backward pass.

    Args:
        config, step: the model's, of any family, and how a training step is carried out.
        rows: of a micro-batch, with an image each.
        text_tokens: of its longest row.
        token_budget: of that row, a fraction.
        image_size: height and width in pixels, see [`ModelCosts`].
        padded: whether rows are of different lengths; by default if there are several.
        dtype: of the model.
        autocast: whether weights that train are float32 and cast to `dtype` for each product.

    Returns:
        `"tower"`, `"controller"`, `"projector"`, `"decoder"`: what is saved; and `"logits or a layer"`: what comes on
        top at its beginning, or later while a checkpointed layer runs again, with the gradients inside its MLP.
    """
    text, b = config.get_text_config(), dtype.itemsize
    gates_attention = step.trains("controller") and step.gates == "attention"
    if gates_attention:
        # Every token stays; a fraction below 1 has the controller asked.
        token_budget = min(max(token_budget, 0.9999), 0.9999)
    masked = rows > 1 if padded is None else padded
    asked = (replace(step, gates="features"), text_tokens, token_budget, image_size, masked, dtype, autocast)
    saved = _saved_by_a_row(config, *asked)
    bias = saved.columns**2 * b * (3 + text.num_attention_heads) if gates_attention else 0
    again = 0.0
    if step.checkpointing:
        # Of gate, up and their product; what entered the map behind them, kept if that trains, has gone by then.
        gradients = 2 if step.trains("decoder") else 3
        inside = gradients * saved.columns * getattr(text, "intermediate_size", 0) * b
        again = max(saved.layers.get("tower", 0), saved.layers["decoder"] + inside)
    return {
        "tower": float(rows * saved.parts["tower"]),
        "controller": float(rows * (saved.parts["controller"] + bias)),
        "projector": float(rows * saved.parts["projector"]),
        "decoder": float(rows * saved.parts["decoder"]),
        "logits or a layer": float(rows * max(again, LOGIT_BYTES * saved.columns * text.vocab_size)),
    }


class Saved(NamedTuple):
    """
    What autograd saves of one row, in bytes.

    Attributes:
        parts: by name; with checkpointing of a layer only what enters it.
        layers: of the tower and of the decoder the largest layer.
        columns: that the decoder sees.
    """

    parts: Counter[str]
    layers: Counter[str]
    columns: int


@remembered
def _saved_by_a_row(
    config: PreTrainedConfig,
    step: Step,
    text_tokens: int,
    token_budget: float,
    image_size: tuple[int, int] | None,
    masked: bool,
    dtype: torch.dtype,
    autocast: bool,
) -> Saved:
    """Runs a weightless model forward and notes what autograd keeps, by the module that was running."""
    own = torch.float32 if autocast else dtype
    # Beside a longer row it is padded.
    rows = [text_tokens, text_tokens - 1] if masked else [text_tokens]
    model, inputs = training_prompt(config, rows, step, [1] * len(rows), image_size, own)
    let_train(model, step)
    if autocast:
        keep_frozen_in(model, dtype)
    for module in model.modules():
        # What a layer would keep is noted in any case.
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    times = layers_that_run(model)
    watched = _watched(model, times)
    plain = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    with plain, ProductsAreNoise(lambda: True) as noise, FlopsByPart(watched) as running:
        noted = BytesSaved(model, noise, running, watched)
        with noted, torch.autocast("cpu", dtype, enabled=autocast):
            logits = model(**inputs, token_budget=token_budget, use_cache=False).logits
    parts, layers = Counter(), Counter()
    for key, saved in noted.saved.items():
        part, index = key or ("controller", None)
        is_layer = index is not None
        number = times[index] if part == "decoder" and is_layer else 1
        kept = noted.entering[key] if is_layer and step.checkpointing and saved else saved
        parts[part] += number * kept / len(rows)
        layers[part] = max(layers[part], saved / len(rows)) if is_layer else layers[part]
    return Saved(parts, layers, logits.shape[1])


def _watched(model: PreTrainedModel, times: Mapping[int, int]) -> dict[tuple[str, int | None], list[nn.Module]]:
    """Modules by part, and of tower and decoder every layer that can be checkpointed by itself."""
    decoder, visual = model.get_decoder(), modules_of_parts(model)
    watched: dict[tuple[str, int | None], list[nn.Module]] = {
        ("projector", None): visual["projector"],
        ("tower", None): [module for module in visual["vision"] if not isinstance(module, GradientCheckpointingLayer)],
        ("decoder", None): [model.lm_head, *(child for child in decoder.children() if child is not decoder.layers)],
    }
    layers = [module for module in visual["vision"] if isinstance(module, GradientCheckpointingLayer)]
    watched |= {("tower", index): [layer] for index, layer in enumerate(layers)}
    return watched | {("decoder", index): [decoder.layers[index]] for index in times}


class BytesSaved(torch.autograd.graph.saved_tensors_hooks):
    """
    Notes the bytes of what autograd saves, each tensor once and weights not among them.

    Args:
        model: weightless.
        noise: that its products are made of, whose tensors lie in one memory.
        running: which part runs.
        watched: the modules of each part.

    Attributes:
        saved: bytes by part.
        entering: bytes of the hidden states that enter each part.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        noise: ProductsAreNoise,
        running: FlopsByPart,
        watched: Mapping[Hashable, list[nn.Module]],
    ) -> None:
        super().__init__(self._note, lambda tensor: tensor)
        self.noise, self.running = noise, running
        self.saved: Counter[Any] = Counter()
        self.entering: Counter[Any] = Counter()
        self._known = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for key, modules in watched.items():
            for module in modules:
                module.register_forward_pre_hook(partial(self._enter, key), with_kwargs=True)

    def _enter(self, key: Hashable, _: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        (states, *_) = *args, *kwargs.values()
        self.entering[key] = states.nbytes

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage, part = _storage(tensor), self.running.inside[-1] if self.running.inside else None
        size = tensor.untyped_storage().nbytes()
        if self.noise.is_noise(tensor):
            place = (storage, tensor.storage_offset())
            wide = zip(tensor.shape, tensor.stride(), strict=True)
            storage, size = place, math.prod(count for count, step in wide if step) * tensor.itemsize
        if storage not in self._known and tensor.numel() > 1:
            self._known.add(storage)
            self.saved[part] += size
        return tensor


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
