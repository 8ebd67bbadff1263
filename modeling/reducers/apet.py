"""ApET: what a few tokens cannot say for the others stays (arXiv 2602.19870, CVPR 2026).

A handful of basis tokens, each as far as can be from the others, approximates every token by least squares. The tokens
with the largest error are kept, the last places among them are given to the basis, and what is dropped is averaged
into the kept token that it resembles most. No attention is read. The authors compress twice: behind the tower
(`apet`), and before layer 16 of 32, to a third of what is left (`apet_layer`).
"""

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..budget.top_k import top_k_mask
from ..decoder.view import DecoderView, marked_columns
from ..vision.features import VisionFeatures
from .base import TokenReducer, directions, register_reducer, require_choice, require_count, take_tokens
from .one_cut import OneCutReducer

# Of the normal equations, as in the authors' code.
_RIDGE = 1e-5


@register_reducer("apet")
class ApETReducer(TokenReducer):
    """
    ApET behind the tower, on features before the projector.

    As in the authors' code for LLaVA: of the K tokens with the largest error the `basis` least make room for the basis
    tokens, in spatial order for the order in which these were found, and what stood there is lost; dropped tokens, the
    basis' own among them, are merged into the K - basis others. (Their code for Qwen2.5-VL halves: place and basis
    token in equal parts.) The basis begins with the first token, in the authors' code with a random one. There are at
    most K - 1 basis tokens among K, so that one is left to merge into.

    Args:
        basis: how many basis tokens there are, 1 or more.
    """

    paper = "ApET (arXiv 2602.19870)"

    def __init__(self, config: AdaVTPConfig, basis: int = 10) -> None:
        super().__init__(config)
        require_count("basis", basis, least=1)
        self.basis = basis

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        patches, num_keep = features.patches, num_keep.to(features.patches.device)
        is_token = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        basis = farthest_points(patches.float(), is_token, self.basis)
        errors = approximation_errors(patches.float(), is_token, basis)
        keep, tokens = compressed(patches.float(), is_token, basis, errors, num_keep, spatial_places=True)
        chosen = Selection.from_keep(keep)
        tokens = take_tokens(tokens.to(patches.dtype), chosen.positions.clamp(min=0))
        return Selection.from_tokens(tokens, chosen.positions, patches.shape[1])


@register_reducer("apet_layer")
class ApETLayerReducer(OneCutReducer):
    """
    ApET inside the decoder, as published: one cut, before `layer`, on hidden states.

    Here the basis tokens take the places in the order of errors. All visual tokens of a prompt are compressed
    together. To have both cuts in their published shares, stack `["apet", "apet_layer"]`, with 1.5 times the wanted
    mean for `apet` and 2/3 for `apet_layer`.

    Args:
        layer: k, the first layer that sees fewer tokens, in [1, number of layers - 1]; by default 16 of 32, in
            proportion. A budget below k / number of layers is refused.
        basis: see [`ApETReducer`].
        merge: whether dropped tokens are merged and basis tokens put in; without it the tokens with the largest
            errors stay as they are.
    """

    name, published_layer = "apet_layer", 16
    paper = "ApET (arXiv 2602.19870)"

    def __init__(self, config: AdaVTPConfig, layer: int | None = None, basis: int = 10, merge: bool = True) -> None:
        super().__init__(config, layer)
        require_count("basis", basis, least=1)
        require_choice("merge", merge, (True, False))
        self.basis, self.merge = basis, merge

    def num_left(self, num_visual: int) -> int:
        """A third, 32 of 96 and 96 of 288 in the authors' scripts."""
        return round(num_visual / 3)

    def scores(self, view: DecoderView, cut: int) -> torch.Tensor:
        """The error of every visual token, `[batch, n]` float32."""
        index, is_visual = marked_columns(view.is_visual)
        tokens = take_tokens(view.hidden_states, index).float()
        errors = approximation_errors(tokens, is_visual, farthest_points(tokens, is_visual, self.basis))
        scores = torch.zeros(view.is_visual.shape, device=tokens.device)
        return scores.scatter_add(1, index, errors * is_visual)

    def reduce(
        self, view: DecoderView, scores: torch.Tensor, num_keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`DecoderReducer.reduce`]."""
        if not self.merge:
            return super().reduce(view, scores, num_keep)
        index, is_visual = marked_columns(view.is_visual)
        tokens = take_tokens(view.hidden_states, index).float()
        basis = farthest_points(tokens, is_visual, self.basis)
        keep, merged = compressed(tokens, is_visual, basis, scores.gather(1, index), num_keep)
        hidden_states = _put_back(view.hidden_states, index, merged, is_visual)
        stays = torch.zeros(view.is_visual.shape, device=tokens.device).scatter_add(1, index, keep.float())
        return ~view.is_visual | (stays > 0), hidden_states


def _put_back(
    hidden_states: torch.Tensor, index: torch.Tensor, tokens: torch.Tensor, is_token: torch.Tensor
) -> torch.Tensor:
    """Hidden states with `tokens` `[batch, most, width]` in the columns `index`, where they are tokens."""
    place = index[..., None].expand_as(tokens)
    tokens = torch.where(is_token[..., None], tokens.to(hidden_states.dtype), hidden_states.gather(1, place))
    return hidden_states.scatter(1, place, tokens)


def farthest_points(tokens: torch.Tensor, is_token: torch.Tensor, number: int) -> torch.Tensor:
    """
    The first token, and then, one after another, the one whose squared distance to the nearest so far is largest; of
    equal ones the earlier.

    Args:
        tokens: `[batch, num_tokens, width]` float32.
        is_token: `[batch, num_tokens]` bool; what is none stands behind all that are.
        number: how many are wanted; fewer where there are fewer.

    Returns:
        Their index `[batch, at most number]` int64, -1 behind the last of a row that has fewer tokens.
    """
    distance = torch.full(is_token.shape, torch.inf, device=tokens.device).masked_fill(~is_token, -1.0)
    count, points = is_token.sum(dim=-1, keepdim=True), []
    for _ in range(min(number, tokens.shape[1])):
        points.append(distance.argmax(dim=-1, keepdim=True))
        to_latest = (tokens - take_tokens(tokens, points[-1])).square().sum(dim=-1)
        # Below every distance, so that what is in the basis is never the farthest from it.
        distance = torch.minimum(distance, to_latest).scatter(1, points[-1], -1.0)
    points = torch.cat(points, dim=-1) if points else count.new_zeros(len(tokens), 0)
    return points.masked_fill(torch.arange(points.shape[1], device=tokens.device) >= count, -1)


def approximation_errors(tokens: torch.Tensor, is_token: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """
    The distance of each token to its approximation from the basis: with rows S of the basis, x - S^T (S S^T +
    1e-5 I)^-1 S x. A basis token's own is 0. `[batch, num_tokens]` float32.

    Args:
        tokens: `[batch, num_tokens, width]` float32.
        is_token: `[batch, num_tokens]` bool.
        basis: `[batch, num_basis]` int64, see [`farthest_points`].
    """
    if basis.shape[1] == 0:
        return torch.zeros(is_token.shape, device=tokens.device)
    # A row of zeros takes no part in any sum.
    span = take_tokens(tokens, basis.clamp(min=0)).masked_fill((basis < 0)[..., None], 0.0)
    gram = span @ span.transpose(1, 2) + _RIDGE * torch.eye(span.shape[1], device=tokens.device)
    weights = torch.linalg.solve(gram, span @ tokens.transpose(1, 2))
    errors = (tokens - weights.transpose(1, 2) @ span).norm(dim=-1)
    return errors.masked_fill(_among(basis, is_token), 0.0)


def _among(index: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Marks the places `index` `[batch, any]`, -1 for none, in a mask like `is_token`."""
    one_more = torch.zeros(len(is_token), is_token.shape[1] + 1, dtype=torch.bool, device=is_token.device)
    return one_more.scatter(1, torch.where(index < 0, is_token.shape[1], index), True)[:, :-1]


