"""HiRED: a prompt's budget shared among its image tiles, and spent where CLS looks (arXiv 2408.10945, AAAI 2025).

A large picture comes as several images: the whole, scaled down, and tiles of it in full resolution. The whole gets a
fixed share of the budget. Its CLS attention in the tower's first layer, which follows texture and edges, says how much
there is to see in each tile's part of it, and the tiles share the rest accordingly. Inside each image the patches with
the largest CLS attention of the layer that made the features stay, as in FasterVLM.
"""

import math
from collections.abc import Sequence

import torch

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..budget.top_k import top_k_mask
from ..families.base import Units
from ..vision.features import VisionFeatures
from .base import ScoringReducer, making_layer, register_reducer, require_choice, require_share
from .cls_attention import cls_log_scores, cls_scores

FIRST_LAYER = 0


def tiled_prompts(sample: torch.Tensor, num_tiles: int) -> torch.Tensor:
    """
    The images of each prompt that shows a whole picture and its tiles, `[num_prompts, 1 + num_tiles]`. Prompts of a
    single image are not among them; any other number is a `ValueError`. `sample` `[num_images]` says whose images
    they are.
    """
    _, prompt, num_images = sample.unique(return_inverse=True, return_counts=True)
    if ((num_images != 1) & (num_images != 1 + num_tiles)).any():
        raise ValueError(
            f"`tile_grid` makes {num_tiles} tiles, so a prompt shows either one image or {1 + num_tiles}, the whole "
            f"picture and its tiles; the prompts here show {num_images.tolist()}."
        )
    by_prompt = prompt.argsort(stable=True)
    return by_prompt[num_images[prompt[by_prompt]] > 1].view(-1, 1 + num_tiles)


def shares_of_tiles(attention: torch.Tensor, units: Units, alpha: float = 0.5) -> torch.Tensor:
    """
    By what the units of a prompt share its tokens where wholes and tiles are known. A picture, the whole view and its
    tiles, weighs as much as it has tokens. The share alpha of that is the whole view's; the tiles have the rest by how
    many of its floor((1 - alpha) N) most attended tokens have their centre in each.

    Args:
        attention: `[num_units, largest N]`, what the tokens of each unit get in the tower's first layer.
        units: with `parts`.
        alpha: in [0, 1].

    Returns:
        `[num_units]` float64.
    """
    weights = units.sizes.double()
    for whole, tile in units.parts.items():
        tiles = tile.unique()
        num_best = math.floor((1 - alpha) * len(tile) + 1e-9)
        best = top_k_mask(attention[whole, None, : len(tile)], num_best)[0]
        counts = (tile[best] == tiles[:, None]).sum(dim=-1).double()
        total = weights[whole] + weights[tiles].sum()
        weights[whole] = alpha * total
        # Where none is most attended the tiles share equally.
        counts = counts if counts.sum() > 0 else torch.ones_like(counts)
        weights[tiles] = (1 - alpha) * total * counts / counts.sum()
    return weights


