"""ToMe: between a layer's attention and its MLP, tokens that are alike become one.

The tokens are dealt into two sets, A and B. Every token of A finds the token of B whose key in this layer is most like
its own, and the r best of these pairs are merged: A's token goes, B's becomes the mean of both, weighted by how many
patches each stands for. Attention then counts a token as often as it has patches. A little in every layer adds up to
the budget, and the tower itself gets faster with every layer.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..vision.encode import TowerPass
from ..vision.encoder_reducer import EncodedTokens, EncoderReducer
from ..vision.tower import TowerAttention, _attention, _first_norm, layer_keys
from .base import directions, register_reducer, require_choice, take_tokens


@dataclass
class Matching:
    """
    Which tokens go and which take them in, as indices among `num_tokens` tokens.

    Attributes:
        source: `[num_images, num_merged]`, the tokens that go, best match first.
        target: `[num_images, num_merged]`, for each the token that takes it in; one may take in several.
        stay: `[num_images, num_tokens - num_merged]`, the others, in the order in which they stand from here on.
    """

    source: torch.Tensor
    target: torch.Tensor
    stay: torch.Tensor

    def received(self, given: torch.Tensor) -> torch.Tensor:
        """
        What every token receives in all, `[num_images, num_tokens, width]`, where each source gives
        `[num_images, num_merged, width]`; 0 for a token that no source points to.
        """
        num_tokens = self.source.shape[1] + self.stay.shape[1]
        return self.added(given.new_zeros(len(given), num_tokens, given.shape[-1]), given)

    def added(self, tokens: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """`tokens` `[num_images, num_tokens, width]` and what each of them receives; exactly itself if nothing."""
        goes_to = self.target[:, None] == torch.arange(tokens.shape[1], device=given.device)[:, None]
        # A product, because scatter_add adds in no fixed order on a GPU, and the next layer's matching sees the bits.
        return torch.baddbmm(tokens, goes_to.to(given.dtype), given)


@torch.no_grad()
def bipartite_matching(keys: torch.Tensor, num_merged: int, has_cls: bool) -> Matching:
    """
    ToMe's bipartite soft matching: each token of A points to its most similar token of B, the best pairs are merged.

    In the paper and its code A is every other token of the whole sequence, from the first. CLS, at position 0, is then
    in A (from where it never goes), and A's patches are those at odd positions among the patches: 1, 3, 5, ... Without
    CLS they are 0, 2, 4, ... Behind the matching stand A's remaining tokens, then B. The remaining ones are in their
    old order if there is a CLS token and in order of their best similarity, highest first, if there is none: official
    code sorts them only to get CLS back to the front.

    Among equals the earlier token wins. With nothing to merge, nothing moves.

    Args:
        keys: `[num_images, num_tokens, head_dim]`, of the patches in this layer, the mean over its heads.
        num_merged: r, at most half of the tokens, rounded down.
        has_cls: whether a CLS token stands in front of the patches.
    """
    index = torch.arange(keys.shape[1], device=keys.device)
    if num_merged == 0:
        nobody = index.new_zeros(len(keys), 0)
        return Matching(nobody, nobody, index.expand(len(keys), -1))
    in_a, in_b = (index[1::2], index[0::2]) if has_cls else (index[0::2], index[1::2])
    unit = directions(keys)
    similarity = unit[:, in_a] @ unit[:, in_b].transpose(1, 2)
    best = similarity.argmax(dim=-1)
    ranked = similarity.gather(-1, best[..., None])[..., 0].argsort(dim=-1, descending=True, stable=True)
    going, remaining = ranked[:, :num_merged], ranked[:, num_merged:]
    if has_cls:
        remaining = remaining.sort(dim=-1).values
    return Matching(
        source=in_a[going],
        target=in_b[best.gather(1, going)],
        stay=torch.cat([in_a[remaining], in_b.expand(len(keys), -1)], dim=1),
    )


def mean_keys(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    The mean over heads of the keys that a layer makes of the tokens that enter it,
    `[num_images, num_tokens, head_dim]`.

    The layer's attention makes all keys too, but shows them to nobody. Their mean is a linear map, by the mean of the
    heads' weights, and costs no more than one head. Where the weights are not there as one plain matrix (an adapter,
    quantised or sharded weights, weights on another device) all keys are made, and averaged.
    """
    attention = _attention(layer)
    projection = getattr(attention, "k_proj", None)
    if not _is_plain(projection, hidden_states):
        return layer_keys(layer, hidden_states).mean(dim=1)
    heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
    weight, bias = (
        None if part is None else part.unflatten(0, (heads, -1)).mean(dim=0, dtype=torch.float32)
        for part in (projection.weight, projection.bias)
    )
    return nn.functional.linear(_first_norm(layer)(hidden_states).float(), weight, bias)


