"""Exact-K choice: which K of N tokens, with a gradient.

Training samples. Adding independent Gumbel noise to the scores and taking the K largest draws K tokens without
replacement, exactly as K successive draws from the softmax of what is left would (Kool et al., arXiv 1903.06059), in
one sort in place of K. Evaluation takes the K largest scores.
"""

import torch


def top_k_mask(scores: torch.Tensor, num_keep: torch.Tensor | int) -> torch.Tensor:
    """
    Marks the `num_keep` largest scores of each row `[batch, num_patches]`, `[batch]` or as many of all; among equal
    scores the earlier position wins.
    """
    if isinstance(num_keep, int):
        num_keep = torch.full((len(scores),), num_keep, device=scores.device)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    in_reach = torch.arange(scores.shape[-1], device=scores.device) < num_keep.to(scores.device)[:, None]
    return torch.zeros_like(in_reach).scatter(-1, order, in_reach)


def gumbel_noise(scores: torch.Tensor) -> torch.Tensor:
    """Independent standard Gumbel noise in the shape of `scores`, float32."""
    uniform = torch.rand(scores.shape, device=scores.device, dtype=torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    return -torch.log((-torch.log(uniform.clamp_min(tiny))).clamp_min(tiny))


def margins(scores: torch.Tensor, threshold: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    How far each score lies above the threshold of its row, (s_i - t) / temperature, whose sigmoid is a soft gate p_i.

    The threshold moves with the scores such that the p_i keep their sum, dt/ds_i = p'_i / sum_j p'_j, because how many
    tokens stay is the budget's to say. A token's score therefore gets the gradient of its own gate less the mean of
    all: that one more token would help says nothing about which.

    Args:
        scores: `[batch, num_patches]`.
        threshold: `[batch, 1]`, without gradient.
        temperature: above 0; larger spreads the gradient over more tokens.
    """
    values = scores.detach()
    slope = torch.sigmoid((values - threshold) / temperature)
    slope = slope * (1 - slope)
    share = slope / slope.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
    threshold = threshold + (share * (scores - values)).sum(dim=-1, keepdim=True)
    return (scores - threshold) / temperature


def straight_through_gates(
    perturbed_scores: torch.Tensor, num_keep: torch.Tensor, keep: torch.Tensor, temperature: float
) -> torch.Tensor:
    """
    Gates that are exactly 0 or 1 going forward and soft going backward.

    The threshold of the soft gates, see [`margins`], lies halfway between the last score that is kept and the first
    that is dropped: how nearly the choice would have fallen the other way. A row that keeps everything has no
    boundary, and its gates carry no gradient.

    Args:
        perturbed_scores: `[batch, num_patches]`, the scores that were ranked, noise included.
        num_keep: `[batch]` int64.
        keep: `[batch, num_patches]` bool, the choice.
        temperature: above 0; larger spreads the gradient over more tokens.
    """
    ranked = perturbed_scores.detach().sort(dim=-1, descending=True).values
    num_keep = num_keep.to(ranked.device)
    last_kept = ranked.gather(-1, (num_keep - 1)[:, None])
    first_dropped = ranked.gather(-1, num_keep.clamp(max=ranked.shape[-1] - 1)[:, None])
    soft = torch.sigmoid(margins(perturbed_scores, (last_kept + first_dropped) / 2, temperature))
    keeps_everything = (num_keep == ranked.shape[-1])[:, None]
    soft = torch.where(keeps_everything, soft.detach(), soft)
    return keep.to(soft.dtype) + (soft - soft.detach())


def sample_top_k(
    scores: torch.Tensor, num_keep: torch.Tensor, temperature: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Chooses exactly `num_keep` tokens per row.

    Args:
        scores: `[batch, num_patches]`, unnormalised log-probabilities.
        num_keep: `[batch]` int64, values in [1, num_patches].
        temperature: of the gates' gradient, see [`straight_through_gates`]. It does not change what is sampled.
        training: whether to sample, with gates, or to take the largest scores, without.

    Returns:
        The choice, bool `[batch, num_patches]`, and the gates `[batch, num_patches]` or `None`.
    """
    scores = scores.float()
    if not training:
        return top_k_mask(scores, num_keep), None
    perturbed_scores = scores + gumbel_noise(scores)
    keep = top_k_mask(perturbed_scores.detach(), num_keep)
    return keep, straight_through_gates(perturbed_scores, num_keep, keep, temperature)
