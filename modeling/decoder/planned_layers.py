"""The decoder's layers as a plan has them run: which prompts enter each, and with which of its heads and channels.

What a plan asks of the weights is worked out once, when a prompt is read, and serves every step of its answer.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .execution_plan import ExecutionPlan
from .layer_inputs import LayerInputs
from .partial_layer import can_be_sliced, gated_layer, sliced_layer, why_not_partial


class _OfSomeRows:
    """
    What a layer's cache does otherwise where it holds only some rows of the batch.

    Attributes:
        rows: `[num_rows]` int64, or `None` for all, as in a cache that was reset.
    """

    rows: torch.Tensor | None = None

    def reset(self) -> None:
        """See [`DynamicLayer.reset`]."""
        super().reset()
        self.rows = None

    def crop(self, tokens_to_remove: int) -> None:
        """See [`DynamicLayer.crop`]. Where nothing was written there is nothing to cut off."""
        if self.is_initialized:
            super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beams of a prompt have one plan, and so the rows that come into the place of those here are here, too."""
        if self.rows is not None:
            rows, beam_idx = self.rows.to(beam_idx.device), beam_idx.long()
            place = torch.full_like(beam_idx, -1).scatter(0, rows, torch.arange(len(rows), device=rows.device))
            beam_idx = place[beam_idx[rows]]
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See [`DynamicLayer.batch_repeat_interleave`]."""
        super().batch_repeat_interleave(repeats)
        if self.rows is not None:
            behind = torch.arange(repeats, device=self.rows.device)
            self.rows = (self.rows[:, None] * repeats + behind).flatten()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """
        Raises:
            ValueError: if it holds some rows only; which would be left is not known to all who have to know it.
        """
        if self.rows is not None:
            raise ValueError(
                "`past_key_values` belongs to prompts with different plans, of which some cannot be taken out. Give "
                "all prompts of the batch one plan, or pass them one by one."
            )
        super().batch_select_indices(indices)


class LayerOfSomeRows(_OfSomeRows, DynamicLayer):
    """A cache's layer that only some rows of the batch enter."""


class SlidingLayerOfSomeRows(_OfSomeRows, DynamicSlidingWindowLayer):
    """The same with a window."""


_OF_SOME_ROWS = {DynamicLayer: LayerOfSomeRows, DynamicSlidingWindowLayer: SlidingLayerOfSomeRows}