def _is_plain(projection: nn.Module | None, like: torch.Tensor) -> bool:
    """Whether a module is a linear map whose weight is here as a whole, in the dtype and on the device of `like`."""
    if type(projection) is not nn.Linear:
        return False
    weight = projection.weight
    is_whole = type(weight) is nn.Parameter and weight.shape == (projection.out_features, projection.in_features)
    return is_whole and weight.dtype == like.dtype and weight.device == like.device


def absorbed(features: torch.Tensor, weights: torch.Tensor, given: torch.Tensor, matching: Matching) -> torch.Tensor:
    """
    Every token's mean with the tokens that it takes in: x_b <- (w_b x_b + sum_a v_a x_a) / (w_b + sum_a v_a).

    Computed as x_b + sum_a v_a (x_a - x_b) / (w_b + sum_a v_a), which is exactly x_b where nothing is given.

    Args:
        features: `[num_images, num_tokens, hidden_size]`.
        weights: `[num_images, num_tokens]` float32, w, above 0.
        given: `[num_images, num_merged]` float32, v, the weight with which each source goes into its target.
        matching: who goes where.

    Returns:
        As `features`, the sources still among them.
    """
    total = weights + matching.received(given[..., None])[..., 0]
    share = given / total.gather(1, matching.target)
    exact = features.float()
    moves = share[..., None] * (take_tokens(exact, matching.source) - take_tokens(exact, matching.target))
    return matching.added(exact, moves).to(features.dtype)


