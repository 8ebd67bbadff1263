"""A conversation whose earlier turns were pruned.

The cache of a pruned turn is shorter than the ids that the caller has. What it stands for is kept on the cache object:
the next turn can then tell which ids are new, which columns are padding, and where positions go on.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ..budget.selection import Selection
from ..prompt import Prompt
from .cached_columns import CachedLayers
from .policy import DecoderPolicy


@dataclass
class PrunedCache:
    """
    What our decoding leaves on a cache, as `cache.pruned`.

    Attributes:
        prompt: what the cache holds of the turns so far, where it is shorter than the ids that the caller has.
        layers: what each layer holds, where that is not the same in all.
        policy: what decides in the prompt that fills the cache next.
    """

    prompt: "PrunedHistory | None" = None
    layers: CachedLayers | None = None
    policy: DecoderPolicy | None = None


def pruned_cache(past_key_values: Cache | None) -> PrunedCache:
    """What our decoding left on a cache; nothing of it on one that it has not seen, or on none."""
    if past_key_values is None:
        return PrunedCache()
    if not hasattr(past_key_values, "pruned"):
        past_key_values.pruned = PrunedCache()
    return past_key_values.pruned


def leave_on(past_key_values: Cache, prompt: "PrunedHistory | None", policy: DecoderPolicy | None) -> None:
    """Leaves on a cache what the prompt that fills it next has to find. It may have been reset and be used again."""
    layers = pruned_cache(past_key_values).layers
    if layers is not None and int(past_key_values.get_seq_length()) == 0:
        layers = None
    past_key_values.pruned = PrunedCache(prompt, layers, policy)


def pending_policy(past_key_values: Cache | None) -> DecoderPolicy | None:
    """The policy that was left on a cache for the prompt that fills it next, which is taken off it."""
    pruned = pruned_cache(past_key_values)
    policy, pruned.policy = pruned.policy, None
    return policy


@dataclass
class PrunedHistory:
    """
    What a cache holds of the turns so far, where it is shorter than the ids that the caller has. It is kept on the
    cache object, so that a later turn can tell which ids are new.

    Attributes:
        mask: `[batch, columns in the cache after prefill]`, 0 for padding.
        num_columns: columns of `input_ids` that prefill stood for.
        num_dropped: `[batch]`, visual tokens dropped from each row.
        full_mask: `[batch, num_columns]`, the mask that belongs to `input_ids`.
        selection: the visual tokens kept of the images that came last, or `None` if this turn had none.
    """

    mask: torch.Tensor
    num_columns: int
    num_dropped: torch.Tensor
    full_mask: torch.Tensor
    selection: Selection | None = None

    def expand(self, expand_size: int) -> "PrunedHistory":
        """Repeats every row, for beams and for several sequences per prompt."""
        mask, num_dropped, full_mask = (
            tensor.repeat_interleave(expand_size, dim=0) for tensor in (self.mask, self.num_dropped, self.full_mask)
        )
        return PrunedHistory(mask, self.num_columns, num_dropped, full_mask, self.selection)

    def mask_of(self, num_columns: int) -> torch.Tensor:
        """The mask `[batch, num_columns]` of what the cache holds and of generated tokens behind it."""
        return torch.nn.functional.pad(self.mask, (0, num_columns - self.mask.shape[1]), value=1)


@dataclass
class NewColumns:
    """
    The part of a prompt that a cache does not hold yet; on a first turn, the whole prompt.

    Attributes:
        input_ids, attention_mask, position_ids: `[batch, new columns]`; positions as in the unpruned conversation.
        past_mask: `[batch, columns in the cache]`.
        full_mask: `[batch, columns of the unpruned conversation]`.
        num_dropped: `[batch]`, visual tokens dropped in earlier turns.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    past_mask: torch.Tensor
    full_mask: torch.Tensor
    num_dropped: torch.Tensor


