"""A prompt as columns: what stays, what leaves, and where labels and positions go with it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .budget.selection import Selection
from .decoder.policy import DecoderPolicy

_LEAST_GATE = 1e-3


@dataclass
class Prompt:
    """
    What a family's decoder reads, as columns that are dropped together.

    Attributes:
        input_ids: `[batch, sequence]` int64.
        attention_mask: `[batch, sequence]` int64, 0 for padding and for dropped tokens that stay in place, or
            `[batch, 1, sequence, sequence]`: bool, true where a row may attend to a column, or float, added to the
            attention logits.
        position_ids: `[..., batch, sequence]` int64; families with several axes of positions have them in front.
        labels: `[batch, sequence]` int64 or `None`.
        visual_index: `[batch, sequence]` int64 or `None`; the visual token that a column shows, counted through all
            units of the batch, -1 for every other column.
        column: `[batch, sequence]` int64 or `None`; where a column stood in the caller's prompt, -1 for padding and
            for what is hidden.
        token_types: `[batch, sequence]` each, what else a family has for every column, by argument.
        inputs_embeds: `[batch, sequence, hidden_size]` or `None`; what the columns are read as in place of the
            embeddings of `input_ids`, which then only tell placeholders from other columns.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor | None = None
    visual_index: torch.Tensor | None = None
    column: torch.Tensor | None = None
    token_types: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs_embeds: torch.Tensor | None = None

    def with_caller_targets(self, labels: torch.Tensor) -> "Prompt":
        """The same prompt with labels of a loss that is computed elsewhere, where columns are the caller's."""
        column = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        return replace(self, labels=labels, column=column)

    def without(self, keep: torch.Tensor, pad_token_id: int) -> "Prompt":
        """
        Drops columns; the rows that keep fewer are padded on the left, whatever side they were padded on before.

        Args:
            keep: `[batch, sequence]` bool, the columns that stay.
            pad_token_id: the id of padding, which must not be a placeholder's.

        Returns:
            `Prompt` as long as the longest row. A padding column has attention 0, position 0 and label -100.
        """
        index = left_padded(keep)
        is_real = keep.gather(1, index)

        def taken(columns: torch.Tensor | None, fill: int) -> torch.Tensor | None:
            if columns is None:
                return None
            where = index.expand(*columns.shape[:-2], *index.shape)
            return columns.expand(*columns.shape[:-2], *keep.shape).gather(-1, where).masked_fill(~is_real, fill)

        if self.attention_mask.dim() == 4:
            mask = _gather_rows_and_columns(self.attention_mask, index) & is_real[:, None, None, :]
        else:
            mask = taken(self.attention_mask, 0)
        embeds = self.inputs_embeds
        if embeds is not None:
            embeds = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
        return Prompt(
            taken(self.input_ids, pad_token_id),
            mask,
            taken(self.position_ids, 0),
            taken(self.labels, -100),
            taken(self.visual_index, -1),
            taken(self.column, -1),
            {name: taken(columns, 0) for name, columns in self.token_types.items()},
            embeds,
        )

    def hiding(self, dropped: torch.Tensor) -> "Prompt":
        """
        Hides columns from attention and leaves them in place.

        Args:
            dropped: `[batch, sequence]` bool.

        Returns:
            `Prompt` of the same length. A label behind hidden columns stands at the first of them, so that the column
            before, which is not hidden, is the one that predicts it.
        """
        if self.attention_mask.dim() == 4:
            attention_mask = self.attention_mask & ~dropped[:, None, None, :]
        else:
            attention_mask = self.attention_mask.masked_fill(dropped, 0)
        labels = None if self.labels is None else _labels_before_gaps(self.labels, dropped)
        visual_index = None if self.visual_index is None else self.visual_index.masked_fill(dropped, -1)
        column = None if self.column is None else self.column.masked_fill(dropped, -1)
        return replace(self, attention_mask=attention_mask, labels=labels, visual_index=visual_index, column=column)

    def gating(self, gates: torch.Tensor, dtype: torch.dtype) -> "Prompt":
        """
        Multiplies the attention that each column gets by a gate, and leaves all columns in place.

        A row's weights become exp(l_ij) g_j / sum_k exp(l_ik) g_k, with g_i = 1 for the row's own column, as in
        DynamicViT (arXiv 2106.02034), by a bias log(g_j) on the logits. A gate of 0 keeps a thousandth of its column's
        weight: with none at all, its gradient would be 0 and not what the column would have been worth.

        Args:
            gates: `[batch, sequence]` float in [0, 1].
            dtype: of the additive mask, the decoder's.

        Returns:
            `Prompt` of the same length, with an additive mask `[batch, 1, sequence, sequence]`.
        """
        own = torch.eye(gates.shape[-1], dtype=torch.bool, device=gates.device)
        visible = self.attention_mask
        if visible.dim() == 2:
            visible = visible.bool()[:, None, None, :] & torch.ones_like(own).tril()
        bias = torch.where(own, 0.0, torch.log(gates + _LEAST_GATE)[:, None, None, :]).to(dtype)
        attention_mask = bias.masked_fill(~visible, torch.finfo(dtype).min)
        dropped = gates.detach() == 0
        labels = None if self.labels is None else _labels_before_gaps(self.labels, dropped)
        column = None if self.column is None else self.column.masked_fill(dropped, -1)
        return replace(self, attention_mask=attention_mask, labels=labels, column=column)


