"""What decoder layers take beside hidden states: masks, positions, and the rotary tables of these.

Layers that hold the same columns share them. Between two cuts they are made once; at a decoding step, hardly at all.
"""

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


def rotary_tables(
    language_model: PreTrainedModel, hidden_states: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines `[batch, n, head_dim]` of positions `[batch, n]`, or `[4, batch, n]`: of text, which only masks
    are made of, time, row and column.
    """
    return language_model.rotary_emb(hidden_states, position_ids[1:] if position_ids.dim() == 3 else position_ids)


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
        self.masks, self.places = masks, cached.of_layer
        if not compact:
            tables = rotary_tables(language_model, new, position_ids)
            self.positions = [(of_text(position_ids), tables)] * len(cached.columns)
            return
        # All tables in one go, as if what layers hold were one more batch dimension.
        dropped = torch.stack([held.num_dropped for held in cached.columns])
        compacted = (position_ids - dropped[..., None]).clamp(min=0)
        cos, sin = language_model.rotary_emb(new, compacted.flatten(0, 1))
        tables = zip(cos.unflatten(0, dropped.shape), sin.unflatten(0, dropped.shape), strict=True)
        self.positions = list(zip(compacted, tables, strict=True))

    def of_layer(self, number: int, hidden_states: torch.Tensor) -> LayerInputs:
        """The inputs of a layer."""
        return LayerInputs(self.masks[number], *self.positions[self.places[number]])


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
    ) -> None:
        self.language_model, self.past, self.num_behind, self.cache = language_model, past, num_behind, cache
        self.prompt_positions, self.compact = position_ids, compact
        self.attentions = layer_attentions(language_model.config)
        self.cached, self.prompt_rank = CachedLayers([], []), None

    def enter(self, index: torch.Tensor, has_padding: bool) -> None:
        """
        Begins with the columns of a prompt, or goes on with those that a cut has left.

        Args:
            index: `[batch, n]` int64, where each column stood in the prompt; -1 for padding.
            has_padding: whether there is any.
        """
        self.is_real, self.has_padding = index >= 0, has_padding
        rank, place = self.is_real.cumsum(dim=-1), index.clamp(min=0)
        if self.prompt_rank is None:
            self.prompt_rank = rank
        self.num_dropped = self.prompt_rank[:, -1] - rank[:, -1]
        axes = self.prompt_positions.shape[:-2]
        self.position_ids = self.prompt_positions.gather(-1, place.expand(*axes, *place.shape))
        if self.compact:
            # As many columns closer to the beginning as left before it.
            self.position_ids = self.position_ids - self.prompt_rank.gather(1, place) + rank
        self._shared: dict[Any, Any] = {}

    def of_layer(self, number: int, hidden_states: torch.Tensor) -> LayerInputs:
        """The inputs of a layer; layers ask in their order, and each once."""
        before, attention = self.past.of_layer[number], self.attentions[number]
        if before not in self._shared:
            self._shared[before] = len(self.cached.columns), *self._positions(before, hidden_states)
            held = self.past.columns[before]
            num_cached = held.num_known + self.num_behind
            held = held.followed_by(num_cached, self.is_real, self.has_padding, self.num_dropped)
            self.cached.columns.append(held)
        place, position_ids, tables = self._shared[before]
        self.cached.of_layer.append(place)
        if (place, attention) not in self._shared:
            held = self.cached.columns[place]
            self._shared[place, attention] = held.mask(
                self.language_model.config, number, attention, held.num_known, self.cache, hidden_states
            )
        return LayerInputs(self._shared[place, attention], position_ids, tables)

    def _positions(self, before: int, hidden_states: torch.Tensor) -> tuple[torch.Tensor, Any]:
        position_ids = self.position_ids
        if self.compact:
            position_ids = (position_ids - self.past.columns[before].num_dropped[:, None]).clamp(min=0)
        return of_text(position_ids), rotary_tables(self.language_model, hidden_states, position_ids)
