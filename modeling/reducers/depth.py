"""Depth-based pruning: the deeper the layer, the fewer visual tokens it sees, by a formula that looks at nothing else.

A step down at one layer, then a straight line to the last. Which tokens leave is FastV's question: those that the last
prompt token pays least attention to.
"""

import math

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..decoder.layer_counts import distinct_cuts, in_proportion, solved_counts
from ..decoder.view import DecoderView, attention_of_last
from .base import register_reducer, require_share
from .one_cut import FirstCutReducer


@register_reducer("depth")
class DepthReducer(FirstCutReducer):
    """
    Depth-based pruning, from notes on dynamic reduction that give a formula and no source:
    C(l) = 1 - H(l - 4) P_4 - H(l - 4) R', the share of visual tokens that layer l of 32 sees, H the Heaviside step.

    As it stands that is one step. To be gradual R' has to depend on the layer: here R'(l) = gamma (l - 4) / (L - 5),
    from 0 at the first layer that drops to gamma at the last. H(0) = 1, so that layer 4 drops already, and C is held
    in [0, 1]. The notes name neither P_4 nor gamma; with the defaults C falls from 3/4 to 1/4, a mean of 0.56 of the
    tokens, near the share of FLOPs (58 %) that the notes report.

    The notes do not say how tokens are scored either: here by the last prompt token's attention in the layer before,
    mean over heads, as in FastV. Tokens leave before every layer, and they are scored anew at the first of them and
    at each quarter of the decoder's depth behind it, because scoring costs a projection of all keys; in between the
    last scores decide.

    A budget scales P_4 and R' by one common factor, solved so that the mean over layers is exact.

    Args:
        layer: the first layer that sees fewer tokens, in [1, number of layers - 1]; by default 4 of 32, in proportion.
            A budget below what the layers before it cost is refused.
        first_drop: P_4 in [0, 1], the share dropped there.
        further_drop: gamma in [0, 1], the further share dropped from there to the last layer.
    """

    name, published_layer = "depth", 4

    def __init__(
        self,
        config: AdaVTPConfig,
        layer: int | None = None,
        first_drop: float = 0.25,
        further_drop: float = 0.5,
    ) -> None:
        super().__init__(config, layer)
        require_share("first_drop", first_drop)
        require_share("further_drop", further_drop)
        if first_drop == further_drop == 0.0:
            raise ValueError(
                "`first_drop` and `further_drop` are 0, so that nothing is ever dropped; raise one of them."
            )
        self.first_drop, self.further_drop = first_drop, further_drop

    def cuts(self, num_layers: int) -> list[int]:
        first = self.first_cut(num_layers)
        quarters = [in_proportion(layer, num_layers) for layer in (8, 16, 24)]
        return distinct_cuts([first, *(layer for layer in quarters if layer > first)], num_layers)

    def drops(self, num_layers: int) -> list[float]:
        """H(l - k) (P + R'(l)) of every layer l, the share that the own rule drops, before it is held in [0, 1]."""
        first = self.first_cut(num_layers)
        depth = max(1, num_layers - 1 - first)
        return [
            0.0 if layer < first else self.first_drop + self.further_drop * (layer - first) / depth
            for layer in range(num_layers)
        ]

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        drops = self.drops(num_layers)
        if num_keep is None:
            return [math.floor(num_visual * max(0.0, 1.0 - drop) + 0.5) for drop in drops]
        # At this factor every layer that drops at all drops everything.
        largest_factor = 1.0 / min((drop for drop in drops if drop > 0.0), default=1.0)
        return solved_counts(
            self.name,
            lambda strength: [max(0.0, 1.0 - strength * largest_factor * drop) for drop in drops],
            num_visual,
            num_keep,
            num_layers,
            "set a lower `layer`, or a `first_drop` above 0.",
        )

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        return attention_of_last(view, "previous")
