"""AIM: tokens that look alike are merged before the language model, and what is left is dropped inside it.

Merging is ToMe's matching, repeated on the tower's output: every other token looks for its likeness among the rest. In
the decoder, tokens are ranked by PageRank: a token matters if tokens that matter attend to it. Both halves can be used
alone, as `"aim_merge"` and `"aim_prune"`.
"""

import math

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..decoder.layer_counts import solved_counts
from ..decoder.view import DecoderView
from ..vision.features import VisionFeatures
from .base import TokenReducer, feature_layer_index, register_reducer, require_choice, require_share, take_tokens
from .one_cut import FirstCutReducer
from .tome import bipartite_matching

_PAPER = "AIM (arXiv 2412.03248)"
_TEMPERATURE = 0.1
_ITERATIONS = 5


@register_reducer("aim_merge")
class AimMerge(TokenReducer):
    """
    The first half of AIM (arXiv 2412.03248): rounds of bipartite merging between tower and projector, at most half of
    the tokens a round, until K are left.

    Tokens are compared by the cosine of their keys, all heads side by side, in the tower layer above the features (or
    in the top layer, where there is none above). A merged token is the plain mean of a token and those that joined it
    in the round; unlike in ToMe, rounds do not count how many patches a token stands for already. Keys are merged as
    their tokens are.

    Args:
        order: `"spatial"`, a token stands where the token stood that the others joined, or `"official"`, in the order
            that the matching leaves behind: tokens that did not merge by falling likeness, then the others. It is only
            the order of the output; rounds always continue in the official one.
        share: in (0, 1], of the tokens that the own rule (no budget) leaves; 43.75 % is 252 of 576.
    """

    stage = "vision"
    needs = ("attention",)
    has_own_rule = True
    one_count = True
    paper = _PAPER

    def __init__(self, config: AdaVTPConfig, order: str = "spatial", share: float = 0.4375) -> None:
        super().__init__(config)
        require_choice("order", order, ("spatial", "official"))
        require_share("share", share, above_zero=True)
        self.order, self.share = order, share

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The tower layer above the one that made the features, or the top one."""
        return (min(feature_layer_index(self.config), self.config.num_tower_layers - 1),)

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor | None) -> Selection:
        num_images, num_tokens, _ = features.patches.shape
        target = merged_count(num_tokens, self.share) if num_keep is None else int(num_keep[0])
        tokens = features.patches.float()
        metric = features.attention[self.attention_layers[0]].keys.transpose(1, 2).flatten(2).float()
        place = torch.arange(num_tokens, device=tokens.device).expand(num_images, -1)
        while place.shape[1] > target:
            tokens, metric, place = merge_round(tokens, metric, place, place.shape[1] - target)
        return Selection.from_tokens(
            tokens.to(features.patches.dtype), place, num_tokens, spatial_order=self.order == "spatial"
        )


def merge_round(
    tokens: torch.Tensor, metric: torch.Tensor, place: torch.Tensor, surplus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    One round of bipartite merging. Tokens with even numbers (A) each point to the token with an odd number (B) whose
    metric has the largest cosine with theirs; those of A with the largest cosines join their targets, many to one
    target if need be. As many join as there are in surplus, but no more than there are in B.

    Returns:
        Tokens `[num_images, num_left, hidden_size]`, metric and places of what is left: A that did not join, by
        falling cosine, and B.
    """
    matching = bipartite_matching(metric, min(surplus, place.shape[1] // 2), has_cls=False)
    group_size = 1 + matching.received(torch.ones_like(matching.source, dtype=tokens.dtype)[..., None])

    def merged(values: torch.Tensor) -> torch.Tensor:
        means = matching.added(values, take_tokens(values, matching.source)) / group_size
        return take_tokens(means, matching.stay)

    return merged(tokens), merged(metric), place.gather(1, matching.stay)


def merged_count(num_tokens: int, share: float) -> int:
    """How many of `num_tokens` the own rule leaves; at least one."""
    return max(1, math.floor(num_tokens * share + 1e-6))


@register_reducer("aim_prune")
class AimPrune(FirstCutReducer):
    """
    The second half of AIM (arXiv 2412.03248): PageRank on the decoder's attention, and a schedule that falls in a
    straight line from one layer on, by an eighth of the tokens a layer, until none is left.

    Of 32 layers 0 to 13 see everything, 14 sees 7/8, ... and 21 and up see nothing: the official ret(l) = 1 - (l - 12)
    / 8 is what is left behind layer l. For Qwen2's 28 layers the official code has `layer=15, slope=0.125`. It hides
    tokens where we let them leave; they are ranked by the attention among those still there. Text always stays.

    A budget keeps the layer and changes the slope, solved so that the mean over layers is exact.

    Args:
        layer: the first layer that sees fewer tokens, in [1, number of layers - 1]; by default 14 of 32, in
            proportion. A budget below what the layers before it cost is refused.
        slope: in (0, 1], the share of tokens that leaves before each layer from there on; by default 1/8 for 32
            layers, in inverse proportion for fewer or more.
    """

    name, published_layer = "aim_prune", 14
    paper = _PAPER

    def __init__(self, config: AdaVTPConfig, layer: int | None = None, slope: float | None = None) -> None:
        super().__init__(config, layer)
        if slope is not None:
            require_share("slope", slope, above_zero=True)
        self.slope = slope

    def cuts(self, num_layers: int) -> list[int]:
        """Every layer from the first cut on: tokens are ranked anew wherever some leave."""
        return list(range(self.first_cut(num_layers), num_layers))

    def shares(self, num_layers: int, slope: float | None = None) -> list[float]:
        """The share of tokens that each layer sees with this slope, or the own rule's."""
        if slope is None:
            slope = 0.125 * 32 / num_layers if self.slope is None else self.slope
        first = self.first_cut(num_layers)
        return [1.0 if layer < first else max(0.0, 1.0 - slope * (layer - first + 1)) for layer in range(num_layers)]

    def layer_counts(self, num_visual: int, num_keep: int | None, num_layers: int) -> list[int]:
        if num_keep is None:
            return [math.floor(num_visual * share + 1e-6) for share in self.shares(num_layers)]
        return solved_counts(
            self.name,
            lambda slope: self.shares(num_layers, slope),
            num_visual,
            num_keep,
            num_layers,
            "set a lower `layer`, or use 'aim', which merges first.",
        )

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        return page_rank(view)


def page_rank(view: DecoderView) -> torch.Tensor:
    """
    PageRank on the previous layer's attention: in each head h, M = softmax(q k^T / (0.1 sqrt(d))), five steps
    v <- v M from 1 / n in the n columns of the prompt, without damping, and over heads the root of the mean of v_h^2.

    M is never in memory as a whole; every step makes it again, block of rows by block of rows. `[batch, n]` float32.
    """
    batch, length = view.is_real.shape
    rows = torch.arange(length, device=view.is_real.device).expand(batch, -1)
    attention = view.attention(rows, "previous")
    rank = (view.is_prompt / view.is_prompt.sum(dim=-1, keepdim=True).clamp(min=1))[:, None]
    for _ in range(_ITERATIONS):
        rank = attention.received(rank, _TEMPERATURE)
    return rank.square().mean(dim=1).sqrt()


@register_reducer("aim")
class AimReducer(TokenReducer):
    """
    AIM (arXiv 2412.03248): merging before the decoder, then pruning inside it.

    A budget of K of N tokens, a mean over the decoder's layers, is divided as published: the pruning schedule is the
    official one, and merging leaves as many tokens as give it the mean K. Where that would be more than N, nothing is
    merged and the schedule is made flatter. The remainder to K is the slope's to settle, so that the mean is exact.
    Without a budget merging leaves 43.75 % and pruning follows its own schedule.

    Args:
        order, share: see [`AimMerge`].
        layer, slope: see [`AimPrune`].

    Attributes:
        parts: [`AimMerge`] and [`AimPrune`], what the model runs in this reducer's place.
    """

    stage = "vision"
    has_own_rule = True
    paper = _PAPER

    def __init__(
        self,
        config: AdaVTPConfig,
        order: str = "spatial",
        share: float = 0.4375,
        layer: int | None = None,
        slope: float | None = None,
    ) -> None:
        super().__init__(config)
        self.parts = nn.ModuleList([AimMerge(config, order, share), AimPrune(config, layer, slope)])

    def split(self, num_patches: int, num_keep: int | None, num_layers: int) -> int:
        """
        How many of N tokens merging leaves: the number M in [K, N] for which the official schedule has the mean K,
        rounded up; not so large that the layers before the first cut alone would see more.

        Args:
            num_patches: N.
            num_keep: K, the mean over the decoder's layers that is wanted, in [1, N], or `None` for the own rule.
            num_layers: of the decoder.
        """
        merge, prune = self.parts
        if num_keep is None:
            return merged_count(num_patches, merge.share)
        total = num_keep * num_layers
        wanted = math.ceil(total / sum(prune.shares(num_layers)) - 1e-6)
        most = total // min(prune.first_cut(num_layers), num_layers)
        return min(num_patches, wanted, most)
