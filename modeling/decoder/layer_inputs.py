"""What decoder layers take beside hidden states: masks, positions, and the rotary tables of these.

Layers that hold the same columns share them. Between two cuts they are made once; at a decoding step, hardly at all.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .cached_columns import CachedLayers, layer_attentions


@dataclass
class LayerInputs:
    """
    Of one layer.

    Attributes:
        attention_mask: as the layer takes it.
        position_ids: `[batch, n]` int64, where a family has several axes those of text.
        position_embeddings: their cosines and sines, `[batch, n, head_dim]`.
    """

    attention_mask: Any
    position_ids: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]

    def of_rows(self, rows: torch.Tensor, batch_size: int) -> "LayerInputs":
        """Those of some rows `[num_rows]` of a batch of so many."""

        def taken(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return tensor[rows] if tensor is not None and len(tensor) == batch_size else tensor

        tables = tuple(map(taken, self.position_embeddings))
        return LayerInputs(taken(self.attention_mask), taken(self.position_ids), tables)


def rotary_tables(
    language_model: PreTrainedModel, hidden_states: torch.Tensor, position_ids: torch.Tensor, kind: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines `[batch, n, head_dim]` of positions `[batch, n]`, or `[4, batch, n]`: of text, which only masks
    are made of, time, row and column. Of layers of a `kind` where kinds turn differently.
    """
    position_ids = position_ids[1:] if position_ids.dim() == 3 else position_ids
    return language_model.rotary_emb(hidden_states, position_ids, *(() if kind is None else (kind,)))


def rotary_kinds(language_model: PreTrainedModel) -> list[str | None]:
    """The kind of each layer where kinds turn differently, as in Gemma 3, and `None` elsewhere."""
    if "layer_type" in inspect.signature(language_model.rotary_emb.forward).parameters:
        return list(language_model.config.layer_types)
    return [None] * len(language_model.layers)


def of_text(position_ids: torch.Tensor) -> torch.Tensor:
    """`[batch, n]` of positions on any number of axes."""
    return position_ids[0] if position_ids.dim() == 3 else position_ids


