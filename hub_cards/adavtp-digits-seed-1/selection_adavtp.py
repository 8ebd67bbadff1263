"""What was chosen, and what is done with it.

A [`Selection`] is the one thing that passes from whatever chooses visual tokens (a controller, a published method, a
user's class) to whatever uses the choice (projector, prompt, decoder, FLOPs counter, picture).
"""

from dataclasses import dataclass

import torch
from torch import nn

_LEAST_GATE = 1e-3


@dataclass
class Selection:
    """
    The visual tokens that are kept of each image.

    Attributes:
        keep: `torch.BoolTensor` `[num_images, num_patches]`, true where the patch is kept.
        positions: `torch.LongTensor` `[num_images, max_keep]`, the kept patch positions in ascending order. Where
            images keep different numbers, the shorter rows end in -1.
        gates: `[num_images, num_patches]` or `None`; exactly 0 or 1, equal to `keep`, and carrying the gradient of the
            choice.
        features: `[num_images, max_keep, hidden_size]` of reducers that merge, or `None`: what stands at `positions`
            in place of the patches' own features. Rows at position -1 are ignored.
        loss: a term that the reducer adds to the training loss, or `None`.
        depth: `[num_images, num_patches]` int64 or `None`; in how many decoder layers each patch is seen, where a
            reducer acts inside the decoder.
    """

    keep: torch.Tensor
    positions: torch.Tensor
    gates: torch.Tensor | None = None
    features: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    depth: torch.Tensor | None = None

    @classmethod
    def from_keep(cls, keep: torch.Tensor, gates: torch.Tensor | None = None) -> "Selection":
        """Builds a selection from its keep mask `[num_images, num_patches]`."""
        num_keep = keep.sum(dim=-1)
        max_keep = int(num_keep.max()) if len(keep) else 0
        kept_first = torch.argsort((~keep).to(torch.int8), dim=-1, stable=True)[:, :max_keep]
        is_kept = torch.arange(max_keep, device=keep.device) < num_keep[:, None]
        return cls(keep, kept_first.masked_fill(~is_kept, -1), gates)

    @classmethod
    def from_tokens(
        cls,
        features: torch.Tensor,
        positions: torch.Tensor,
        num_patches: int,
        spatial_order: bool = True,
        loss: torch.Tensor | None = None,
    ) -> "Selection":
        """
        Builds a selection of tokens that are no patches any more.

        Args:
            features: `[num_images, num_tokens, hidden_size]`.
            positions: `[num_images, num_tokens]` int64, for each token the patch in whose place it stands. No two
                tokens of an image share one.
            num_patches: N.
            spatial_order: whether a token stands at its own position; otherwise the tokens stand in the order given
                and fill the places of all of them from the first to the last.
            loss: a term that is added to the training loss.
        """
        ranked, order = positions.sort(dim=-1)
        if spatial_order:
            features = features.gather(1, order[..., None].expand_as(features))
        keep = torch.zeros(len(positions), num_patches, dtype=torch.bool, device=positions.device)
        return cls(keep.scatter(1, ranked, True), ranked, features=features, loss=loss)

    @classmethod
    def everything(cls, num_images: int, num_patches: int, device: torch.device) -> "Selection":
        """The selection that drops nothing."""
        positions = torch.arange(num_patches, device=device).expand(num_images, -1)
        return cls(torch.ones_like(positions, dtype=torch.bool), positions)

    @property
    def num_keep(self) -> torch.Tensor:
        """Kept tokens per image, `[num_images]` int64."""
        return self.keep.sum(dim=-1)

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """
        The kept features, or what they were merged into, a shorter sequence.

        Args:
            features: `[num_images, num_patches, hidden_size]`, of the patches; unused where tokens were merged.

        Returns:
            `[num_images, max_keep, hidden_size]`; rows beyond an image's own number are zero.
        """
        if self.features is None:
            index = self.positions.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1])
            kept = self.gated(features).gather(1, index)
        else:
            kept = self.features
        return kept.masked_fill((self.positions < 0)[..., None], 0.0)

    def mask(self, features: torch.Tensor) -> torch.Tensor:
        """
        All features in their places, the dropped ones zero.

        Args:
            features: `[num_images, num_patches, hidden_size]`.

        Returns:
            `[num_images, num_patches, hidden_size]`.
        """
        if self.features is not None:
            num_images, num_patches = self.keep.shape
            placed = self.features.new_zeros(num_images, num_patches, self.features.shape[-1])
            return placed.masked_scatter(self.keep[..., None], self.features[self.positions >= 0])
        return self.gated(features).masked_fill(~self.keep[..., None], 0.0)

    def gated(self, features: torch.Tensor) -> torch.Tensor:
        """
        The features as they are, on a path that carries the gradient of the choice.

        Gate g moves a feature x between the image's mean feature m and itself, m + g (x - m), so that the gradient of
        the gate is the first-order effect of replacing the token by one that tells nothing apart. Scaling, g x, would
        ask another question: decoders normalise what they read, and a token scaled down says the same.

        Args:
            features: `[num_images, num_patches, hidden_size]`.
        """
        if self.gates is None:
            return features
        mean = features.mean(dim=1, keepdim=True).detach()
        gates = self.gates[..., None].to(features.dtype)
        # Kept features stay exactly what they are: (x - m) + m is x only up to rounding.
        return features + (gates - gates.detach()) * (features - mean).detach()


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
