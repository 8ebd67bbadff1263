"""The memory that a training run needs on each GPU, from formulas.

Weights, gradients and optimizer states follow from how many parameters train and who keeps them in which precision.
Activations are what autograd saves: beside each line below stands the tensor. The worst moment is at the logits, in
float32 once as log-probabilities and twice as gradients; or, where checkpointing keeps only what enters the layers, at
one layer that runs again. What the CUDA context, the communication library and fragmentation take has no formula: it
is a reserve that the caller states.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.costs.counting import remembered
from ..modeling.costs.training_step import Step, linear_maps, part_of
from ..modeling.costs.weightless import weightless_model
from ..modeling.families.llava import LLAVA
from ..modeling.reducers.base import feature_layer_index

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
    def of(cls, config: AdaVTPConfig, step: Step, quantize: bool = False) -> "Weights":
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
        parts, num_layers, layer, maps, head = _parameters(config)
        # r (in + out) for every linear map of every layer.
        adapters = num_layers * (step.lora_rank or 0) * sum(map(sum, maps))
        train = adapters + sum(number for part, number in parts.items() if step.trains(part))
        quantized = num_layers * sum(wide * out for wide, out in maps) if quantize else 0
        return cls(train, parts.total() + adapters - train - quantized, quantized, layer, head)


@remembered
def _parameters(config: AdaVTPConfig) -> tuple[Counter[str], int, int, list[tuple[int, int]], int]:
    """How many each part has; decoder layers, how many one has, and its linear maps' sizes; how many the head has."""
    model, parts = weightless_model(config), Counter()
    for name, parameter in model.named_parameters():
        parts[part_of(name, config)] += parameter.numel()
    layers, head = model.get_decoder().layers, model.get_output_embeddings()
    maps = [(linear.in_features, linear.out_features) for linear in linear_maps(layers[0]).values()]
    return parts, len(layers), sum(map(torch.numel, layers[0].parameters())), maps, head.weight.numel()


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
    config: AdaVTPConfig,
    step: Step,
    *,
    rows: int,
    length: int,
    visual_tokens: int | None = None,
    padded: bool | None = None,
    autocast: bool = False,
    number: int = 2,
) -> dict[str, float]:
    """
    Bytes that are alive at the worst moment of the backward pass.

    Args:
        config, step: the model's, and how a training step is carried out.
        rows: of a micro-batch, with an image each.
        length: columns of its longest row as the decoder gets it: text and those visual tokens that are kept.
        visual_tokens: that the projector gets of each image; by default all.
        padded: whether rows are of different lengths; by default if there are several.
        autocast: whether float32 weights are cast for each product.
        number: bytes of a number, 2 or 4.

    Returns:
        `"tower"`, `"controller"`, `"projector"`, `"decoder"`: what is saved; and `"logits or a layer"`: what comes on
        top at its beginning, or later while a checkpointed layer runs again, with the gradients inside its MLP.
    """
    text, vision, b = config.text_config, config.vision_config, number
    patches = LLAVA.tokens_per_image(config)
    num_layers, depth = feature_layer_index(config), text.num_hidden_layers
    # Which tensors want a gradient. Checkpointing makes words and patches want one whatever trains, and the budget
    # token, which stands in one sequence with the patches, makes all of them.
    adaptive = "adaptive" in config.reducer.split(", ")
    words = step.trains("decoder") or step.checkpointing
    token = adaptive and (step.trains("controller") or (config.question_aware and words))
    joins = token and config.budget_fusion == "encoder"
    in_tower = step.trains("vision") or step.checkpointing or joins
    gates = step.trains("controller") and adaptive
    in_attention = gates and step.gates == "attention"
    in_projector = in_tower or step.trains("projector") or (gates and not in_attention)
    sequence = patches + int(config.has_cls) + int(joins)
    of_tower_layer = rows * tower_layer_bytes(config, sequence, step.trains("vision"), b) if in_tower else 0.0
    masked = rows > 1 if padded is None else padded
    of_layer = rows * decoder_layer_bytes(text, length, step, b, autocast, masked)
    tower, layers = num_layers * of_tower_layer, depth * of_layer
    again = 0.0
    if step.checkpointing:
        again = max(of_tower_layer, of_layer + 3 * rows * length * text.intermediate_size * b)
        tower = num_layers * rows * sequence * vision.hidden_size * b
        layers = depth * rows * length * text.hidden_size * b
    kept = patches if visual_tokens is None or in_attention else visual_tokens
    projected = rows * kept * b * (config.visual_width * step.trains("projector") + 2 * text.hidden_size)
    # Normed patches, what enters GELU and score, and the features behind the gates.
    scored = 5 * rows * patches * vision.hidden_size * b if gates else 0.0
    bias = rows * length * length * b * (3 + text.num_attention_heads) if in_attention else 0.0
    return {
        "tower": float(tower),
        "controller": float(scored + bias),
        "projector": float(projected) if in_projector else 0.0,
        "decoder": float(layers + rows * last_norm_bytes(text, length, step, b)),
        "logits or a layer": float(max(again, LOGIT_BYTES * rows * length * text.vocab_size)),
    }