def compressed(
    tokens: torch.Tensor,
    is_token: torch.Tensor,
    basis: torch.Tensor,
    errors: torch.Tensor,
    num_keep: torch.Tensor,
    spatial_places: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keeps the tokens with the largest errors; the last of them give their places to the basis, and what is dropped is
    averaged into the other kept token that it is most like.

    Args:
        tokens: `[batch, num_tokens, width]` float32.
        is_token: `[batch, num_tokens]` bool.
        basis: `[batch, num_basis]` int64, see [`farthest_points`].
        errors: `[batch, num_tokens]`.
        num_keep: `[batch]` int64, 0 or more.
        spatial_places: whether the basis fills its places in the order of the tokens, not in that of the errors.

    Returns:
        Which tokens stay, `[batch, num_tokens]` bool, and all tokens, those that stay changed.
    """
    errors, num_keep = errors.masked_fill(~is_token, -1.0), num_keep.to(tokens.device)
    keep = top_k_mask(errors, num_keep)
    num_basis = (basis >= 0).sum(dim=-1).minimum((num_keep - 1).clamp(min=0))
    # Where all tokens stay, all are what they were.
    num_basis = num_basis.masked_fill(num_keep >= is_token.sum(dim=-1), 0)
    target = top_k_mask(errors, num_keep - num_basis)
    unit = directions(tokens)
    cosines = (unit @ unit.transpose(1, 2)).masked_fill(~target[:, None], -torch.inf)
    is_dropped = (is_token & ~keep & target.any(dim=-1, keepdim=True))[..., None]
    goes_to = torch.nn.functional.one_hot(cosines.argmax(dim=-1), tokens.shape[1]) * is_dropped
    total = goes_to.transpose(1, 2).to(tokens) @ tokens
    merged = (tokens + total) / (1 + goes_to.sum(dim=1)[..., None])
    # The b-th basis token goes to the b-th place; places that there are too many of are none.
    places = keep & ~target
    if spatial_places:
        order = (~places).to(torch.int8).argsort(dim=-1, stable=True)
    else:
        order = errors.masked_fill(~places, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    order = order[:, : basis.shape[1]]
    is_placed = torch.arange(basis.shape[1], device=tokens.device) < num_basis[:, None]
    put = torch.where(is_placed[..., None], take_tokens(tokens, basis.clamp(min=0)), take_tokens(merged, order))
    return keep, merged.scatter(1, order[..., None].expand_as(put), put)
