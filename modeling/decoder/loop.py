"""The loop over the language model's layers, for when layers see different numbers of columns, or not all of them run.

It is the loop of transformers' own text models, with one question between two layers: a policy may decide that columns
leave. From then on layers have masks, keys and values of their own, and, where positions are compact, positions;
layers between two cuts share them. Which layers run, and with which of their heads and channels, a plan says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from .cached_columns import CachedLayers
from .compute_scheduler import UnitChoice
from .compute_token import ComputeToken
from .layer_inputs import AnswerInputs, LayerInputs, PromptInputs
from .planned_layers import PlannedLayers, WholeLayer
from .policy import Decision, DecoderPolicy
from .pruned_cache import has_layer_columns, pruned_cache
from .view import LayerView

# Decoders whose forward is the loop below: embeddings go in as they are, attention and MLP follow one another, each
# behind a norm, with rotary positions that are worked out once.
RUNNABLE = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "gemma3_text")


@dataclass
class PromptColumns:
    """
    The columns of a prompt that are in the sequence at one point of the loop.

    Attributes:
        index: `[batch, n]` int64, where each column stood in the prompt; -1 for padding.
        lengths: how many columns of each row are no padding.
        depth: `[batch, columns of the prompt]` int64, how many layers saw each; for those that are still here, all.
        carried: what a policy keeps of each column, by name, `[batch, n, ...]`.
    """

    index: torch.Tensor
    lengths: list[int]
    depth: torch.Tensor
    carried: dict[str, torch.Tensor]

    @classmethod
    def of_prompt(cls, is_real: torch.Tensor | None, inputs_embeds: torch.Tensor, num_layers: int) -> "PromptColumns":
        """All columns of `inputs_embeds`; of those whose mask `is_real` `[batch, n]` is 0, none is kept at a cut."""
        batch_size, length, device = *inputs_embeds.shape[:2], inputs_embeds.device
        index = torch.arange(length, device=device).expand(batch_size, -1)
        depth = torch.full_like(index, num_layers)
        if is_real is None:
            return cls(index, [length] * batch_size, depth, {})
        is_real = is_real.to(device, torch.bool)
        # Asked of the device once; from here on lengths are counted on the host.
        return cls(index.masked_fill(~is_real, -1), is_real.sum(dim=-1).tolist(), depth * is_real, {})

    @property
    def has_padding(self) -> bool:
        """Whether any column is padding."""
        return min(self.lengths) < self.index.shape[1]

    def after(self, decision: Decision, number: int) -> tuple["PromptColumns", torch.Tensor]:
        """
        The columns that stay before layer `number`, and their hidden states `[batch, n, hidden_size]`. Rows that keep
        fewer are padded on the left.
        """
        lengths = [length - leaving for length, leaving in zip(self.lengths, decision.num_leaving, strict=True)]
        keep = decision.keep_columns & (self.index >= 0)
        order = keep.to(torch.int8).argsort(dim=-1, stable=True)[:, keep.shape[1] - max(lengths) :]

        def taken(tensor: torch.Tensor) -> torch.Tensor:
            place = order.reshape(*order.shape, *[1] * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])
            return tensor.gather(1, place)

        index = taken(self.index).masked_fill(~taken(keep), -1)
        stays = torch.zeros_like(self.depth).scatter_add(1, index.clamp(min=0), (index >= 0).long()) > 0
        depth = torch.where(stays, self.depth, self.depth.clamp(max=number))
        carried = {name: taken(tensor) for name, tensor in self.carried.items()}
        return PromptColumns(index, lengths, depth, carried), taken(decision.hidden_states)


@dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """
    Output of [`run_decoder`].

    Attributes:
        column_index: where a policy acted, `[batch, columns left]` int64, where each column that is left stood in the
            prompt; -1 for padding.
        depth: where a policy acted, `[batch, columns]` int64, how many layers saw each column of the prompt.
    """

    column_index: torch.Tensor | None = None
    depth: torch.Tensor | None = None


@capture_outputs
def run_decoder(
    language_model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict[int, Any] | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None = None,
    policy: DecoderPolicy | None = None,
    compact: bool = False,
    deepstack: Sequence[torch.Tensor] = (),
    blocks: torch.Tensor | None = None,
    is_sharded: bool = False,
    **kwargs: Any,
) -> DecoderOutput:
    """
    Runs a text model where a policy or a plan acts, or behind a cache whose layers hold different columns.

    Args:
        language_model: of a kind in `RUNNABLE`.
        inputs_embeds: `[batch, columns, hidden_size]`.
        attention_mask: `[batch, columns of layer 0's cache + columns]`, or `None` for ones; or what [`layer_masks`]
            made of it.
        position_ids: `[..., batch, columns]` or `None`, as in the whole prompt.
        past_key_values: whose layers may hold different columns.
        use_cache: whether to make a cache where there is none; by default what the model's configuration says.
        policy: what decides before each layer, and which units run; without one nothing leaves, and what runs is
            what ran where the cache was filled.
        compact: whether the positions of what is left are counted anew behind every cut.
        deepstack: what is added to the columns behind each of the first layers, `[batch, columns, hidden_size]`.
        blocks: of a prompt's columns, those that see each other in both directions, see [`PromptInputs`].
        is_sharded: whether parameters are spread over processes.
        kwargs: of the layers.

    Raises:
        ValueError: if the text model is of another kind, the mask is not two-dimensional, or units are to run that did
            not run where the cache was filled.
    """
    _check(language_model, attention_mask, policy)
    config = language_model.config
    if use_cache is None:
        checkpoints = language_model.training and getattr(language_model, "gradient_checkpointing", False)
        use_cache = config.use_cache and not checkpoints
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=config)
    planned = _planned_layers(language_model, policy, past_key_values, len(inputs_embeds), is_sharded)
    if policy is None:
        columns = None
        inputs = _answer_inputs(language_model, inputs_embeds, attention_mask, position_ids, past_key_values, compact)
    else:
        columns, inputs = _prompt_inputs(
            language_model, inputs_embeds, attention_mask, position_ids, past_key_values, compact, blocks, policy
        )
        # What a cut takes along with the columns that stay.
        columns.carried.update({f"deepstack {number}": added for number, added in enumerate(deepstack)})
    token = None if policy is None or policy.schedule is None else ComputeToken(policy.schedule, inputs)
    hidden_states, given, below = inputs_embeds, None, None
    for number, layer in enumerate(language_model.layers[: config.num_hidden_layers]):
        if policy is not None and number in policy.layers:
            states = (below, hidden_states)
            # A layer that ran in part, or not for all, has not cached the keys of all its heads and rows.
            has_keys = planned is None or planned[number - 1].is_whole
            cache = past_key_values if has_keys else None
            view = _view(language_model, number, states, inputs_embeds, given, columns, cache, inputs)
            decision = policy.decide(number, view)
            if decision is not None:
                columns, hidden_states = columns.after(decision, number)
                inputs.enter(columns.index, columns.has_padding)
        if token is not None and number == token.num_layers:
            planned, token = _planned(language_model, token.choice(), past_key_values, is_sharded), None
        runs = token or (planned and planned[number]) or WholeLayer()
        given, below = inputs.of_layer(number, hidden_states, runs.attends), hidden_states
        hidden_states = runs.run(layer, number, hidden_states, given, past_key_values, use_cache=use_cache, **kwargs)
        if number < len(deepstack):
            hidden_states = hidden_states + columns.carried.pop(f"deepstack {number}")
    if policy is not None:
        pruned_cache(past_key_values).layers = inputs.cached
        pruned_cache(past_key_values).planned = planned
    return DecoderOutput(
        last_hidden_state=language_model.norm(hidden_states),
        past_key_values=past_key_values,
        column_index=None if columns is None else columns.index,
        depth=None if columns is None else columns.depth,
    )


def _check(language_model: PreTrainedModel, attention_mask: Any, policy: DecoderPolicy | None) -> None:
    if policy is not None and (kind := language_model.config.model_type) not in RUNNABLE:
        raise ValueError(
            f"{policy.name!r} acts inside the decoder, which works with decoders of the kinds {', '.join(RUNNABLE)}, "
            f"and this one is {kind!r}. Use a reducer that acts before the decoder, and no plan."
        )
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() != 2:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; where something acts inside the decoder it "
            "has to be [batch, sequence]. Use a reducer that acts before the decoder, and no plan."
        )


def _planned_layers(
    language_model: PreTrainedModel,
    policy: DecoderPolicy | None,
    cache: Cache | None,
    batch_size: int,
    is_sharded: bool,
) -> PlannedLayers | None:
    """The layers as a policy's plan has them run, or the plan that a cache was filled by; `None` if all run whole."""
    plan, pruned = None if policy is None else policy.plan_of_units, pruned_cache(cache)
    # Forgets the plan of a cache that was reset.
    has_layer_columns(cache)
    if pruned.planned is not None:
        pruned.planned = pruned.planned.of_batch(batch_size)
    if plan is None:
        return pruned.planned
    if cache is None or int(cache.get_seq_length()) == 0:
        return _planned(language_model, UnitChoice(plan), cache, is_sharded)
    if pruned.planned is None or pruned.planned.plan != plan:
        raise ValueError(
            "`plan` was given with a `past_key_values` that was filled by another plan, or by none. What a layer was "
            "left out of, it cannot read later: leave `plan` out to go on with the same, or begin with a new cache."
        )
    return pruned.planned


