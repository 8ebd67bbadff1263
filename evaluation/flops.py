"""Counted FLOPs of a prompt with images, part by part.

What is counted are matrix products, convolutions and attention, as torch's FlopCounterMode does, at two FLOPs for a
multiplication with its addition; attention counts its whole square, masked or not. Each tower layer's halves and each
decoder layer have a number of tokens of their own. Nothing is run and no weight is made: configuration and budget say
all, or, where only the image could, a [`Selection`] of what happened. Published figures use other conventions, see
`flops_conventions`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.budget.schedule import StackBudget
from ..modeling.budget.selection import Selection
from ..modeling.modeling_adavtp import ReducerSpec
from ..modeling.reducers.base import REDUCERS
from .decoder_flops import (
    DecodeCost,
    ExecutionPlan,
    Prompts,
    decode_cost,
    inside_decoder_flops,
    kv_numbers,
    layer_columns,
    prefill_flops,
)
from .model_shape import ModelShape
from .settings import FULL
from .token_plan import Happened, TokenPlan, plan_tokens, weightless_steps
from .vision_flops import between_flops, projector_flops, vision_flops

_PLAIN = frozenset({bool, int, float, str, type(None)})


@dataclass(frozen=True)
class Flops:
    """
    What one prompt costs (or one batch), in FLOPs.

    Attributes:
        vision: the vision tower, up to the feature layer.
        reducer: choosing and merging, wherever it happens, and the budget's embedding.
        projector: on the tokens that reach it.
        prefill: the decoder on the whole prompt, and the head on its last position.
        decode_per_token: the decoder on the first token behind the prompt; later ones attend to more, see `decode`.
        kv_bytes: keys and values of the prompt in the cache, in bytes.
        mean_visual_tokens: that a decoder layer sees of an image in prefill, mean over layers and images.
        new_tokens: tokens that are generated, 1 or more; prefill makes the first.
        layer_tokens: for each decoder layer the columns of the sequence in prefill.
        convention: by which all of it was counted.
        decode: the steps behind the prefill.
    """

    vision: float
    reducer: float
    projector: float
    prefill: float
    decode_per_token: float
    kv_bytes: float
    mean_visual_tokens: float
    new_tokens: int = 1
    layer_tokens: tuple[int, ...] = ()
    convention: str = "adavtp"
    decode: DecodeCost | None = field(default=None, repr=False)

    @property
    def total(self) -> float:
        """Everything, up to and with `new_tokens` generated tokens."""
        return self.with_new_tokens(self.new_tokens)

    @property
    def prefill_per_layer(self) -> float:
        """Prefill divided by the number of layers, which is what FastV's table prints."""
        return self.prefill / len(self.layer_tokens)

    def with_new_tokens(self, number: int) -> float:
        """
        Everything up to and with the `number`-th generated token. Prefill makes the first, and each further one takes
        a step over a cache that has grown.

        Args:
            number: 1 or more; 0 for a prompt that is read and not answered costs the same as 1.

        Raises:
            ValueError: if it is negative.
        """
        if number < 0:
            raise ValueError(f"`new_tokens` is {number}; allowed are whole numbers from 0.")
        before = self.vision + self.reducer + self.projector + self.prefill
        return before + (0.0 if self.decode is None else self.decode.steps(max(number - 1, 0)))

    def as_dict(self) -> dict[str, Any]:
        """Parts, settings and `total`, as JSON can hold them."""
        values = asdict(self)
        del values["decode"]
        return {**values, "layer_tokens": list(self.layer_tokens), "total": self.total}


# ---------------------------------------------------------------- what users call


