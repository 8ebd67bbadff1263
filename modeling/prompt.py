"""A prompt as columns: what stays, what leaves, and where labels and positions go with it."""

from dataclasses import dataclass

import torch
from torch import nn

_LEAST_GATE = 1e-3


@dataclass
class Prompt:
    """
    The decoder's input as columns that can be dropped together.

    Attributes:
        inputs_embeds: `[batch, sequence, hidden_size]`.
        attention_mask: `[batch, sequence]` int64, 0 for padding and for dropped tokens that stay in place, or
            `[batch, 1, sequence, sequence]`: bool, true where a row may attend to a column, or float, added to the
            attention logits.
        position_ids: `[batch, sequence]` int64.
        labels: `[batch, sequence]` int64 or `None`.
        patches: `[batch, sequence]` int64 or `None`; the patch that a column shows, counted through all images of the
            batch (image * N + patch), -1 for every other column.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor | None = None
    patches: torch.Tensor | None = None

    def without(self, keep: torch.Tensor) -> "Prompt":
        """
        Drops columns; the rows that keep fewer are padded on the left, whatever side they were padded on before.

        Args:
            keep: `[batch, sequence]` bool, the columns that stay.

        Returns:
            `Prompt` as long as the longest row. A padding column has attention 0, position 0 and label -100.
        """
        index = left_padded(keep)
        is_real = keep.gather(1, index)
        embeds = self.inputs_embeds.gather(1, index[..., None].expand(-1, -1, self.inputs_embeds.shape[-1]))
        labels = None
        if self.labels is not None:
            labels = self.labels.gather(1, index).masked_fill(~is_real, -100)
        if self.attention_mask.dim() == 4:
            attention_mask = _gather_rows_and_columns(self.attention_mask, index) & is_real[:, None, None, :]
        else:
            attention_mask = self.attention_mask.gather(1, index) * is_real
        position_ids = self.position_ids.gather(1, index).masked_fill(~is_real, 0)
        patches = None if self.patches is None else self.patches.gather(1, index).masked_fill(~is_real, -1)
        return Prompt(embeds, attention_mask, position_ids, labels, patches)

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
        patches = None if self.patches is None else self.patches.masked_fill(dropped, -1)
        return Prompt(self.inputs_embeds, attention_mask, self.position_ids, labels, patches)

    def gating(self, gates: torch.Tensor) -> "Prompt":
        """
        Multiplies the attention that each column gets by a gate, and leaves all columns in place.

        A row's weights become exp(l_ij) g_j / sum_k exp(l_ik) g_k, with g_i = 1 for the row's own column, as in
        DynamicViT (arXiv 2106.02034), by a bias log(g_j) on the logits. A gate of 0 keeps a thousandth of its column's
        weight: with none at all, its gradient would be 0 and not what the column would have been worth.

        Args:
            gates: `[batch, sequence]` float, 0 or 1 going forward.

        Returns:
            `Prompt` of the same length, with an additive mask `[batch, 1, sequence, sequence]`.
        """
        length, device = gates.shape[-1], gates.device
        own = torch.eye(length, dtype=torch.bool, device=device)
        visible = self.attention_mask
        if visible.dim() == 2:
            visible = visible.bool()[:, None, None, :] & torch.ones_like(own).tril()
        bias = torch.where(own, 0.0, torch.log(gates + _LEAST_GATE)[:, None, None, :]).to(self.inputs_embeds.dtype)
        attention_mask = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)
        labels = None if self.labels is None else _labels_before_gaps(self.labels, gates.detach() == 0)
        return Prompt(self.inputs_embeds, attention_mask, self.position_ids, labels, self.patches)


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


def count_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions 0, 1, 2, ... of the attended columns of `[batch, sequence]`; 0 for padding."""
    attended = attention_mask.long()
    return (attended.cumsum(dim=-1) - 1).masked_fill(attended == 0, 0)


def images_per_sample(
    input_ids: torch.Tensor, image_token_id: int, num_image_tokens: int, num_images: int
) -> torch.Tensor:
    """
    How many images each prompt shows, from its placeholder tokens.

    Args:
        input_ids: `[batch, sequence]`.
        image_token_id: the placeholder's id.
        num_image_tokens: placeholders of one image.
        num_images: images that were given with the batch, in the order of their placeholders.

    Returns:
        `torch.LongTensor` `[batch]`.

    Raises:
        ValueError: if a prompt's placeholders are not whole images, or their images are not as many as were given.
    """
    placeholders = (input_ids == image_token_id).sum(dim=-1)
    if (placeholders % num_image_tokens).any() or int(placeholders.sum()) != num_images * num_image_tokens:
        raise ValueError(
            f"`input_ids` has {placeholders.tolist()} image placeholder tokens (id {image_token_id}) per prompt and "
            f"`pixel_values` holds {num_images} image(s); every image needs exactly {num_image_tokens} placeholders, "
            "which the processor writes for each '<image>' in the prompt."
        )
    return placeholders // num_image_tokens