def tile_of(positions: torch.Tensor, grid: tuple[int, int], tile_grid: Sequence[int]) -> torch.Tensor:
    """
    The tile, counted row by row, whose part of the whole picture holds the centre of the patch at each position;
    grids are rows and columns, of patches and of tiles.
    """
    (height, width), (rows, columns) = grid, tile_grid
    row = (2 * (positions // width) + 1) * rows // (2 * height)
    column = (2 * (positions % width) + 1) * columns // (2 * width)
    return row * columns + column


def shared_counts(total: torch.Tensor, weights: torch.Tensor, num_tokens: int, alpha: float) -> torch.Tensor:
    """
    Divides each prompt's tokens between the whole picture and its tiles.

    The whole gets floor(alpha total), at most `num_tokens`, and the tiles share the rest in proportion to their
    weights. The authors' code truncates every share; here the largest remainders get what is left over, no image gets
    less than 1 or more than it has, and what one cannot take goes to the others, so that the sum is the total.

    Args:
        total: `[num_prompts]` float64 whole numbers, in [1 + num_tiles, (1 + num_tiles) num_tokens].
        weights: `[num_prompts, num_tiles]` float64, 0 or more. Where all are 0 the tiles share equally.
        num_tokens: of every image.
        alpha: in [0, 1].

    Returns:
        `[num_prompts, 1 + num_tiles]` int64.
    """
    num_tiles = weights.shape[1]
    least = (total - num_tiles * num_tokens).clamp(min=1)
    most = (total - num_tiles).clamp(max=num_tokens)
    whole = (alpha * total + 1e-9).floor().maximum(least).minimum(most)
    rest = (total - whole)[:, None]
    shares = bounded_shares(rest, weights, num_tokens)
    counts = shares.floor()
    remainders = top_k_mask(shares - counts, (rest - counts.sum(dim=-1, keepdim=True))[:, 0].long())
    return torch.cat([whole[:, None], counts + remainders], dim=1).long()


def bounded_shares(total: torch.Tensor, weights: torch.Tensor, most: int) -> torch.Tensor:
    """
    Shares c_i = min(max(lambda w_i, 1), most), with the lambda of each row for which they sum to its total.

    Rounds of dividing in proportion and of settling on its bound what came out beyond it: as those below the least
    are raised and those above the most are cut, the sum comes out too large or too small, and only the bounds on that
    side are sure. Each round settles at least one share or is the last.

    Args:
        total: `[rows, 1]`, in [columns, columns * most].
        weights: `[rows, columns]`, 0 or more.
        most: at least 1.
    """
    weight_sum = weights.sum(dim=-1, keepdim=True)
    # A column without weight gets the least, and takes more only where no other can.
    weights = torch.where(weight_sum > 0, weights.maximum(1e-9 * weight_sum), 1.0)
    settled = torch.zeros_like(weights, dtype=torch.bool)
    shares = torch.zeros_like(weights)
    for _ in range(weights.shape[1]):
        left = total - (shares * settled).sum(dim=-1, keepdim=True)
        open_weights = weights.masked_fill(settled, 0.0)
        # The product first: the quotient is then exact wherever the share is a whole number.
        proportional = open_weights * left / open_weights.sum(dim=-1, keepdim=True).clamp_min(1e-300)
        proportional = torch.where(settled, shares, proportional)
        shares = proportional.clamp(1, most)
        excess = (shares - proportional).sum(dim=-1, keepdim=True)
        settled = settled | ((proportional < 1) & (excess >= 0)) | ((proportional > most) & (excess <= 0))
    return shares


@register_reducer("hired")
class HiREDReducer(ScoringReducer):
    """
    Keeps the patches with the largest CLS attention of the layer that made the features, in spatial order; with
    `tile_grid` after dividing the budget of each tiled picture anew.

    For single images this chooses as `"cls_attention"` does: the authors sum over heads, which ranks as the mean does.

    With `tile_grid` an image's own number of tokens only counts towards its prompt's total, which is kept exactly.
    The authors' code takes strips of rows of the whole picture for the regions of its tiles, a bug; here the regions
    are the tiles'. A patch belongs to the tile that holds its centre.

    Args:
        tile_grid: rows and columns of tiles. The images of a prompt are then the whole picture and rows * columns
            tiles row by row, or a single one, which keeps its own number. Without it every image does.
        alpha: share of the prompt's tokens for the whole picture, from 0 to 1.
        share: what the tiles share by. `"count"`, as in the authors' code: how many of the whole picture's
            floor((1 - alpha) n) best tokens, by first-layer CLS attention, lie in the tile's region. `"attention"`,
            as in the paper: the sum of that attention in the region.
    """

    needs = ("attention",)
    ranks_by_cls = True
    paper = "HiRED (arXiv 2408.10945)"

    def __init__(
        self,
        config: AdaVTPConfig,
        tile_grid: tuple[int, int] | None = None,
        alpha: float = 0.5,
        share: str = "count",
    ) -> None:
        super().__init__(config)
        is_grid = isinstance(tile_grid, list | tuple) and [type(size) for size in tile_grid] == [int, int]
        if tile_grid is not None and not (is_grid and min(tile_grid) > 0):
            raise ValueError(
                f"`tile_grid` is {tile_grid!r}; allowed are None and two whole numbers above 0, rows and columns."
            )
        require_share("alpha", alpha)
        require_choice("share", share, ("count", "attention"))
        self.redistributes = tile_grid is not None
        self.tile_grid, self.alpha, self.share = tile_grid, alpha, share

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layer that made the features and, to share among tiles, the first."""
        making = making_layer(self.config)
        return (making,) if self.tile_grid is None else tuple(sorted({FIRST_LAYER, making}))

    def scores(self, features: VisionFeatures) -> torch.Tensor:
        return cls_log_scores(features.attention[making_layer(self.config)])

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        if self.tile_grid is not None:
            num_keep = self.redistributed(features, num_keep)
        return super().forward(features, num_keep)

    def redistributed(self, features: VisionFeatures, num_keep: torch.Tensor) -> torch.Tensor:
        """The tokens `[num_images]` that each image keeps after its prompt's total was divided anew."""
        if features.sample is None:
            raise ValueError(
                "`tile_grid` is set, and `features.sample`, which says which images belong together, is not."
            )
        prompts = tiled_prompts(features.sample.to(num_keep.device), math.prod(self.tile_grid))
        if len(prompts) == 0:
            return num_keep
        num_tokens = features.patches.shape[1]
        whole = features.images(prompts[:, 0].to(features.patches.device), num_tokens)
        weights = self.tile_weights(whole).cpu().double()
        # A handful of numbers, in a precision that not every accelerator has.
        total = num_keep[prompts].sum(dim=-1).cpu().double()
        counts = shared_counts(total, weights, num_tokens, self.alpha)
        num_keep = num_keep.clone()
        num_keep[prompts] = counts.to(num_keep)
        return num_keep

    def tile_weights(self, whole: VisionFeatures) -> torch.Tensor:
        """What the tiles share by, `[num_prompts, num_tiles]` float32, from the whole pictures."""
        attention = cls_scores(whole.attention[FIRST_LAYER])
        if self.share == "count":
            num_best = math.floor((1 - self.alpha) * attention.shape[1] + 1e-9)
            attention = top_k_mask(attention, num_best).float()
        tile = tile_of(whole.positions, whole.grid, self.tile_grid)
        belongs = tile[:, None] == torch.arange(math.prod(self.tile_grid), device=tile.device)[:, None]
        return (attention[:, None] * belongs).sum(dim=-1)
