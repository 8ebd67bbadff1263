"""The columns of a padded batch in each decoder layer of a training step, and what reducers inside it spend."""

from collections.abc import Iterator
from dataclasses import dataclass

from .model_shape import ModelShape
from .reducer_flops import Cut, cut_flops
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