@dataclass
class VisualEmbeddings:
    """
    What stands at the placeholders of a prompt, in their order.

    Attributes:
        features: `[num_placeholders, hidden_size]`.
        deepstack: what is added to them behind the first decoder layers, `[num_placeholders, hidden_size]` each.
        kinds: `[num_placeholders]` int64, 0 for images and 1 for videos; by default all are images.
    """

    features: torch.Tensor
    deepstack: Sequence[torch.Tensor] = ()
    kinds: torch.Tensor | None = None

    def at(self, chosen: torch.Tensor) -> "VisualEmbeddings":
        """Only those at `chosen`, a bool mask or indices."""
        kinds = None if self.kinds is None else self.kinds[chosen]
        return VisualEmbeddings(self.features[chosen], [layer[chosen] for layer in self.deepstack], kinds)

    def split(self, counts: Sequence[int]) -> list["VisualEmbeddings"]:
        """Parts of so many placeholders, one after another."""
        ends = torch.tensor(counts).cumsum(0).tolist()
        return [self.at(slice(end - count, end)) for end, count in zip(ends, counts, strict=True)]

    @classmethod
    def joined(cls, parts: Sequence["VisualEmbeddings"]) -> "VisualEmbeddings":
        """Parts one after another."""
        deepstack = [torch.cat(layer) for layer in zip(*(part.deepstack for part in parts), strict=True)]
        kinds = None if parts[0].kinds is None else torch.cat([part.kinds for part in parts])
        return cls(torch.cat([part.features for part in parts]), deepstack, kinds)

    def with_written(self, embeds: torch.Tensor, kinds: torch.Tensor) -> "VisualEmbeddings":
        """
        These, and behind them the embeddings `[n, hidden_size]` of tokens that are written like placeholders of
        `kinds` `[n]` and show nothing.
        """
        none = [layer.new_zeros(len(embeds), layer.shape[-1]) for layer in self.deepstack]
        own = None if self.kinds is None else kinds
        return self.joined([self, VisualEmbeddings(embeds.to(self.features.dtype), none, own)])

    def encoder_outputs(self, as_tensor: Collection[str] = ()) -> dict[str, BaseModelOutputWithPooling]:
        """
        As a family's forward takes what is encoded already: features in a list, or of the kinds in `as_tensor`
        `[1, num_placeholders, hidden_size]`.
        """
        outputs, numbers = {}, [0] if self.kinds is None else self.kinds.unique().tolist()
        for number in numbers:
            kind = ("image", "video")[number]
            # Where there is one kind, nothing has to be copied.
            of_kind = self if len(numbers) == 1 else self.at(self.kinds == number)
            features = of_kind.features[None] if kind in as_tensor else [of_kind.features]
            outputs[kind] = BaseModelOutputWithPooling(pooler_output=features)
            if self.deepstack:
                outputs[kind]["deepstack_features"] = [[layer] for layer in of_kind.deepstack]
        return outputs


