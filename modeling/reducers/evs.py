"""EVS, Efficient Video Sampling: what a video does not show anew leaves (arXiv 2510.14624).

Between two frames most of a picture stays as it was. Every token is compared with the one at the same place one frame
earlier, all tokens of a video are ranked together by how unlike these are, and the K most unlike stay. The first frame
comes first.
"""

import torch

from ..vision.features import VisionFeatures
from ..vision.novelty import novelty
from .base import ScoringReducer, register_reducer

# The authors' score of a token with none before it: more than any cosine allows.
_FIRST = 255.0


@register_reducer("evs")
class EVSReducer(ScoringReducer):
    """
    Keeps the K tokens of a video with the largest 1 - cosine to the token at the same place one frame earlier, before
    them those of the first frame; among equal ones the earlier.

    The authors keep the first frame whole whatever the budget. Here K is exact, and a K below a frame's tokens keeps
    the first K of them. Behind another reducer a token is compared with the last that is left at its place.
    """

    needs = ("frames",)
    paper = "EVS (arXiv 2510.14624)"

    def scores(self, features: VisionFeatures) -> torch.Tensor:
        return novelty(features.patches, features.positions, features.frame_size, first=_FIRST)
