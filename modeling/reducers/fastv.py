"""FastV: behind its first layers a language model hardly looks at most visual tokens, so they leave after two.

What layer k - 1 paid attention to decides which visual tokens layers k and up see.
"""

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..decoder.view import DecoderView, attention_of_last
from .base import register_reducer, require_choice, require_share
from .one_cut import OneCutReducer


@register_reducer("fastv")
class FastVReducer(OneCutReducer):
    """
    FastV (arXiv 2403.06764): ranks visual tokens by the attention they get in layer k - 1 and drops the lowest before
    layer k.

    The paper's score is the mean attention that a visual token receives from all other tokens. All versions of the
    official code use the last prompt token's row instead, and so does the default. Original positions are kept.

    Args:
        layer: k, the first layer that sees fewer tokens, in [1, number of layers - 1]; by default 2 of 32, in
            proportion. A budget below k / number of layers is refused.
        ratio: R in [0, 1], the share of visual tokens that the own rule (no budget) drops; it keeps round((1 - R) N).
        rows: `"last"`, the attention of the last prompt token, or `"all"`, the mean over all other tokens.
    """

    name, published_layer = "fastv", 2
    paper = "FastV (arXiv 2403.06764)"

    def __init__(self, config: AdaVTPConfig, layer: int | None = None, ratio: float = 0.5, rows: str = "last") -> None:
        super().__init__(config, layer)
        require_share("ratio", ratio)
        require_choice("rows", rows, ("last", "all"))
        self.ratio, self.rows = ratio, rows

    def num_left(self, num_visual: int) -> int:
        return round(num_visual * (1 - self.ratio))

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        return attention_of_last(view, "previous") if self.rows == "last" else attention_from_others(view)


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
