"""What is seen between two decoder layers: hidden states, and rows of attention, each computed when it is asked for.

Attention is computed for the few query rows that a score is made of, from the layer's own projections, so the layers
themselves may run any attention.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

# Rows of attention that are in memory together where a score is made of many: heads times this times the sequence.
_ROWS_AT_ONCE = 128


@dataclass
class LayerView:
    """
    What is known before layer k, with `n` columns left in the sequence.

    Attributes:
        previous_layer, next_layer: the decoder layers k - 1 and k.
        norm: the norm behind the last layer.
        previous_hidden_states: `[batch, n, hidden_size]`, what entered layer k - 1.
        hidden_states: `[batch, n, hidden_size]`, what enters layer k.
        position_embeddings: cosines and sines `[batch, n, head_dim]` of the columns' rotary positions.
        is_real: `[batch, n]` bool, false for padding.
        index: `[batch, n]` int64, where each column stood in the prompt; -1 for padding.
        inputs_embeds: `[batch, n, hidden_size]`, what entered layer 0 in these columns.
        previous_keys: `[batch, key_value_heads, n, head_dim]`, the keys of layer k - 1 if a cache holds them already.
        next_position_embeddings: those of layer k where its kind turns in another way than layer k - 1's.
        blocks: `[batch, n]` int64, of columns that see each other in both directions the number of their block, -1 of
            all others; `None` where there are none.
        carried: what was written here before an earlier layer, by name, each `[batch, n, ...]`: the decoder's loop
            hands on the same dictionary all through a pass and takes its tensors along when columns leave.
    """

    previous_layer: nn.Module
    next_layer: nn.Module
    norm: nn.Module
    previous_hidden_states: torch.Tensor
    hidden_states: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    is_real: torch.Tensor
    index: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    previous_keys: torch.Tensor | None = None
    carried: dict[str, torch.Tensor] = field(default_factory=dict)
    next_position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    blocks: torch.Tensor | None = None

    def keys(self, of: Literal["previous", "next"]) -> torch.Tensor:
        """Keys `[batch, key_value_heads, n, head_dim]` with their positions turned in, in one of the two layers."""
        if of == "previous" and self.previous_keys is not None:
            return self.previous_keys
        layer, hidden_states = self._side(of)
        keys = _heads(layer.self_attn, "k", layer.input_layernorm(hidden_states))
        return apply_rotary_pos_emb(keys, keys, *self.tables(of))[1]

    def tables(self, of: Literal["previous", "next"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[batch, n, head_dim]` of the columns' positions in one of the two layers."""
        is_other = of == "next" and self.next_position_embeddings is not None
        return self.next_position_embeddings if is_other else self.position_embeddings

    def queries(self, rows: torch.Tensor, of: Literal["previous", "next"]) -> torch.Tensor:
        """Queries `[batch, heads, num_rows, head_dim]` of the columns in `rows` `[batch, num_rows]`."""
        layer, hidden_states = self._side(of)
        chosen = hidden_states.gather(1, rows[..., None].expand(-1, -1, hidden_states.shape[-1]))
        cos, sin = (
            table.expand(len(rows), -1, -1).gather(1, rows[..., None].expand(-1, -1, table.shape[-1]))
            for table in self.tables(of)
        )
        queries = _heads(layer.self_attn, "q", layer.input_layernorm(chosen))
        return apply_rotary_pos_emb(queries, queries, cos, sin)[0]

    def attention(self, rows: torch.Tensor, of: Literal["previous", "next"]) -> "AttentionRows":
        """The rows `[batch, num_rows]` of a layer's attention, not computed yet."""
        attention = self._side(of)[0].self_attn
        return AttentionRows(
            self.queries(rows, of),
            self.keys(of),
            rows,
            self.is_real,
            attention.scaling,
            _sliding_window(attention),
            self.blocks,
        )

    def attention_logits(self, rows: torch.Tensor, of: Literal["previous", "next"]) -> torch.Tensor:
        """
        Attention logits q k^T / sqrt(d) of some rows, minus infinity where a column is out of the row's sight: behind
        it, padding, or before the window of a layer that has one.

        Args:
            rows: `[batch, num_rows]` int64, columns of the sequence.
            of: the layer.

        Returns:
            `[batch, heads, num_rows, n]` float32.
        """
        return self.attention(rows, of).logits()

    def attention_rows(self, rows: torch.Tensor, of: Literal["previous", "next"]) -> torch.Tensor:
        """
        What some rows attend to: the softmax of [`attention_logits`], 0 everywhere in a row of padding.

        Returns:
            `[batch, heads, num_rows, n]` float32.
        """
        return softmax_or_zero(self.attention_logits(rows, of))

    def _side(self, of: Literal["previous", "next"]) -> tuple[nn.Module, torch.Tensor]:
        if of == "previous":
            return self.previous_layer, self.previous_hidden_states
        return self.next_layer, self.hidden_states


@dataclass(kw_only=True)
class DecoderView(LayerView):
    """
    What a reducer sees at a cut: a [`LayerView`] in which visual tokens are told from text.

    Attributes:
        is_visual: `[batch, n]` bool, visual tokens that may be dropped.
        last: `[batch]` int64, the column that asks: the last one before the answer.
    """

    is_visual: torch.Tensor
    last: torch.Tensor

    @property
    def is_prompt(self) -> torch.Tensor:
        """`[batch, n]` bool, what stands before the answer. In training the answer is there too, and has no say."""
        column = torch.arange(self.is_visual.shape[1], device=self.is_visual.device)
        return self.is_real & (column <= self.last[:, None])

    @property
    def is_question(self) -> torch.Tensor:
        """`[batch, n]` bool, the text behind the last visual token, up to the column that asks."""
        column = torch.arange(self.is_visual.shape[1], device=self.is_visual.device)
        last_visual = torch.where(self.is_visual, column, -1).amax(dim=-1, keepdim=True)
        return self.is_prompt & (column > last_visual)


