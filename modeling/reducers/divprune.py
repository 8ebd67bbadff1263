"""DivPrune: keep the tokens that differ most from each other.

Choosing K of N tokens so that the smallest distance between any two of them is largest is the max-min diversity
problem (arXiv 2503.02175). It is solved greedily: start with the token that stands most alone, then add, K - 1
times, the token that is farthest from all that are in. Neither question nor attention is looked at.
"""

import math

import torch

from ..budget.selection import Selection
from ..vision.features import VisionFeatures
from .base import TokenReducer, directions, register_reducer, take_tokens

# Float32 cannot tell 1 - cos below this from the rounding of the sum over thousands of channels.
_RESOLUTION = 1e-6
# Of tokens that are not in the pool: below all that are, above those that have joined and must not join again.
_OUTSIDE = -0.5


@register_reducer("divprune")
class DivPruneReducer(TokenReducer):
    """
    Keeps the K tokens that a greedy solution of the max-min diversity problem takes, by the cosine distance of
    projected tokens.

    The published code measures in the model's half precision, where near-duplicates tie and the order of the tokens
    decides; here distances are float32. Larger budgets only ever add tokens to smaller ones.
    """

    stage = "projector"
    paper = "DivPrune (arXiv 2503.02175)"

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        order = farthest_first(cosine_distances(features.patches.detach()), int(num_keep.max()))
        return Selection.from_keep(first_picks(order, num_keep, features.patches.shape[1]))


def cosine_distances(tokens: torch.Tensor) -> torch.Tensor:
    """
    1 - cos of every two tokens of an image, `[num_images, num_tokens, num_tokens]` float32 in [0, 2]. Tokens that
    point in the same direction are at exactly 0.
    """
    unit = directions(tokens)
    distances = 1 - unit @ unit.transpose(1, 2)
    return distances.masked_fill_(distances < _RESOLUTION, 0.0)


def farthest_first(
    distances: torch.Tensor, num_picks: int, pool: torch.Tensor | None = None, first: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Greedy max-min diversity: the order in which tokens join the set S.

    The first is argmax_j min_{i != j} d_ij, whose nearest neighbour is farthest; each further one is
    argmax_j min_{i in S} d_ij. Of equal ones the earlier joins. Only the distance to the set is kept up to date, so a
    step costs O(N).

    Args:
        distances: `[num_images, num_tokens, num_tokens]`, 0 or more.
        num_picks: how many join, at most `num_tokens`.
        pool: `[num_images, num_tokens]` bool, which tokens join before any other; by default all alike.
        first: `[num_images]` int64, the token that joins first in place of that one.

    Returns:
        `[num_images, num_picks]` int64.
    """
    num_tokens = distances.shape[-1]
    itself = torch.eye(num_tokens, dtype=torch.bool, device=distances.device)
    if first is None:
        first = distances.masked_fill(itself, math.inf).amin(dim=1).argmax(dim=-1)
    picks = [first[:, None]]
    # Below every distance, so that what is in the set is never the farthest from it.
    distances = distances.masked_fill(itself, -1.0)
    distance_to_set = torch.full_like(distances[:, 0], math.inf)
    if pool is not None:
        distance_to_set = distance_to_set.masked_fill(~pool, _OUTSIDE)
    for _ in range(num_picks - 1):
        to_latest = take_tokens(distances, picks[-1])[:, 0]
        distance_to_set = torch.minimum(distance_to_set, to_latest)
        picks.append(distance_to_set.argmax(dim=-1, keepdim=True))
    return torch.cat(picks, dim=-1)


def first_picks(order: torch.Tensor, num_keep: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Marks the first `num_keep` of a greedy order `[num_images, num_picks]` in a mask `[num_images, num_tokens]`. A
    greedy order does not depend on where it will be cut, so images that keep different numbers share one loop.
    """
    is_kept = torch.arange(order.shape[1], device=order.device) < num_keep.to(order.device)[:, None]
    return torch.zeros(len(order), num_tokens, dtype=torch.bool, device=order.device).scatter(1, order, is_kept)
