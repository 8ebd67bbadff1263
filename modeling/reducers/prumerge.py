"""PruMerge and PruMerge+: keep what CLS attends to, and merge into it what resembles it (arXiv 2403.15388, ICCV 2025).

CLS attention is sparse: a few patches are outliers and most get next to nothing. The outliers are kept, each with its
nearest neighbours added on, weighted by their attention, and one more token carries the sum of all that was not kept.
PruMerge+ also keeps patches at a uniform stride, so that no part of the image is missing altogether.
"""

from dataclasses import replace

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..budget.top_k import top_k_mask
from ..vision.features import VisionFeatures
from ..vision.tower import TowerAttention
from .base import (
    TokenReducer,
    directions,
    making_layer,
    register_reducer,
    require_choice,
    require_count,
    require_share,
    take_tokens,
)
from .cls_attention import cls_scores
from .controls import at_a_stride


def single_head_scores(attention: TowerAttention) -> torch.Tensor:
    """
    CLS attention with all heads as one vector of width C, a = softmax(q k^T / sqrt(C)).

    The softmax is over CLS and all patches that are there; CLS's own column is left out and the rest not renormalised.
    """
    query, cls_key = attention.query.flatten(1)[:, None], attention.cls_key.flatten(1)[:, None]
    return TowerAttention(query, cls_key, joined_heads(attention.keys)[:, None]).cls_row()[:, 0]


def joined_heads(keys: torch.Tensor) -> torch.Tensor:
    """Keys `[num_images, heads, num_tokens, head_dim]` as `[num_images, num_tokens, heads * head_dim]`."""
    return keys.transpose(1, 2).flatten(2)


def num_outliers(scores: torch.Tensor) -> torch.Tensor:
    """How many scores of an image lie above Q3 + 1.5 (Q3 - Q1), its quartiles linearly interpolated; at least 1."""
    quarters = torch.tensor([0.25, 0.75], dtype=scores.dtype, device=scores.device)
    first, third = torch.quantile(scores, quarters, dim=-1)
    threshold = third + 1.5 * (third - first)
    return (scores > threshold[:, None]).sum(dim=-1).clamp(min=1)


def with_neighbours(
    patches: torch.Tensor,
    keys: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor,
    num_neighbours: int,
    average: bool,
) -> torch.Tensor:
    """
    Kept tokens with their neighbours added, x'_i = x_i + sum_{j in N_i} a_j x_j.

    N_i are the tokens other than i whose keys have the largest cosine to key i; other kept tokens may be among them,
    and all x are those from before any merging.

    Args:
        patches: `[num_images, num_tokens, hidden_size]` float32.
        keys: `[num_images, num_tokens, key_size]`.
        scores: a, `[num_images, num_tokens]` float32.
        kept: `[num_images, num_kept]` int64, i.
        num_neighbours: of each kept token; as many as there are, if there are fewer.
        average: whether to divide by the sum of the weights, 1 + sum_{j in N_i} a_j.
    """
    unit = directions(keys)
    cosine = take_tokens(unit, kept) @ unit.transpose(1, 2)
    cosine = cosine.scatter(2, kept[..., None], -torch.inf)
    nearest = cosine.argsort(dim=-1, descending=True, stable=True)
    nearest = nearest[..., : min(num_neighbours, patches.shape[1] - 1)]
    weights = scores[:, None].expand_as(cosine)
    weights = torch.zeros_like(cosine).scatter(2, nearest, weights.gather(2, nearest))
    merged = take_tokens(patches, kept) + weights @ patches
    return merged / (1 + weights.sum(dim=-1, keepdim=True)) if average else merged


def sum_of_rest(patches: torch.Tensor, scores: torch.Tensor, is_kept: torch.Tensor, average: bool) -> torch.Tensor:
    """The extra token, sum_{j not kept} a_j x_j, divided by the sum of its weights or not; 0 if everything is kept."""
    weights = scores.masked_fill(is_kept, 0.0)[:, None]
    if average:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return weights @ patches