def _heads(attention: nn.Module, kind: Literal["q", "k"], hidden_states: torch.Tensor) -> torch.Tensor:
    """`[batch, n, hidden_size]` -> `[batch, heads, n, head_dim]`, normalised where the model does so (Qwen3)."""
    if not hasattr(attention, f"{kind}_proj"):
        raise ValueError(
            f"{type(attention).__name__} has no {kind}_proj, whose rows this reducer reads; use a decoder of the "
            "Llama, Mistral, Qwen2 or Qwen3 family, or a reducer that acts before the decoder."
        )
    heads = getattr(attention, f"{kind}_proj")(hidden_states).unflatten(-1, (-1, attention.head_dim))
    return getattr(attention, f"{kind}_norm", nn.Identity())(heads).transpose(1, 2)


def _sliding_window(attention: nn.Module) -> int | None:
    """How many columns, its own included, a row of this layer sees; `None` for all."""
    # Qwen's layers know their own window; Mistral's share the configuration's.
    holder = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(holder, "sliding_window", None)


def softmax_or_zero(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension; all 0 where every logit is minus infinity."""
    return logits.softmax(dim=-1).masked_fill(logits.isneginf().all(dim=-1, keepdim=True), 0.0)


@dataclass
class AttentionRows:
    """
    Some rows of one layer's attention, before queries and keys have met.

    Attributes:
        queries: `[batch, heads, num_rows, head_dim]`.
        keys: `[batch, key_value_heads, n, head_dim]`.
        rows: `[batch, num_rows]` int64, the columns whose queries these are.
        is_real: `[batch, n]` bool, false for padding.
        scaling: of the logits.
        sliding_window: columns that a row sees, its own included; `None` for all.
        block: `[batch, n]` int64, that of each column, see [`LayerView`].
    """

    queries: torch.Tensor
    keys: torch.Tensor
    rows: torch.Tensor
    is_real: torch.Tensor
    scaling: float
    sliding_window: int | None = None
    block: torch.Tensor | None = None

    def logits(self, part: slice = slice(None)) -> torch.Tensor:
        """Logits `[batch, heads, num_rows, n]` float32 of a part of the rows; minus infinity out of a row's sight."""
        queries, rows = self.queries[:, :, part].float(), self.rows[:, part, None]
        keys = self.keys.float().repeat_interleave(queries.shape[1] // self.keys.shape[1], dim=1)
        column = torch.arange(keys.shape[2], device=rows.device)
        is_seen = column <= rows
        if self.block is not None:
            own = self.block.gather(1, rows[:, :, 0])[:, :, None]
            is_seen = is_seen | ((own == self.block[:, None]) & (own >= 0))
        is_seen = is_seen & self.is_real[:, None]
        if self.sliding_window is not None:
            is_seen = is_seen & (column > rows - self.sliding_window)
        return (queries @ keys.transpose(-1, -2) * self.scaling).masked_fill(~is_seen[:, None], -math.inf)

    def blocks(self, temperature: float = 1.0) -> Iterator[tuple[slice, torch.Tensor]]:
        """
        The attention softmax(logits / temperature), block of rows by block of rows, never all rows at once.

        Yields:
            Which rows, and their attention `[batch, heads, rows of the block, n]` float32.
        """
        for start in range(0, self.rows.shape[1], _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            yield part, softmax_or_zero(self.logits(part) / temperature)

    def received(self, weights: torch.Tensor, temperature: float = 1.0, from_others: bool = False) -> torch.Tensor:
        """
        What each column gets: sum over rows i of w_i A_ij.

        Args:
            weights: `[batch, heads or 1, num_rows]` float32.
            temperature: of the softmax.
            from_others: whether to leave out what a column gets from its own row.

        Returns:
            `[batch, heads, n]` float32.
        """
        column = torch.arange(self.keys.shape[2], device=self.rows.device)
        total = self.queries.new_zeros(*self.queries.shape[:2], self.keys.shape[2], dtype=torch.float32)
        for part, attention in self.blocks(temperature):
            if from_others:
                attention = attention.masked_fill((column == self.rows[:, part, None])[:, None], 0.0)
            total += (weights[:, :, None, part] @ attention)[:, :, 0]
        return total


def attention_of_last(view: DecoderView, of: Literal["previous", "next"]) -> torch.Tensor:
    """What the column that asks attends to, mean over heads, `[batch, n]` float32."""
    return view.attention_rows(view.last[:, None], of)[:, :, 0].mean(dim=1)


def marked_columns(marked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The marked columns of each row in ascending order, side by side.

    Args:
        marked: `[batch, n]` bool.

    Returns:
        Their indices `[batch, most]` int64, and `[batch, most]` bool, false behind the last of a row that has fewer.
    """
    count = marked.sum(dim=-1)
    most = int(count.max()) if len(count) else 0
    index = (~marked).to(torch.int8).argsort(dim=-1, stable=True)[:, :most]
    return index, torch.arange(most, device=marked.device) < count[:, None]