class WholeLayer:
    """
    One layer as it is.

    Attributes:
        attends: whether the layer gets keys and values of what it reads.
    """

    attends = True

    def run(
        self,
        layer: nn.Module,
        number: int,
        hidden_states: torch.Tensor,
        given: LayerInputs,
        cache: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Hidden states `[batch, n, hidden_size]` behind the layer.

        Args:
            layer: the decoder's.
            number: of the layer.
            hidden_states: that enter it, `[batch, n, hidden_size]`.
            given: what it takes beside them.
            cache: or `None`.
            kwargs: of the layer.
        """
        return layer(hidden_states, **vars(given), past_key_values=cache, **kwargs)


class PlannedLayer:
    """
    One layer under a plan.

    Args:
        layer: the decoder's.
        runs: `[batch]` bool, for which prompts it runs.
        heads, mlp_groups: `[batch, ...]`, the layer's tables of an [`ExecutionPlan`].
        is_sharded: whether parameters are spread over processes.

    Attributes:
        rows: `[num_rows]` int64, the prompts that enter it; `None` for all.
        attends: see [`WholeLayer`].
        cached_rows: the prompts that it has a cache of, as `rows`.
        is_whole: whether all prompts enter the layer as it is.
    """

    def __init__(
        self,
        layer: nn.Module,
        runs: torch.Tensor,
        heads: torch.Tensor,
        mlp_groups: torch.Tensor,
        is_sharded: bool = False,
    ) -> None:
        device = next(layer.parameters()).device
        rows = runs.nonzero()[:, 0]
        own_heads, own_groups = heads[rows], mlp_groups[rows]
        is_part = not bool(own_heads.all() and own_groups.all())
        if is_part and (reason := why_not_partial(layer)) is not None:
            raise ValueError(reason)
        is_shared = bool((own_heads == own_heads[:1]).all() and (own_groups == own_groups[:1]).all())
        is_gated = is_part and (is_sharded or not is_shared or not can_be_sliced(layer))
        self.layer, self.gates = layer, (heads.to(device), mlp_groups.to(device)) if is_gated else None
        self._gated: dict[bool, nn.Module] = {}
        if is_part and not is_gated:
            self.layer = sliced_layer(layer, own_heads[0], own_groups[0])
        self.rows = None if len(rows) == len(runs) else rows.to(device)
        self.cached_rows = self.rows if is_gated or bool(own_heads.any()) else rows[:0]
        self.attends = is_gated or bool(own_heads.any())
        self.is_whole = self.rows is None and not is_part
        self.is_left_out = len(rows) == 0

    def module(self, rows: torch.Tensor | None) -> nn.Module:
        """What runs, for some rows of the batch or for all."""
        if self.gates is None:
            return self.layer
        is_all = rows is None
        if is_all not in self._gated:
            gates = self.gates if is_all else [table[rows] for table in self.gates]
            self._gated[is_all] = gated_layer(self.layer, *gates)
        return self._gated[is_all]

    def run(
        self,
        layer: nn.Module,
        number: int,
        hidden_states: torch.Tensor,
        given: LayerInputs,
        cache: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See [`WholeLayer.run`]."""
        takes_rows = cache is None or _hold_rows(cache, number, self.cached_rows)
        if self.is_left_out:
            return hidden_states
        takes_rows = takes_rows and _has_rows(given.attention_mask)
        kwargs["past_key_values"] = cache
        if self.rows is None or not takes_rows:
            output = self.module(None)(hidden_states, **vars(given), **kwargs)
            if self.rows is None:
                return output
            # Room that is made for all rows is theirs, too; what the others wrote into it nobody reads.
            enters = torch.zeros(len(hidden_states), dtype=torch.bool, device=output.device)
            return torch.where(enters.index_fill(0, self.rows, True)[:, None, None], output, hidden_states)
        own = given.of_rows(self.rows, len(hidden_states))
        output = self.module(self.rows)(hidden_states[self.rows], **vars(own), **kwargs)
        return hidden_states.index_copy(0, self.rows, output)


class LearningLayer:
    """
    One layer in training, where the choice of what runs learns: all of it is computed, and gates of 0 and 1 say what
    counts. The gradient of a gate is what its unit would have changed.

    Args:
        layer_gate: `[batch]`.
        heads, mlp_groups: gates `[batch, ...]`.
    """

    attends, is_whole = True, False

    def __init__(self, layer_gate: torch.Tensor, heads: torch.Tensor, mlp_groups: torch.Tensor) -> None:
        self.layer_gate, self.heads, self.mlp_groups = layer_gate, heads, mlp_groups

    def run(
        self,
        layer: nn.Module,
        number: int,
        hidden_states: torch.Tensor,
        given: LayerInputs,
        cache: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See [`WholeLayer.run`]."""
        gated = gated_layer(layer, self.heads, self.mlp_groups)
        output = gated(hidden_states, **vars(given), past_key_values=cache, **kwargs)
        gate = self.layer_gate[:, None, None].to(output)
        # Where the layer runs, exactly what it gives, and where it does not, what entered it.
        taken = torch.where(gate.detach() > 0.5, output, hidden_states)
        return taken + (gate - gate.detach()) * (output - hidden_states).detach()


class PlannedLayers:
    """
    The layers of a decoder under a plan, for as long as that holds.

    Args:
        language_model: of a kind in `RUNNABLE`.
        plan: with a row for each prompt.
        is_sharded: whether parameters are spread over processes.
        gates: where the choice of the plan learns, see [`UnitChoice`].

    Raises:
        ValueError: if the plan is not of this model, or leaves out parts of a layer that cannot run in part.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        plan: ExecutionPlan,
        is_sharded: bool = False,
        gates: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        plan.check(language_model.config)
        self.language_model, self.plan, self.is_sharded = language_model, plan, is_sharded
        self.layers: list[PlannedLayer | LearningLayer] = []
        if gates is not None:
            of_layers = zip(*(table.unbind(dim=1) for table in gates), strict=True)
            self.layers = [LearningLayer(*of_layer) for of_layer in of_layers]
            return
        for number, layer in enumerate(language_model.layers[: language_model.config.num_hidden_layers]):
            of_layer = (plan.runs[:, number], plan.heads[:, number], plan.mlp_groups[:, number])
            try:
                self.layers.append(PlannedLayer(layer, *of_layer, is_sharded))
            except ValueError as error:
                raise ValueError(
                    f"`plan` leaves out parts of layer {number}, which cannot run in part: {error}"
                ) from None

    def of_batch(self, batch_size: int) -> "PlannedLayers":
        """
        The same for a batch in which every row is repeated, as often as it takes.

        Raises:
            ValueError: if it takes no whole number of times.
        """
        repeats, rest = divmod(batch_size, len(self.plan))
        if rest:
            raise ValueError(
                f"`past_key_values` belongs to a plan of {len(self.plan)} prompts, and {batch_size} go on behind it."
            )
        return self if repeats == 1 else PlannedLayers(self.language_model, self.plan.expand(repeats), self.is_sharded)

    def __getitem__(self, number: int) -> PlannedLayer:
        return self.layers[number]

    def let_make_room(self, cache: Cache) -> None:
        """Before and after a plan, lets an empty cache make its room anew: for fewer heads it makes less."""
        for layer, planned in zip(cache.layers, self.layers, strict=False):
            if isinstance(layer, StaticLayer) and not planned.is_whole:
                layer.is_initialized = False

    def __deepcopy__(self, memo: Any) -> "PlannedLayers":
        """A cache is copied to be used twice, and its copy is another cache of the same model."""
        return self


def _has_rows(attention_mask: Any) -> bool:
    """Whether rows can be taken out of a mask; those of flex attention are made for all."""
    return attention_mask is None or isinstance(attention_mask, torch.Tensor)


def _hold_rows(cache: Cache, number: int, rows: torch.Tensor | None) -> bool:
    """
    Makes a layer of a cache ready for some rows of the batch, or for all; whether it can be. A layer with room for
    all rows, or one that is kept in few bits, cannot.
    """
    make = getattr(cache, "layer_class_to_replicate", None)
    while len(cache.layers) <= number and make is not None:
        cache.layers.append(make())
    layer = cache.layers[number]
    if isinstance(layer, _OfSomeRows):
        if layer.get_seq_length() == 0:
            layer.rows = rows
        return True
    if type(layer) not in _OF_SOME_ROWS or rows is None:
        return rows is None
    of_some_rows = object.__new__(_OF_SOME_ROWS[type(layer)])
    vars(of_some_rows).update(vars(layer), rows=rows)
    cache.layers[number] = of_some_rows
    return True