@register_reducer("prumerge")
class PruMergeReducer(TokenReducer):
    """
    Keeps the K - 1 tokens with the largest CLS attention, merges neighbours into them, and adds a token for the rest.

    For K = 1 the best token is kept, with its neighbours, and there is no token for the rest. Without K the paper's
    own rule keeps the outliers of each image's attention, those above Q3 + 1.5 IQR and at least one, and adds a token
    for the rest if there is any. (The authors' code takes the quartiles of a whole batch at once, so that an image's
    tokens depend on what shares its batch, and fails where there is no outlier.)

    Attention and keys are those of the tower layer above the one that made the features: it need not run, but has its
    projections (layer 23 of LLaVA-1.5). Where there is none above, because the features are the top layer's, it is the
    top layer itself.

    Args:
        attention: `"single_head"`, as in the authors' code: [`single_head_scores`] of the layer above. `"per_head"`,
            as in the paper: the head mean of the ordinary attention of the layer that made the features.
        average: whether merged tokens are divided by the sum of their weights. The paper speaks of a weighted
            average; the authors' code does not divide, and so by default neither do we.
        neighbours: tokens that are merged into each kept one, from 0; the 32 are in the authors' code only.
        order: `"spatial"`: every token stands at its own patch, and the extra one at the last patch that is free.
            `"official"`: by descending attention, the extra token last.
    """

    needs = ("attention",)
    ranks_by_cls = True
    has_own_rule = True
    paper = "PruMerge (arXiv 2403.15388)"

    def __init__(
        self,
        config: AdaVTPConfig,
        attention: str = "single_head",
        average: bool = False,
        neighbours: int = 32,
        order: str = "spatial",
    ) -> None:
        super().__init__(config)
        require_choice("attention", attention, ("single_head", "per_head"))
        require_choice("average", average, (True, False))
        require_choice("order", order, ("spatial", "official"))
        require_count("neighbours", neighbours, least=0)
        self.attention, self.average, self.neighbours, self.order = attention, average, neighbours, order

    @property
    def layer_above(self) -> int:
        """The layer whose keys say what is near: the one above the features, or the top one."""
        return min(making_layer(self.config) + 1, self.config.num_tower_layers - 1)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layer above the features and, for the paper's attention, the one that made them."""
        if self.attention == "single_head":
            return (self.layer_above,)
        return tuple(sorted({self.layer_above, making_layer(self.config)}))

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor | None = None) -> Selection:
        scores = self.scores(features)
        num_tokens = scores.shape[1]
        ranked, num_kept = self.ranking(scores, None if num_keep is None else num_keep.to(scores.device))
        is_kept = ranked.argsort(dim=-1) < num_kept[:, None]
        # Without a K of its own an image gets the extra token wherever something is left over.
        has_extra = num_kept < (num_tokens if num_keep is None else num_keep.to(scores.device))
        kept = ranked[:, : int(num_kept.max())]
        patches = features.patches.float()
        keys = joined_heads(features.attention[self.layer_above].keys)
        merged = with_neighbours(patches, keys, scores, kept, self.neighbours, self.average)
        extra = sum_of_rest(patches, scores, is_kept, self.average)
        column = torch.arange(num_tokens, device=scores.device)
        last_free = column.masked_fill(is_kept, -1).amax(dim=-1, keepdim=True)
        # Columns of -1 are no tokens: behind an image's own number, and for an extra token that it does not get.
        kept = kept.masked_fill(column[: kept.shape[1]] >= num_kept[:, None], -1)
        places = torch.cat([kept, last_free.masked_fill(~has_extra[:, None], -1)], dim=1)
        tokens = torch.cat([merged, extra], dim=1).to(features.patches.dtype)
        selection = Selection.from_tokens(tokens, places, num_tokens, self.order == "spatial")
        longest = int(selection.num_keep.max())
        return replace(selection, positions=selection.positions[:, :longest], features=selection.features[:, :longest])

    def scores(self, features: VisionFeatures) -> torch.Tensor:
        """CLS attention a, `[num_images, num_tokens]` float32."""
        if self.attention == "per_head":
            return cls_scores(features.attention[making_layer(self.config)])
        return single_head_scores(features.attention[self.layer_above])

    def ranking(self, scores: torch.Tensor, num_keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What is kept beside the extra token: all tokens `[num_images, num_tokens]`, those to keep first and in the
        order of output, and how many they are, `[num_images]`.
        """
        num_kept = num_outliers(scores) if num_keep is None else (num_keep - 1).clamp(min=1)
        return scores.argsort(dim=-1, descending=True, stable=True), num_kept


@register_reducer("prumerge+")
class PruMergePlusReducer(PruMergeReducer):
    """
    PruMerge with tokens at a uniform stride beside the most attended ones; neighbours are merged into both.

    Given K, of the K - 1 tokens beside the extra one the share `important`, rounded and at least one, are the most
    attended, and the others are taken from those that this leaves, n' in spatial order, at floor((i + 1/2) n' / s),
    i = 0 .. s - 1. This is our reading for an exact K: the authors' fixed form takes 72 and 72 of 576 and counts those
    that are both twice, their adaptive form about one part attended to three parts spatial, and the paper one to one
    (`important=0.5`).

    Without K, the authors' adaptive form: of n tokens m are outliers, and the stride is a third of n / m, both rounded
    down and at least 1; tokens 0, stride, 2 stride, ... below n - 1 join the outliers, none twice.

    Args:
        attention, average, neighbours: see [`PruMergeReducer`].
        order: `"spatial"`, or `"official"`: the attended by descending attention, the spatial, the extra token.
        important: share of the kept tokens that attention chooses, from 0 to 1. Only where K is given.
    """

    paper = "PruMerge+ (arXiv 2403.15388)"

    def __init__(
        self,
        config: AdaVTPConfig,
        attention: str = "single_head",
        average: bool = False,
        neighbours: int = 32,
        order: str = "spatial",
        important: float = 0.25,
    ) -> None:
        super().__init__(config, attention, average, neighbours, order)
        require_share("important", important)
        self.important = important

    def ranking(self, scores: torch.Tensor, num_keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens = scores.shape[1]
        column = torch.arange(num_tokens, device=scores.device)
        if num_keep is None:
            num_important = num_outliers(scores)
            stride = (num_tokens // num_important // 3).clamp(min=1)[:, None]
            is_important = top_k_mask(scores, num_important)
            is_spatial = ~is_important & (column % stride == 0) & (column < num_tokens - 1)
        else:
            num_kept = (num_keep - 1).clamp(min=1)
            num_important = (self.important * num_kept).round().long().clamp(min=1)
            is_important = top_k_mask(scores, num_important)
            is_spatial = evenly_among(~is_important, num_kept - num_important)
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        place = torch.where(is_spatial, num_tokens, 2 * num_tokens) + column
        ranked = torch.where(is_important, rank, place).argsort(dim=-1)
        return ranked, (is_important | is_spatial).sum(dim=-1)


def evenly_among(is_candidate: torch.Tensor, num_chosen: torch.Tensor) -> torch.Tensor:
    """
    Marks s of the n' candidates `[num_images, num_tokens]` of each image at a uniform stride: counted from 0, those at
    floor((i + 1/2) n' / s), i = 0 .. s - 1.
    """
    is_chosen = at_a_stride(is_candidate.sum(dim=-1), num_chosen, is_candidate.shape[1])
    return is_candidate & is_chosen.gather(1, (is_candidate.cumsum(dim=-1) - 1).clamp(min=0))
