"""DART: drop what duplicates, whatever its importance.

A handful of pivot tokens, those with the largest keys, stand for what is seen already; each pivot in turn takes the
tokens that are least like it, and what nobody takes is nearest to a duplicate and leaves (arXiv 2502.11494). No
attention weights are read. The paper cuts inside the decoder, before layer 2, where text tokens are pivots too:
`dart_layer`. `dart` is our reading of the same rule for the place between projector and decoder.
"""

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..budget.top_k import top_k_mask
from ..decoder.view import DecoderView
from ..vision.features import VisionFeatures
from .base import TokenReducer, directions, register_reducer, require_count, take_tokens
from .one_cut import OneCutReducer


@register_reducer("dart")
class DARTReducer(TokenReducer):
    """
    DART on projected tokens, before the decoder.

    Ours, after the paper's rule: keys are those of the tower layer that made the features, tokens are compared by the
    cosine of their projections, and all pivots are visual.

    Args:
        pivots: how many tokens are pivots, 1 or more; fewer where fewer are kept.
    """

    stage = "projector"
    needs = ("attention",)
    paper = "DART (arXiv 2502.11494)"

    def __init__(self, config: AdaVTPConfig, pivots: int = 8) -> None:
        super().__init__(config)
        require_count("pivots", pivots, least=1)
        self.pivots = pivots

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        norms = key_norms(features.attention[self.attention_layers[0]].keys.detach())
        is_image = torch.ones_like(norms, dtype=torch.bool)
        tokens = features.patches.detach()
        pivots, is_pivot = pivot_tokens(norms, is_image, ~is_image, num_keep, self.pivots, text_pivots=0)
        return Selection.from_keep(least_like_pivots(tokens, is_image, pivots, is_pivot, num_keep))


@register_reducer("dart_layer")
class DARTLayerReducer(OneCutReducer):
    """
    DART inside the decoder, as published: one cut, before `layer`.

    The published code takes pivots in the order of a Python set and floor(K / 8) tokens for each, so that asking for
    128 keeps 132. Here pivots have a fixed order, image pivots by falling norm and then text pivots, and exactly K
    tokens are kept: image pivots, and the rest split over all pivots as evenly as can be, earlier ones taking more.

    Which tokens are chosen depends on how many, so the choice is made in `reduce`, and `scores` are the norms that
    rank the pivots. By these a token leaves where the exact mean over layers wants one less between cuts.

    Args:
        layer: the decoder layer before which tokens leave, 1 or more and below the number of layers; by default 2 of
            32, in proportion.
        keep: visual tokens from that layer on, 0 or more, where no budget says otherwise.
        image_pivots: 1 or more; fewer where fewer tokens are kept.
        text_pivots: of the question behind the image, 0 or more; fewer where it is shorter.
    """

    name, published_layer = "dart_layer", 2
    paper = "DART (arXiv 2502.11494)"

    def __init__(
        self,
        config: AdaVTPConfig,
        layer: int | None = None,
        keep: int = 128,
        image_pivots: int = 4,
        text_pivots: int = 4,
    ) -> None:
        super().__init__(config, layer)
        require_count("keep", keep, least=0)
        require_count("image_pivots", image_pivots, least=1)
        require_count("text_pivots", text_pivots, least=0)
        self.keep, self.image_pivots, self.text_pivots = keep, image_pivots, text_pivots

    def num_left(self, num_visual: int) -> int:
        return min(self.keep, num_visual)

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        """The L1 norm of every column's key in the layer before the cut, its position turned in. `[batch, n]`."""
        return key_norms(view.keys("previous"))

    def reduce(
        self, view: DecoderView, scores: torch.Tensor, num_keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns are compared as the decoder's last norm makes them."""
        pivots, is_pivot = pivot_tokens(
            scores, view.is_visual, view.is_question, num_keep, self.image_pivots, self.text_pivots
        )
        kept = least_like_pivots(view.norm(view.hidden_states), view.is_visual, pivots, is_pivot, num_keep)
        return ~view.is_visual | kept, view.hidden_states


def key_norms(keys: torch.Tensor) -> torch.Tensor:
    """The L1 norm of each token's keys `[batch, heads, num_tokens, head_dim]`, all heads together."""
    return keys.float().abs().sum(dim=(1, 3))


def pivot_tokens(
    norms: torch.Tensor,
    is_image: torch.Tensor,
    is_text: torch.Tensor,
    num_keep: torch.Tensor,
    image_pivots: int,
    text_pivots: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The tokens with the largest keys: first image tokens, then text tokens, each by falling norm.

    Args:
        norms: `[batch, num_tokens]`.
        is_image, is_text: `[batch, num_tokens]` bool.
        num_keep: `[batch]` int64, image tokens that will be kept; there are no more image pivots than that.
        image_pivots, text_pivots: how many there are at most.

    Returns:
        Their index `[batch, num_pivots]` int64, and whether the row has so many, `[batch, num_pivots]` bool.
    """
    index, is_pivot = [], []
    num_image = num_keep.to(norms.device).clamp(max=image_pivots)
    num_text = is_text.sum(dim=-1).clamp(max=text_pivots)
    for allowed, count, most in ((is_image, num_image, image_pivots), (is_text, num_text, text_pivots)):
        # A norm is never negative, so that whatever is not allowed comes last.
        ranked = norms.masked_fill(~allowed, -1.0).argsort(dim=-1, descending=True, stable=True)[:, :most]
        index.append(ranked)
        is_pivot.append(torch.arange(ranked.shape[1], device=norms.device) < count[:, None])
    return torch.cat(index, dim=-1), torch.cat(is_pivot, dim=-1)


def least_like_pivots(
    tokens: torch.Tensor, is_image: torch.Tensor, pivots: torch.Tensor, is_pivot: torch.Tensor, num_keep: torch.Tensor
) -> torch.Tensor:
    """
    Image pivots, and the tokens that are least like one of the pivots: each pivot in turn takes its share from what
    the pivots before it have left, by rising cosine; of equal ones it takes the earlier.

    Args:
        tokens: `[batch, num_tokens, hidden_size]`.
        is_image: `[batch, num_tokens]` bool, tokens that may be taken.
        pivots: `[batch, num_pivots]` int64.
        is_pivot: `[batch, num_pivots]` bool, those that count.
        num_keep: `[batch]` int64, from the number of image pivots to the number of image tokens.

    Returns:
        `[batch, num_tokens]` bool, true for exactly `num_keep` image tokens.
    """
    unit = directions(tokens)
    cosines = take_tokens(unit, pivots) @ unit.transpose(1, 2)
    kept = torch.zeros(is_image.shape, dtype=torch.long, device=tokens.device)
    kept = (kept.scatter_add(1, pivots, is_pivot.long()) > 0) & is_image
    shares = even_shares(num_keep.to(tokens.device) - kept.sum(dim=-1), is_pivot)
    for pivot in range(pivots.shape[1]):
        # Above every cosine is what cannot be taken; so the share ends before it.
        unlike = -cosines[:, pivot].masked_fill(kept | ~is_image, 3.0)
        kept = kept | top_k_mask(unlike, shares[:, pivot])
    return kept


def even_shares(total: torch.Tensor, takes_part: torch.Tensor) -> torch.Tensor:
    """Splits whole numbers `[batch]` evenly over what takes part `[batch, num_parts]`; earlier ones get more."""
    num_parts = takes_part.sum(dim=-1).clamp(min=1)
    rank = takes_part.cumsum(dim=-1) - 1
    share = (total // num_parts)[:, None] + (rank < (total % num_parts)[:, None]).long()
    return share * takes_part