class AnswerInputs:
    """
    The inputs of the layers for columns that all of them get, behind what each holds.

    Args:
        language_model: whose layers these are.
        new: `[batch, n, hidden_size]`, the columns.
        masks: of each layer, by its number.
        position_ids: `[..., batch or 1, n]` int64, as in the whole prompt.
        cached: what the layers hold.
        compact: whether positions are counted without what was dropped.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        new: torch.Tensor,
        masks: dict[int, Any],
        position_ids: torch.Tensor,
        cached: CachedLayers,
        compact: bool,
    ) -> None:
        self.masks, self.places, self.kinds = masks, cached.of_layer, rotary_kinds(language_model)
        self.positions: dict[str | None, list[Any]] = {}
        for kind in dict.fromkeys(self.kinds):
            if not compact:
                tables = rotary_tables(language_model, new, position_ids, kind)
                self.positions[kind] = [(of_text(position_ids), tables)] * len(cached.columns)
                continue
            # All tables in one go, as if what layers hold were one more batch dimension.
            dropped = torch.stack([held.num_dropped for held in cached.columns])
            compacted = (position_ids - dropped[..., None]).clamp(min=0)
            cos, sin = rotary_tables(language_model, new, compacted.flatten(0, 1), kind)
            tables = zip(cos.unflatten(0, dropped.shape), sin.unflatten(0, dropped.shape), strict=True)
            self.positions[kind] = list(zip(compacted, tables, strict=True))

    def of_layer(self, number: int, hidden_states: torch.Tensor, attends: bool = True) -> LayerInputs:
        """The inputs of a layer; without a mask where it does not attend."""
        return LayerInputs(self.masks.get(number), *self.positions[self.kinds[number]][self.places[number]])


class PromptInputs:
    """
    The inputs of the layers for a prompt of which columns leave on the way. Made when the first layer that needs them
    asks, and shared by those that hold the same.

    Args:
        language_model: whose layers these are.
        past: what layers hold before.
        num_behind: columns that they hold behind those that are known.
        position_ids: `[..., batch, sequence]` int64, as in the whole prompt.
        cache: what holds the columns.
        compact: whether the positions of what is left are counted anew behind every cut.
        blocks: `[batch, sequence]` int64, of columns that see each other in both directions the number of their
            block, -1 of all others; `None` where there are none.
        bias: what is added to the logits of attention among the columns of the prompt, see [`DecoderPolicy.bias`].

    Attributes:
        cached: what layers hold with the prompt; complete when the last layer has asked.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        past: CachedLayers,
        num_behind: int,
        position_ids: torch.Tensor,
        cache: Cache | None,
        compact: bool,
        blocks: torch.Tensor | None = None,
        bias: Callable[..., torch.Tensor | None] = lambda *_: None,
    ) -> None:
        self.language_model, self.past, self.num_behind, self.cache = language_model, past, num_behind, cache
        self.bias = bias
        self.prompt_positions, self.compact, self.prompt_blocks = position_ids, compact, blocks
        self.kinds = rotary_kinds(language_model)
        self.attentions = layer_attentions(language_model.config)
        self.cached, self.prompt_rank = CachedLayers([], []), None

    def enter(self, index: torch.Tensor, has_padding: bool) -> None:
        """
        Begins with the columns of a prompt, or goes on with those that a cut has left.

        Args:
            index: `[batch, n]` int64, where each column stood in the prompt; -1 for padding.
            has_padding: whether there is any.
        """
        self.index, self.is_real, self.has_padding = index, index >= 0, has_padding
        rank, place = self.is_real.cumsum(dim=-1), index.clamp(min=0)
        if self.prompt_rank is None:
            self.prompt_rank = rank
        self.num_dropped = self.prompt_rank[:, -1] - rank[:, -1]
        axes = self.prompt_positions.shape[:-2]
        self.position_ids = self.prompt_positions.gather(-1, place.expand(*axes, *place.shape))
        if self.compact:
            # As many columns closer to the beginning as left before it.
            self.position_ids = self.position_ids - self.prompt_rank.gather(1, place) + rank
        self.blocks = None
        if self.prompt_blocks is not None:
            self.blocks = self.prompt_blocks.gather(1, place).masked_fill(~self.is_real, -1)
        self._shared: dict[Any, Any] = {}

    def tables(self, number: int, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary tables of a layer."""
        before, kind = self.past.of_layer[number], self.kinds[number]
        if (before, kind) not in self._shared:
            positions = self._positions(before)
            self._shared[before, kind] = rotary_tables(self.language_model, hidden_states, positions, kind)
        return self._shared[before, kind]

    def of_layer(self, number: int, hidden_states: torch.Tensor, attends: bool = True) -> LayerInputs:
        """The inputs of a layer, without a mask where it does not attend; layers ask in their order, and each once."""
        before, attention, kind = self.past.of_layer[number], self.attentions[number], self.kinds[number]
        if before not in self._shared:
            self._shared[before] = len(self.cached.columns), of_text(self._positions(before))
            held = self.past.columns[before]
            num_cached = held.num_known + self.num_behind
            held = held.followed_by(num_cached, self.is_real, self.has_padding, self.num_dropped)
            self.cached.columns.append(held)
        place, position_ids = self._shared[before]
        self.cached.of_layer.append(place)
        tables, key = self.tables(number, hidden_states), (place, attention, kind)
        if not attends:
            # Nor has it a cache, whose length a mask is made for.
            return LayerInputs(None, position_ids, tables)
        if key not in self._shared:
            held, bias = self.cached.columns[place], self.bias(tables, self.index)
            self._shared[key] = held.mask(
                self.language_model.config,
                number,
                attention,
                held.num_known,
                self.cache,
                hidden_states,
                self.blocks,
                bias,
            )
        return LayerInputs(self._shared[key], position_ids, tables)

    def _positions(self, before: int) -> torch.Tensor:
        position_ids = self.position_ids
        if self.compact:
            position_ids = (position_ids - self.past.columns[before].num_dropped[:, None]).clamp(min=0)
        return position_ids
