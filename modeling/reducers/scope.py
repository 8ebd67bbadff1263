"""SCOPE: salient tokens that cover what no other covers (arXiv 2510.24214, NeurIPS 2025).

The most attended patches show the same few things. A kept token covers those that are like it, and what another one
would cover beyond that, summed over the image, is its gain. The token with the largest product of gain and attention
joins, and gains are worked out anew.
"""

import math
from numbers import Real

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..vision.features import VisionFeatures
from .base import TokenReducer, directions, register_reducer, take_tokens
from .cls_attention import cls_scores
from .divprune import first_picks


@register_reducer("scope")
class SCOPEReducer(TokenReducer):
    """
    Keeps the K tokens that join first, by CLS attention and the cosine of the features before the projector.

    With c_i = max(0, max_j cos(x_i, x_j)) over what is kept, the gain of token t is sum_i max(0, cos(x_i, x_t) - c_i),
    over all tokens i of the image that are there, and argmax_t gain_t a_t^alpha joins; of equal ones the earlier. a is
    the attention of the layer that made the features, as in the authors' code, which sums it over heads. Larger
    budgets only ever add tokens to smaller ones.

    Args:
        alpha: 0 or more, how much attention counts; with 0 only coverage does. 1 in the authors' scripts.
    """

    needs = ("attention",)
    ranks_by_cls = True
    paper = "SCOPE (arXiv 2510.24214)"

    def __init__(self, config: AdaVTPConfig, alpha: float = 1.0) -> None:
        super().__init__(config)
        if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0 <= alpha < math.inf:
            raise ValueError(f"`alpha` is {alpha!r}; allowed are finite numbers from 0.")
        self.alpha = alpha

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        unit = directions(features.patches.detach())
        saliency = cls_scores(features.attention[self.attention_layers[0]]) ** self.alpha
        order = largest_gain_first(unit @ unit.transpose(1, 2), saliency, int(num_keep.max()))
        return Selection.from_keep(first_picks(order, num_keep, unit.shape[1]))


def largest_gain_first(cosines: torch.Tensor, saliency: torch.Tensor, num_picks: int) -> torch.Tensor:
    """
    The order in which tokens join by gain in coverage times saliency.

    Args:
        cosines: `[num_images, num_tokens, num_tokens]`.
        saliency: `[num_images, num_tokens]`, 0 or more.
        num_picks: how many join, at most `num_tokens`.

    Returns:
        `[num_images, num_picks]` int64.
    """
    covered, picks = torch.zeros_like(saliency), []
    joined = torch.zeros_like(saliency, dtype=torch.bool)
    for _ in range(num_picks):
        gain = (cosines - covered[:, :, None]).clamp(min=0).sum(dim=1)
        picks.append((gain * saliency).masked_fill(joined, -1.0).argmax(dim=-1, keepdim=True))
        joined = joined.scatter(1, picks[-1], True)
        covered = torch.maximum(covered, take_tokens(cosines, picks[-1])[:, 0])
    return torch.cat(picks, dim=-1)
