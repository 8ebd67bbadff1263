"""Token fusion: a learned mix of pruning and merging.

Merging assumes that the layers above answer to a mean of two tokens with the mean of their answers, pruning that one
of them was not needed. Token Fusion (ToFu) finds the first layers far from linear and prunes there, and merges above.
Here every token that ToMe would merge has a gate that says what share of it goes along: none of it is pruning, all of
it is ToMe, and the layers start from ToFu's schedule.
"""

from typing import Literal

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..vision.encode import TowerPass
from .base import feature_layer_index, register_reducer, require_choice, take_tokens
from .tome import Matching, MatchingReducer, absorbed

# sigmoid(3) = 0.953: an untrained gate gives nearly all or nearly nothing, and still has a fifth of its largest slope.
_FIRST_LOGIT = 3.0


class ZeroLinear(nn.Linear):
    """A linear map that starts as 0, so that at first no token is told from another."""

    def reset_parameters(self) -> None:
        """Gives the weights their first values."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


@register_reducer("token_fusion")
class TokenFusionReducer(MatchingReducer):
    """
    ToMe in which a token a gives its target b the share g_a in (0, 1) of itself, and the rest is pruned:

        x_b <- (s_b x_b + sum_a g_a s_a x_a) / (s_b + sum_a g_a s_a),    s_b <- s_b + sum_a g_a s_a

    with g_a = sigmoid(w_l . LayerNorm(x_a) + c_l + d_l) in layer l, where w_l and c_l are learned from 0, and d_l is
    -3 in the first half of the layers that run and +3 in the second. LayerNorm has no weights of its own: w_l and c_l
    make them superfluous.

    Token Fusion itself has no learned part: it prunes up to a layer and merges above. That the mix is learned, by this
    gate, is our addition.

    Args:
        norm_preserving: after Token Fusion's MLERP, whether a merged token gets the largest of the norms of what it is
            made of, since a mean is shorter than its parts. A source counts for as much as it gives: the norm is
            max_a(|x_b| + g_a max(0, |x_a| - |x_b|)), which is |x_b| where everything is pruned.
        proportional_attention, order: see [`MatchingReducer`].
    """

    paper = "Token Fusion (arXiv 2312.01026)"
    trained = True

    def __init__(
        self,
        config: AdaVTPConfig,
        norm_preserving: bool = True,
        proportional_attention: bool = True,
        order: Literal["spatial", "official"] = "spatial",
    ) -> None:
        super().__init__(config, proportional_attention, order)
        require_choice("norm_preserving", norm_preserving, (True, False))
        self.norm_preserving = norm_preserving
        num_layers, hidden_size = feature_layer_index(config), config.vision_config.hidden_size
        self.first_logits = [-_FIRST_LOGIT if layer < num_layers // 2 else _FIRST_LOGIT for layer in range(num_layers)]
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.gates = nn.ModuleList(ZeroLinear(hidden_size, 1) for _ in range(num_layers))

    def shares(self, layer: int, sources: torch.Tensor) -> torch.Tensor:
        """
        What share of themselves tokens `[num_images, num_merged, hidden_size]`, between a layer's attention and its
        MLP, give to their targets: `[num_images, num_merged]` float32 in [0, 1].
        """
        gate = self.gates[layer]
        logits = gate(self.norm(sources.to(gate.weight.dtype)))[..., 0].to(sources.device)
        return torch.sigmoid(logits.float() + self.first_logits[layer])

    def take_in(
        self,
        tower: TowerPass,
        layer: int,
        entering: torch.Tensor,
        patches: torch.Tensor,
        sizes: torch.Tensor,
        matching: Matching,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shares = self.shares(layer, take_tokens(patches, matching.source))
        given = shares * sizes.gather(1, matching.source)
        fused = absorbed(patches, sizes, given, matching)
        if self.norm_preserving:
            fused = with_largest_norm(fused, patches, shares, matching)
        return fused, sizes + matching.received(given[..., None])[..., 0]


def with_largest_norm(
    fused: torch.Tensor, patches: torch.Tensor, shares: torch.Tensor, matching: Matching
) -> torch.Tensor:
    """
    The means `fused` stretched to the largest norm among their parts, the `patches`, sources counting by their shares
    g; tokens that took nothing in are what they were.
    """
    norms = patches.float().norm(dim=-1)
    own, others = norms.gather(1, matching.target), norms.gather(1, matching.source)
    reached = own + shares * (others - own).clamp_min(0.0)
    largest = norms.scatter_reduce(1, matching.target, reached, "amax")
    exact = fused.float()
    length = exact.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (exact * (largest / length)[..., None]).to(fused.dtype)
