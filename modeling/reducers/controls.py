"""The controls that every comparison needs: choices that look at nothing.

A method is worth something where it beats them. They are strong, because a tower's tokens have seen each other.
"""

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..budget.top_k import top_k_mask
from ..vision.features import VisionFeatures, fingerprint
from .base import TokenReducer, register_reducer


@register_reducer("random")
class RandomReducer(TokenReducer):
    """
    Keeps a uniformly random set of tokens.

    In training every call draws anew. In evaluation the draw depends on the image's own pixels and `seed` alone, so
    that it is repeatable, differs between images, and does not change with what shares the batch.

    Args:
        seed: of the draw in evaluation.
    """

    needs = ("fingerprint",)

    def __init__(self, config: AdaVTPConfig, seed: int = 0) -> None:
        super().__init__(config)
        self.seed = seed

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        num_images, num_tokens, _ = features.patches.shape
        if self.training:
            scores = torch.rand(num_images, num_tokens, device=features.patches.device)
        else:
            numbers = features.fingerprint
            if numbers is None:
                numbers = torch.tensor([fingerprint(image) for image in features.pixel_values])
            scores = torch.stack([self._scores_of(number, num_tokens) for number in numbers.tolist()])
        return Selection.from_keep(top_k_mask(scores.to(features.patches.device), num_keep))

    def _scores_of(self, number: int, num_tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((number + self.seed * 1_000_003) % 2**63)
        return torch.rand(num_tokens, generator=generator)


@register_reducer("grid")
class GridReducer(TokenReducer):
    """
    Keeps tokens at a uniform stride: of n tokens in raster order those at floor((i + 1/2) n / K), i = 0 .. K - 1.
    """

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        num_tokens, num_keep = features.patches.shape[1], num_keep.to(features.patches.device)
        return Selection.from_keep(at_a_stride(torch.full_like(num_keep, num_tokens), num_keep, num_tokens))


def at_a_stride(num_tokens: torch.Tensor, num_keep: torch.Tensor, num_columns: int) -> torch.Tensor:
    """
    Marks K of n tokens at a uniform stride, those at floor((i + 1/2) n / K), i = 0 .. K - 1; n and K from 0 to n are
    `[num_images]` int64, and the result is `[num_images, num_columns]` bool, of the largest n or more columns.
    """
    num_tokens, num_keep = num_tokens[:, None], num_keep[:, None]
    step = torch.arange(num_columns, device=num_keep.device)[None]
    # Integer arithmetic: a float stride would miss by one for some n and K. Steps beyond K go to a place behind all.
    place = ((2 * step + 1) * num_tokens) // (2 * num_keep).clamp(min=1)
    place = place.masked_fill(step >= num_keep, num_columns)
    is_kept = torch.zeros(len(num_keep), num_columns + 1, dtype=torch.bool, device=num_keep.device)
    return is_kept.scatter(1, place, True)[:, :num_columns]