def decoder_layer_bytes(
    text: PreTrainedConfig, n: int, step: Step, b: int, autocast: bool = False, masked: bool = False
) -> float:
    """
    What autograd saves of a Llama-shaped layer, for one row of n columns.

    Args:
        text: configuration of the text model.
        n: columns.
        step: says what trains.
        b: bytes of a number.
        autocast: whether every product casts what enters it anew.
        masked: whether rows are padded, which makes attention take a mask, and as many keys as queries.
    """
    width, heads, mlp = text.hidden_size, text.num_attention_heads, text.intermediate_size
    head_dim = getattr(text, "head_dim", None) or width // heads
    query, key = heads * head_dim, text.num_key_value_heads * head_dim
    numbers = 2 * (4 * width + 4)  # of both norms: what enters, in float32, and the inverse of its size
    if step.trains("decoder"):
        numbers += 2 * width * (4 if autocast else b)  # of both norms: what their weights multiply
        numbers += (5 if autocast else 2) * width * b  # what enters queries, keys and values; gate and up
        numbers += mlp * b  # what enters down
    numbers += b * (2 * query + 2 * (query if masked else key)) + 4 * heads  # q, result; k, v; log-sums
    numbers += 3 * mlp * b  # gate, silu(gate), up
    if step.lora_rank is not None:
        numbers += (5 * width + query + mlp) * (b + 1)  # what enters each adapter behind dropout of its own; its mask
        numbers += 7 * step.lora_rank * b  # between the halves of each adapter
    return float(n * numbers + (b * n * n if masked else 0))


def last_norm_bytes(text: PreTrainedConfig, n: int, step: Step, b: int) -> float:
    """The norm before the head and what enters the head, for one row of n columns."""
    width = text.hidden_size
    return float(n * (4 * width + 4 + (2 * b * width if step.trains("decoder") else 0)))


def tower_layer_bytes(config: AdaVTPConfig, n: int, trains: bool, b: int) -> float:
    """
    What autograd saves of a tower layer, for one image of n tokens: both residuals with two numbers a norm; queries,
    keys, values, result and log-sums of attention; what the MLP's activation needs; and what enters products that
    train.
    """
    vision = config.vision_config
    width, scales = vision.hidden_size, vision.model_type == "dinov2"
    mlp = int(width * vision.mlp_ratio) if scales else vision.intermediate_size
    if scales and vision.use_swiglu_ffn:
        # Two thirds of it, in multiples of 8, since there is a third matrix.
        mlp = (mlp * 2 // 3 + 7) // 8 * 8
    # x sigmoid(1.702 x) is two tensors to autograd, every other activation one.
    inner = 2 if getattr(vision, "hidden_act", "gelu") == "quick_gelu" else 1
    numbers = 2 * b * (width + 2) + 4 * b * width + 4 * vision.num_attention_heads + inner * b * mlp
    if trains:
        numbers += 2 * b * width + b * mlp
        # DINOv2 scales what both halves make, by weights that train.
        numbers += 2 * b * width if scales else 0
    return float(n * numbers)