def count_flops(
    config: AdaVTPConfig,
    text_tokens: int,
    *,
    token_budget: StackBudget | None = None,
    reducer: ReducerSpec | None = None,
    selection: Selection | None = None,
    layer_tokens: Sequence[int] | None = None,
    num_images: int = 1,
    new_tokens: int = 1,
    dtype: torch.dtype | str | None = None,
    convention: str = "adavtp",
    plan: ExecutionPlan | None = None,
    question_tokens: int | None = None,
) -> Flops:
    """
    The FLOPs of one prompt, alone and without padding, as `generate` executes it.

    Args:
        config: the model's.
        text_tokens: of the prompt, placeholders of images not among them.
        token_budget, reducer: see [`AdaVTPForConditionalGeneration.forward`]; the reducer `"full"` keeps everything.
        selection: what was really kept of the prompt's images, in place of what the budget says. Needed where a
            reducer decides by a rule of its own that looks at the image. Stacks need the budget beside it.
        layer_tokens: visual tokens that each decoder layer sees, of all images together, in place of a reducer: its
            own cost is then 0, and as many as layer 0 sees reach the projector.
        num_images: in the prompt.
        new_tokens: that are generated, for `total`.
        dtype: of the cache, a torch dtype or its name; by default the configuration's, or else float32.
        convention: `"adavtp"`, or that of a paper, a name in `flops_conventions.CONVENTIONS`, which excludes what the
            paper does not count.
        plan: the decoder's units that run; by default all.
        question_tokens: text behind the last image, which some reducers rank by; by default all of the text. Of these
            words half, rounded up, are taken to be SparseVLM's raters, since only the words themselves can say.

    Raises:
        ValueError: if an argument is not allowed, a budget cannot be reached, or a user's reducer does not say what it
            costs; the message says what to do.
    """
    return count_batch_flops(
        config,
        [text_tokens],
        token_budget=token_budget,
        reducer=reducer,
        selection=selection,
        layer_tokens=None if layer_tokens is None else [layer_tokens],
        num_images=[num_images],
        new_tokens=new_tokens,
        dtype=dtype,
        convention=convention,
        plan=plan,
        question_tokens=None if question_tokens is None else [question_tokens],
    )


def count_batch_flops(
    config: AdaVTPConfig,
    text_tokens: Sequence[int],
    *,
    token_budget: StackBudget | None = None,
    reducer: ReducerSpec | None = None,
    selection: Selection | None = None,
    layer_tokens: Sequence[Sequence[int]] | None = None,
    num_images: Sequence[int] | None = None,
    new_tokens: int = 1,
    dtype: torch.dtype | str | None = None,
    convention: str = "adavtp",
    plan: ExecutionPlan | None = None,
    question_tokens: Sequence[int] | None = None,
    selection_output: str = "gather",
) -> Flops:
    """
    The FLOPs that a padded batch really executes: in each decoder layer every row is as long as the longest.

    Args:
        text_tokens, num_images, layer_tokens, question_tokens: for each prompt; see [`count_flops`]. One image each by
            default.
        selection_output: `"gather"`, or `"mask"` as `forward` has it, where dropped tokens stay in the sequence.
        others: see [`count_flops`].

    Returns:
        `Flops` of the batch; `mean_visual_tokens` is that of an image.
    """
    num_images = [1] * len(text_tokens) if num_images is None else num_images
    if len(num_images) != len(text_tokens) or not text_tokens or min(*text_tokens, *num_images, 0) < 0:
        raise ValueError(
            f"`text_tokens` is {list(text_tokens)!r} and `num_images` {list(num_images)!r}; allowed are whole numbers "
            "from 0, one of each for each prompt."
        )
    words = text_tokens if question_tokens is None else question_tokens
    if len(words) != len(text_tokens) or any(
        not 0 <= behind <= text for behind, text in zip(words, text_tokens, strict=True)
    ):
        raise ValueError(
            f"`question_tokens` is {list(words)!r}; allowed are whole numbers from 0 to `text_tokens`, one for each."
        )
    if layer_tokens is not None and not (reducer is token_budget is selection is None):
        raise ValueError("`layer_tokens` stands in for `reducer`, `token_budget` and `selection`; leave those out.")
    if type(new_tokens) is not int or new_tokens < 1:
        raise ValueError(f"`new_tokens` is {new_tokens!r}; allowed are whole numbers from 1.")
    if selection_output not in ("gather", "mask"):
        raise ValueError(f"`selection_output` is {selection_output!r}; allowed are 'gather' and 'mask'.")
    if reducer == FULL:
        reducer, token_budget = None, 1.0
    happened = None if selection is None else Happened.of(selection, config.text_config.num_hidden_layers)
    counted = _counted(
        Asked(
            looked=Looked(
                config=_Keyed(config, _config_key(config)),
                reducer=_Keyed(reducer, _reducer_key(config, reducer)),
                token_budget=_Keyed(token_budget, _budget_key(token_budget)),
                num_images=tuple(num_images),
                happened=happened,
                layer_tokens=None if layer_tokens is None else tuple(map(tuple, layer_tokens)),
            ),
            prompts=Prompts(tuple(text_tokens), tuple(words), tuple(num_images), selection_output == "mask"),
            bytes_per_number=_bytes_per_number(dtype, config),
            convention=convention,
            plan=plan,
        )
    )
    return counted if new_tokens == 1 else replaced(counted, new_tokens)


