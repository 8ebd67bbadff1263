"""What choosing costs in a training step: the matrix products of every reducer, one formula beside each name.

A product of [a, b] and [b, c] counts 2abc, and nothing else counts: no norms, softmaxes, sorts, distances taken entry
by entry. In the formulas n tokens come in and K leave, C is the tower's width and W that of its features (the same
with one feature layer), D the decoder's width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling.reducers.aim import _ITERATIONS as PAGE_RANK_STEPS
from ..modeling.reducers.base import REDUCERS, TokenReducer
from ..modeling.reducers.downsample import smallest_grid
from ..modeling.reducers.dynamicvit import tokens_after_stages
from ..modeling.reducers.sparsevlm import num_candidates, num_kept_as_they_are
from ..modeling.reducers.tome import tokens_after_layers
from ..modeling.reducers.visionzip import num_contextual
from .model_shape import BUDGET_ENCODING, ModelShape


def product(rows: float, inner: float, columns: float) -> float:
    """FLOPs of a matrix product [rows, inner] @ [inner, columns], one multiplication and one addition each."""
    return 2.0 * rows * inner * columns


# ---------------------------------------------------------------- what reducers are shown


def attention_rows(shape: ModelShape, num_layers: int) -> float:
    """Keys of CLS and all N patches, and CLS's query, in `num_layers` tower layers, for reducers that need them."""
    vision, num_cls = shape.vision, int(shape.vision.has_cls)
    keys = product(vision.num_patches + num_cls, vision.hidden_size, vision.hidden_size)
    return num_layers * (keys + product(num_cls, vision.hidden_size, vision.hidden_size))


def budget_token(shape: ModelShape) -> float:
    """The budget's embedding, a two-layer MLP, and the question's projection, for one image."""
    width = shape.vision.hidden_size
    question = product(1, shape.decoder.hidden_size, width) if shape.question_aware else 0.0
    return product(1, BUDGET_ENCODING, width) + product(1, width, width) + question


def budget_cross_attention(shape: ModelShape, num_tokens: int) -> float:
    """Option B: the budget as the one query, n patches as keys and values."""
    width = shape.vision.hidden_size
    query_and_output = 2 * product(1, width, width)
    keys_and_values = 2 * product(num_tokens, shape.vision.patch_width, width)
    return query_and_output + keys_and_values + 2 * product(1, width, num_tokens)


# ---------------------------------------------------------------- between tower and decoder, for one image


