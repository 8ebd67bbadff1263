"""Random dropping inside the decoder: behind some layer all visual tokens say the same (arXiv 2512.07580).

The information of single visual tokens fades with depth, and from about layer 20 of LLaVA-1.5 on, methods that choose
are no better than chance. So chance is what to compare them with there, and what to put behind one of them: `divprune`
and then `random_layer`.
"""

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..decoder.view import DecoderView
from .base import register_reducer, require_count, require_share
from .one_cut import OneCutReducer


@register_reducer("random_layer")
class RandomLayerReducer(OneCutReducer):
    """
    Drops visual tokens at random before layer k. How many the authors drop there we could not read, and there is no
    code of theirs yet; the own rule (no budget) is ours.

    In training every call draws anew. In evaluation a token's draw depends on `seed` and on its number among the
    prompt's visual tokens at the cut, so that it does not change with what shares the batch.

    Args:
        layer: k, the first layer that sees fewer tokens, in [1, number of layers - 1]; by default 20 of 32, in
            proportion. A budget below k / number of layers is refused.
        ratio: in [0, 1], the share of visual tokens that the own rule drops; it keeps round((1 - ratio) N).
        seed: of the draw in evaluation, a whole number from 0.
    """

    name, published_layer = "random_layer", 20
    paper = "random from the information horizon on (arXiv 2512.07580)"

    def __init__(self, config: AdaVTPConfig, layer: int | None = None, ratio: float = 0.5, seed: int = 0) -> None:
        super().__init__(config, layer)
        require_share("ratio", ratio)
        require_count("seed", seed, least=0)
        self.ratio, self.seed = ratio, seed

    def num_left(self, num_visual: int) -> int:
        return round(num_visual * (1 - self.ratio))

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        if self.training:
            return torch.rand(view.is_visual.shape, device=view.is_visual.device)
        return scattered(view.is_visual.long().cumsum(dim=-1) + 1_000_003 * self.seed % 2**31)


def scattered(numbers: torch.Tensor) -> torch.Tensor:
    """
    For whole numbers from 0 others in [0, 2^24) that look drawn, float32: each the same on every device and whatever
    stands beside it, which a generator of random numbers does not promise. (Two rounds of multiplying and folding.)
    """
    for _ in range(2):
        numbers = (numbers ^ (numbers >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return ((numbers ^ (numbers >> 16)) & 0xFFFFFF).float()
