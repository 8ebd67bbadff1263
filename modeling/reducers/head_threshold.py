"""Head threshold: every attention head votes with the same weight on which visual tokens matter.

A head that hardly looks at the image says as much about where in it to look as one that does nothing else. So each
head's attention to the visual tokens is first made to sum to 1, then averaged over heads; what lies above a percentile
stays.
"""

import math

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..decoder.view import DecoderView, softmax_or_zero
from .base import register_reducer
from .one_cut import OneCutReducer


@register_reducer("head_threshold")
class HeadThresholdReducer(OneCutReducer):
    """
    Multi-head importance with a percentile threshold, from notes on dynamic reduction; no paper or code of its own is
    known to us. The notes leave open which row of attention is meant and where it is read: here it is the last prompt
    token's row of layer k - 1, as in FastV.

    A threshold at the percentile p keeps as many tokens as lie strictly above it, n - 1 - floor(p (n - 1) / 100) of n
    different ones; so many are kept, the earlier of equal ones, whatever the values.

    Args:
        layer: k, the first layer that sees fewer tokens, in [1, number of layers - 1]; by default 2 of 32, in
            proportion. A budget below k / number of layers is refused.
        percentile: p in [0, 100], where the own rule (no budget) puts the threshold.
    """

    name, published_layer = "head_threshold", 2

    def __init__(self, config: AdaVTPConfig, layer: int | None = None, percentile: float = 50.0) -> None:
        super().__init__(config, layer)
        if not 0.0 <= percentile <= 100.0:
            raise ValueError(f"`percentile` is {percentile!r}; allowed are 0 to 100.")
        self.percentile = percentile

    def num_left(self, num_visual: int) -> int:
        return max(0, num_visual - 1 - math.floor(self.percentile * (num_visual - 1) / 100))

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        return importance_of_equal_heads(view)


def importance_of_equal_heads(view: DecoderView) -> torch.Tensor:
    """
    The importance of visual token v, mean over heads h of a_hv / sum_u a_hu, with a_h the row of attention of the
    column that asks and u over the visual tokens: `[batch, n]` float32, 0 for what is no visual token.
    """
    # Of one softmax over all columns, normalised over some, the softmax over these is what is left.
    logits = view.attention_logits(view.last[:, None], "previous")[:, :, 0]
    is_visual = view.is_visual[:, None]
    return softmax_or_zero(logits.masked_fill(~is_visual, -math.inf)).mean(dim=1)
