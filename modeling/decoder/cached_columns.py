"""What the layers of a cache hold, where it is not the same in all, and what new columns may attend to there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

# Room for so many generated columns is made at a time.
_BLOCK = 256


class LayerAttention(NamedTuple):
    """How a layer's attention is computed, and how many columns a row sees, its own included; `None` for all."""

    implementation: str
    window: int | None


@dataclass
class CachedColumns:
    """
    What decoder layers between two cuts hold in their caches.

    Attributes:
        is_real: `[batch, room]` bool, false for padding. Behind the columns that are known it is true: those are
            generated, and no padding.
        num_known: how many columns are known.
        has_padding: whether any of these is padding.
        num_dropped: `[batch]` int64, tokens that left before these layers.
    """

    is_real: torch.Tensor
    num_known: int
    has_padding: bool
    num_dropped: torch.Tensor

    def until(self, num_columns: int) -> torch.Tensor:
        """`[batch, num_columns]` bool, which of the first columns are no padding."""
        missing = num_columns - self.is_real.shape[1]
        if missing > 0:
            self.is_real = pad(self.is_real, (0, max(missing, _BLOCK)), value=True)
        return self.is_real[:, :num_columns]

    def followed_by(
        self, num_cached: int, is_real: torch.Tensor, has_padding: bool, num_dropped: torch.Tensor
    ) -> "CachedColumns":
        """What layers hold that held `num_cached` columns of this and get those of a prompt of which some left."""
        known = torch.cat([self.until(num_cached), is_real], dim=1)
        return CachedColumns(known, known.shape[1], self.has_padding or has_padding, self.num_dropped + num_dropped)

    def changed(self, num_cut: int, repeats: int, told: torch.Tensor | None) -> "CachedColumns":
        """What is held when the last columns were cut off and rows repeated, and a mask told of columns behind."""
        num_known = self.num_known - num_cut
        is_real = self.until(num_known).repeat_interleave(repeats, dim=0)
        if told is not None:
            is_real, num_known = torch.cat([is_real, told], dim=1), num_known + told.shape[1]
        num_dropped = self.num_dropped.repeat_interleave(repeats, dim=0)
        return CachedColumns(is_real, num_known, self.has_padding or told is not None, num_dropped)

    def mask(
        self,
        config: PreTrainedConfig,
        number: int,
        attention: LayerAttention,
        num_columns: int,
        cache: Cache | None,
        new: torch.Tensor,
        blocks: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> Any:
        """
        What a layer takes as its attention mask.

        Args:
            config: the text model's.
            number: of the layer.
            attention: of the layer.
            num_columns: that the layer sees, new ones included.
            cache: what holds the others.
            new: `[batch, n, hidden_size]`, hidden states of the new ones.
            blocks: `[batch, n]` int64, those of one number see each other in both directions, -1 is none; or `None`.
            bias: `[batch, 1, n, n]`, added to the logits of the new ones among each other; or `None`.

        Raises:
            ValueError: if there is a bias and the layer's attention takes none.
        """
        num_new, (implementation, window) = new.shape[1], attention
        num_keys, first_key = (num_columns, 0) if cache is None else cache.get_mask_sizes(num_new, number)
        takes_none = implementation in ("eager", "sdpa")
        if bias is not None and not takes_none:
            raise ValueError(
                "`visual_attention` is 'rescaled', which adds a bias to the logits of attention, and "
                f"{implementation!r} attention takes none; use 'eager' or 'sdpa'."
            )
        if bias is None and num_new == 1 and takes_none and (window is None or num_columns - first_key <= window):
            # All keys are in sight but padding, and the room that a static cache has left.
            room = first_key + num_keys - num_columns
            if not self.has_padding and not room:
                return None
            seen = self.until(num_columns)[:, None, None, first_key:]
            if room:
                seen = pad(seen, (0, room), value=False)
            return seen if implementation == "sdpa" else torch.where(seen, 0.0, torch.finfo(new.dtype).min).to(new)
        # Given a mask or a length in a tensor, transformers asks the device whether there is padding. We know.
        is_static = cache is not None and isinstance(cache.get_seq_length(number), torch.Tensor)
        make, sees = create_causal_mask if window is None else create_sliding_window_causal_mask, {}
        if blocks is not None:
            # A window is the outer bound of what a block sees.
            in_block = pad(blocks, (num_columns - num_new, num_keys), value=-1)
            make, sees = create_causal_mask, {"or_mask_function": _sees_its_block(in_block)}
            if window is not None:
                sees["and_mask_function"] = sliding_window_overlay(window)
        mask = make(
            config=config,
            inputs_embeds=new,
            attention_mask=self.until(num_columns) if self.has_padding or not takes_none else None,
            past_key_values=cache,
            # With positions, gaps between them would be taken for the ends of packed sequences.
            position_ids=None,
            layer_idx=number,
            allow_is_causal_skip=not self.has_padding and not is_static and bias is None,
            **sees,
        )
        if bias is None:
            return mask
        seen = mask
        if mask.dtype == torch.bool:
            seen = torch.zeros_like(mask, dtype=new.dtype).masked_fill(~mask, torch.finfo(new.dtype).min)
        before = num_columns - num_new - first_key
        return seen + pad(bias, (before, num_keys - before - num_new)).to(seen)


@dataclass
class CachedLayers:
    """
    What every layer holds.

    Attributes:
        columns: what is held, once for all layers that hold the same.
        of_layer: for each layer, which of `columns` it holds.
    """

    columns: list[CachedColumns]
    of_layer: list[int]

    @classmethod
    def all_alike(
        cls,
        num_cached: int,
        attention_mask: torch.Tensor | None,
        batch_size: int,
        num_layers: int,
        device: torch.device,
    ) -> "CachedLayers":
        """Layers that hold the same `num_cached` columns; the first of a mask say which of them are padding."""
        is_real, has_padding = torch.ones(batch_size, num_cached, dtype=torch.bool, device=device), False
        if attention_mask is not None and num_cached:
            is_real = attention_mask[:, :num_cached].to(device, torch.bool)
            has_padding = not bool(is_real.all())
        none_dropped = torch.zeros(batch_size, dtype=torch.long, device=device)
        return cls([CachedColumns(is_real, num_cached, has_padding, none_dropped)], [0] * num_layers)

    def note_changes(self, num_cached: int, num_new: int, attention_mask: torch.Tensor | None, batch_size: int) -> int:
        """
        Brings what is known up to date: the cache may have been cut since, or repeated for beams, and a mask may hide
        columns that were generated, where an answer ended before the others of its batch.

        Args:
            num_cached: columns in layer 0's cache.
            num_new: columns of this call which the mask is about too.
            attention_mask: `[batch, columns]`, the last `num_new` of them new, and the cache's last ones before them.
            batch_size: of this call.

        Returns:
            How many columns, the new ones included, are behind those that are known; the same in all layers.

        Raises:
            ValueError: if the mask is too short.
        """
        first = self.columns[self.of_layer[0]]
        num_behind, repeats = num_cached - first.num_known, batch_size // len(first.is_real)
        num_cut, num_behind = max(-num_behind, 0), max(num_behind, 0) + num_new
        told = None
        if attention_mask is not None and num_behind:
            if attention_mask.shape[1] < num_behind:
                raise ValueError(
                    f"`attention_mask` has {attention_mask.shape[1]} columns; the cache holds {num_cached}, and "
                    f"{num_new} are new. Pass a mask for all of them."
                )
            told = attention_mask[:, -num_behind:].to(first.is_real.device, torch.bool)
            # The one thing in a decoding step that is asked of the device.
            told = None if bool(told.all()) else told
        if num_cut or repeats > 1 or told is not None:
            self.columns = [held.changed(num_cut, repeats, told) for held in self.columns]
        return num_behind if told is None else 0

    def masks(
        self,
        config: PreTrainedConfig,
        num_behind: int,
        cache: Cache,
        new: torch.Tensor,
        attends: Callable[[int], bool] = lambda number: True,
    ) -> dict[int, Any]:
        """The mask of each layer that attends by its number, with `num_behind` columns behind those that are known."""
        made, masks = {}, {}
        for number, key in enumerate(zip(self.of_layer, layer_attentions(config), strict=True)):
            if not attends(number):
                continue
            if key not in made:
                held, attention = self.columns[key[0]], key[1]
                made[key] = held.mask(config, number, attention, held.num_known + num_behind, cache, new)
            masks[number] = made[key]
        return masks


def _sees_its_block(blocks: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Whether query and key are of one block, as transformers asks of a mask; `blocks` `[batch, columns]`."""

    def is_one(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (blocks[batch, query] == blocks[batch, key]) & (blocks[batch, query] >= 0)

    return is_one


def layer_attentions(config: PreTrainedConfig) -> list[LayerAttention]:
    """Of every layer of a text model."""
    implementation, window = config._attn_implementation, getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not types:
        return [LayerAttention(implementation, window)] * config.num_hidden_layers
    return [LayerAttention(implementation, window if kind == "sliding_attention" else None) for kind in types]
