"""A conversation whose earlier turns were pruned.

The cache of a pruned turn is shorter than the ids that the caller has. What it stands for is kept on the cache object:
the next turn can then tell which ids are new, which columns are padding, and where positions go on.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..budget.selection import Selection
from ..families.base import has_recurrent_layers
from ..prompt import PreparedInputs, VisualEmbeddings, check_attention_mask, count_positions
from .cached_columns import CachedLayers
from .planned_layers import PlannedLayers
from .policy import DecoderPolicy


@dataclass
class PrunedCache:
    """
    What our decoding leaves on a cache, as `cache.pruned`.

    Attributes:
        prompt: what the cache holds of the turns so far, where it is shorter than the ids that the caller has.
        layers: what each layer holds, where that is not the same in all.
        policy: what decides in the prompt that fills the cache next.
        planned: the decoder's layers under the plan that the cache was filled by, where there is one.
    """

    prompt: "PrunedPrompt | None" = None
    layers: CachedLayers | None = None
    policy: DecoderPolicy | None = None
    planned: PlannedLayers | None = None

    def attends(self, number: int) -> bool:
        """Whether a layer has keys and values of what the cache was filled with."""
        return self.planned is None or self.planned[number].attends


def pruned_cache(past_key_values: Cache | None) -> PrunedCache:
    """What our decoding left on a cache; nothing of it on one that it has not seen, or on none."""
    if past_key_values is None:
        return PrunedCache()
    if not hasattr(past_key_values, "pruned"):
        past_key_values.pruned = PrunedCache()
    return past_key_values.pruned


def has_layer_columns(past_key_values: Cache | None) -> bool:
    """Whether a cache holds different columns in different layers."""
    pruned = pruned_cache(past_key_values)
    # A static cache's length is a tensor, which a compiled forward must not read; `generate` has then seen to it.
    if pruned.layers is not None and not torch.compiler.is_compiling() and int(past_key_values.get_seq_length()) == 0:
        # It was reset, and nothing is left of what its layers held.
        if pruned.planned is not None:
            pruned.planned.let_make_room(past_key_values)
        pruned.layers = pruned.planned = None
    return pruned.layers is not None


def pending_policy(past_key_values: Cache | None) -> DecoderPolicy | None:
    """The policy that was left on a cache for the prompt that fills it next, which is taken off it."""
    pruned = pruned_cache(past_key_values)
    policy, pruned.policy = pruned.policy, None
    return policy


@dataclass
class PrunedPrompt:
    """
    A prompt from which columns left, beside the ids that the caller has: what a generation loop, which goes on
    counting and matching the caller's ids, feeds the model in their place. On a cache it says what the cache holds.

    Attributes:
        mask: `[batch, columns of the model]`, 0 for padding: what the cache holds once the prompt is in it.
        num_columns: columns of the caller's conversation that these stand for.
        num_ids: columns of the `input_ids` that the loop began with, the conversation or only what is new of it.
        next_position: `[..., batch]` int64, where positions go on behind the prompt.
        selection: the visual tokens kept of the images that came last, or `None` if this turn had none.
        input_ids: `[batch, new columns]`, what the model reads of this turn.
        position_ids: `[..., batch, new columns]`, theirs.
        token_types: `[batch, new columns]` each, what else a family has for every column, by argument.
        visual: what stands at the placeholders that are left, or `None`.
        num_features: `[batch]` int64, how many of these are each row's.
    """

    mask: torch.Tensor
    num_columns: int
    num_ids: int
    next_position: torch.Tensor
    selection: Selection | None = None
    input_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    token_types: dict[str, torch.Tensor] = field(default_factory=dict)
    visual: VisualEmbeddings | None = None
    num_features: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        new: "NewColumns",
        prepared: PreparedInputs,
        num_features: torch.Tensor,
        num_ids: int,
        next_position: torch.Tensor,
    ) -> "PrunedPrompt":
        """
        What the model reads in place of new columns, and what its cache then stands for.

        Args:
            new: as the caller has them.
            prepared: as the model reads them.
            num_features: `[batch]` int64, placeholders that are left in each row.
            num_ids: columns of the caller's `input_ids`.
            next_position: `[..., batch]` int64, the first behind these columns.
        """
        prompt = prepared.prompt
        return cls(
            mask=torch.cat([new.past_mask, prompt.attention_mask], dim=1),
            num_columns=new.num_columns,
            num_ids=num_ids,
            # Behind the last column, whether it was kept or not; a row that ended early goes on where it was.
            next_position=torch.maximum(next_position, new.begin),
            selection=prepared.selection,
            input_ids=prompt.input_ids,
            position_ids=prompt.position_ids,
            token_types=prompt.token_types,
            # Embeddings hold the images already.
            visual=prepared.visual if prompt.inputs_embeds is None else None,
            num_features=num_features,
        )

    def expand(self, expand_size: int) -> "PrunedPrompt":
        """Repeats every row, for beams and for several sequences per prompt."""
        if expand_size == 1:
            return self
        visual = self.visual
        if visual is not None:
            rows = visual.split(self.num_features.tolist())
            visual = VisualEmbeddings.joined([row for row in rows for _ in range(expand_size)])
        return replace(
            self,
            mask=self.mask.repeat_interleave(expand_size, dim=0),
            next_position=self.next_position.repeat_interleave(expand_size, dim=-1),
            input_ids=self.input_ids.repeat_interleave(expand_size, dim=0),
            position_ids=self.position_ids.repeat_interleave(expand_size, dim=-2),
            token_types={
                name: columns.repeat_interleave(expand_size, dim=0) for name, columns in self.token_types.items()
            },
            visual=visual,
            num_features=self.num_features.repeat_interleave(expand_size),
        )

    def on_cache(self) -> "PrunedPrompt":
        """What a later turn has to know, without what only prefill reads."""
        return replace(self, input_ids=None, position_ids=None, token_types={}, visual=None, num_features=None)

    def mask_with(self, num_answer: int, needs_mask: bool) -> torch.Tensor | None:
        """
        The mask of the prompt and of `num_answer` tokens behind it; `None` for ones, except where it is needed:
        without a cache transformers takes gaps between positions for the ends of packed sequences.
        """
        if self.is_unpadded and not needs_mask:
            return None
        return torch.nn.functional.pad(self.mask, (0, num_answer), value=1)

    def positions_with(self, num_answer: int, first: int = 0) -> torch.Tensor:
        """Positions `[..., batch, num_answer - first]` of tokens behind the prompt, from token `first` on."""
        return self.next_position[..., None] + torch.arange(first, num_answer, device=self.next_position.device)

    def encoder_outputs(
        self,
        answer: torch.Tensor,
        kinds: torch.Tensor,
        embed: Callable[[torch.Tensor], torch.Tensor],
        as_tensor: Collection[str] = (),
    ) -> dict[str, BaseModelOutputWithPooling] | None:
        """
        The features as a family's forward takes what is encoded already.

        Args:
            answer: `[batch, num_answer]` int64, tokens behind the prompt.
            kinds: `[batch, num_answer]` int64, whose placeholder each of them is written like, -1 for others. They
                are no images: a model wrote them, or prompt lookup proposes them.
            embed: makes the embeddings of ids.
            as_tensor: see [`VisualEmbeddings.encoder_outputs`].
        """
        if self.visual is None:
            return None
        visual = self.visual
        if kinds.numel() and bool((kinds >= 0).any()):
            rows = zip(visual.split(self.num_features.tolist()), answer, kinds, strict=True)
            visual = VisualEmbeddings.joined(
                [row.with_written(embed(ids[kind >= 0]), kind[kind >= 0]) for row, ids, kind in rows]
            )
        return visual.encoder_outputs(as_tensor)

    @cached_property
    def is_unpadded(self) -> bool:
        """Whether the mask is one of ones: attention is faster without it."""
        return bool(self.mask.all())


@dataclass
class NewColumns:
    """
    The part of a prompt that a cache does not hold yet; on a first turn, the whole prompt.

    Attributes:
        input_ids, attention_mask: `[batch, new columns]`.
        position_ids: `[..., batch, new columns]`.
        begin: `[..., batch]`, the position before which nothing of this part stands.
        past_mask: `[batch, columns in the cache]`.
        num_columns: of the caller's whole conversation.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    begin: torch.Tensor
    past_mask: torch.Tensor
    num_columns: int

    @classmethod
    def of_prompt(
        cls, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> "NewColumns":
        """
        A prompt of which no cache holds anything.

        Raises:
            ValueError: if the mask does not fit, or is one over pairs of columns and comes without positions.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        check_attention_mask(attention_mask, input_ids.shape)
        if position_ids is None:
            if attention_mask.dim() != 2:
                raise ValueError("`position_ids` is None, which is allowed only with a 2-D `attention_mask`.")
            position_ids = count_positions(attention_mask)
        position_ids = position_ids.expand(*position_ids.shape[:-2], *input_ids.shape)
        begin, none = torch.zeros_like(position_ids[..., 0]), attention_mask.new_zeros(len(input_ids), 0)
        return cls(input_ids, attention_mask, position_ids, begin, none, input_ids.shape[1])


def behind_cache(
    config: PreTrainedConfig,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Mask and positions of text whose `past_key_values` stand for more columns than they hold."""
    earlier = None if position_ids is not None else pruned_cache(past_key_values).prompt
    past_length = 0 if earlier is None else int(past_key_values.get_seq_length())
    if past_length == 0:
        return attention_mask, position_ids
    if attention_mask is None and earlier.is_unpadded:
        # Attention is faster without a mask of ones.
        num_behind = _columns_behind_cache(earlier, past_length, len(input_ids)) - earlier.num_columns
        return None, earlier.positions_with(num_behind + input_ids.shape[1], first=num_behind)
    if attention_mask is None:
        num_columns = earlier.num_columns + past_length - earlier.mask.shape[1] + input_ids.shape[1]
        attention_mask = input_ids.new_ones(len(input_ids), num_columns)
    new = new_columns(input_ids, {"attention_mask": attention_mask}, past_length, earlier)
    require_no_gaps(config, new)
    return torch.cat([new.past_mask, new.attention_mask], dim=1), new.position_ids


def new_columns(
    input_ids: torch.LongTensor, model_kwargs: dict[str, Any], past_length: int, earlier: PrunedPrompt | None
) -> NewColumns:
    """Tells new columns from those in the cache. `input_ids` may be the whole conversation or only what is new."""
    batch_size, device = len(input_ids), input_ids.device
    position_ids = model_kwargs.get("position_ids")
    full_mask = model_kwargs.get("attention_mask")
    if full_mask is None:
        # transformers drops a mask of ones; positions still have its length.
        full_mask = torch.ones(batch_size, position_ids.shape[-1], dtype=torch.long, device=device)
    num_columns = full_mask.shape[1]
    num_old = past_length if earlier is None else _columns_behind_cache(earlier, past_length, batch_size)
    num_new = num_columns - num_old
    if not 0 < num_new <= input_ids.shape[1]:
        raise ValueError(
            f"`past_key_values` stands for {num_old} tokens of the conversation, and `input_ids` has "
            f"{input_ids.shape[1]} with an `attention_mask` for {num_columns}. Pass the whole conversation as "
            "`input_ids` (the earlier output and the new text), or the new tokens with a mask for the whole."
        )
    new_mask, new_ids = full_mask[:, -num_new:], input_ids[:, -num_new:]
    if earlier is None:
        past_mask = full_mask[:, :num_old]
        position_ids = position_ids[..., -num_new:].expand(*position_ids.shape[:-2], batch_size, -1)
        begin = past_mask.sum(dim=-1).expand(position_ids.shape[:-1])
    else:
        answer_mask = full_mask[:, earlier.num_columns : num_old]
        past_mask = torch.cat([earlier.mask, answer_mask], dim=1)
        begin = earlier.next_position + answer_mask.sum(dim=-1)
        position_ids = (begin[..., None] + count_positions(new_mask)).masked_fill(new_mask == 0, 0)
    return NewColumns(new_ids, new_mask, position_ids, begin, past_mask, num_columns)


def require_no_gaps(config: PreTrainedConfig, new: NewColumns) -> None:
    """
    A window counts columns, and a state moves on at every one: padding between two turns would take the places of
    tokens.
    """
    mask = torch.cat([new.past_mask, new.attention_mask], dim=1)
    keeps_state, window = has_recurrent_layers(config), getattr(config.get_text_config(), "sliding_window", None)
    if new.past_mask.shape[1] == 0 or not (keeps_state or (window is not None and window < mask.shape[1])):
        return
    is_gap = (mask == 0) & (mask.cumsum(dim=-1) > 0)
    if bool(is_gap.any()):
        reason = (
            "decoder's linear attention moves its state on at every column"
            if keeps_state
            else f"decoder attends to the last {window} columns of {mask.shape[1]}"
        )
        raise ValueError(
            "`input_ids` continues conversations of different lengths, which leaves padding within them, and this "
            f"{reason}, padding counted. Continue each by itself."
        )


def _columns_behind_cache(earlier: PrunedPrompt, past_length: int, batch_size: int) -> int:
    """Columns of the unpruned conversation that the `past_length` columns of a cache stand for."""
    num_rows, num_prefilled = earlier.mask.shape
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
    return earlier.num_columns + past_length - num_prefilled
