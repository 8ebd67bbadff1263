"""The compute token's way through the first layers, and what it decides at their end.

It goes through a layer as one column more, behind all of the prompt's, which never see it: a prompt is what it is
without. What it sees of the prompt is one row of the mask. It leaves nothing in the cache, and no column of its own in
the answer.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput

from .compute_scheduler import ComputeScheduler, UnitChoice, UnitCounts
from .layer_inputs import LayerInputs, PromptInputs, of_text, rotary_tables


@dataclass
class UnitSchedule:
    """
    A choice of units that a scheduler is to make while a prompt is read.

    Attributes:
        scheduler: which chooses.
        counts: how much is to run.
        statistics: of the visual tokens, `[batch, n]`, see [`selection_statistics`]; or `None`.
        is_prompt: `[batch, columns]` bool, what is no padding and stands before the answer.
        sees: `[batch, columns]` bool, which of these the compute token sees.
    """

    scheduler: ComputeScheduler
    counts: UnitCounts
    statistics: torch.Tensor | None
    is_prompt: torch.Tensor
    sees: torch.Tensor

    def expand(self, repeats: int) -> "UnitSchedule":
        """Repeats every row, for beams and for several sequences per prompt."""

        def repeated(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.repeat_interleave(repeats, dim=0)

        counts = UnitCounts(*map(repeated, vars(self.counts).values()))
        tables = (self.statistics, self.is_prompt, self.sees)
        return UnitSchedule(self.scheduler, counts, *map(repeated, tables))


class ComputeToken:
    """
    What runs the first layers, see [`WholeLayer`], while a choice is to be made.

    Args:
        schedule: what is to be decided.
        inputs: of the prompt's columns.
    """

    attends = True

    def __init__(self, schedule: UnitSchedule, inputs: PromptInputs) -> None:
        self.schedule, self.inputs = schedule, inputs
        self.hidden_states = schedule.scheduler.token(schedule.counts, schedule.statistics)
        self.num_layers = schedule.scheduler.settings.num_prefix_layers

    def run(
        self,
        layer: nn.Module,
        number: int,
        hidden_states: torch.Tensor,
        given: LayerInputs,
        cache: Cache | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See [`WholeLayer.run`]. Takes the token through the layer beside the prompt."""
        joined = torch.cat([hidden_states, self.hidden_states.to(hidden_states)], dim=1)
        kwargs["past_key_values"] = None if cache is None else _WithoutLastColumn(cache)
        output = layer(joined, **vars(self._joined_inputs(number, hidden_states, given)), **kwargs)
        self.hidden_states = output[:, -1:]
        return output[:, :-1]

    def choice(self) -> UnitChoice:
        """What the scheduler makes of the token."""
        return self.schedule.scheduler(self.hidden_states[:, 0], self.schedule.counts)

    def _joined_inputs(self, number: int, hidden_states: torch.Tensor, given: LayerInputs) -> LayerInputs:
        """The inputs of a layer for the prompt's columns and the token behind them."""
        inputs, index = self.inputs, self.inputs.index
        place = index.clamp(0, self.schedule.sees.shape[1] - 1)
        # Assisted decoding puts its candidates behind the prompt.
        known = (index >= 0) & (index < self.schedule.sees.shape[1])
        is_prompt, sees = (
            table.to(index.device).gather(1, place) & known for table in (self.schedule.is_prompt, self.schedule.sees)
        )
        positions = inputs.position_ids.masked_fill(~is_prompt, -1).amax(dim=-1, keepdim=True) + 1
        own = rotary_tables(inputs.language_model, hidden_states, positions, inputs.kinds[number])
        tables = tuple(
            torch.cat([table.expand(len(last), -1, -1), last], dim=1)
            for table, last in zip(given.position_embeddings, own, strict=True)
        )
        position_ids = torch.cat([given.position_ids.expand(len(index), -1), of_text(positions)], dim=-1)
        window = inputs.attentions[number].window
        if window is not None:
            # What a window counts is columns, and the token's own is one.
            last = torch.where(is_prompt, torch.arange(index.shape[1], device=index.device), -1).amax(-1, keepdim=True)
            sees = sees & (torch.arange(index.shape[1], device=index.device) > last + 1 - window)
        mask = mask_with_token(given.attention_mask, sees, hidden_states, inputs.attentions[number].implementation)
        return replace(given, attention_mask=mask, position_ids=position_ids, position_embeddings=tables)


class _WithoutLastColumn:
    """A cache that is not told of the last new column, and gives its keys and values nevertheless."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`Cache.update`]."""
        cached = self.cache.update(keys[..., :-1, :], values[..., :-1, :], *args, **kwargs)
        return tuple(
            torch.cat([held, new[..., -1:, :]], dim=-2) for held, new in zip(cached, (keys, values), strict=True)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def mask_with_token(mask: Any, sees: torch.Tensor, hidden_states: torch.Tensor, implementation: str) -> Any:
    """
    A layer's mask with a row and a column more, for a token behind all others that no other sees.

    Args:
        mask: what the layer takes for `n` columns: `None` (each sees those before it), `[batch or 1, 1, n, keys]` bool
            or numbers that are added to the logits, or `[batch, keys]` bool, of attention that is causal by itself.
        sees: `[batch, n]` bool, what the token sees. Of the keys these are the first.
        hidden_states: `[batch, n, hidden_size]`.
        implementation: of the attention.

    Raises:
        ValueError: if the attention takes no mask that says so.
    """
    batch_size, num_columns = sees.shape
    if mask is None and bool(sees.all()):
        return None
    if implementation not in ("eager", "sdpa"):
        is_flat = mask is not None and isinstance(mask, torch.Tensor) and mask.dim() == 2
        if is_flat and torch.equal(mask[:, :num_columns].bool(), sees):
            return nn.functional.pad(mask, (0, 1), value=1)
        raise ValueError(
            f"The scheduler's compute token does not see all of the prompt, and {implementation!r} attention takes no "
            "mask that says so; use 'eager' or 'sdpa'."
        )
    if mask is None:
        mask = torch.ones(num_columns, num_columns, dtype=torch.bool, device=sees.device).tril()[None, None]
    room = nn.functional.pad(sees, (0, mask.shape[-1] - num_columns), value=False)
    row = nn.functional.pad(room, (0, 1), value=True)[:, None, None]
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        row = torch.zeros_like(row, dtype=mask.dtype).masked_fill(~row, lowest)
        others = nn.functional.pad(mask, (0, 1), value=lowest)
    else:
        others = nn.functional.pad(mask, (0, 1), value=False)
    return torch.cat([others.expand(batch_size, *others.shape[1:]), row], dim=2)


def without_token(outputs: ModelOutput, num_layers: int) -> None:
    """Takes the token's column out of the hidden states and attentions that were recorded in the first layers."""
    if outputs.get("hidden_states") is not None:
        recorded = outputs.hidden_states
        first = (None if states is None else states[:, :-1] for states in recorded[: num_layers + 1])
        outputs["hidden_states"] = (*first, *recorded[num_layers + 1 :])
    if outputs.get("attentions") is not None:
        recorded = outputs.attentions
        first = (None if rows is None else rows[..., :-1, :-1] for rows in recorded[:num_layers])
        outputs["attentions"] = (*first, *recorded[num_layers:])
