"""What a reducer of visual tokens is, and the registry of them.

A reducer is told how many tokens to keep and returns a [`Selection`]. It says at which stage it acts and what it needs
to see, so that the model computes that and nothing else. One published method is one file beside this one.
"""

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import nn

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..budget.top_k import top_k_mask
from ..vision.features import VisionFeatures

STAGES = ("encoder", "vision", "projector", "decoder")


class TokenReducer(nn.Module):
    """
    Base class of everything that chooses or merges visual tokens. Subclass it, write `forward`, and register it by
    name. Keyword arguments of `__init__` beside `config` are the reducer's parameters: what users may write in
    `model.set_reducer(name, **parameters)`, plain values that JSON can hold. One that is not allowed raises a
    `ValueError` that names it, its value and what is allowed.

    Attributes:
        stage: where it acts. `"encoder"`: inside the vision tower (see [`EncoderReducer`]); `"vision"`: between tower
            and projector; `"projector"`: on the projected tokens; `"decoder"`: before decoder layers (see
            [`DecoderReducer`]).
        needs: of the class or the instance, what it has to be given beside the tokens, of the fields of
            [`VisionFeatures`] `"cls"`, `"budget"`, `"question"`, `"question_ids"`, `"question_tokens"`,
            `"pixel_values"`, `"fingerprint"`, `"tower_patches"`, `"native"`, `"frames"` and `"attention"` (of the
            tower layers in `attention_layers`); `"received"` says that of their attention it reads how much each token
            receives.
        ranks_by_cls: whether it reads the attention of the tower's CLS token, or in other families without one the
            attention that tokens receive.
        trained: whether it has weights that have to be learned.
        has_own_rule: whether `forward` also takes `num_keep=None` and then decides by a rule of its own.
        one_count: whether `forward` wants images that all keep the same number; images that do not come in several
            calls.
        takes_padding: whether `forward` takes images of several sizes in one call, with positions of -1 behind the
            last token of a smaller one. In training they come in one, so that all processes call it equally often.
        redistributes: whether it may move tokens between the images of a batch; their sum is then what is exact.
        is_exact: whether it keeps exactly as many tokens as it is told, which all do but the families' own dials.
        paper: where it was published, `"Name (arXiv id)"`, or empty.
    """

    stage: ClassVar[str] = "vision"
    needs: tuple[str, ...] = ()
    ranks_by_cls: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    has_own_rule: ClassVar[bool] = False
    one_count: bool = False
    takes_padding: ClassVar[bool] = False
    redistributes: bool = False
    is_exact: ClassVar[bool] = True
    paper: ClassVar[str] = ""

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Tower layers, from 0, that `features.attention` is of: by default the one that made the features."""
        return (making_layer(self.config),)

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        """
        Args:
            features: the tokens `[num_images, num_tokens, hidden_size]` and what else is in `needs`.
            num_keep: `[num_images]` int64, tokens to keep of each image, in [1, num_tokens].

        Returns:
            `Selection` among the `num_tokens` tokens, with exactly `num_keep` of each image.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define forward(features, num_keep).")


class ScoringReducer(TokenReducer):
    """
    A reducer that scores every token by itself and keeps the best. Write `scores`.

    With `config.min_token_entropy` h above 0, tokens are added in the order of their scores until the kept tokens'
    softmax of scores has at least h times the largest entropy that as many tokens can have.
    """

    def scores(self, features: VisionFeatures) -> torch.Tensor:
        """
        Unnormalised log-probabilities `[num_images, num_tokens]` of keeping each token: only their order matters to
        which are kept, and their differences to the entropy.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define scores(features).")

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        scores = self.scores(features).float()
        num_keep = raised_to_entropy(scores, num_keep, self.config.min_token_entropy)
        num_keep = num_keep.clamp(max=(features.positions >= 0).sum(dim=-1).to(num_keep.device))
        return Selection.from_keep(top_k_mask(scores, num_keep))


def raised_to_entropy(scores: torch.Tensor, num_keep: torch.Tensor, min_token_entropy: float) -> torch.Tensor:
    """
    The least number K of tokens `[num_images]`, `num_keep` or more, whose entropy is no less than a share of its
    maximum; every token, if no number of them reaches it.

    The K best tokens have probabilities p = softmax of their K scores, and entropy H = -sum p log p, at most log K.
    One token has none, so that any floor H / log K above 0 adds to it; 0 adds nothing.
    """
    if min_token_entropy == 0.0:
        return num_keep
    num_tokens = scores.shape[-1]
    ranked = scores.sort(dim=-1, descending=True).values
    # Of the first k tokens: log Z_k, and the mean score under their softmax; H_k = log Z_k - mean_k.
    shifted = ranked - ranked[:, :1]
    weights = shifted.exp().cumsum(dim=-1)
    entropy = weights.log() - (shifted.exp() * shifted).cumsum(dim=-1) / weights
    count = torch.arange(1, num_tokens + 1, device=scores.device)
    is_enough = (entropy >= min_token_entropy * count.log()) & (count > 1)
    is_enough = is_enough & (count >= num_keep.to(scores.device)[:, None])
    is_enough[:, -1] = True
    return is_enough.int().argmax(dim=-1) + 1


def feature_layers(config: AdaVTPConfig) -> list[int]:
    """The feature layers in the order asked for, as indices of hidden states: 0 the embeddings, l of layer l - 1."""
    layers = getattr(config, "vision_feature_layer", -1)
    # Stock LLaVA's configuration has only the tower's own.
    num_states = 1 + (
        config.num_tower_layers if hasattr(config, "num_tower_layers") else config.vision_config.num_hidden_layers
    )
    return [index if index >= 0 else num_states + index for index in ([layers] if isinstance(layers, int) else layers)]


def feature_layer_index(config: AdaVTPConfig) -> int:
    """The highest feature layer as an index of hidden states."""
    return max(feature_layers(config))


def making_layer(config: AdaVTPConfig) -> int:
    """The tower layer, from 0, that made the features; a `ValueError` if they are the tower's embeddings."""
    layer = feature_layer_index(config) - 1
    if layer < 0:
        raise ValueError(
            f"`vision_feature_layer` is {config.vision_feature_layer}, the tower's embeddings, which no layer's "
            "attention has made; choose a feature layer above 0."
        )
    return layer


