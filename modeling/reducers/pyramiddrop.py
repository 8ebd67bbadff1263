"""PyramidDrop: visual tokens get more redundant layer by layer, so a share of them leaves at the end of every stage.

The decoder is cut into four stages of equal depth, and each sees half the tokens of the one before. At a boundary the
instruction's last token asks with the query of the layer to come: who gets least of its attention leaves.
"""

import math
from collections.abc import Sequence

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..decoder.layer_counts import distinct_cuts, in_proportion, shares_behind, solved_counts
from ..decoder.reducer import DecoderReducer, require_layer
from ..decoder.view import DecoderView, attention_of_last
from .base import register_reducer


@register_reducer("pyramiddrop")
class PyramidDropReducer(DecoderReducer):
    """
    PyramidDrop (arXiv 2410.17247): visual tokens leave before layers 8, 16 and 24 of 32 until 1/2, 1/4 and 1/8 of the
    original number are left, ranked by the attention of the last instruction token in the layer behind the cut.

    That attention is computed ahead from the next layer's own norm, projections and rotary positions, softmax in
    float32, mean over heads, as in the official code. The paper's best figures are of a model trained this way. The
    official code counts positions again at every stage; here they are the model's to say (`visual_position_ids`).

    A budget keeps the pyramid and changes its steepness: the stages' shares become r_s ^ t with one t for all, which
    for the defaults is a common factor per stage, and t is solved so that the mean over layers is exact.

    Args:
        layers: the first layers that see fewer tokens, never falling, in [1, number of layers - 1]; by default a
            quarter, a half and three quarters of the depth. In a decoder too shallow for three cuts several fall on
            one layer and act there one after another. A budget below what the layers before the first cost is refused.
        ratios: one for each cut, the share of the original tokens that is left behind it, falling, between 0 and 1.
    """

    has_own_rule = True
    paper = "PyramidDrop (arXiv 2410.17247)"

    def __init__(
        self,
        config: AdaVTPConfig,
        layers: Sequence[int] | None = None,
        ratios: Sequence[float] = (0.5, 0.25, 0.125),
    ) -> None:
        super().__init__(config)
        self.layers, self.ratios = layers if layers is None else as_list("layers", layers), as_list("ratios", ratios)
        for layer in self.layers or []:
            require_layer("layers", layer, config)
        if self.layers is not None and (self.layers != sorted(self.layers) or len(self.layers) != len(self.ratios)):
            raise ValueError(
                f"`layers` is {self.layers!r}; allowed are as many ascending layers as there are `ratios`, "
                f"{len(self.ratios)}."
            )
        require_falling_shares("ratios", self.ratios)
        if self.layers is None and len(self.ratios) != 3:
            raise ValueError(f"`ratios` is {self.ratios!r}; without `layers` there are three cuts.")

    def stage_cuts(self, num_layers: int) -> list[int]:
        """The cut behind each stage; where the decoder is shallow, several on one layer."""
        if self.layers is not None:
            return self.layers
        return [in_proportion(layer, num_layers) for layer in (8, 16, 24)]

    def cuts(self, num_layers: int) -> list[int]:
        return distinct_cuts(self.stage_cuts(num_layers), num_layers)

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        cuts = self.stage_cuts(num_layers)
        if num_keep is not None:
            return pyramid_counts("pyramiddrop", cuts, self.ratios, num_visual, num_keep, num_layers)
        # A share of 0.29 times 100 tokens is 28.999...96, and means 29.
        shares = shares_behind(cuts, self.ratios, num_layers)
        return [math.floor(num_visual * share + 1e-6) for share in shares]

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        return attention_of_last(view, "next")


def pyramid_counts(
    name: str, cuts: Sequence[int], ratios: Sequence[float], num_visual: int, num_keep: int, num_layers: int
) -> list[int]:
    """
    Counts behind several cuts in the shape of a published schedule, with the mean that a budget asks for.

    With the published shares r_1 > r_2 > ... the shares are r_s ^ t = lambda ^ e_s, e_s = log r_s / log r_1 and lambda
    = r_1 ^ t in [0, 1]: t = 0 drops nothing, t = 1 is the published schedule, and as t grows everything leaves at the
    first cut. Ratios 1/2, 1/4, 1/8 give lambda, lambda^2, lambda^3.
    """
    exponents = [math.log(ratio) / math.log(ratios[0]) for ratio in ratios]
    return solved_counts(
        name,
        lambda strength: shares_behind(cuts, [(1.0 - strength) ** exponent for exponent in exponents], num_layers),
        num_visual,
        num_keep,
        num_layers,
        "set lower `layers`.",
    )


def as_list(parameter: str, values: Sequence[float]) -> list[float]:
    """The values of a parameter; a `ValueError` if they are no list or tuple of numbers."""
    if not isinstance(values, list | tuple) or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"`{parameter}` is {values!r}; allowed is a list of numbers.")
    return list(values)


def require_falling_shares(parameter: str, shares: Sequence[float]) -> None:
    """Raises a `ValueError` if the shares do not fall from below 1 to above 0."""
    bounded = [1.0, *shares, 0.0]
    if not shares or any(before <= after for before, after in zip(bounded, bounded[1:], strict=False)):
        raise ValueError(f"`{parameter}` is {list(shares)!r}; allowed are falling shares between 1 and 0.")