def new_columns(
    input_ids: torch.LongTensor, model_kwargs: dict[str, Any], past_length: int, history: PrunedHistory | None
) -> NewColumns:
    """Tells new columns from those in the cache. `input_ids` may be the whole conversation or only what is new."""
    batch_size, device = len(input_ids), input_ids.device
    position_ids = model_kwargs["position_ids"]
    full_mask = model_kwargs.get("attention_mask")
    if full_mask is None:
        # transformers drops a mask of ones; positions still have its length.
        full_mask = torch.ones(batch_size, position_ids.shape[-1], dtype=torch.long, device=device)
    num_columns = full_mask.shape[1]
    num_old = past_length if history is None else _columns_behind_cache(history, past_length, batch_size)
    num_new = num_columns - num_old
    if not 0 < num_new <= input_ids.shape[1]:
        raise ValueError(
            f"`past_key_values` stands for {num_old} tokens of the conversation, and `input_ids` has "
            f"{input_ids.shape[1]} with an `attention_mask` for {num_columns}. Pass the whole conversation as "
            "`input_ids` (the earlier output and the new text), or the new tokens with a mask for the whole."
        )
    if history is None:
        past_mask, num_dropped = full_mask[:, :num_old], torch.zeros(batch_size, dtype=torch.long, device=device)
    else:
        past_mask = torch.cat([history.mask, full_mask[:, history.num_columns : num_old]], dim=1)
        num_dropped = history.num_dropped
    position_ids = position_ids.expand(batch_size, -1)
    return NewColumns(
        input_ids[:, -num_new:], full_mask[:, -num_new:], position_ids[:, -num_new:], past_mask, full_mask, num_dropped
    )


def _columns_behind_cache(history: PrunedHistory, past_length: int, batch_size: int) -> int:
    """Columns of the unpruned conversation that the `past_length` columns of a cache stand for."""
    num_rows, num_prefilled = history.mask.shape
    if batch_size != num_rows:
        raise ValueError(
            f"`past_key_values` holds {num_rows} conversations and `input_ids` has {batch_size}. Continue all of them "
            "in their order, one row for each beam or returned sequence, or start anew without `past_key_values`."
        )
    if past_length < num_prefilled:
        raise ValueError(
            f"`past_key_values` was cut to {past_length} columns, and {num_prefilled} were its pruned prompt; which "
            "`input_ids` the rest stands for is not known. Cut off no more than generated tokens, or start anew "
            "without `past_key_values`."
        )
    return history.num_columns + past_length - num_prefilled


def with_prompt(model_kwargs: dict[str, Any], prompt: Prompt, new: NewColumns) -> tuple[dict[str, Any], PrunedHistory]:
    """`model_kwargs` with the pruned prompt, and what the cache will hold once it is prefilled."""
    batch_size, past_length = new.past_mask.shape
    # `generate` cuts off as many columns as the cache holds, so they have to be there to be cut off.
    past_embeds = prompt.inputs_embeds.new_zeros(batch_size, past_length, prompt.inputs_embeds.shape[-1])
    mask = torch.cat([new.past_mask, prompt.attention_mask], dim=1)
    position_ids = torch.cat([prompt.position_ids.new_zeros(batch_size, past_length), prompt.position_ids], dim=1)
    dropped_now = new.attention_mask.sum(dim=-1) - prompt.attention_mask.sum(dim=-1)
    history = PrunedHistory(mask, new.full_mask.shape[1], new.num_dropped + dropped_now, new.full_mask)
    pruned = {
        "inputs_embeds": torch.cat([past_embeds, prompt.inputs_embeds], dim=1),
        "position_ids": position_ids,
    }
    # As in transformers, attention is faster without a mask than with one of ones. The older of the supported versions
    # read whatever is there as a tensor, so it has to be left out and not be None.
    if not mask.all():
        pruned["attention_mask"] = mask
    without_mask = {key: value for key, value in model_kwargs.items() if key != "attention_mask"}
    return without_mask | pruned, history
