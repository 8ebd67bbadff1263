"""The decoder's cost as a polynomial of lengths: n columns that attend to k cost a n + b n k in each layer.

Two short runs of the model's own decoder say a and b of every layer, and with them what any prompt costs, and any
answer behind it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.base import has_recurrent_layers
from .counting import flops_by_part


@dataclass(frozen=True)
class ExecutionPlan:
    """
    Which units of the decoder run.

    Attributes:
        heads: for each layer the share of attention heads that run, in [0, 1]; a layer without any writes no keys.
        mlp: for each layer the share of MLP neurons that run, in [0, 1].
    """

    heads: tuple[float, ...]
    mlp: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.mlp) or not all(0 <= share <= 1 for share in (*self.heads, *self.mlp)):
            raise ValueError(f"`plan` is {self!r}; allowed are shares from 0 to 1, one of each kind for each layer.")


@dataclass(frozen=True)
class DecodeCost:
    """
    What the steps behind the prefill cost.

    Attributes:
        fixed: of a step whatever came before: projections, MLPs, the head.
        per_key: for each layer, of attending to one more column.
        cached: for each layer the columns that prefill left in the cache.
        windows: for each layer how many columns it sees back, or `None`.
    """

    fixed: float
    per_key: tuple[float, ...]
    cached: tuple[int, ...]
    windows: tuple[int | None, ...]

    def steps(self, number: int) -> float:
        """The first `number` steps together, each with a column more in every layer up to its window."""
        layers = zip(self.per_key, self.cached, self.windows, strict=True)
        return self.fixed * number + sum(cost * keys_over_steps(seen, number, window) for cost, seen, window in layers)


def keys_over_steps(cached: int, steps: int, window: int | None) -> int:
    """Sum over steps t = 1 .. T of min(cached + t, window), the columns that each step attends to."""
    growing = steps if window is None else max(0, min(steps, window - cached))
    full = 0 if window is None else window * (steps - growing)
    return growing * cached + growing * (growing + 1) // 2 + full


@dataclass(frozen=True)
class LayerCost:
    """
    One decoder layer.

    Attributes:
        projections: of its attention, for a column, a.
        pair: of its attention, for a column and one that it attends to, b.
        mlp: all else, for a column.
        kv_numbers: that its cache holds of a column.
        window: columns that it sees back, or `None` for all.
        shared: for a column, if any share of the layer runs, what a paper counts of norms and additions.
    """

    projections: int
    pair: int
    mlp: int
    kv_numbers: int = 0
    window: int | None = None
    shared: int = 0

    def prefill(self, n: int, keys: int, heads: float, mlp: float) -> float:
        """Of n columns that attend to so many, if such shares of its attention and of its MLP run."""
        shared = self.shared * n if heads or mlp else 0
        return heads * (self.projections * n + self.pair * n * keys) + mlp * self.mlp * n + shared


@dataclass(frozen=True)
class DecoderCost:
    """All layers, and the head on one position."""

    layers: tuple[LayerCost, ...]
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "DecoderCost":
        """Runs the decoder of a weightless model on two and on four columns."""
        decoder, config = model.get_decoder(), model.config.get_text_config()
        parts, head = {}, model.get_output_embeddings()
        for index, layer in enumerate(decoder.layers):
            parts["attention", index] = [layer.self_attn]
            parts["mlp", index] = [child for child in layer.children() if child is not layer.self_attn]

        def run(columns: int) -> tuple[Any, Counter]:
            embeds = torch.ones(1, columns, config.hidden_size)
            return flops_by_part(lambda: decoder(inputs_embeds=embeds, use_cache=True).past_key_values, parts)

        (_, two), (cache, four) = run(2), run(4)
        layers = []
        for index, held in enumerate(cache.layers):
            # f(2) = 2 a + 4 b and f(4) = 4 a + 16 b.
            pair = (four["attention", index] - 2 * two["attention", index]) // 8
            numbers = (held.keys.numel() + held.values.numel()) // held.keys.shape[-2]
            projections = two["attention", index] // 2 - 2 * pair
            layers.append(LayerCost(projections, pair, two["mlp", index] // 2, numbers, _window(config, index)))
        _, of_head = flops_by_part(lambda: head(torch.ones(1, 1, config.hidden_size)), {"head": [head]})
        return cls(tuple(layers), of_head["head"])

    def prefill(self, columns: Sequence[int], plan: ExecutionPlan | None = None) -> float:
        """
        One prompt.

        Args:
            columns: that each layer sees.
            plan: units that run; by default all.
        """
        shares = self._shares(plan)
        return self.head + sum(
            layer.prefill(n, n, *of_layer) for layer, n, of_layer in zip(self.layers, columns, shares, strict=True)
        )

    def decode(self, columns: Sequence[int], plan: ExecutionPlan | None = None) -> DecodeCost:
        """The steps behind a prefill; see [`DecoderCost.prefill`]."""
        shares = self._shares(plan)
        pairs = list(zip(self.layers, shares, strict=True))
        fixed = self.head + sum(layer.prefill(1, 0, *of_layer) for layer, of_layer in pairs)
        per_key = tuple(heads * layer.pair for layer, (heads, _) in pairs)
        return DecodeCost(fixed, per_key, tuple(columns), tuple(layer.window for layer in self.layers))

    def kv_numbers(self, columns: Sequence[int], plan: ExecutionPlan | None = None) -> float:
        """Keys and values in the cache behind a prefill, in a window no more than the next step can see."""
        return sum(
            heads * layer.kv_numbers * (n if layer.window is None else min(n, layer.window - 1))
            for layer, n, (heads, _) in zip(self.layers, columns, self._shares(plan), strict=True)
        )

    def _shares(self, plan: ExecutionPlan | None) -> list[tuple[float, float]]:
        if plan is None:
            return [(1, 1)] * len(self.layers)
        if len(plan.heads) != len(self.layers):
            raise ValueError(f"`plan` is of {len(plan.heads)} layers; the decoder has {len(self.layers)}.")
        return list(zip(plan.heads, plan.mlp, strict=True))


def require_countable(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: if what a decoder spends does not follow from what each of its layers does with columns.
    """
    text, reason = config.get_text_config(), None
    if has_recurrent_layers(config):
        reason = "its linear attention works through columns in pieces, and spends as much on a part of one as on all"
    elif getattr(text, "hidden_size_per_layer_input", None):
        reason = "its layers read embeddings of each token that are made outside of them"
    if reason is not None:
        raise ValueError(f"Costs of a {config.model_type!r} model are not counted: {reason}.")


def _window(config: PreTrainedConfig, index: int) -> int | None:
    """How many columns a layer sees back, its own included."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    return window if not types or types[index] == "sliding_attention" else None
