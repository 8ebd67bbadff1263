"""FastV: behind its first layers a language model hardly looks at most visual tokens, so they leave after two.

Layers 0 to k - 1 see everything. What layer k - 1 paid attention to decides which visual tokens layers k and up see.
With K' left behind the cut, the mean over layers is (k N + (L - k) K') / L, and a budget is solved for K'.
"""

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..decoder.layer_counts import distinct_cuts, in_proportion, shares_behind, solved_counts
from ..decoder.reducer import DecoderReducer, require_in, require_layer
from ..decoder.view import DecoderView, attention_of_last
from .base import register_reducer


@register_reducer("fastv")
class FastVReducer(DecoderReducer):
    """
    FastV (arXiv 2403.06764): ranks visual tokens by the attention they get in layer k - 1 and drops the lowest before
    layer k.

    The paper's score is the mean attention that a visual token receives from all other tokens. All versions of the
    official code use the last prompt token's row instead, and so does the default. Original positions are kept.

    Args:
        layer: k, the first layer that sees fewer tokens, in [1, number of layers - 1]; by default 2 of 32, in
            proportion.
        ratio: R in [0, 1], the share of visual tokens that the own rule (no budget) drops; it keeps round((1 - R) N).
        rows: `"last"`, the attention of the last prompt token, or `"all"`, the mean over all other tokens.

    Raises:
        ValueError: if a parameter is not allowed, or a budget is below k / L.
    """

    has_own_rule = True
    paper = "FastV (arXiv 2403.06764)"

    def __init__(self, config: AdaVTPConfig, layer: int | None = None, ratio: float = 0.5, rows: str = "last") -> None:
        super().__init__(config)
        if layer is not None:
            require_layer("layer", layer, config)
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"`ratio` is {ratio!r}; allowed are 0 to 1, the share of visual tokens that is dropped.")
        require_in("rows", rows, ("last", "all"))
        self.layer, self.ratio, self.rows = layer, ratio, rows

    def first_cut(self, num_layers: int) -> int:
        """k in a decoder of `num_layers`."""
        return in_proportion(2, num_layers) if self.layer is None else self.layer

    def cuts(self, num_layers: int) -> list[int]:
        """See [`DecoderReducer.cuts`]."""
        return distinct_cuts([self.first_cut(num_layers)], num_layers)

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        """See [`DecoderReducer.layer_counts`]."""
        num_left = round(num_visual * (1 - self.ratio))
        return one_cut_counts("fastv", self.first_cut(num_layers), num_left, num_visual, num_keep, num_layers)

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        """See [`DecoderReducer.scores`]."""
        return attention_of_last(view, "previous") if self.rows == "last" else attention_from_others(view)


def one_cut_counts(
    name: str, cut: int, num_left: int, num_visual: int, num_keep: int | None, num_layers: int
) -> list[int]:
    """
    Counts of a schedule with one cut.

    Args:
        name: of the reducer.
        cut: the first layer that sees fewer tokens.
        num_left: how many it sees without a budget.
        num_visual: visual tokens that enter layer 0.
        num_keep: their mean number over layers, or `None`.
        num_layers: of the decoder.
    """
    if num_keep is None:
        return [num_visual if layer < cut else num_left for layer in range(num_layers)]
    return solved_counts(
        name,
        lambda strength: shares_behind([cut], [1.0 - strength], num_layers),
        num_visual,
        num_keep,
        num_layers,
        "set a lower `layer`.",
    )


def attention_from_others(view: DecoderView) -> torch.Tensor:
    """
    The mean attention that each column gets in the previous layer from all other real columns of its prompt (0 from
    those before it, which cannot see it), mean over heads, `[batch, n]` float32.
    """
    batch, length = view.is_real.shape
    rows = torch.arange(length, device=view.is_real.device).expand(batch, -1)
    num_others = (view.is_prompt.sum(dim=-1, keepdim=True) - 1).clamp(min=1)
    weights = (view.is_prompt / num_others)[:, None]
    return view.attention(rows, "previous").received(weights, from_others=True).mean(dim=1)
