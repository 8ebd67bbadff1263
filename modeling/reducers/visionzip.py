"""VisionZip: dominant tokens as they are, and a few contextual ones merged from the rest (arXiv 2412.04467).

A small part of the patches holds most of CLS's attention; they are kept, and so is CLS itself. What they leave out is
not thrown away: tokens at a uniform stride among the rest become targets, and every other one is merged into the
target whose key it resembles most.
"""

import math

import torch
from torch.nn import functional

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..budget.top_k import top_k_mask
from ..vision.features import VisionFeatures
from .base import TokenReducer, directions, register_reducer, require_choice, require_share, take_tokens
from .cls_attention import cls_scores


def num_contextual(num_kept: int, contextual: float) -> int:
    """
    Contextual tokens among K, floor(contextual K).

    The default share of 0.16 gives the paper's 10 of 64, 20 of 128 and 30 of 192. There is at least one from K = 3,
    where CLS and a dominant patch leave room for it, if the share is not 0; and at most K - 1, because CLS, or the
    best patch, always stays.
    """
    # Rounded first: 0.29 x 100 is 28.999999999999996.
    count = math.floor(round(contextual * num_kept, 6))
    least = 1 if contextual > 0 and num_kept >= 3 else 0
    return min(max(count, least), num_kept - 1)


def merged_into_targets(
    tokens: torch.Tensor, metric: torch.Tensor, is_target: torch.Tensor, average: bool
) -> torch.Tensor:
    """
    Target tokens, each with those merged into it that have the largest cosine to it: x_t + mean_{j -> t} x_j.

    That is the sum of a token and a mean, so about twice as long as a token; a target that nothing goes to stays what
    it is. Of targets that are equally near the first is taken.

    Args:
        tokens: x, `[num_images, num_rest, hidden_size]` float32.
        metric: `[num_images, num_rest, width]`, what is compared.
        is_target: `[num_rest]` bool, the same of every image.
        average: whether to take the mean of target and merged tokens instead, (x_t + sum x_j) / (1 + their number).
    """
    unit = directions(metric)
    cosine = unit[:, ~is_target] @ unit[:, is_target].transpose(1, 2)
    goes_to = functional.one_hot(cosine.argmax(dim=-1), cosine.shape[-1]).to(tokens.dtype)
    total = goes_to.transpose(1, 2) @ tokens[:, ~is_target]
    count = goes_to.sum(dim=1)[..., None]
    targets = tokens[:, is_target]
    return (targets + total) / (1 + count) if average else targets + total / count.clamp(min=1)


@register_reducer("visionzip")
class VisionZipReducer(TokenReducer):
    """
    Keeps CLS, the patches with the largest CLS attention, and contextual tokens merged from the others; K in all.

    With c contextual tokens these are CLS, K - c - 1 dominant patches, and c targets among the M other patches: every
    floor(M / c)-th in spatial order, the first c of them. Attention and keys are those of the layer that made the
    features, and what is compared are the keys averaged over heads. For K = 1 only CLS is left, for K = 2 CLS and the
    best patch.

    If the model keeps CLS anyway (`config.keep_cls`) or its family shows none, it is not put in the place of a patch,
    and there is one more dominant patch.

    Args:
        contextual: share of the tokens that are contextual, from 0 to 1; see [`num_contextual`].
        average: whether a contextual token is the mean of all that went into it. The authors' code adds the mean of
            the others to the target, and so by default do we.
        order: `"spatial"`: patches stand at their own place, contextual tokens at their target's, and CLS at the first
            patch that is free. `"official"`: CLS, the dominant patches, the contextual tokens.
    """

    needs = ("cls", "attention")
    ranks_by_cls = True
    one_count = True
    paper = "VisionZip (arXiv 2412.04467)"

    def __init__(
        self, config: AdaVTPConfig, contextual: float = 0.16, average: bool = False, order: str = "spatial"
    ) -> None:
        super().__init__(config)
        require_share("contextual", contextual)
        require_choice("average", average, (True, False))
        require_choice("order", order, ("spatial", "official"))
        self.contextual, self.average, self.order = contextual, average, order

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        patches, attention = features.patches, features.attention[self.attention_layers[0]]
        num_images, num_tokens, hidden_size = patches.shape
        num_targets = num_contextual(int(num_keep[0]), self.contextual)
        num_cls = 0 if self.config.keep_cls or features.cls is None else 1
        num_dominant = int(num_keep[0]) - num_targets - num_cls
        dominant, rest = split_by_score(cls_scores(attention), num_dominant)
        is_target = target_columns(rest.shape[1], num_targets, rest.device)
        tokens, index = [take_tokens(patches, dominant)], [dominant]
        if num_targets > 0:
            metric = take_tokens(attention.keys.float().mean(dim=1), rest)
            merged = merged_into_targets(take_tokens(patches, rest).float(), metric, is_target, self.average)
            tokens, index = [*tokens, merged.to(patches.dtype)], [*index, rest[:, is_target]]
        if num_cls > 0:
            tokens, index = [features.cls, *tokens], [rest[:, ~is_target][:, :1], *index]
        return Selection.from_tokens(
            torch.cat(tokens, dim=1), torch.cat(index, dim=1), num_tokens, spatial_order=self.order == "spatial"
        )


def split_by_score(scores: torch.Tensor, num_best: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the `num_best` tokens with the largest scores and of all others, both in spatial order."""
    best_first = (~top_k_mask(scores, num_best)).to(torch.int8).argsort(dim=-1, stable=True)
    return best_first[:, :num_best], best_first[:, num_best:]


def target_columns(num_rest: int, num_targets: int, device: torch.device) -> torch.Tensor:
    """Which of M tokens are targets: every floor(M / c)-th from the first, c of them. `[num_rest]` bool."""
    is_target = torch.zeros(num_rest, dtype=torch.bool, device=device)
    if num_targets > 0:
        stride = num_rest // num_targets
        is_target[: stride * num_targets : stride] = True
    return is_target