def _planned(
    language_model: PreTrainedModel, choice: UnitChoice, cache: Cache | None, is_sharded: bool
) -> PlannedLayers:
    """The layers as they were chosen, before any that was left out in part has written into the cache."""
    planned = PlannedLayers(language_model, choice.plan, is_sharded, choice.gates)
    if cache is not None:
        planned.let_make_room(cache)
    return planned


def _answer_inputs(
    language_model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict[int, Any] | None,
    position_ids: torch.Tensor | None,
    cache: Cache,
    compact: bool,
) -> AnswerInputs:
    """Inputs for columns that all layers get. See [`run_decoder`]."""
    cached, masks = pruned_cache(cache).layers, attention_mask
    if not isinstance(masks, dict):
        batch_size, num_new = inputs_embeds.shape[:2]
        num_cached = int(cache.get_seq_length())
        num_behind = cached.note_changes(num_cached, num_new, attention_mask, batch_size)
        masks = cached.masks(language_model.config, num_behind, cache, inputs_embeds, pruned_cache(cache).attends)
        if position_ids is None:
            position_ids = _positions_behind(num_cached, inputs_embeds)
    return AnswerInputs(language_model, inputs_embeds, masks, position_ids, cached, compact)


def _prompt_inputs(
    language_model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    compact: bool,
    blocks: torch.Tensor | None,
    policy: DecoderPolicy,
) -> tuple[PromptColumns, PromptInputs]:
    """The columns of a prompt of which some are to leave, and inputs for them. See [`run_decoder`]."""
    batch_size, num_new, device = *inputs_embeds.shape[:2], inputs_embeds.device
    num_cached, num_layers = 0 if cache is None else int(cache.get_seq_length()), len(language_model.layers)
    past_mask = is_real = None
    if attention_mask is not None:
        past_mask, is_real = attention_mask[:, :-num_new], attention_mask[:, -num_new:]
    columns = PromptColumns.of_prompt(is_real, inputs_embeds, num_layers)
    past, num_behind = pruned_cache(cache).layers if num_cached else None, 0
    if past is None:
        past = CachedLayers.all_alike(num_cached, past_mask, batch_size, num_layers, device)
    else:
        num_behind = past.note_changes(num_cached, 0, past_mask, batch_size)
    if position_ids is None:
        position_ids = _positions_behind(num_cached, inputs_embeds)
    position_ids = position_ids.expand(*position_ids.shape[:-2], batch_size, -1)
    inputs = PromptInputs(language_model, past, num_behind, position_ids, cache, compact, blocks, policy.bias)
    inputs.enter(columns.index, columns.has_padding)
    return columns, inputs


