"""A choice of K tokens that is soft while it is learned (VisionSelector, arXiv 2510.16598).

Gates sigmoid((s_i - t) / temperature) lie between 0 and 1, and the threshold t is solved for such that their sum is K.
In training no token leaves: each is weighed by its gate, so that every score has its part in the answer. Evaluation
keeps the K largest scores. What makes the two meet is a term of the loss, the cross-entropy of the gates against that
choice, whose weight rises while the model trains: first scores find out what helps, then gates decide. The authors'
code has no noise and no temperature (1 here), and leaves the temperature as it is throughout.
"""

import torch
from torch import nn

from .top_k import margins

# Weights of the cross-entropy at the beginning and at the end of training, those of the authors' training scripts.
FIRST_WEIGHT, LAST_WEIGHT = 0.1, 2.0
# Enough for the last bit of a float32, however far apart scores lie.
_BISECTIONS = 64
# Of margins: what lies farther away has a gate of exactly 0 or 1, too.
_FARTHEST = 1e9


def differentiable_top_k(
    scores: torch.Tensor, num_keep: torch.Tensor, keep: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Gates between 0 and 1 with a given sum.

    Args:
        scores: `[batch, num_patches]`; what is no token has the lowest number there is.
        num_keep: `[batch]` int64, values in [1, num_patches]. A row that keeps everything has gates of 1, without
            gradient.
        keep: `[batch, num_patches]` bool, the tokens with the largest scores.
        temperature: above 0; towards 0 the gates become `keep`.

    Returns:
        The gates, and the cross-entropy of each against `keep`, both `[batch, num_patches]` float32.
    """
    scores, num_keep = scores.float(), num_keep.to(scores.device)[:, None]
    ranked = scores.detach().sort(dim=-1, descending=True).values
    # Counted from the last that is kept, numbers are small near the threshold, and so exact.
    last_kept = ranked.gather(-1, num_keep - 1)
    threshold = temperature * _threshold((ranked - last_kept) / temperature, num_keep)
    margin = margins(scores - last_kept, threshold, temperature)
    margin = margin.masked_fill(num_keep == scores.shape[-1], torch.inf)
    return torch.sigmoid(margin), nn.functional.softplus(torch.where(keep, -margin, margin))


def _threshold(ranked: torch.Tensor, num_keep: torch.Tensor) -> torch.Tensor:
    """
    The t `[batch, 1]` at which sum_i sigmoid(x_i - t) is K, by bisection.

    Args:
        ranked: `[batch, num_patches]`, descending, the K-th 0.
        num_keep: `[batch, 1]`, K.
    """
    num_others, ranked = ranked.shape[-1] - num_keep, ranked.clamp(min=-_FARTHEST)
    # At log(N - K), N - K + 1 gates have a sum of 1 at most, the K - 1 others less than 1 each. At x_(K+1) - log(K),
    # each of the first K + 1 gates is K / (K + 1) or more.
    first_dropped = ranked.gather(-1, num_keep.clamp(max=ranked.shape[-1] - 1))
    low, high = first_dropped - num_keep.log(), num_others.clamp(min=1).log()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_below = torch.sigmoid(ranked - middle).sum(dim=-1, keepdim=True) > num_keep
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return high


def weight_of_indecision(progress: float) -> float:
    """The weight of the cross-entropy when so much of training is over, from 0 to 1; it rises evenly."""
    return FIRST_WEIGHT + (LAST_WEIGHT - FIRST_WEIGHT) * progress
