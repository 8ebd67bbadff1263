"""A decoder layer of which only some attention heads and groups of MLP channels run.

Two ways lead to the same numbers. Slicing takes the parts that run out of the weights, once for as long as the plan
holds: the products get smaller, and so does the cache. It needs one plan for all prompts of a batch. Gating multiplies
what enters the output projections by zeros and ones, which may differ from prompt to prompt, and saves nothing.

Neither touches the layer: what runs is a twin that has the layer's own modules but for those that differ.
"""

from copy import copy
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


class SlicedLinear(nn.Module):
    """
    Some rows, or some columns, of a linear layer.

    Args:
        whole: the layer.
        outputs: `[num_outputs]` int64, those that are made; by default all.
        inputs: `[num_inputs]` int64, those that are read; by default all.
    """

    def __init__(
        self, whole: nn.Linear, outputs: torch.Tensor | None = None, inputs: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        weight, bias = whole.weight, whole.bias
        if outputs is not None:
            outputs = outputs.to(weight.device)
            weight, bias = weight[outputs], None if bias is None else bias[outputs]
        # In a tuple they are no parameters of this module: in training the gradient is that of the layer's.
        self.sliced = (weight if inputs is None else weight[:, inputs.to(weight.device)], bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., num_inputs]` to `[..., num_outputs]`."""
        return linear(hidden_states, *self.sliced)


class GatedInputs(nn.Module):
    """
    A layer whose inputs are multiplied by gates.

    Args:
        layer: of any kind.
        gates: `[batch, 1, num_inputs]`.
    """

    def __init__(self, layer: nn.Module, gates: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.gates = layer, gates

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[batch, n, num_inputs]` to what the layer makes of it."""
        return self.layer(hidden_states * self.gates.to(hidden_states))


class OutputOfNothing(nn.Module):
    """
    What an output projection makes of zeros, in place of the attention or of the MLP that stands before it.

    Args:
        projection: the output projection.
        returns_weights: whether what it stands for returns attention weights beside hidden states.
    """

    def __init__(self, projection: nn.Module, returns_weights: bool) -> None:
        super().__init__()
        self.projection, self.returns_weights = projection, returns_weights

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, None]:
        """`[batch, n, hidden_size]` of nothing but the projection's bias, if it has one."""
        bias = getattr(self.projection, "bias", None)
        output = torch.zeros_like(hidden_states)
        output = output if bias is None else output + bias
        return (output, None) if self.returns_weights else output


def why_not_partial(layer: nn.Module) -> str | None:
    """Why no twin of a decoder layer can run, or `None` if one can."""
    if any("forward" in vars(module) for module in layer.modules()):
        return (
            "its modules were given another `forward`, as accelerate does where it spreads a model over devices or "
            "keeps weights on the CPU or disk. Put the model on one device, or leave out whole layers."
        )
    return None


def can_be_sliced(layer: nn.Module) -> bool:
    """Whether a layer's projections are plain matrices that lie here whole: no adapters, no four bits, no shards."""
    projections = [*_attention_projections(layer), *_mlp_projections(layer)]
    return all(type(one) is nn.Linear and type(one.weight) is nn.Parameter for one in projections) and not any(
        hasattr(one.weight, "ds_id") for one in projections
    )


def sliced_layer(layer: nn.Module, heads: torch.Tensor, mlp_groups: torch.Tensor) -> nn.Module:
    """
    A twin of a decoder layer in which only some heads and groups of MLP channels are computed.

    Args:
        layer: of a kind in `RUNNABLE`, see [`can_be_sliced`].
        heads: `[num_heads]` bool, see [`ExecutionPlan`].
        mlp_groups: `[num_groups]` bool.
    """
    attention, mlp, twins = layer.self_attn, layer.mlp, {}
    query, key, value, output = _attention_projections(layer)
    if not bool(heads.any()):
        twins["self_attn"] = OutputOfNothing(output, returns_weights=True)
    elif not bool(heads.all()):
        of_heads = heads.repeat_interleave(output.in_features // len(heads)).nonzero()[:, 0]
        shared = heads.view(key.out_features // attention.head_dim, -1).any(dim=-1)
        of_shared = shared.repeat_interleave(attention.head_dim).nonzero()[:, 0]
        twins["self_attn"] = twin_with(
            attention,
            q_proj=SlicedLinear(query, outputs=of_heads),
            k_proj=SlicedLinear(key, outputs=of_shared),
            v_proj=SlicedLinear(value, outputs=of_shared),
            o_proj=SlicedLinear(output, inputs=of_heads),
        )
    gate, up, down = _mlp_projections(layer)
    if not bool(mlp_groups.any()):
        twins["mlp"] = OutputOfNothing(down, returns_weights=False)
    elif not bool(mlp_groups.all()):
        channels = mlp_groups.repeat_interleave(down.in_features // len(mlp_groups)).nonzero()[:, 0]
        twins["mlp"] = twin_with(
            mlp,
            gate_proj=SlicedLinear(gate, outputs=channels),
            up_proj=SlicedLinear(up, outputs=channels),
            down_proj=SlicedLinear(down, inputs=channels),
        )
    return twin_with(layer, **twins) if twins else layer


def gated_layer(layer: nn.Module, heads: torch.Tensor, mlp_groups: torch.Tensor) -> nn.Module:
    """
    A twin of a decoder layer in which gates multiply what heads and groups of MLP channels give.

    Args:
        layer: of a kind in `RUNNABLE`.
        heads: `[batch, num_heads]` gates; bool, or numbers that carry a gradient.
        mlp_groups: `[batch, num_groups]` gates.
    """
    attention, mlp = layer.self_attn, layer.mlp
    num_inputs = layer.self_attn.config.num_attention_heads * attention.head_dim
    num_channels = attention.config.intermediate_size

    def gates(table: torch.Tensor, size: int) -> torch.Tensor:
        return table.repeat_interleave(size // table.shape[-1], dim=-1)[:, None]

    return twin_with(
        layer,
        self_attn=twin_with(attention, o_proj=GatedInputs(attention.o_proj, gates(heads, num_inputs))),
        mlp=twin_with(mlp, down_proj=GatedInputs(mlp.down_proj, gates(mlp_groups, num_channels))),
    )


def twin_with(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A module that is another in everything but some of its children."""
    twin = copy(module)
    vars(twin)["_modules"] = module._modules | children
    return twin


def _attention_projections(layer: nn.Module) -> tuple[nn.Module, ...]:
    attention = layer.self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


def _mlp_projections(layer: nn.Module) -> tuple[nn.Module, ...]:
    return layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
