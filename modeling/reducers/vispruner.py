"""VisPruner: important tokens by attention, and diverse ones by similarity (arXiv 2412.01818, later version).

The patches with the largest CLS attention stay as they do in FasterVLM. They crowd on one object, so only a share of
the budget goes to them. The other patches form a pool, from which near-duplicates are taken away a few at a time until
as many are left as the budget still has room for.
"""

import math

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..vision.features import VisionFeatures
from .base import TokenReducer, directions, register_reducer, require_share
from .cls_attention import cls_scores

_MOST_DROPPED_AT_ONCE = 8


def without_duplicates(patches: torch.Tensor, pool: torch.Tensor, num_diverse: int) -> torch.Tensor:
    """
    Drops tokens that resemble another until `num_diverse` are left.

    Each round splits the pool by even and odd places. The even tokens that are most similar to any odd one, at most 8,
    are dropped; of two that are equally similar the later. The next round's pool is the remaining even tokens, the
    most similar first, and behind them the odd ones. Halves may be unequal (the authors' code stops with an error on
    a pool of odd size). `pool` `[num_images, pool_size]` holds indices in the order that the first round splits.
    """
    if num_diverse == 0:
        return pool[:, :0]
    unit = directions(patches)
    similarity = unit @ unit.transpose(1, 2)
    image = torch.arange(len(pool), device=pool.device)[:, None, None]
    while pool.shape[1] > num_diverse:
        even, odd = pool[:, ::2], pool[:, 1::2]
        nearest = similarity[image, even[:, :, None], odd[:, None, :]].amax(dim=-1)
        num_dropped = min(_MOST_DROPPED_AT_ONCE, pool.shape[1] - num_diverse, even.shape[1])
        least_similar = nearest.argsort(dim=-1, stable=True)[:, : even.shape[1] - num_dropped]
        pool = torch.cat([even.gather(1, least_similar.flip(-1)), odd], dim=1)
    return pool


@register_reducer("vispruner")
class VisPrunerReducer(TokenReducer):
    """
    Keeps floor(important K) patches by CLS attention and fills up with diverse ones, in spatial order.

    Attention is the head mean of the layer that made the features; similarity is the cosine of the features before
    the projector, and the pool starts in the order of attention.

    Args:
        important: share of the kept tokens that attention chooses, from 0 to 1. With 1 this is `"cls_attention"`.
    """

    needs = ("attention",)
    ranks_by_cls = True
    one_count = True
    paper = "VisPruner (arXiv 2412.01818)"

    def __init__(self, config: AdaVTPConfig, important: float = 0.5) -> None:
        super().__init__(config)
        require_share("important", important)
        self.important = important

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        num_tokens_kept = int(num_keep[0])
        # Rounded first: 0.29 x 100 is 28.999999999999996.
        num_important = math.floor(round(self.important * num_tokens_kept, 6))
        scores = cls_scores(features.attention[self.attention_layers[0]])
        ranked = scores.argsort(dim=-1, descending=True, stable=True)
        diverse = without_duplicates(
            features.patches, ranked[:, num_important:], num_diverse=num_tokens_kept - num_important
        )
        kept = torch.cat([ranked[:, :num_important], diverse], dim=1)
        return Selection.from_keep(torch.zeros_like(ranked, dtype=torch.bool).scatter(1, kept, True))