def layer_visual_tokens(
    config: AdaVTPConfig,
    reducer: ReducerSpec | None = None,
    token_budget: StackBudget | None = None,
    num_images: int = 1,
) -> list[int]:
    """
    Visual tokens that each decoder layer sees in prefill, of all images of a prompt together.

    Args:
        config: the model's.
        reducer, token_budget: see [`AdaVTPForConditionalGeneration.forward`]; the reducer `"full"` keeps everything.
        num_images: in the prompt.

    Raises:
        ValueError: if the budget is not allowed or out of the reducer's reach, or only the image can say.
    """
    if reducer == FULL:
        reducer, token_budget = None, 1.0
    return list(plan_tokens(config, weightless_steps(config, reducer), token_budget, [num_images]).layer_counts[0])


# ---------------------------------------------------------------- counted once for each thing that is asked


@dataclass(frozen=True)
class _Keyed:
    """A value that cannot be hashed, beside what stands for it."""

    value: Any = field(compare=False)
    key: Any


@dataclass(frozen=True)
class Looked:
    """What is asked about the images, as a key; prompts differ in their text more often than in this."""

    config: _Keyed
    reducer: _Keyed
    token_budget: _Keyed
    num_images: tuple[int, ...]
    happened: Happened | None
    layer_tokens: tuple[tuple[int, ...], ...] | None


@dataclass(frozen=True)
class Asked:
    """What is to be counted, as a key: see [`count_batch_flops`]. An evaluation asks the same for many examples."""

    looked: Looked
    prompts: Prompts
    bytes_per_number: int
    convention: str
    plan: ExecutionPlan | None


def replaced(flops: Flops, new_tokens: int) -> Flops:
    """The same count with another number of generated tokens."""
    return Flops(**{**flops.__dict__, "new_tokens": new_tokens})


def _config_key(config: AdaVTPConfig) -> tuple:
    """
    The configuration and its plain values, which may be changed between two calls. Read past the attributes, whose
    look-up in a configuration takes several times as long as everything else here.
    """
    parts = [vars(part) for part in (config, vars(config)["vision_config"], vars(config)["text_config"])]
    plain = tuple(value for part in parts for value in part.values() if type(value) in _PLAIN)
    return id(config), repr(parts[0]["vision_feature_layer"]), plain


def _reducer_key(config: AdaVTPConfig, reducer: ReducerSpec | None) -> tuple:
    entries = config.reducers if reducer is None else [reducer] if isinstance(reducer, str | dict) else reducer
    names = [entry if isinstance(entry, str) else entry.get("name") for entry in entries]
    # A class may be registered anew under its name, as in a notebook.
    return (json.dumps(entries, default=repr, sort_keys=True), *(REDUCERS.get(name) for name in names))