def _positions_behind(num_cached: int, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Positions `[1, columns]` of columns behind so many others."""
    return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + num_cached


def _view(
    language_model: PreTrainedModel,
    number: int,
    hidden_states: tuple[torch.Tensor, torch.Tensor],
    inputs_embeds: torch.Tensor,
    below: LayerInputs,
    columns: PromptColumns,
    cache: Cache | None,
    inputs: PromptInputs,
) -> LayerView:
    """What is known before layer `number`; `hidden_states` entered the layer below, which had its inputs, and this."""
    place = columns.index.clamp(min=0)[..., None].expand(-1, -1, inputs_embeds.shape[-1])
    return LayerView(
        language_model.layers[number - 1],
        language_model.layers[number],
        language_model.norm,
        *hidden_states,
        below.position_embeddings,
        is_real=columns.index >= 0,
        index=columns.index,
        inputs_embeds=inputs_embeds.gather(1, place),
        previous_keys=_cached_keys(cache, number - 1, place.shape[1], place.device),
        carried=columns.carried,
        next_position_embeddings=inputs.tables(number, hidden_states[1]),
        blocks=inputs.blocks,
    )


def _cached_keys(cache: Cache | None, number: int, length: int, device: torch.device) -> torch.Tensor | None:
    """
    The keys `[batch, key_value_heads, length, head_dim]` that layer `number` made of the columns of this call, which
    are the last in its cache; `None` where the cache does not hold them as they were made.
    """
    layer = None if cache is None else cache.layers[number]
    # Other kinds cut them to a window, quantise them, keep them elsewhere, or hold room for more behind them.
    if type(layer) is not DynamicLayer or layer.keys.device != device:
        return None
    return layer.keys[..., -length:, :]


def layer_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
) -> dict[int, Any] | None:
    """
    The masks that [`run_decoder`] would make at a step of an answer, made ahead of a forward that may be compiled.

    Args:
        config: the text model's.
        inputs_embeds: `[batch, n, any]`, for their shape, type and device.
        attention_mask: `[batch, columns of layer 0's cache + n]`, or `None` for ones.
        past_key_values: which may hold different columns in different layers.

    Returns:
        By the layer's number, or `None` if all layers hold the same.
    """
    cached, num_new = pruned_cache(past_key_values).layers, inputs_embeds.shape[1]
    if cached is None:
        return None
    if attention_mask is None:
        num_cached = int(past_key_values.get_seq_length())
    else:
        num_cached = attention_mask.shape[1] - num_new
    num_behind = cached.note_changes(num_cached, num_new, attention_mask, len(inputs_embeds))
    return cached.masks(config, num_behind, past_key_values, inputs_embeds, pruned_cache(past_key_values).attends)