REDUCERS: dict[str, type[TokenReducer]] = {}


def register_reducer(name: str) -> Callable[[type[TokenReducer]], type[TokenReducer]]:
    """
    Class decorator that makes a reducer available as `model.set_reducer(name)` and in `config.reducers`.

    Raises:
        TypeError: if the decorated class is not a [`TokenReducer`].
        ValueError: if the name has characters other than letters, digits, `_`, `+` and `-`, another class holds it, or
            the class's stage is not one.
    """
    if not re.fullmatch(r"[\w+-]+", name):
        raise ValueError(f"`name` is {name!r}; letters, digits, '_', '+' and '-' are allowed.")

    def register(reducer_class: type[TokenReducer]) -> type[TokenReducer]:
        if not (isinstance(reducer_class, type) and issubclass(reducer_class, TokenReducer)):
            raise TypeError(f"`register_reducer` takes subclasses of TokenReducer, got {reducer_class!r}.")
        if reducer_class.stage not in STAGES:
            raise ValueError(
                f"{reducer_class.__name__}.stage is {reducer_class.stage!r}; allowed: {', '.join(STAGES)}."
            )
        holder = REDUCERS.get(name, reducer_class)
        if holder.__qualname__ != reducer_class.__qualname__:
            raise ValueError(f"`name` is {name!r}, which {holder.__qualname__} holds already; choose another.")
        REDUCERS[name] = reducer_class
        return reducer_class

    return register


def build_reducer(name: str, config: AdaVTPConfig, **parameters: Any) -> TokenReducer:
    """
    Makes the reducer that is registered under `name`.

    Raises:
        ValueError: if there is none, it does not know a parameter, or it needs a CLS token that the tower lacks.
    """
    if name not in REDUCERS:
        # A model that was loaded before the package runs its folder's copy of this file, with a registry of its own.
        copies = [
            module for key, module in list(sys.modules.items()) if key.endswith((".reducers_base", ".reducers.base"))
        ]
        is_elsewhere = any(name in getattr(copy, "REDUCERS", {}) for copy in copies)
        hint = " Another copy of this code knows it: import adavtp before the model is loaded." if is_elsewhere else ""
        raise ValueError(f"`reducer` is {name!r}; registered reducers: {', '.join(sorted(REDUCERS))}.{hint}")
    known = reducer_parameters(name)
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        takes = ", ".join(known) or "none"
        raise ValueError(f"Reducer {name!r} got the parameter(s) {', '.join(unknown)}; parameters it takes: {takes}.")
    if REDUCERS[name].ranks_by_cls and not (config.has_cls or config.ranks_by_received):
        raise ValueError(
            f"Reducer {name!r} ranks patches by the attention of the CLS token, and a "
            f"{config.vision_config.model_type!r} tower has none; use a reducer that does without, such as 'divprune'."
        )
    try:
        module = REDUCERS[name](config, **parameters)
    # What a parameter of another type does where it is used.
    except (TypeError, RuntimeError, OverflowError) as error:
        if not parameters:
            raise
        raise ValueError(f"Reducer {name!r} cannot be made with {parameters}: {error}.") from error
    if module.ranks_by_cls:
        making_layer(config)
    return module


def reducer_parameters(name: str) -> dict[str, Any]:
    """The parameters of a registered reducer, each with its default."""
    signature = inspect.signature(REDUCERS[name].__init__).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default for p in signature if p.kind in kinds and p.name not in ("self", "config")}


def directions(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `[..., width]` as unit vectors in float32, whose products are cosines; one of no length stays 0."""
    return nn.functional.normalize(tokens.float(), dim=-1)


def take_tokens(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of `[num_images, num_tokens, hidden_size]` the tokens at `index` `[num_images, num_taken]`, in its order."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def require_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises a `ValueError` if the parameter `name` is none of `choices`; 1 is not `True`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"`{name}` is {value!r}; allowed: {', '.join(map(repr, choices))}.")


def require_share(name: str, value: Any, above_zero: bool = False) -> None:
    """Raises a `ValueError` if the parameter `name` is no number from 0 to 1, or is 0 where it has to be above."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1 or (above_zero and value == 0):
        raise ValueError(f"`{name}` is {value!r}; allowed are {'shares above 0, up to' if above_zero else '0 to'} 1.")


def require_count(name: str, value: Any, least: int) -> None:
    """Raises a `ValueError` if the parameter `name` is no whole number of `least` or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` is {value!r}; allowed are whole numbers from {least}.")