def nothing(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """No matrix product: sorting, striding, elementwise cosines."""
    return 0.0


def adaptive(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """
    The controller's head: one linear map of the budget to N scores, or of each patch to one, or projections of both
    to a common width and one number for each pair. The choice "spread" compares all patches, n W n.
    """
    width, patch = shape.vision.hidden_size, shape.vision.patch_width
    both = product(n, patch, width) + product(1, width, width) + product(n, width, 1)
    head = {
        "budget_token": product(1, width, shape.vision.num_patches),
        "patch": product(n, patch, 1),
        "patch_budget": both,
        "dot": both,
    }[shape.controller_head]
    return head + (product(n, patch, n) if shape.controller_choice == "spread" else 0.0)


def cls_row(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """CLS's query times the keys of CLS and n patches, over all heads."""
    return product(1, shape.vision.hidden_size, n + 1)


def hired(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """The CLS row, and of one image in each 1 + tiles, the whole picture, that of the first layer too."""
    rows = 1.0 if reducer.tile_grid is None else 1.0 + 1.0 / (1 + math.prod(reducer.tile_grid))
    return rows * cls_row(reducer, shape, n, keep)


def prumerge(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """The CLS row; keys of the K - 1 kept against all; the kept as weighted sums of all; one sum of the rest."""
    kept = max(keep - 1, 1)
    merged = product(kept, shape.vision.hidden_size, n) + product(kept + 1, n, shape.vision.patch_width)
    return cls_row(reducer, shape, n, keep) + merged


def visionzip(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """The CLS row; of the M tokens that are not dominant M - c against c targets, by mean keys, then their sums."""
    targets = num_contextual(keep, reducer.contextual)
    dominant = keep - targets - (0 if shape.keep_cls else 1)
    others = n - dominant - targets
    compared = product(others, shape.vision.head_dim, targets)
    return cls_row(reducer, shape, n, keep) + compared + product(targets, others, shape.vision.patch_width)


def vispruner(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """The CLS row, and all patches against all, unless attention alone fills the budget."""
    num_important = math.floor(round(reducer.important * keep, 6))
    similarity = product(n, shape.vision.patch_width, n) if num_important < keep else 0.0
    return cls_row(reducer, shape, n, keep) + similarity


def aim_merge(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """Rounds of pairs: the even half's keys against the odd half's; tokens and keys of those that join, as sums."""
    vision, total = shape.vision, 0.0
    while n > keep:
        even, odd = n - n // 2, n // 2
        joining = min(n - keep, odd)
        total += product(even, vision.hidden_size, odd)
        total += product(odd, joining, vision.patch_width) + product(odd, joining, vision.hidden_size)
        n -= joining
    return total


def pool(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """Means as a product with the matrix of cells; maxima cost none."""
    return product(keep, n, shape.vision.patch_width) if reducer.kind == "average" else 0.0


def resampler(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """In each layer K queries and outputs, n keys and values, attention of K to n, and an MLP four times as wide."""
    width = shape.vision.patch_width
    projections = 2 * product(keep, width, width) + 2 * product(n, width, width)
    attention, mlp = 2 * product(keep, width, n), 2 * product(keep, width, 4 * width)
    return len(reducer.layers) * (projections + attention + mlp)


def divprune(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """All projected tokens against all."""
    return product(n, shape.decoder.hidden_size, n)


def cdpruner(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """All projected tokens against all; step s of K takes s rows of a Cholesky factor times n columns."""
    if reducer.clip_text is not None:
        raise ValueError(
            f"`reducer` is 'cdpruner' with `text_model` {reducer.clip_text.text_model!r}, whose text tower's cost is "
            "not in this model's configuration; leave `text_model` out."
        )
    return divprune(reducer, shape, n, keep) + sum(product(1, step, n) for step in range(keep))


def dart(reducer: TokenReducer, shape: ModelShape, n: int, keep: int) -> float:
    """Pivots against all projected tokens."""
    return product(min(reducer.pivots, n), shape.decoder.hidden_size, n)


IMAGE_COSTS: dict[str, Callable[[Any, ModelShape, int, int], float]] = {
    "adaptive": adaptive,
    "random": nothing,
    "grid": nothing,
    "prumerge": prumerge,
    "prumerge+": prumerge,
    "visionzip": visionzip,
    "hired": hired,
    "cls_attention": cls_row,
    "vispruner": vispruner,
    "divprune": divprune,
    "cdpruner": cdpruner,
    "dart": dart,
    "query": nothing,
    "pool": pool,
    "resampler": resampler,
    "aim_merge": aim_merge,
}


# ---------------------------------------------------------------- inside the tower, for one image


@dataclass(frozen=True)
class TowerRun:
    """
    A run of the tower with fewer and fewer tokens.

    Attributes:
        patches: that are embedded.
        attended, transformed: for each layer the patches in its attention half and in its MLP half.
        own: FLOPs of choosing and merging.
    """

    patches: int
    attended: tuple[int, ...]
    transformed: tuple[int, ...]
    own: float = 0.0

    @classmethod
    def whole(cls, shape: ModelShape) -> "TowerRun":
        """Nothing leaves."""
        n, depth = shape.vision.num_patches, shape.vision.num_layers
        return cls(n, (n,) * depth, (n,) * depth)


def tome(reducer: TokenReducer, shape: ModelShape, keep: int) -> TowerRun:
    """
    In each layer, r of t tokens merged: mean keys of one head's width, half of the tokens against the other half, and
    as sums over the r sources the features of all t tokens, their weights and their sizes. The merge "importance" adds
    CLS's row.
    """
    vision = shape.vision
    counts = tokens_after_layers(vision.num_patches, keep, vision.num_layers)
    entering, own = (vision.num_patches, *counts[:-1]), 0.0
    for t, left in zip(entering, counts, strict=True):
        if t > left:
            merged = t - left
            own += product(t, vision.hidden_size, vision.head_dim)
            own += product(t - t // 2, vision.head_dim, t // 2)
            own += product(t, merged, vision.hidden_size) + 2 * product(t, merged, 1)
            own += merge_weights(reducer, shape, t, merged)
    return TowerRun(vision.num_patches, entering, tuple(counts), own)


def merge_weights(reducer: TokenReducer, shape: ModelShape, tokens: int, merged: int) -> float:
    """Token fusion's gate of each source; for ToMe's "importance" the keys of CLS and tokens, CLS's query, its row."""
    width = shape.vision.hidden_size
    if hasattr(reducer, "gates"):
        return product(merged, width, 1)
    if reducer.merge == "importance" and shape.vision.has_cls:
        return product(tokens + 2, width, width) + product(1, width, tokens + 1)
    return 0.0


def dynamicvit(reducer: TokenReducer, shape: ModelShape, keep: int) -> TowerRun:
    """A predictor before each cut: one map C to C, then C to C/2, C/4 and 2, of every token that is there."""
    vision, width = shape.vision, shape.vision.hidden_size
    counts = tokens_after_stages(vision.num_patches, keep, len(reducer.cuts))
    tokens, inside, own = vision.num_patches, [], 0.0
    for layer in range(vision.num_layers):
        if layer in reducer.cuts:
            own += product(tokens, width, width) + product(tokens, width, width // 2)
            own += product(tokens, width // 2, width // 4) + product(tokens, width // 4, 2)
            tokens = counts[reducer.cuts.index(layer)]
        inside.append(tokens)
    return TowerRun(vision.num_patches, tuple(inside), tuple(inside), own)


def downsample(reducer: TokenReducer, shape: ModelShape, keep: int) -> TowerRun:
    """No product of its own: the whole tower on the smallest grid of K cells or more."""
    cells = min(math.prod(smallest_grid(keep)), shape.vision.num_patches)
    inside = (cells,) * shape.vision.num_layers
    return TowerRun(cells, inside, inside)


TOWER_RUNS: dict[str, Callable[[Any, ModelShape, int], TowerRun]] = {
    "downsample": downsample,
    "dynamicvit": dynamicvit,
    "token_fusion": tome,
    "tome": tome,
}


# ---------------------------------------------------------------- inside the decoder, for one row of the batch


@dataclass(frozen=True)
class Cut:
    """
    The sequence where a reducer inside the decoder scores tokens.

    Attributes:
        layer: the first that sees fewer.
        columns: n, of the longest row, padding included.
        visual, keep: visual tokens of each row before and behind the cut.
        words: columns of the text behind the last image, in the longest row.
        raters: of these, how many SparseVLM lets vote.
        is_first: whether nothing was scored before.
    """

    layer: int
    columns: int
    visual: tuple[int, ...]
    keep: tuple[int, ...]
    words: int
    raters: int
    is_first: bool


def queries(shape: ModelShape, rows: int) -> float:
    """Queries of some rows, from a decoder layer's own projection."""
    return product(rows, shape.decoder.hidden_size, shape.decoder.query_width)


def keys(shape: ModelShape, cut: Cut, of: str) -> float:
    """
    Keys of all columns. The layer below the cut has left its own in the cache, unless that cuts them to a window; the
    layer above has not made any yet.
    """
    if of == "previous" and shape.decoder.windows[cut.layer - 1] is None:
        return 0.0
    return product(cut.columns, shape.decoder.hidden_size, shape.decoder.key_width)


def logits(shape: ModelShape, rows: int, columns: int) -> float:
    """Some rows' queries against all columns' keys, in all heads."""
    return product(rows, shape.decoder.query_width, columns)


def sums_of_rows(shape: ModelShape, rows: int, columns: int) -> float:
    """Weighted sums of rows of attention, one in each head."""
    return product(shape.decoder.num_heads, rows, columns)


def last_row(reducer: TokenReducer, shape: ModelShape, cut: Cut) -> float:
    """One row of attention, of the column that asks, in the layer below the cut."""
    return queries(shape, 1) + keys(shape, cut, "previous") + logits(shape, 1, cut.columns)


def fastv(reducer: TokenReducer, shape: ModelShape, cut: Cut) -> float:
    """The last row, or with `rows="all"` every row and the mean over them."""
    if reducer.rows == "last":
        return last_row(reducer, shape, cut)
    n = cut.columns
    return queries(shape, n) + keys(shape, cut, "previous") + logits(shape, n, n) + sums_of_rows(shape, n, n)


def vtw(reducer: TokenReducer, shape: ModelShape, cut: Cut) -> float:
    """Nothing is scored."""
    return 0.0


def pyramiddrop(reducer: TokenReducer, shape: ModelShape, cut: Cut) -> float:
    """One row of attention in the layer above the cut, whose keys are made for it."""
    return queries(shape, 1) + keys(shape, cut, "next") + logits(shape, 1, cut.columns)


def dart_layer(reducer: TokenReducer, shape: ModelShape, cut: Cut) -> float:
    """Image pivots and text pivots against all columns, as the decoder's last norm makes them."""
    pivots = min(reducer.image_pivots, cut.columns) + min(reducer.text_pivots, cut.columns)
    return keys(shape, cut, "previous") + product(pivots, shape.decoder.hidden_size, cut.columns)


def aim_prune(reducer: TokenReducer, shape: ModelShape, cut: Cut) -> float:
    """PageRank: all queries once, and in each of five steps all logits anew and the sums of rows."""
    n = cut.columns
    step = logits(shape, n, n) + sums_of_rows(shape, n, n)
    return queries(shape, n) + keys(shape, cut, "previous") + PAGE_RANK_STEPS * step


def sparsevlm(reducer: TokenReducer, shape: ModelShape, cut: Cut) -> float:
    """
    At the first cut all columns against the question's words. At every cut the raters' rows of attention, and version
    1 their weighted sum and each cluster's members as sums over the candidates; version 2 the pull of positions alone.
    """
    n, raters = cut.columns, cut.raters
    rating = product(n, shape.decoder.hidden_size, cut.words) if cut.is_first else 0.0
    rows = queries(shape, raters) + keys(shape, cut, "previous") + logits(shape, raters, n)
    if reducer.version == "v2":
        return rating + rows + product(raters, shape.decoder.head_dim, n)
    visual, keep = torch.tensor(cut.visual), torch.tensor(cut.keep)
    removed = visual - num_kept_as_they_are(visual, keep)
    candidates = int(torch.minimum(num_candidates(removed), removed).max())
    clusters = product(candidates, candidates, shape.decoder.hidden_size)
    return rating + rows + sums_of_rows(shape, raters, n) + clusters


CUT_COSTS: dict[str, Callable[[Any, ModelShape, Cut], float]] = {
    "aim_prune": aim_prune,
    "dart_layer": dart_layer,
    "depth": last_row,
    "fastv": fastv,
    "head_threshold": last_row,
    "pyramiddrop": pyramiddrop,
    "sparsevlm": sparsevlm,
    "vtw": vtw,
}


# ---------------------------------------------------------------- by class


def formula(reducer: TokenReducer, formulas: dict[str, Callable]) -> Callable | None:
    """
    The formula of a reducer's class, or `None` for a class that is not among ours. A subclass may do anything, so it
    does not inherit one.
    """
    return next((formulas[name] for name in formulas if _origin(REDUCERS[name]) == _origin(type(reducer))), None)


def _origin(reducer_class: type[TokenReducer]) -> tuple[str, str]:
    """File and name: a model loaded from its own folder's copy of the code has classes of the same."""
    return reducer_class.__module__.rsplit(".", 1)[-1], reducer_class.__qualname__


def image_flops(reducer: TokenReducer, name: str, shape: ModelShape, n: int, keep: int) -> float:
    """What a reducer between tower and decoder spends on one image of n tokens, of which K stay."""
    return _known(reducer, name, IMAGE_COSTS)(reducer, shape, n, keep)


def tower_run(reducer: TokenReducer, name: str, shape: ModelShape, keep: int) -> TowerRun:
    """How a reducer inside the tower runs it, for one image of which K tokens stay."""
    if keep >= shape.vision.num_patches:
        return TowerRun.whole(shape)
    return _known(reducer, name, TOWER_RUNS)(reducer, shape, keep)


def cut_flops(reducer: TokenReducer, name: str, shape: ModelShape, cut: Cut) -> float:
    """What a reducer inside the decoder spends at one cut on one row."""
    return _known(reducer, name, CUT_COSTS)(reducer, shape, cut)


def _known(reducer: TokenReducer, name: str, formulas: dict[str, Callable]) -> Callable:
    known = formula(reducer, formulas)
    if known is None:
        raise ValueError(f"`reducer` is {name!r}, a class of its own, and what it costs in training is not known.")
    return known
