"""Torch counts, part by part, while the model's own code runs on a prompt or takes a training step.

Counted are matrix products, convolutions and attention, at two FLOPs for a multiplication with its addition; attention
counts its whole square, masked or not.
"""

import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..parts import modules_of_parts
from ..vision.tower import _attention, tower_layers
from .weightless import CPU_FORMULAS, ProductsAreNoise


class FlopsByPart(TorchDispatchMode):
    """
    Notes what torch's `FlopCounterMode` would count, by its formulas, for which part of a model: forward, on the way
    back, and in layers that run again on it.

    Autograd numbers its nodes in the order in which the forward pass makes them. So the modules of parts say which
    numbers are theirs, and a product on the way back belongs to the part that has its node's number.

    Args:
        parts: the modules of each part, none inside another's; what is outside of all is under `None`.

    Attributes:
        spent: FLOPs by part, by phase (`"forward"`, `"backward"`, `"recomputed"`), and by whether a product of
            batches spent them.
    """

    def __init__(self, parts: Mapping[Hashable, list[nn.Module]]) -> None:
        super().__init__()
        self.formulas = FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS).flop_registry
        self.spent: Counter[tuple[Hashable, str, bool]] = Counter()
        self.inside, self.hooks = [], []
        # Numbers of autograd's nodes at which parts begin and end, and the part from there on.
        self.numbers, self.parts = [0], [None]
        for part, modules in parts.items():
            for module in modules:
                self.hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self._enter(part)))
                # A layer that runs again stops, by an exception, where nothing further is needed.
                self.hooks.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))

    def _enter(self, part: Hashable) -> None:
        self.inside.append(part)
        self._from_here(part)

    def _leave(self) -> None:
        # Of nothing, where another hook stopped the module before it began.
        del self.inside[-1:]
        self._from_here(None)

    def _from_here(self, part: Hashable) -> None:
        self.numbers.append(torch._C._autograd._get_sequence_nr())
        self.parts.append(part)

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result, formula = operation(*args, **kwargs), self.formulas.get(operation.overloadpacket)
        spent = formula(*args, **kwargs, out_val=result) if formula else 0
        if spent:
            part, phase = self.inside[-1] if self.inside else None, "forward"
            node = torch._C._current_autograd_node()
            if node is not None:
                phase = "recomputed" if self.inside else "backward"
            if phase == "backward":
                part = self.parts[bisect_right(self.numbers, node._sequence_nr()) - 1]
            self.spent[part, phase, operation is torch.ops.aten.bmm.default] += spent
        return result


def flops_by_part(
    run: Callable[[], Any], parts: Mapping[Hashable, list[nn.Module]], blind: Collection[Hashable] = ()
) -> tuple[Any, Counter[Hashable]]:
    """
    What `run` returns without gradients, and the FLOPs of each part; see [`FlopsByPart`].

    Args:
        run: of a weightless model.
        parts: see there.
        blind: parts in which nothing asks for values, which then take no time.
    """
    by_part: Counter[Hashable] = Counter()
    counted = FlopsByPart(parts)
    noise = ProductsAreNoise(lambda: bool(counted.inside) and counted.inside[-1] in blind)
    # See `weightless_model`.
    with torch.inference_mode(False), torch.no_grad(), noise, counted:
        result = run()
    for (part, _, _), flops in counted.spent.items():
        by_part[part] += flops
    return result, by_part


def visual_modules(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """
    The modules of `"vision"` and `"projector"` of a model of any family, none inside another. Of a LLaVA's tower they
    are the halves of its layers: keys and values that a reducer asks a layer for are the reducer's.
    """
    tower = model.get_encoder(modality="image")
    if not isinstance(model.config, AdaVTPConfig):
        return modules_of_parts(model, layers_apart=getattr(model.config, "opens_tower", False))
    halves = [half for layer in tower_layers(tower) for half in (_attention(layer), layer.mlp)]
    return {"vision": [tower.embeddings, *halves], "projector": [model.model.multi_modal_projector]}


def weights_on_parabola(place: int, points: Sequence[int]) -> list[Fraction]:
    """What the values at some points weigh in the value at a place of the polynomial through them (Lagrange)."""
    others = [[other for other in points if other != point] for point in points]
    return [
        math.prod((Fraction(place - other, point - other) for other in rest), start=Fraction(1))
        for point, rest in zip(points, others, strict=True)
    ]


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a configuration and of what can be hashed, which works out once what it returns for the same."""

    @lru_cache(maxsize=64)
    def of_written(config_class: type[PreTrainedConfig], written: str, *arguments: Any) -> Any:
        return function(config_class.from_dict(json.loads(written)), *arguments)

    @wraps(function)
    def of_config(config: PreTrainedConfig, *arguments: Any) -> Any:
        # As it is now; it may be changed afterwards.
        return of_written(type(config), config.to_json_string(use_diff=False), *arguments)

    return of_config
