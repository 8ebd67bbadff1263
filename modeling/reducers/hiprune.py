"""HiPrune: middle layers of the tower look at objects, deep ones at the whole (arXiv 2508.00553).

Three kinds of tokens stay. Anchors receive most attention in a middle layer, buffers are their four neighbours, and
registers, which take what is left of the budget, receive most in the layer that made the features. No CLS token and no
question is asked.
"""

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..budget.top_k import top_k_mask
from ..vision.features import VisionFeatures
from .base import TokenReducer, making_layer, register_reducer, require_share


@register_reducer("hiprune")
class HiPruneReducer(TokenReducer):
    """
    Keeps round(alpha K / 5) anchors (no more than K / 5), their neighbours, and registers up to K.

    What ranks is the attention that a token receives, the mean over heads and over all tokens that attend, CLS among
    them. As in the authors' code the neighbours of token i of the whole image are i - 1, i + 1, i - w and i + w, with
    w tokens in a row, each held in [0, N - 1]: a neighbour of a row's first token is the last of the row above.
    Neighbours that a reducer before this one has dropped are not there.

    Args:
        alpha: from 0 to 1, about the share of anchors and buffers.
        layer: tower layer, from 0, that chooses the anchors: any up to the one that made the features. By default the
            ninth of 24, as the authors have it for CLIP, in proportion; for Qwen2.5-VL they have the sixteenth of 32.
    """

    needs = ("attention", "received")
    paper = "HiPrune (arXiv 2508.00553)"

    def __init__(self, config: AdaVTPConfig, alpha: float = 0.1, layer: int | None = None) -> None:
        super().__init__(config)
        require_share("alpha", alpha)
        making = making_layer(config)
        if layer is not None and (isinstance(layer, bool) or layer not in range(making + 1)):
            raise ValueError(f"`layer` is {layer!r}; allowed are 0 to {making}, or None for the ninth of 24.")
        self.alpha, self.layer = alpha, layer

    @property
    def middle_layer(self) -> int:
        """The layer that chooses the anchors."""
        if self.layer is not None:
            return self.layer
        return min(max(round(self.config.num_tower_layers * 9 / 24), 1) - 1, making_layer(self.config))

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layer that chooses the anchors, and the one that made the features."""
        return tuple(sorted({self.middle_layer, making_layer(self.config)}))

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        middle, deep = (
            features.attention[layer].received.mean(dim=1) for layer in (self.middle_layer, making_layer(self.config))
        )
        num_keep = num_keep.to(middle.device)
        # In the precision of Python's own numbers, and like it to the even one of two equally near.
        num_anchors = (num_keep.cpu().double() * self.alpha / 5).round().long().to(middle.device)
        anchors = top_k_mask(middle, num_anchors.minimum(num_keep // 5))
        with_buffers = with_neighbours(anchors, features.positions, features.grid)
        # An attention is at most 1.
        return Selection.from_keep(top_k_mask(deep + 2.0 * with_buffers, num_keep))


def with_neighbours(marked: torch.Tensor, positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Marks tokens `[num_images, num_tokens]` bool and their four neighbours, by their places `[num_images, num_tokens]`
    in images of so many rows and columns.
    """
    num_patches, width = grid[0] * grid[1], grid[1]
    places = positions[..., None] + torch.tensor([0, -1, 1, -width, width], device=marked.device)
    # What is near nothing that is marked goes to one place more.
    places = places.clamp(0, num_patches - 1).masked_fill(~marked[..., None], num_patches).flatten(1)
    is_near = torch.zeros(len(marked), num_patches + 1, dtype=torch.bool, device=marked.device)
    return is_near.scatter(1, places, True).gather(1, positions)