def tokens_after_layers(num_patches: int, num_keep: int, num_layers: int) -> list[int]:
    """
    How many tokens leave each layer, so that exactly K leave the last.

    As in ToMe, every layer merges (N - K) / L tokens away, the first (N - K) mod L of them one more. No layer can
    merge more than half of what enters it, which binds in the last layers when K is small (for N = 576 and L = 23
    when K <= 23): going down from the last layer, t_l <- min(t_l, 2 t_(l + 1)) moves what is too much to the layers
    before.

    Raises:
        ValueError: if halving in every layer leaves more than K tokens.
    """
    fewest = -(-num_patches // 2**num_layers)
    if num_keep < fewest:
        raise ValueError(
            f"`token_budget` asks for {num_keep} of {num_patches} visual tokens; merging pairs in each of the tower's "
            f"{num_layers} layers leaves {fewest} or more, so the smallest budget is {fewest} tokens."
        )
    if num_layers == 0:
        return []
    each, more = divmod(num_patches - num_keep, num_layers)
    counts = [num_patches - each * layer - min(layer, more) for layer in range(1, num_layers + 1)]
    for layer in reversed(range(num_layers - 1)):
        counts[layer] = min(counts[layer], 2 * counts[layer + 1])
    return counts


class MatchingReducer(EncoderReducer):
    """
    Base class of reducers that let matched tokens go between the halves of every layer. Write `take_in`.

    CLS and the budget token are never merged and no target. A token stands at the position of the first patch that
    went into it.

    Args:
        proportional_attention: whether attention counts a token as often as it stands for patches: log(size) is added
            to the logits of its key (ToMe, section 3).
        order: `"spatial"`: the tokens leave in the order of their positions. `"official"`: in the order in which
            matching left them, see [`bipartite_matching`].
    """

    def __init__(
        self, config: AdaVTPConfig, proportional_attention: bool, order: Literal["spatial", "official"]
    ) -> None:
        super().__init__(config)
        require_choice("proportional_attention", proportional_attention, (True, False))
        require_choice("order", order, ("spatial", "official"))
        self.proportional_attention = proportional_attention
        self.spatial_order = order == "spatial"

    def take_in(
        self,
        tower: TowerPass,
        layer: int,
        entering: torch.Tensor,
        patches: torch.Tensor,
        sizes: torch.Tensor,
        matching: Matching,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Lets targets take their sources in, between the halves of a layer.

        Args:
            tower, layer: the pass, and which layer this is.
            entering: the whole sequence before the layer's attention.
            patches: `[num_images, num_tokens, hidden_size]`, behind it.
            sizes: `[num_images, num_tokens]` float32, how many patches each stands for.
            matching: who goes where.

        Returns:
            Patches and sizes in the same shapes. Those of the sources are not read again.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define take_in(...).")

    def forward(self, tower: TowerPass, pixel_values: torch.Tensor, num_keep: torch.Tensor) -> EncodedTokens:
        """Refuses a `num_keep` to which merging pairs in every layer cannot get down."""
        sequence = tower.embed(pixel_values)
        num_images, num_patches, _ = tower.patches(sequence).shape
        positions = torch.arange(num_patches, device=sequence.device).expand(num_images, -1)
        sizes = torch.ones(num_images, num_patches, device=sequence.device)
        for layer, count in enumerate(tokens_after_layers(num_patches, int(num_keep[0]), len(tower.layers))):
            entering, num_merged = sequence, sizes.shape[1] - count
            is_merged = self.proportional_attention and sizes.shape[1] < num_patches
            key_bias = nn.functional.pad(sizes.log(), (tower.num_before, tower.num_after)) if is_merged else None
            sequence = tower.attend(layer, entering, key_bias)
            # Training runs what is trained in every layer, so that processes with other budgets run the same.
            if num_merged > 0 or (self.training and self.trained):
                keys = mean_keys(tower.layers[layer], tower.patches(entering))
                matching = bipartite_matching(keys, num_merged, self.config.has_cls)
                patches, sizes = self.take_in(tower, layer, entering, tower.patches(sequence), sizes, matching)
                positions = positions.scatter_reduce(
                    1, matching.target, positions.gather(1, matching.source), "amin"
                ).gather(1, matching.stay)
                sizes = sizes.gather(1, matching.stay)
                # Indexing copies whole rows; a gather of as many numbers takes three times as long on a CPU.
                image = torch.arange(num_images, device=sequence.device)[:, None]
                sequence = tower.with_patches(sequence, patches[image, matching.stay])
            sequence = tower.finish(layer, sequence)
        return EncodedTokens(sequence, positions)


@register_reducer("tome")
class ToMeReducer(MatchingReducer):
    """
    Merges the most similar tokens in every layer of the tower (ToMe, section 3).

    Args:
        merge: the mean that replaces a token and what it takes in. `"weighted"`: weighted by size, so that a token
            is the mean of its patches, as in official code. `"average"`: of the tokens as they are, however many
            patches they stand for. `"importance"`: weighted by size times importance, which is the attention that CLS
            pays to the token in this layer (mean over heads), or without CLS the norm of its feature.
        proportional_attention, order: see [`MatchingReducer`].
    """

    paper = "ToMe (arXiv 2210.09461)"

    def __init__(
        self,
        config: AdaVTPConfig,
        merge: Literal["weighted", "average", "importance"] = "weighted",
        proportional_attention: bool = True,
        order: Literal["spatial", "official"] = "spatial",
    ) -> None:
        super().__init__(config, proportional_attention, order)
        require_choice("merge", merge, ("weighted", "average", "importance"))
        self.merge = merge

    def take_in(
        self,
        tower: TowerPass,
        layer: int,
        entering: torch.Tensor,
        patches: torch.Tensor,
        sizes: torch.Tensor,
        matching: Matching,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = sizes
        if self.merge == "average":
            weights = torch.ones_like(sizes)
        elif self.merge == "importance":
            weights = sizes * token_importance(tower, layer, entering, patches)
        patches = absorbed(patches, weights, weights.gather(1, matching.source), matching)
        return patches, sizes + matching.received(sizes.gather(1, matching.source)[..., None])[..., 0]


def token_importance(tower: TowerPass, layer: int, entering: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """
    The attention that CLS pays to each patch in a layer, mean over its heads, or without CLS the norm of the patch
    behind that attention: `[num_images, num_tokens]` float32, above 0.
    """
    if tower.config.has_cls:
        attention = TowerAttention.of_layer(tower.layers[layer], tower.without_budget(entering), has_cls=True)
        importance = attention.cls_row().mean(dim=1)[:, : patches.shape[1]]
    else:
        importance = patches.float().norm(dim=-1)
    # Two weights of 0 have no mean.
    return importance.clamp_min(torch.finfo(torch.float32).tiny)
