"""SparseVLM: the words of the question that have to do with the image say which visual tokens matter.

These words, the raters, are found once, by comparing embeddings before the first layer. At three cuts their attention
ranks the visual tokens. What leaves is not all lost: the best of it is clustered, and each cluster stays as one token.
"""

import math

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.top_k import top_k_mask
from ..decoder.layer_counts import distinct_cuts, in_proportion
from ..decoder.reducer import DecoderReducer, best_visual
from ..decoder.view import DecoderView, marked_columns, softmax_or_zero
from .base import register_reducer, require_choice, require_count, take_tokens
from .pyramiddrop import pyramid_counts

# Tokens kept behind the three cuts, of 576, by the name that the official code gives the schedule.
_KEPT = {
    "v1": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@register_reducer("sparsevlm")
class SparseVLMReducer(DecoderReducer):
    """
    SparseVLM (arXiv 2410.04417): text-guided pruning behind layers 2, 6 and 15 of 32, with recycling of what leaves.

    Version 1 (the paper) ranks by the mean over heads and clusters what leaves. Version 2 ("SparseVLM+" in the
    official repository) divides attention by what rotary positions alone give a distance, takes only the heads that
    look at the image most, and recycles nothing.

    Where code and paper differ this is the code: how many tokens stay is a fixed list, where the paper derives it from
    the rank of the attention matrix, and recycled tokens are averaged, where the paper adds them up. Different from
    the code: ties between densities, which random noise decides there, go to the earlier token; densities are compared
    as logarithms, because at the width of a language model they all round to 0; a question of one word, or of words
    all alike, which has no rater there, is rated by all its words (or, where no word is behind the image, by the
    prompt's last token). The official names count as if layers 2, 6 and 15 had seen the tokens left behind them; the
    layers really see 206, 145, 114 and 82 of 576 on average for "192", "128", "96" and "64".

    A budget keeps the shape of the schedule that `tokens` names and changes its steepness: its shares r_s of the
    original tokens become r_s ^ t, with t solved so that the mean over layers, recycled tokens included, is exact.

    Args:
        version: `"v1"` or `"v2"`.
        tokens: 192, 128, 96 or 64, the official schedule for the own rule (no budget), in proportion where an image
            does not have 576 tokens.
        merge: `"average"` or `"sum"` of a cluster's tokens (version 1).
        order: `"spatial"`, a recycled token stands where its cluster's centre stood, or `"official"`, behind the last
            visual token that is kept (version 1).
        num_heads: heads whose attention counts (version 2), those that look at the image most; all, where a decoder
            has no more.
    """

    has_own_rule = True
    paper = "SparseVLM (arXiv 2410.04417)"

    def __init__(
        self,
        config: AdaVTPConfig,
        version: str = "v1",
        tokens: int = 192,
        merge: str = "average",
        order: str = "spatial",
        num_heads: int = 14,
    ) -> None:
        super().__init__(config)
        require_choice("version", version, tuple(_KEPT))
        require_choice("tokens", tokens, tuple(_KEPT[version]))
        require_choice("merge", merge, ("average", "sum"))
        require_choice("order", order, ("spatial", "official"))
        require_count("num_heads", num_heads, least=1)
        self.version, self.tokens, self.merge, self.order, self.num_heads = version, tokens, merge, order, num_heads

    def stage_cuts(self, num_layers: int) -> list[int]:
        """The cut behind each stage; where the decoder is shallow, several on one layer."""
        return [in_proportion(layer, num_layers) for layer in (3, 7, 16)]

    def cuts(self, num_layers: int) -> list[int]:
        return distinct_cuts(self.stage_cuts(num_layers), num_layers)

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        cuts = self.stage_cuts(num_layers)
        shares = [kept / 576 for kept in _KEPT[self.version][self.tokens]]
        if num_keep is not None:
            return pyramid_counts("sparsevlm", cuts, shares, num_visual, num_keep, num_layers)
        left = [num_visual]
        for share in shares:
            kept = min(round(num_visual * share), left[-1])
            left.append(kept + (num_clusters(left[-1] - kept) if self.version == "v1" else 0))
        return [left[sum(cut <= layer for cut in cuts)] for layer in range(num_layers)]

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        if "raters" not in view.carried:
            view.carried["raters"] = text_raters(view)
        if self.version == "v1":
            return attention_of_raters(view, view.carried["raters"]).mean(dim=1)
        received = attention_of_raters(view, view.carried["raters"], divided_by_gravity=True)
        return mean_of_visual_heads(received, view.is_visual, self.num_heads)

    def reduce(
        self, view: DecoderView, scores: torch.Tensor, num_keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the best tokens as they are and recycles the best of the rest, `num_keep` together."""
        if self.version == "v2":
            return super().reduce(view, scores, num_keep)
        num_kept = num_kept_as_they_are(view.is_visual.sum(dim=-1), num_keep)
        stays = best_visual(view.is_visual, scores, num_kept)
        hidden_states, rank = recycled(view, scores, stays, num_keep - num_kept, self.merge)
        stays = stays | (rank > 0)
        if self.order == "official":
            hidden_states = recycled_last(hidden_states, stays & view.is_visual, rank)
        return stays, hidden_states


def text_raters(view: DecoderView) -> torch.Tensor:
    """
    The words of the question whose meaning is nearest to the image's: with embeddings h as they enter layer 0,
    visual tokens i and words j, r_j = mean_i softmax_j(h_i . h_j), and raters are the words with r_j > mean_j r_j.
    """
    embeds = view.inputs_embeds.float()
    index, is_word = marked_columns(view.is_question)
    affinity = (embeds @ take_tokens(embeds, index).transpose(1, 2)).masked_fill(~is_word[:, None], -math.inf)
    is_visual = view.is_visual[..., None].float()
    rating = (softmax_or_zero(affinity) * is_visual).sum(dim=1) / is_visual.sum(dim=1).clamp(min=1)
    mean = rating.sum(dim=-1, keepdim=True) / is_word.sum(dim=-1, keepdim=True).clamp(min=1)
    is_rater = torch.zeros_like(view.is_question).scatter(1, index, (rating > mean) & is_word)
    is_rater = torch.where(is_rater.any(dim=-1, keepdim=True), is_rater, view.is_question)
    is_last = torch.arange(embeds.shape[1], device=embeds.device) == view.last[:, None]
    return torch.where(is_rater.any(dim=-1, keepdim=True), is_rater, is_last)


def attention_of_raters(view: DecoderView, raters: torch.Tensor, divided_by_gravity: bool = False) -> torch.Tensor:
    """
    What each column gets from the raters in the previous layer, `[batch, heads, n]` float32, mean over raters; for
    version 2 each weight divided by the [`gravity`] of its distance first. `raters` `[batch, n]` has one in each row.
    """
    rows, is_rater = marked_columns(raters)
    weights = is_rater / is_rater.sum(dim=-1, keepdim=True)
    attention = view.attention(rows, "previous")
    if not divided_by_gravity:
        return attention.received(weights[:, None])
    return sum(
        (attention_of_some / gravity(view, rows[:, part])[:, None] * weights[:, None, part, None]).sum(dim=2)
        for part, attention_of_some in attention.blocks()
    )


def gravity(view: DecoderView, rows: torch.Tensor) -> torch.Tensor:
    """
    What rotary positions give a distance whatever the content: the logit between a query and a key of ones,
    sum_f 2 cos(w_f (p_i - p_j)) / sqrt(d) for row i and column j. It falls with the distance, and where it is below a
    hundredth of its value at none (far out of the contexts it was made for it can be negative) it counts as that.
    `[batch, num_rows]` columns -> `[batch, num_rows, n]` float32.
    """
    cos, sin = (table.float().expand(len(rows), -1, -1) for table in view.position_embeddings)
    # Angles come twice, once for each half of a head; a one in both halves turns into (cos - sin, cos + sin).
    half = cos.shape[-1] // 2
    turned = torch.cat([(cos - sin)[..., :half], (cos + sin)[..., half:]], dim=-1)
    logits = take_tokens(turned, rows) @ turned.transpose(1, 2) / math.sqrt(2 * half)
    return logits.clamp(min=0.01 * math.sqrt(2 * half))


def mean_of_visual_heads(received: torch.Tensor, is_visual: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Mean of `[batch, heads, n]` over the heads that give visual tokens most; of equal heads the earlier."""
    mass = (received * is_visual[:, None]).sum(dim=-1)
    num_heads = min(num_heads, mass.shape[1])
    return (received * top_k_mask(mass, num_heads)[..., None]).sum(dim=1) / num_heads


def num_candidates(num_removed: int | torch.Tensor) -> int | torch.Tensor:
    """Of so many tokens that leave, how many are recycled: the best int(0.3 n) + 1."""
    return num_removed * 3 // 10 + 1


def num_clusters(num_removed: int | torch.Tensor) -> int | torch.Tensor:
    """Of so many tokens that leave, how many come back: a tenth of the recycled and one more; of none, none."""
    return (num_candidates(num_removed) // 10 + 1) * (num_removed > 0)


def num_kept_as_they_are(num_visual: torch.Tensor, num_keep: torch.Tensor) -> torch.Tensor:
    """
    How many tokens stay as they are where, with what is recycled from the others, `num_keep` are to be left: the
    largest k with k + [`num_clusters`](num_visual - k) <= num_keep, but no less than half of what is left.
    """
    kept = torch.arange(int(num_visual.max()) + 1, device=num_visual.device)
    fits = (kept <= num_visual[:, None]) & (
        kept + num_clusters((num_visual[:, None] - kept).clamp(min=0)) <= num_keep[:, None]
    )
    # With one token more kept never less are left in all, so those that fit are the first.
    return torch.maximum(fits.sum(dim=-1) - 1, num_keep - num_keep // 2)


def recycled(
    view: DecoderView, scores: torch.Tensor, stays: torch.Tensor, count: torch.Tensor, merge: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Clusters the best of the visual tokens that leave, in `count` `[batch]` clusters, and puts what each is merged into
    in its centre's place.

    Returns:
        Hidden states `[batch, n, hidden_size]`, changed at centres, and `[batch, n]` int64, 1, 2, ... for the centre
        of the first, second, ... cluster, 0 for all other columns.
    """
    removed = view.is_visual & ~stays
    best = best_visual(removed, scores, num_candidates(removed.sum(dim=-1))) & removed
    index, is_there = marked_columns(best)
    if index.shape[1] == 0:
        return view.hidden_states, torch.zeros_like(stays.long())
    as_it_was = take_tokens(view.hidden_states, index)
    candidates = as_it_was.float()
    centre, rank = density_peaks(candidates, is_there, count)
    number = torch.arange(index.shape[1], device=index.device)
    member = ((centre[:, None] == number[:, None]) & is_there[:, None]).float()
    merged = member @ candidates
    if merge == "average":
        merged = merged / member.sum(dim=-1, keepdim=True).clamp(min=1)
    merged = torch.where((rank > 0)[..., None], merged.to(as_it_was.dtype), as_it_was)
    hidden_states = view.hidden_states.scatter(1, index[..., None].expand_as(merged), merged)
    return hidden_states, torch.zeros_like(stays.long()).scatter(1, index, rank)


def density_peaks(
    points: torch.Tensor, is_there: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Clustering by density peaks with k nearest neighbours, k the number of clusters. With distances d_ij =
    |x_i - x_j| / sqrt(C), a point's density is exp(-mean of d^2 to its k nearest points, itself included), its
    isolation the distance to the nearest denser point (for the densest, the largest distance there is); points with
    the largest product of both are centres, and every other point belongs to the nearest centre.

    Of equally dense points the earlier is the denser, of equal products the earlier is the centre, and of centres
    equally near the one with the larger product is the nearer.

    Args:
        points: `[batch, num_points, C]` float32.
        is_there: `[batch, num_points]` bool, the first points of each row.
        count: `[batch]` int64, clusters of each row, no more than its points.

    Returns:
        The centre `[batch, num_points]` int64 that each point belongs to, and `[batch, num_points]` int64: for centres
        1, 2, ... by falling product, for all other points 0.
    """
    # The faster way through the inner products would not find that equal points have distance 0.
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(points.shape[-1])
    distance = distance.masked_fill(~(is_there[:, None] & is_there[..., None]), math.inf)
    number = torch.arange(points.shape[1], device=points.device)
    ranked = _peaks_first(distance, is_there, count)
    place = torch.zeros_like(ranked).scatter(1, ranked, number.expand_as(ranked))
    rank = torch.where(place < count[:, None], place + 1, 0)
    to_centres = distance.gather(2, ranked[:, None].expand(-1, len(number), -1))
    to_centres = to_centres.masked_fill(number >= count[:, None, None], math.inf)
    nearest_centre = ranked.gather(1, to_centres.argmin(dim=-1))
    return torch.where(rank > 0, number, nearest_centre), rank


def _peaks_first(distance: torch.Tensor, is_there: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The points by falling product of density and isolation, those that are not there last, `[batch, num_points]`."""
    number = torch.arange(distance.shape[-1], device=distance.device)
    nearest = distance.sort(dim=-1).values.square().masked_fill(number >= count[:, None, None], 0.0)
    log_density = -nearest.sum(dim=-1) / count[:, None].clamp(min=1)
    own, other = log_density[..., None], log_density[:, None]
    is_denser = distance.isfinite() & ((other > own) | ((other == own) & (number < number[:, None])))
    largest = distance.masked_fill(distance.isinf(), 0.0).amax(dim=(1, 2), keepdim=True)
    isolation = torch.where(is_denser, distance, largest).amin(dim=-1)
    # Points at no distance from a denser one have a product of 0 too, but they come before those that are not there.
    log_product = (isolation.log() + log_density).masked_fill(~is_there, -math.inf)
    return log_product.argsort(dim=-1, descending=True, stable=True)


def recycled_last(hidden_states: torch.Tensor, stays: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """
    Moves what was recycled (`rank` from 1) behind the visual tokens that are kept; of the visual columns that stay the
    same are filled.
    """
    # Columns that do not stay come last in both orders, in the same order, and so are mapped to themselves.
    behind = rank.masked_fill(~stays, rank.shape[1] + 1)
    content = behind.argsort(dim=-1, stable=True)
    column = (~stays).to(torch.int8).argsort(dim=-1, stable=True)
    moved = take_tokens(hidden_states, content)
    return hidden_states.scatter(1, column[..., None].expand_as(moved), moved)
