"""Head threshold: every attention head votes with the same weight on which visual tokens matter.

A head that hardly looks at the image says as much about where in it to look as one that does nothing else. So each
head's attention to the visual tokens is first made to sum to 1, then averaged over heads; what lies above a percentile
stays.
"""

import math

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..decoder.layer_counts import distinct_cuts, in_proportion
from ..decoder.reducer import DecoderReducer, require_layer
from ..decoder.view import DecoderView, softmax_or_zero
from .base import register_reducer
from .fastv import one_cut_counts


@register_reducer("head_threshold")
class HeadThresholdReducer(DecoderReducer):
    """
    Multi-head importance with a percentile threshold, from notes on dynamic reduction; no paper or code of its own is
    known to us. The notes leave open which row of attention is meant and where it is read: here it is the last prompt
    token's row of layer k - 1, as in FastV.

    A threshold at the percentile p keeps as many tokens as lie strictly above it, n - 1 - floor(p (n - 1) / 100) of n
    different ones; so many are kept, the earlier of equal ones, whatever the values.

    Args:
        layer: k, the first layer that sees fewer tokens, in [1, number of layers - 1]; by default 2 of 32, in
            proportion.
        percentile: p in [0, 100], where the own rule (no budget) puts the threshold.

    Raises:
        ValueError: if a parameter is not allowed, or a budget is below k / L.
    """

    has_own_rule = True

    def __init__(self, config: AdaVTPConfig, layer: int | None = None, percentile: float = 50.0) -> None:
        super().__init__(config)
        if layer is not None:
            require_layer("layer", layer, config)
        if not 0.0 <= percentile <= 100.0:
            raise ValueError(f"`percentile` is {percentile!r}; allowed are 0 to 100.")
        self.layer, self.percentile = layer, percentile

    def first_cut(self, num_layers: int) -> int:
        """k in a decoder of `num_layers`."""
        return in_proportion(2, num_layers) if self.layer is None else self.layer

    def cuts(self, num_layers: int) -> list[int]:
        """See [`DecoderReducer.cuts`]."""
        return distinct_cuts([self.first_cut(num_layers)], num_layers)

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        """See [`DecoderReducer.layer_counts`]."""
        num_left = num_above_percentile(num_visual, self.percentile)
        return one_cut_counts("head_threshold", self.first_cut(num_layers), num_left, num_visual, num_keep, num_layers)

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        """See [`DecoderReducer.scores`]."""
        return importance_of_equal_heads(view)


def num_above_percentile(num_tokens: int, percentile: float) -> int:
    """How many of `num_tokens` different values lie strictly above their percentile, linearly interpolated."""
    return max(0, num_tokens - 1 - math.floor(percentile * (num_tokens - 1) / 100))


def importance_of_equal_heads(view: DecoderView) -> torch.Tensor:
    """
    The importance of visual token v, mean over heads h of a_hv / sum_u a_hu, with a_h the row of attention of the
    column that asks and u over the visual tokens.

    Returns:
        `[batch, n]` float32, 0 for what is no visual token.
    """
    # Of one softmax over all columns, normalised over some, the softmax over these is what is left.
    logits = view.attention_logits(view.last[:, None], "previous")[:, :, 0]
    is_visual = view.is_visual[:, None]
    return softmax_or_zero(logits.masked_fill(~is_visual, -math.inf)).mean(dim=1)
