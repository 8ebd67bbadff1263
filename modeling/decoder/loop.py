"""The loop over the language model's layers, for when layers see different numbers of columns.

It is the loop of transformers' own text models, with one thing between two layers: columns may leave. From then on
every layer has its own mask, its own number of keys and values in the cache, and, where positions are compact, its own
positions. What later calls need to know of that, [`LayerColumns`], is kept on the cache.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from ..prompt import left_padded
from .plan import DecoderPlan
from .pruned_cache import LayerColumns, pruned_cache
from .reducer import DecoderReducer, DecoderView, best_visual


@dataclass
class Columns:
    """
    The columns that are in the sequence at one point of the loop, and what goes with them.

    Attributes:
        hidden_states, inputs_embeds: `[batch, n, hidden_size]`.
        mask: `[batch, n]` int64, 0 for padding.
        position_ids: `[batch, n]` int64, as in the whole prompt.
        index: `[batch, n]` int64, where each column stood in the prompt; -1 for padding that was added.
        rank: `[batch, n]` int64, how many columns that are no padding stood before it in the prompt.
        patches: `[batch, n]` int64, as in [`DecoderPlan`].
        scores: `[batch, n]` or `None`, what the last cut scored.
        carried: what a reducer keeps from one cut to the next.
    """

    hidden_states: torch.Tensor
    inputs_embeds: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    index: torch.Tensor
    rank: torch.Tensor
    patches: torch.Tensor
    scores: torch.Tensor | None
    carried: dict[str, torch.Tensor]

    def without(self, keep: torch.Tensor) -> "Columns":
        """Only the columns in `keep` `[batch, n]`; rows that keep fewer are padded on the left."""
        keep = keep & (self.mask > 0)
        order = left_padded(keep)
        is_real = keep.gather(1, order)

        def taken(tensor: torch.Tensor, fill: int | None = None) -> torch.Tensor:
            index = order.reshape(*order.shape, *[1] * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])
            chosen = tensor.gather(1, index)
            return chosen if fill is None else chosen.masked_fill(~is_real, fill)

        return Columns(
            taken(self.hidden_states),
            taken(self.inputs_embeds),
            taken(self.mask, 0),
            taken(self.position_ids, 0),
            taken(self.index, -1),
            taken(self.rank, 0),
            taken(self.patches, -1),
            None if self.scores is None else taken(self.scores),
            {name: taken(tensor) for name, tensor in self.carried.items()},
        )

    @property
    def num_visual(self) -> torch.Tensor:
        """`[batch]` int64."""
        return (self.patches >= 0).sum(dim=-1)

    @property
    def compact_position_ids(self) -> torch.Tensor:
        """`[batch, n]` int64, positions without the gaps that columns left behind."""
        gone_before = self.rank - (self.mask.cumsum(dim=-1) - 1)
        return (self.position_ids - gone_before).masked_fill(self.mask == 0, 0)


@dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """
    Output of [`run_decoder`].

    Attributes:
        column_index: `[batch, columns left]` int64, where each column that is left stood in the prompt; -1 for padding
            that was added.
        depth: `[batch, columns]` int64, how many layers saw each column of the prompt.
    """

    column_index: torch.Tensor | None = None
    depth: torch.Tensor | None = None


@capture_outputs
def run_decoder(
    language_model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None = None,
    plan: DecoderPlan | None = None,
    reducer: DecoderReducer | None = None,
    compact: bool = False,
    **kwargs: Any,
) -> DecoderOutput:
    """
    Runs a Llama-shaped text model with columns leaving between its layers.

    Args:
        language_model: of the Llama, Mistral, Qwen2 or Qwen3 family, or another with their layers.
        inputs_embeds: `[batch, columns, hidden_size]`.
        attention_mask: `[batch, columns of layer 0's cache + columns]`, or `None` for ones.
        position_ids: `[batch, columns]` or `None`, as in the whole prompt.
        past_key_values: whose layers may hold different columns.
        use_cache: whether to make a cache where there is none; by default what the model's configuration says.
        plan: how many visual tokens each layer sees; without it nothing leaves.
        reducer: what chooses, with `plan`.
        compact: whether the positions of what is left are counted anew behind every cut.

    Raises:
        ValueError: if the mask is not two-dimensional.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; where tokens leave inside the decoder it has "
            "to be [batch, sequence]. Use a reducer that acts before the decoder."
        )
    config, batch_size = language_model.config, len(inputs_embeds)
    if use_cache is None:
        checkpoints = language_model.training and getattr(language_model, "gradient_checkpointing", False)
        use_cache = config.use_cache and not checkpoints
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=config)
    columns = _all_columns(inputs_embeds, attention_mask, position_ids, past_key_values, plan)
    past = _past_columns(past_key_values, attention_mask, batch_size, config.num_hidden_layers, inputs_embeds.device)
    cuts = [] if plan is None else reducer.cuts(config.num_hidden_layers)
    depth, entering = torch.zeros_like(columns.index), columns.num_visual
    masks, dropped, contexts, context, previous = [], [], {}, None, None
    for number, layer in enumerate(language_model.layers[: config.num_hidden_layers]):
        if plan is not None and number > 0:
            keys = _cached_keys(past_key_values, number - 1, len(columns.index[0]), columns.index.device)
            around = (*previous, keys, layer, language_model.norm, context.position_embeddings)
            columns = _reduced(columns, plan, reducer, cuts, number, around)
        kind = _layer_type(config, number)
        context = contexts.get(kind)
        if context is None or not context.still_holds(columns, past, number):
            context = LayerContext.of_layer(language_model, columns, past, number, past_key_values, compact, entering)
            contexts[kind] = context
        previous = (layer, columns.hidden_states)
        hidden_states = layer(
            columns.hidden_states,
            attention_mask=context.attention_mask,
            position_embeddings=context.position_embeddings,
            position_ids=context.position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        columns = replace(columns, hidden_states=hidden_states)
        masks.append(context.mask)
        dropped.append(context.dropped)
        depth.scatter_add_(1, columns.index.clamp(min=0), (columns.index >= 0).long())
    if past_key_values is not None:
        pruned_cache(past_key_values).layers = LayerColumns(masks, dropped)
    return DecoderOutput(
        last_hidden_state=language_model.norm(columns.hidden_states),
        past_key_values=past_key_values,
        column_index=columns.index,
        depth=depth,
    )


def _all_columns(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    plan: DecoderPlan | None,
) -> Columns:
    batch_size, length, device = *inputs_embeds.shape[:2], inputs_embeds.device
    index = torch.arange(length, device=device).expand(batch_size, -1)
    if attention_mask is None:
        mask = torch.ones_like(index)
    else:
        mask = attention_mask[:, -length:].to(device=device, dtype=torch.long)
    if position_ids is None:
        past_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        position_ids = index + past_length
    patches = torch.full_like(index, -1) if plan is None else plan.with_columns(length).patches.to(device)
    patches = patches.masked_fill(mask == 0, -1)
    position_ids = position_ids.expand(batch_size, -1)
    rank = mask.cumsum(dim=-1) - 1
    return Columns(inputs_embeds, inputs_embeds, mask, position_ids, index, rank, patches, None, {})


def _past_columns(
    past_key_values: Cache | None,
    attention_mask: torch.Tensor | None,
    batch_size: int,
    num_layers: int,
    device: torch.device,
) -> LayerColumns:
    """What each layer's cache holds. It may have been cut since it was written down, and then so is its mask."""
    lengths = [0] * num_layers
    if past_key_values is not None:
        lengths = [int(past_key_values.get_seq_length(layer)) for layer in range(num_layers)]
    known = pruned_cache(past_key_values).layers if lengths[0] else None
    none_dropped = torch.zeros(batch_size, dtype=torch.long, device=device)
    if known is not None:
        return known.of_cache(lengths, batch_size)
    if attention_mask is None:
        whole = torch.ones(batch_size, lengths[0], dtype=torch.long, device=device)
    else:
        whole = attention_mask[:, : lengths[0]].to(device=device, dtype=torch.long)
    return LayerColumns([whole] * num_layers, [none_dropped] * num_layers)


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


def _reduced(
    columns: Columns,
    plan: DecoderPlan,
    reducer: DecoderReducer,
    cuts: list[int],
    number: int,
    around: tuple[Any, ...],
) -> Columns:
    """
    The columns that enter layer `number`, 1 or above.

    Args:
        around: the layer below, what entered it and its keys if they are known; the layer itself, the final norm, and
            the position embeddings.
    """
    counts, num_visual = plan.counts.to(columns.index.device), columns.num_visual
    # Scores are for what leaves before the next cut, which makes its own.
    next_cut = next((cut for cut in cuts if cut > number), counts.shape[1])
    if not (counts[:, number:next_cut] < num_visual[:, None]).any():
        return columns
    num_keep = torch.minimum(counts[:, number], num_visual)
    if number in cuts:
        previous_layer, previous_hidden_states, previous_keys, layer, norm, position_embeddings = around
        # Where a prompt ends with an image, the column that asks may have left; the last before it asks then.
        may_ask = (columns.mask > 0) & (columns.index <= plan.last.to(columns.index.device)[:, None])
        column = torch.arange(may_ask.shape[1], device=may_ask.device)
        seen = DecoderView(
            previous_layer=previous_layer,
            next_layer=layer,
            norm=norm,
            previous_hidden_states=previous_hidden_states,
            hidden_states=columns.hidden_states,
            position_embeddings=position_embeddings,
            is_real=columns.mask > 0,
            is_visual=columns.patches >= 0,
            last=torch.where(may_ask, column, -1).amax(dim=-1).clamp(min=0),
            inputs_embeds=columns.inputs_embeds,
            previous_keys=previous_keys,
            carried=columns.carried,
        )
        with torch.no_grad():
            scores = reducer.scores(seen, cuts.index(number))
        keep, hidden_states = reducer.reduce(seen, scores, num_keep)
        columns = replace(columns, scores=scores, hidden_states=hidden_states, carried=seen.carried)
    elif torch.equal(num_keep, num_visual):
        return columns
    else:
        keep = best_visual(columns.patches >= 0, columns.scores, num_keep)
    return columns if bool(keep.all()) else columns.without(keep)


@dataclass
class LayerContext:
    """
    What layers of one type that hold the same columns share: masks and positions.

    Attributes:
        attention_mask: what the layers take as their mask.
        mask: `[batch, columns in the cache + n]` int64, 0 for padding.
        position_ids: `[batch, n]`.
        position_embeddings: their cosines and sines.
        dropped: `[batch]` int64, tokens that left before the layer, in this call and before it.
        of: the columns' index and what was in the cache, by which to tell that nothing has changed.
    """

    attention_mask: Any
    mask: torch.Tensor
    position_ids: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    dropped: torch.Tensor
    of: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def still_holds(self, columns: Columns, past: LayerColumns, number: int) -> bool:
        """Whether layer `number` holds the same columns."""
        now = (columns.index, past.masks[number], past.dropped[number])
        return all(mine is other for mine, other in zip(self.of, now, strict=True))

    @classmethod
    def of_layer(
        cls,
        language_model: PreTrainedModel,
        columns: Columns,
        past: LayerColumns,
        number: int,
        past_key_values: Cache | None,
        compact: bool,
        entering: torch.Tensor,
    ) -> "LayerContext":
        """Works them out for layer `number`; `entering` `[batch]` is how many visual tokens layer 0 got."""
        config, past_dropped = language_model.config, past.dropped[number]
        mask = torch.cat([past.masks[number], columns.mask], dim=1)
        position_ids = columns.position_ids
        if compact:
            position_ids = (columns.compact_position_ids - past_dropped[:, None]).clamp(min=0)
        of_mask = {
            "config": config,
            "inputs_embeds": columns.hidden_states,
            "attention_mask": mask,
            "past_key_values": past_key_values,
            # With positions, gaps between them would be taken for the ends of packed sequences.
            "position_ids": None,
            "layer_idx": number,
        }
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return cls(
            makers[_layer_type(config, number)](**of_mask),
            mask,
            position_ids,
            language_model.rotary_emb(columns.hidden_states, position_ids),
            past_dropped + entering - columns.num_visual,
            (columns.index, past.masks[number], past_dropped),
        )


def _layer_type(config: PreTrainedConfig, number: int) -> str:
    types = getattr(config, "layer_types", None)
    if types:
        return types[number]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