@dataclass
class PreparedInputs:
    """
    A prompt with images as the family's own class reads it: fewer placeholders, and as many features.

    Attributes:
        prompt: the columns that are left.
        visual: what stands at the placeholders that are left.
        selection: the visual tokens that are left.
        policy: what leaves inside the decoder, or `None`.
    """

    prompt: Prompt
    visual: VisualEmbeddings | None = None
    selection: Selection | None = None
    policy: DecoderPolicy | None = None


def left_padded(keep: torch.Tensor) -> torch.Tensor:
    """
    The columns that stay, in their order, at the right end of rows as long as the longest.

    Args:
        keep: `[batch, sequence]` bool.

    Returns:
        Indices `[batch, longest]` int64; where a row keeps fewer, it begins with columns that do not stay.
    """
    return torch.argsort(keep.to(torch.int8), dim=-1, stable=True)[:, -int(keep.sum(dim=-1).max()) :]


def _gather_rows_and_columns(attention_mask: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of `[batch, 1, sequence, sequence]` the rows and columns in `index` `[batch, length]`."""
    sequence = attention_mask.shape[-1]
    rows = attention_mask.gather(2, index[:, None, :, None].expand(-1, 1, -1, sequence))
    return rows.gather(3, index[:, None, None, :].expand(-1, 1, index.shape[1], -1))


def _labels_before_gaps(labels: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Moves the label behind every run of dropped columns to the run's first column. `[batch, sequence]`."""
    length = labels.shape[-1]
    column = torch.arange(length, device=labels.device).expand_as(labels)
    next_kept = column.masked_fill(dropped, length).flip(-1).cummin(dim=-1).values.flip(-1)
    behind = nn.functional.pad(labels, (0, 1), value=-100).gather(1, next_kept)
    dropped_before = nn.functional.pad(dropped, (1, 0))[:, :-1]
    labels = labels.masked_fill(dropped | dropped_before, -100)
    return torch.where(dropped & ~dropped_before, behind, labels)


def of_columns(columns: torch.Tensor | None, index: torch.Tensor, fill: int) -> torch.Tensor | None:
    """Of `[batch, sequence]` the columns `index` `[batch, columns left]`; `fill` where that is -1."""
    return None if columns is None else columns.gather(1, index.clamp(min=0)).masked_fill(index < 0, fill)


def at_columns(states: torch.Tensor, column: torch.Tensor, length: int) -> torch.Tensor:
    """
    The states of what is left, in the columns of the prompt that the caller has. A dropped column gets those of the
    last one before it that stayed, which predicts what comes behind both.

    Args:
        states: `[batch, columns left, hidden_size]`.
        column: `[batch, columns left]` int64, where each of them stood; -1 where it stands for none.
        length: columns of the caller's prompt.

    Returns:
        `[batch, length, hidden_size]`.
    """
    number = torch.arange(column.shape[1], device=column.device).expand_as(column)
    # What stands for no column goes into one more, behind the prompt.
    place = column.new_zeros(len(column), length + 1).scatter(1, column.masked_fill(column < 0, length), number)
    place = place[:, :length].cummax(dim=1).values
    return states.gather(1, place[..., None].expand(-1, -1, states.shape[-1]))


def without_first_labels(labels: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """
    Labels without those of each prompt's first token: what stands before it, and would have to predict it, is padding
    in one batch and absent in another.

    Args:
        labels: `[batch, sequence]`.
        attention_mask: `[batch, sequence]`; with any other shape the first token is that of the first column.

    Returns:
        `[batch, sequence]`.
    """
    if attention_mask.shape == labels.shape:
        attended = attention_mask.long()
        is_first = (attended == 1) & (attended.cumsum(dim=-1) == 1)
    else:
        is_first = torch.arange(labels.shape[-1], device=labels.device).expand_as(labels) == 0
    return labels.masked_fill(is_first, -100)


def is_before_answer(attention_mask: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """`[batch, sequence]` bool: what is no padding and stands before the first target, all of it without labels."""
    is_real = attention_mask > 0
    return is_real if labels is None else is_real & ((labels != -100).cumsum(dim=-1) == 0)


def count_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions 0, 1, 2, ... of the attended columns of `[batch, sequence]`; 0 for padding."""
    attended = attention_mask.long()
    return (attended.cumsum(dim=-1) - 1).masked_fill(attended == 0, 0)


def additive_mask(attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as text models take it: 4-D bool becomes additive, all else stays as it is."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4 or attention_mask.dtype != torch.bool:
        return attention_mask
    additive = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return additive.masked_fill(~attention_mask, torch.finfo(dtype).min)


def rows_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    Of `[batch, sequence, hidden_size]` the columns whose logits are wanted: the last so many (0 for all), those at
    positions `[num_positions]` or `[batch, num_positions]`, or those that are true in `[batch, sequence]` bool, as
    `[num_true, hidden_size]`.

    Raises:
        ValueError: if a mask is not of the columns that are left.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.dim() < 2:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype != torch.bool:
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    if logits_to_keep.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`logits_to_keep` is a mask of shape {tuple(logits_to_keep.shape)}, and {tuple(hidden_states.shape[:2])} "
            "columns are left; where dropped tokens leave the sequence, logits are those of the kept ones. Pass "
            "selection_output='mask', which leaves them in their places."
        )
    return hidden_states[logits_to_keep]


def labels_of_logits(labels: torch.Tensor | None, logits_to_keep: int | torch.Tensor) -> torch.Tensor | None:
    """Of labels `[batch, sequence]` those at the columns whose logits are made, where these are the last so many."""
    return labels if labels is None or not isinstance(logits_to_keep, int) else labels[:, -logits_to_keep:]


def check_columns(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    caller_targets: torch.Tensor | None = None,
) -> None:
    """
    Raises:
        ValueError: if ids are not whole numbers `[batch, sequence]`, or labels or positions are not theirs.
    """
    shape = tuple(input_ids.shape)
    all_labels = {"labels": labels, "caller_targets": caller_targets}
    for name, columns in {"input_ids": input_ids, **all_labels}.items():
        if columns is not None and (columns.is_floating_point() or columns.is_complex()):
            raise ValueError(f"`{name}` is {columns.dtype}; it holds token ids, which are integers (torch.long).")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"`input_ids` has shape {shape}; it has to be [batch, sequence], neither of them 0.")
    for name, columns in all_labels.items():
        if columns is not None and columns.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(columns.shape)}, and `input_ids` has {shape}; they must agree."
            )
    if position_ids is not None and position_ids.shape[-2:] not in ((1, shape[1]), shape):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}; it has to end in {shape}, as `input_ids` does."
        )


def check_attention_mask(attention_mask: torch.Tensor, shape: torch.Size) -> None:
    """
    Raises:
        ValueError: if a mask is neither of a prompt's shape nor a bool matrix over its columns.
    """
    batch, sequence = shape
    is_square = attention_mask.shape == (batch, 1, sequence, sequence) and attention_mask.dtype == torch.bool
    if attention_mask.shape != shape and not is_square:
        raise ValueError(
            f"`attention_mask` is {attention_mask.dtype} of shape {tuple(attention_mask.shape)}; allowed are "
            f"{tuple(shape)}, the shape of `input_ids`, and torch.bool of shape {(batch, 1, sequence, sequence)}."
        )
