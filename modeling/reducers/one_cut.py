"""Reducers inside the decoder whose first cut is before one layer, and those that have no other cut.

Layers 0 to k - 1 of a decoder of L see all N tokens. With K' left behind a single cut the mean over layers is
(k N + (L - k) K') / L, and a budget is solved for K'.
"""

from typing import ClassVar

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..decoder.layer_counts import distinct_cuts, in_proportion, shares_behind, solved_counts
from ..decoder.reducer import DecoderReducer, require_layer


class FirstCutReducer(DecoderReducer):
    """
    Base class of reducers with a parameter `layer`, k: the first layer that sees fewer tokens, in [1, L - 1].

    Attributes:
        name: that the class is registered by.
        published_layer: k of 32 layers where `layer` is `None`, in proportion for other depths.
    """

    has_own_rule = True
    name: ClassVar[str]
    published_layer: ClassVar[int]

    def __init__(self, config: AdaVTPConfig, layer: int | None = None) -> None:
        super().__init__(config)
        if layer is not None:
            require_layer("layer", layer, config)
        self.layer = layer

    def first_cut(self, num_layers: int) -> int:
        """k in a decoder of `num_layers`."""
        return in_proportion(self.published_layer, num_layers) if self.layer is None else self.layer


class OneCutReducer(FirstCutReducer):
    """A reducer with one cut. Write `num_left` and `scores`."""

    def num_left(self, num_visual: int) -> int:
        """How many of the tokens the own rule (no budget) leaves behind the cut."""
        raise NotImplementedError(f"{type(self).__name__} has to define num_left(num_visual).")

    def cuts(self, num_layers: int) -> list[int]:
        return distinct_cuts([self.first_cut(num_layers)], num_layers)

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        cut = self.first_cut(num_layers)
        if num_keep is None:
            return [num_visual if layer < cut else self.num_left(num_visual) for layer in range(num_layers)]
        return solved_counts(
            self.name,
            lambda strength: shares_behind([cut], [1.0 - strength], num_layers),
            num_visual,
            num_keep,
            num_layers,
            "set a lower `layer` or a larger budget.",
        )