def _budget_key(token_budget: StackBudget | None) -> str:
    if isinstance(token_budget, torch.Tensor):
        return f"{token_budget.dtype} {token_budget.tolist()}"
    return repr(token_budget)


def _bytes_per_number(dtype: torch.dtype | str | None, config: AdaVTPConfig) -> int:
    wanted = dtype or getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype):
        raise ValueError(f"`dtype` is {dtype!r}; allowed are torch's dtypes and their names, such as 'bfloat16'.")
    return found.itemsize


@lru_cache(maxsize=8192)
def _counted(asked: Asked) -> Flops:
    # The papers' conventions are made of what is here.
    from .flops_conventions import CONVENTIONS

    if asked.convention not in ("adavtp", *CONVENTIONS):
        raise ValueError(f"`convention` is {asked.convention!r}; allowed: adavtp, {', '.join(CONVENTIONS)}.")
    shape, tokens = _planned(asked.looked)
    depth = shape.decoder.num_layers
    units = asked.plan or ExecutionPlan.everything(depth)
    if len(units.heads) != depth:
        raise ValueError(f"`plan` is of {len(units.heads)} layers; the decoder has {depth}.")
    columns = layer_columns(asked.prompts, shape, tokens)
    if asked.convention != "adavtp":
        return CONVENTIONS[asked.convention].count(shape.decoder, columns, units, asked, tokens)
    return _as_executed(asked, shape, tokens, columns, units)


def _as_executed(
    asked: Asked, shape: ModelShape, tokens: TokenPlan, columns: tuple[int, ...], units: ExecutionPlan
) -> Flops:
    rows = asked.prompts.rows
    decode = decode_cost(shape.decoder, columns, units, rows)
    vision, before = _before_decoder(asked.looked)
    return Flops(
        vision=vision,
        reducer=before + inside_decoder_flops(asked.prompts, shape, tokens),
        projector=projector_flops(shape, tokens, asked.prompts.masks),
        prefill=prefill_flops(shape.decoder, columns, units, rows),
        decode_per_token=decode.steps(1),
        kv_bytes=float(rows * kv_numbers(shape.decoder, columns, units) * asked.bytes_per_number),
        mean_visual_tokens=mean_visual_tokens(tokens),
        layer_tokens=columns,
        decode=decode,
    )


@lru_cache(maxsize=2048)
def _planned(looked: Looked) -> tuple[ModelShape, TokenPlan]:
    config = looked.config.value
    shape = ModelShape.of(config)
    if looked.layer_tokens is None:
        steps = weightless_steps(config, looked.reducer.value)
        return shape, plan_tokens(config, steps, looked.token_budget.value, looked.num_images, looked.happened)
    depth = shape.decoder.num_layers
    for row in looked.layer_tokens:
        if len(row) != depth or min(row) < 0:
            raise ValueError(
                f"`layer_tokens` is {list(row)}; allowed are whole numbers from 0, one for each of {depth} layers."
            )
    sample = tuple(prompt for prompt, images in enumerate(looked.num_images) for _ in range(images))
    return shape, TokenPlan((), sample, False, None, looked.layer_tokens)


@lru_cache(maxsize=2048)
def _before_decoder(looked: Looked) -> tuple[float, float]:
    """The tower, and the reducers up to the decoder."""
    shape, tokens = _planned(looked)
    vision, inside = vision_flops(shape, tokens)
    return vision, inside + between_flops(looked.config.value, shape, tokens)


def mean_visual_tokens(tokens: TokenPlan) -> float:
    """Of an image, that a decoder layer sees: mean over layers and images."""
    seen = sum(map(sum, tokens.layer_counts))
    return seen / (len(tokens.layer_counts[0]) * len(tokens.sample)) if tokens.sample else 0.0
