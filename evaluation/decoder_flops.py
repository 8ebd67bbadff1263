"""FLOPs of the decoder: prefill, the steps behind it, its cache, and what reducers inside it spend.

Every layer has a number of columns of its own, text and those visual tokens that it sees, and maybe a share of its
heads and neurons that runs. In a batch every row is as long as the longest, layer by layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .model_shape import DecoderShape, ModelShape
from .reducer_flops import Cut, cut_flops, product
from .token_plan import TokenPlan


@dataclass(frozen=True)
class Prompts:
    """
    The text around the images.

    Attributes:
        text_tokens: of each prompt.
        words: of these the ones behind the last image.
        num_images: of each prompt.
        masks: whether dropped tokens stay in the sequence, hidden.
    """

    text_tokens: tuple[int, ...]
    words: tuple[int, ...]
    num_images: tuple[int, ...]
    masks: bool

    @property
    def rows(self) -> int:
        """How many they are."""
        return len(self.text_tokens)


@dataclass(frozen=True)
class ExecutionPlan:
    """
    Which units of the decoder run.

    Attributes:
        heads: for each layer the share of attention heads that run, in [0, 1]; a layer without any writes no keys.
        mlp: for each layer the share of MLP neurons that run, in [0, 1].
    """

    heads: tuple[float, ...]
    mlp: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.mlp) or not all(0 <= share <= 1 for share in (*self.heads, *self.mlp)):
            raise ValueError(f"`plan` is {self!r}; allowed are shares from 0 to 1, one of each kind for each layer.")

    @classmethod
    def everything(cls, num_layers: int) -> "ExecutionPlan":
        """Every layer, whole."""
        return cls((1.0,) * num_layers, (1.0,) * num_layers)


@dataclass(frozen=True)
class DecodeCost:
    """
    What the steps behind the prefill cost.

    Attributes:
        fixed: of a step whatever came before: projections, MLPs, the head.
        per_key: for each layer, of attending to one more column.
        cached: for each layer the columns that prefill left in the cache.
        windows: for each layer how many columns it sees back, or `None`.
    """

    fixed: float
    per_key: tuple[float, ...]
    cached: tuple[int, ...]
    windows: tuple[int | None, ...]

    def steps(self, number: int) -> float:
        """The first `number` steps together, each with a column more in every layer up to its window."""
        layers = zip(self.per_key, self.cached, self.windows, strict=True)
        return self.fixed * number + sum(cost * keys_over_steps(seen, number, window) for cost, seen, window in layers)


def keys_over_steps(cached: int, steps: int, window: int | None) -> int:
    """Sum over steps t = 1 .. T of min(cached + t, window), the columns that each step attends to."""
    growing = steps if window is None else max(0, min(steps, window - cached))
    full = 0 if window is None else window * (steps - growing)
    return growing * cached + growing * (growing + 1) // 2 + full


def layer_columns(prompts: Prompts, shape: ModelShape, tokens: TokenPlan) -> tuple[int, ...]:
    """The length of the longest row in each layer: text, kept CLS tokens, and the visual tokens that it sees."""
    rows = list(zip(_unmoved(prompts, shape), tokens.layer_counts, prompts.num_images, strict=True))
    if prompts.masks and tokens.decoder is None:
        longest = max(unmoved + images * shape.vision.num_patches for unmoved, _, images in rows)
        return (longest,) * shape.decoder.num_layers
    return tuple(
        max(unmoved + counts[layer] for unmoved, counts, _ in rows) for layer in range(shape.decoder.num_layers)
    )


def _unmoved(prompts: Prompts, shape: ModelShape) -> list[int]:
    """Of each prompt the columns that no layer drops: text and kept CLS tokens."""
    pairs = zip(prompts.text_tokens, prompts.num_images, strict=True)
    return [text + images * int(shape.keep_cls) for text, images in pairs]


def layer_flops(decoder: DecoderShape, queries: int, keys: int, heads: float = 1.0, mlp: float = 1.0) -> float:
    """
    One decoder layer for n columns that attend to k: queries and outputs 4 n D Q, keys and values 4 n D P, attention
    4 n k Q, and three matrices of the gated MLP 6 n D M, with Q and P the widths of all queries and all keys.

    Args:
        decoder: its shape.
        queries: n.
        keys: k.
        heads, mlp: the shares that run.
    """
    width = decoder.hidden_size
    projections = 2 * product(queries, width, decoder.query_width) + 2 * product(queries, width, decoder.key_width)
    attention = 2 * product(queries, decoder.query_width, keys)
    return heads * (projections + attention) + mlp * 3 * product(queries, width, decoder.mlp_size)


def head_flops(decoder: DecoderShape) -> float:
    """The head, on the last position."""
    return product(1, decoder.hidden_size, decoder.vocab_size)


def prefill_flops(decoder: DecoderShape, columns: Sequence[int], units: ExecutionPlan, rows: int) -> float:
    """
    The decoder on `rows` prompts.

    Args:
        decoder: its shape.
        columns: of each layer.
        units: that run.
        rows: of the batch.
    """
    layers = sum(
        layer_flops(decoder, n, n, heads, mlp) for n, heads, mlp in zip(columns, units.heads, units.mlp, strict=True)
    )
    return rows * (layers + head_flops(decoder))


def decode_cost(decoder: DecoderShape, columns: Sequence[int], units: ExecutionPlan, rows: int) -> DecodeCost:
    """The steps behind a prefill of `columns` in each layer; see [`prefill_flops`]."""
    fixed = sum(layer_flops(decoder, 1, 0, heads, mlp) for heads, mlp in zip(units.heads, units.mlp, strict=True))
    per_key = tuple(rows * heads * 2 * product(1, decoder.query_width, 1) for heads in units.heads)
    return DecodeCost(rows * (fixed + head_flops(decoder)), per_key, tuple(columns), decoder.windows)


def kv_numbers(decoder: DecoderShape, columns: Sequence[int], units: ExecutionPlan) -> float:
    """Numbers in the cache of one row: keys and values of every layer's columns, of as many as its window holds."""
    held = [n if window is None else min(n, window - 1) for n, window in zip(columns, decoder.windows, strict=True)]
    return sum(2 * decoder.key_width * heads * n for heads, n in zip(units.heads, held, strict=True))


def inside_decoder_flops(prompts: Prompts, shape: ModelShape, tokens: TokenPlan) -> float:
    """What a reducer inside the decoder spends at its cuts, on all rows."""
    if tokens.decoder is None:
        return 0.0
    name, reducer = tokens.decoder
    return prompts.rows * sum(cut_flops(reducer, name, shape, cut) for cut in _cuts(prompts, shape, tokens))


def _cuts(prompts: Prompts, shape: ModelShape, tokens: TokenPlan) -> Iterator[Cut]:
    """The cuts at which tokens are scored: those before which, or before the next of which, some leave."""
    depth = shape.decoder.num_layers
    layers = tokens.decoder[1].cuts(depth)
    unmoved, words, is_first = _unmoved(prompts, shape), max(prompts.words), True
    for layer, following in zip(layers, [*layers[1:], depth], strict=True):
        visual = tuple(counts[layer - 1] for counts in tokens.layer_counts)
        if all(min(counts[layer:following]) >= seen for counts, seen in zip(tokens.layer_counts, visual, strict=True)):
            continue
        yield Cut(
            layer=layer,
            columns=max(text + seen for text, seen in zip(unmoved, visual, strict=True)),
            visual=visual,
            keep=tuple(counts[layer] for counts in tokens.layer_counts),
            words=words,
            raters=max(1, -(-words // 2)),
            is_first=is_first,
        )
        is_first = False
