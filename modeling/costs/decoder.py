"""The decoder's cost by lengths: n columns cost d + a n + b n^2 + c ceil(n / 64) in each layer, and a step d + b k.

A few short runs of the model's own decoder say these numbers of every layer, and with them what any prompt costs, and
any answer behind it. Most layers have a n + b n^2; linear attention works through columns in pieces, and layers that
read the keys of others may see but the last column.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..decoder.execution_plan import ExecutionPlan, UnitShares
from .counting import flops_by_part

# Columns that linear attention works on together, in all models of transformers.
PIECE = 64
# Prompts that are run, none shorter than a convolution is wide; and one to see whether these foretell it.
_LENGTHS, _FORETOLD = (6, 7, 8, PIECE + 8), 2 * PIECE + 1


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
class Growth:
    """
    What n columns cost: `once` + `column` n + `pair` n^2 + `piece` ceil(n / 64).

    Attributes:
        once, column, pair, piece: the numbers in it.
    """

    column: int
    pair: int = 0
    once: int = 0
    piece: int = 0

    @classmethod
    def through(cls, costs: Sequence[int]) -> "Growth":
        """The one that gives what prompts of `_LENGTHS` columns cost."""
        first, second, third, longer = costs
        shortest, longest = _LENGTHS[0], _LENGTHS[-1]
        pair = (third - 2 * second + first) // 2
        column = second - first - (2 * shortest + 1) * pair
        once = first - column * shortest - pair * shortest**2
        piece = longer - once - column * longest - pair * longest**2
        return cls(column, pair, once - piece, piece)

    def of(self, number: int) -> int:
        """What so many columns cost; none cost nothing."""
        return number and self.once + self.column * number + self.pair * number**2 + self.piece * -(-number // PIECE)


@dataclass(frozen=True)
class LayerCost:
    """
    One decoder layer.

    Attributes:
        attention: of a prompt.
        mlp: all else.
        attention_step, mlp_step: of a column behind a prompt, whatever came before.
        per_key: of such a column for each that it attends to.
        kv_numbers: that its cache holds of a column.
        state_numbers: that its cache holds whatever it has read.
        window: columns that it sees back, or `None` for all.
        shared: for a column, if any share of the layer runs, what a paper counts of norms and additions.
    """

    attention: Growth
    mlp: Growth
    attention_step: int
    mlp_step: int
    per_key: int
    kv_numbers: int = 0
    state_numbers: int = 0
    window: int | None = None
    shared: int = 0

    @classmethod
    def of_paper(cls, projections: int, pair: int, mlp: int, shared: int) -> "LayerCost":
        """Of a formula that has n (projections + mlp + shared) + n^2 pair for a prompt of n columns."""
        return cls(Growth(projections, pair), Growth(mlp), projections, mlp, pair, shared=shared)

    def prefill(self, number: int, heads: float, mlp: float) -> float:
        """Of so many columns, if such shares of its attention and of its MLP run."""
        shared = self.shared * number if heads or mlp else 0
        return heads * self.attention.of(number) + mlp * self.mlp.of(number) + shared

    def step(self, heads: float, mlp: float) -> float:
        """Of a column behind a prompt, without what it attends to."""
        shared = self.shared if heads or mlp else 0
        return heads * self.attention_step + mlp * self.mlp_step + shared


@dataclass(frozen=True)
class DecoderCost:
    """
    All layers, and what stands around them.

    Attributes:
        layers: from the bottom.
        around: embeddings that are made of all columns, and the head on the last.
        around_step: the same of a column behind a prompt.
    """

    layers: tuple[LayerCost, ...]
    around: Growth
    around_step: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "DecoderCost":
        """
        Runs a weightless model on a few prompts of words, and on a word behind two of them.

        Raises:
            ValueError: if it does not run on a CPU without values, as where kernels for GPUs stand in for torch's
                code; or if these do not foretell what another prompt costs.
        """
        config, layers = model.config.get_text_config(), model.get_decoder().layers
        first, parts = first_alike(layers, config), _parts(layers)
        for index in range(len(layers)):
            if first[index] < index:
                pass_through(layers[index])
        runs = [_run(model, parts, number) for number in _LENGTHS]
        caches = [output.past_key_values for output, _ in runs[:2]]
        numbers = _cached_numbers(caches[0])
        steps = [_run(model, parts, 1, cache)[1] for cache in caches]

        def grown(part: Hashable) -> Growth:
            return Growth.through([counted[part] for _, counted in runs])

        costs: list[LayerCost] = []
        for index in range(len(layers)):
            if first[index] < index:
                costs.append(costs[first[index]])
                continue
            attention, mlp = ("attention", index), ("mlp", index)
            per_key = steps[1][attention] - steps[0][attention]
            costs.append(
                LayerCost(
                    grown(attention),
                    grown(mlp),
                    steps[0][attention] - (_LENGTHS[0] + 1) * per_key,
                    steps[0][mlp],
                    per_key,
                    *(numbers[index] if index < len(numbers) else (0, 0)),
                    _window(config, index),
                )
            )
        cost = cls(tuple(costs), grown(None), steps[0][None])
        _, counted = _run(model, parts, _FORETOLD)
        alone = [part for part in parts if first[part[1]] == part[1]]
        foretold = grown(None).of(_FORETOLD) + sum(grown(part).of(_FORETOLD) for part in alone)
        if counted.total() != foretold:
            raise ValueError(
                f"Costs of a {model.config.model_type!r} model are not counted: {_FORETOLD} columns of its decoder "
                f"cost {counted.total():.4g} FLOPs, and shorter prompts foretell {foretold:.4g}."
            )
        return cost

    def prefill(self, columns: Sequence[int], plan: ExecutionPlan | UnitShares | None = None) -> float:
        """
        One prompt.

        Args:
            columns: that each layer sees.
            plan: units that run, of one prompt; by default all.
        """
        pairs = zip(self.layers, columns, self._shares(plan), strict=True)
        return self.around.of(columns[0]) + sum(layer.prefill(n, *shares) for layer, n, shares in pairs)

    def decode(self, columns: Sequence[int], plan: ExecutionPlan | UnitShares | None = None) -> DecodeCost:
        """The steps behind a prefill; see [`DecoderCost.prefill`]."""
        pairs = list(zip(self.layers, self._shares(plan), strict=True))
        fixed = self.around_step + sum(layer.step(*shares) for layer, shares in pairs)
        per_key = tuple(heads * layer.per_key for layer, (heads, _) in pairs)
        return DecodeCost(fixed, per_key, tuple(columns), tuple(layer.window for layer in self.layers))

    def kv_numbers(self, columns: Sequence[int], plan: ExecutionPlan | UnitShares | None = None) -> float:
        """
        Keys and values in the cache behind a prefill, in a window no more than the next step can see; and states.
        """
        return sum(
            heads * layer.kv_numbers * (n if layer.window is None else min(n, layer.window - 1))
            + heads * layer.state_numbers
            for layer, n, (heads, _) in zip(self.layers, columns, self._shares(plan), strict=True)
        )

    def _shares(self, plan: ExecutionPlan | UnitShares | None) -> list[tuple[float, float]]:
        if plan is None:
            return [(1, 1)] * len(self.layers)
        if isinstance(plan, ExecutionPlan):
            if len(plan) != 1:
                raise ValueError(f"`plan` has {len(plan)} rows; costs are counted of one prompt, so allowed is one.")
            plan = plan.shares(0)
        if len(plan.heads) != len(self.layers):
            raise ValueError(f"`plan` is of {len(plan.heads)} layers; the decoder has {len(self.layers)}.")
        return list(zip(plan.heads, plan.mlp, strict=True))


def first_alike(layers: nn.ModuleList, config: PreTrainedConfig) -> list[int]:
    """
    For each decoder layer the first that is like it: of the same modules with the same sizes and settings.

    Args:
        layers: of the decoder.
        config: of the text model.
    """
    kinds: dict[Any, int] = {}
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    return [
        kinds.setdefault((kind, *map(_described, layer.modules())), index)
        for index, (kind, layer) in enumerate(zip(types, layers, strict=True))
    ]


def pass_through(layer: nn.Module) -> None:
    """Makes a layer give back what it gets."""
    layer.forward = lambda hidden_states, *_, **__: hidden_states


def _described(module: nn.Module) -> tuple:
    """What tells a module from others of its class, but for its number."""
    settings = {name: value for name, value in vars(module).items() if isinstance(value, str | int | float | tuple)}
    settings.pop("layer_idx", None)
    return (type(module), repr(settings), *(tuple(weight.shape) for weight in module.parameters(recurse=False)))


def _parts(layers: nn.ModuleList) -> dict[Hashable, list[nn.Module]]:
    """Of each layer its attention, of whatever kind, and all else."""
    parts: dict[Hashable, list[nn.Module]] = {}
    for index, layer in enumerate(layers):
        for name, child in layer.named_children():
            parts.setdefault(("attention" if "attn" in name else "mlp", index), []).append(child)
    return parts


def _run(
    model: PreTrainedModel, parts: Mapping[Hashable, list[nn.Module]], number: int, cache: Cache | None = None
) -> tuple[ModelOutput, Counter]:
    """So many words, behind a cache or not, and the head on the last of them."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    # An id that stands for no image.
    word = min({0, 1, 2, 3, 4} - {getattr(model.config, name, None) for name in names})
    words = torch.full((1, number), word)
    asked = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    try:
        return flops_by_part(lambda: model(input_ids=words, **asked), parts)
    except Exception as error:
        kind = model.config.model_type
        raise ValueError(
            f"Costs of a {kind!r} model are not counted: running its decoder without values failed ({error!r})."
        ) from error


def _cached_numbers(cache: Cache) -> list[tuple[int, int]]:
    """Of each layer's cache behind a prompt what it holds of a column, and what it holds whatever it has read."""
    numbers = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        of_column = 0 if keys is None else (keys.numel() + values.numel()) // keys.shape[-2]
        kept = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        numbers.append((of_column, sum(state.numel() for state in kept if state is not None)))
    return numbers


def _window(config: PreTrainedConfig, index: int) -> int | None:
    """How many columns a layer sees back, its own included."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    return window if not types or types[index] == "sliding_attention" else None
