"""A vision tower's layers taken apart: their two halves, and the queries and keys of their attention.

CLIP, SigLIP and DINOv2 layers of transformers are residual attention, then a residual MLP, under different names. What
works between the halves (merging) or scores tokens by attention reads them through here, and never needs the matrix of
all attention weights: one query row costs what one token costs.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention_rows import received


def tower_layers(tower: PreTrainedModel) -> nn.ModuleList:
    """The layers of a CLIP, SigLIP or DINOv2 tower, from the bottom."""
    return tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer


def input_device(module: nn.Module, given: torch.Tensor) -> torch.device:
    """
    Where the inputs of a module go. What has no weights works where it is `given` them; offloaded weights are nowhere
    until they run, and take their inputs along then.
    """
    device = next((weight.device for weight in module.parameters()), given.device)
    return given.device if device.type == "meta" else device


def takes_mask(layer: nn.Module) -> bool:
    """Whether a layer's attention can be masked. DINOv2's cannot in the older of the supported transformers."""
    return "attention_mask" in inspect.signature(layer.forward).parameters


def attention_half(layer: nn.Module, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    A layer's first half: h + Attention(norm(h)), a mask (a `ValueError` where the layer takes none) added to the
    attention logits, broadcast to `[num_images, heads, num_tokens, num_tokens]`.
    """
    if attention_mask is not None and not takes_mask(layer):
        raise ValueError(
            f"{type(layer).__name__} takes no attention mask in this version of transformers, and the chosen reducer "
            "needs one; use a newer transformers, or another reducer."
        )
    attended = _attention(layer)(_first_norm(layer)(hidden_states), attention_mask=attention_mask)[0]
    if hasattr(layer, "layer_scale1"):
        attended = layer.drop_path(layer.layer_scale1(attended))
    return hidden_states + attended


def mlp_half(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """A layer's second half: h + MLP(norm(h))."""
    norm = layer.layer_norm2 if hasattr(layer, "layer_norm2") else layer.norm2
    transformed = layer.mlp(norm(hidden_states))
    if hasattr(layer, "layer_scale2"):
        transformed = layer.drop_path(layer.layer_scale2(transformed))
    return hidden_states + transformed


def layer_queries(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Queries `[num_images, heads, num_tokens, head_dim]` that a layer makes of the tokens that enter it."""
    return _projected(layer, hidden_states, ("q_proj", "query"))


def layer_keys(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Keys `[num_images, heads, num_tokens, head_dim]` that a layer makes of the tokens that enter it."""
    return _projected(layer, hidden_states, ("k_proj", "key"))


def _attention(layer: nn.Module) -> nn.Module:
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def _first_norm(layer: nn.Module) -> nn.Module:
    return layer.layer_norm1 if hasattr(layer, "layer_norm1") else layer.norm1


def _projected(layer: nn.Module, hidden_states: torch.Tensor, names: tuple[str, str]) -> torch.Tensor:
    attention = _attention(layer)
    # DINOv2 kept its projections one level deeper, under the second name, in the older transformers.
    attention = getattr(attention, "attention", attention)
    projection = getattr(attention, names[0] if hasattr(attention, names[0]) else names[1])
    heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
    projected = projection(_first_norm(layer)(hidden_states))
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


@dataclass
class TowerAttention:
    """
    What one layer's attention compares: CLS's query, and the keys of CLS and of all patches.

    Attributes:
        query: `[num_images, heads, head_dim]`, of CLS; `None` for a tower without a CLS token.
        cls_key: `[num_images, heads, head_dim]`, or `None` likewise.
        keys: `[num_images, heads, num_tokens, head_dim]`, of the patches.
        row: `[num_images, heads, num_tokens]` float32 where it is known already and not worked out from query and
            keys: how much CLS attends to each token, or where there is no CLS, how much it receives.
        received: `[num_images, heads, num_tokens]` float32, how much each token receives, the mean over all that
            attend; only where a reducer needs it.
    """

    query: torch.Tensor | None
    cls_key: torch.Tensor | None
    keys: torch.Tensor
    row: torch.Tensor | None = None
    received: torch.Tensor | None = None

    @classmethod
    def of_layer(
        cls, layer: nn.Module, hidden_states: torch.Tensor, has_cls: bool, with_received: bool = False
    ) -> "TowerAttention":
        """Of what enters a layer, `[num_images, (1 +) num_patches, hidden_size]`, CLS first if there is one."""
        keys, first = layer_keys(layer, hidden_states), int(has_cls)
        attending = hidden_states if with_received else hidden_states[:, :first]
        queries = layer_queries(layer, attending) if attending.shape[1] else None
        got = None
        if with_received:
            got = received(queries.float() * queries.shape[-1] ** -0.5, keys.float())[..., first:]
        if not has_cls:
            return cls(None, None, keys, received=got)
        return cls(queries[:, :, 0], keys[:, :, 0], keys[:, :, 1:], received=got)

    def cls_row(self) -> torch.Tensor:
        """
        How much CLS attends to each patch in each head, `[num_images, heads, num_tokens]` float32: softmax(q k^T /
        sqrt(d)) over CLS and patches, the column of CLS left out.
        """
        if self.row is not None:
            return self.row
        keys = torch.cat([self.cls_key[:, :, None], self.keys], dim=2).float()
        logits = (keys @ self.query.float()[..., None])[..., 0] * self.query.shape[-1] ** -0.5
        return logits.softmax(dim=-1)[..., 1:]

    def to(self, device: torch.device) -> "TowerAttention":
        """On another device."""
        parts = (self.query, self.cls_key, self.keys, self.row, self.received)
        return TowerAttention(*(None if part is None else part.to(device) for part in parts))

    def take(self, index: torch.Tensor) -> "TowerAttention":
        """Only the patches at `index` `[num_images, num_tokens]`."""
        heads, head_dim = self.keys.shape[1], self.keys.shape[-1]
        keys = self.keys.gather(2, index[:, None, :, None].expand(-1, heads, -1, head_dim))
        index = index[:, None].expand(-1, heads, -1)
        known = [None if rows is None else rows.gather(2, index) for rows in (self.row, self.received)]
        return TowerAttention(self.query, self.cls_key, keys, *known)

    def images(self, rows: torch.Tensor, num_tokens: int) -> "TowerAttention":
        """Only the images at `rows` `[num_rows]`, and of each the first `num_tokens` patches."""
        chosen = [None if tensor is None else tensor[rows] for tensor in (self.query, self.cls_key)]
        known = [None if values is None else values[rows, :, :num_tokens] for values in (self.row, self.received)]
        return TowerAttention(*chosen, self.keys[rows, :, :num_tokens], *known)

    @classmethod
    def joined(cls, parts: list["TowerAttention"], num_tokens: int, order: torch.Tensor) -> "TowerAttention":
        """Images of several parts in one, filled up to `num_tokens` patches and put in `order`."""
        order = order.to(parts[0].keys.device)

        def of_parts(name: str, *behind: int) -> torch.Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is None:
                return None
            if name in ("keys", "row", "received"):
                missing = [num_tokens - part.keys.shape[2] for part in parts]
                tensors = [
                    nn.functional.pad(tensor, (*behind, 0, number))
                    for tensor, number in zip(tensors, missing, strict=True)
                ]
            return torch.cat(tensors)[order]

        return cls(
            of_parts("query"), of_parts("cls_key"), of_parts("keys", 0, 0), of_parts("row"), of_parts("received")
        )
