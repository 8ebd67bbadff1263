"""Progressive compression of a video: the first frame says most, and later ones what they add.

After PVC, progressive visual token compression (arXiv 2412.09613), in a form that needs no training. PVC trains its
tower anew: causal attention over time and a conditioning on the frame's number make every frame encode what the ones
before have not, and each is then shuffled into equally many tokens. Here the tower stays as it is. The budget falls
from frame to frame, and a later frame keeps those of its own tokens that are least like what has been kept before.
"""

import math

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..budget.token_budget import shared_by_weight
from ..budget.top_k import top_k_mask
from ..vision.features import VisionFeatures
from .base import TokenReducer, directions, register_reducer
from .controls import at_a_stride


@register_reducer("progressive")
class ProgressiveReducer(TokenReducer):
    """
    Shares a video's K tokens among its frames t = 0, 1, ... in proportion to (1 + t)^-decay of what each has, at least
    one and at most all. The first frame keeps tokens at a uniform stride; then frame by frame those stay whose largest
    cosine to any token kept so far is smallest. With fewer tokens than frames the first K frames keep one each.

    It may stand before or behind a reducer that looks at single frames.

    Args:
        decay: how fast the budget falls, 0 (equal shares) or more.
    """

    needs = ("frames",)
    paper = "after PVC (arXiv 2412.09613)"

    def __init__(self, config: AdaVTPConfig, decay: float = 1.0) -> None:
        super().__init__(config)
        is_number = isinstance(decay, int | float) and not isinstance(decay, bool)
        if not is_number or not 0 <= decay < math.inf:
            raise ValueError(f"`decay` is {decay!r}; allowed are finite numbers from 0.")
        self.decay = decay

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        pairs = zip(directions(features.patches), features.positions // features.frame_size, num_keep, strict=True)
        return Selection.from_keep(torch.stack([self.kept(*pair) for pair in pairs]))

    def kept(self, tokens: torch.Tensor, frame: torch.Tensor, num_keep: torch.Tensor) -> torch.Tensor:
        """Of one video's tokens `[num_tokens, width]`, of frames `[num_tokens]`, those that stay, bool."""
        numbers, sizes = frame.unique(return_counts=True)
        counts = shared_by_weight(int(num_keep), sizes * (1 + numbers.double()) ** -self.decay, sizes)
        keep = torch.zeros_like(frame, dtype=torch.bool)
        for number, size, count in zip(numbers.tolist(), sizes.tolist(), counts, strict=True):
            own = (frame == number).nonzero()[:, 0]
            if not bool(keep.any()):
                chosen = at_a_stride(torch.tensor([size]), count[None].cpu(), size)[0].to(own.device)
            else:
                chosen = top_k_mask(-(tokens[own] @ tokens[keep].T).amax(dim=1)[None], count[None])[0]
            keep[own[chosen]] = True
        return keep
