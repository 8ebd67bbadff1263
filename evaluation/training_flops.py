"""A training step's FLOPs, forward and on the way back, counted by torch while a weightless model takes the step.

Autograd numbers its nodes in the order in which the forward pass makes them. So each part's modules say which numbers
are theirs, and a product on the way back belongs to the part that has its node's number. Layers of the decoder are
alike, from the second on: two of them say what all cost.
"""

import copy
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.budget.schedule import StackBudget
from ..modeling.costs.counting import ProductsAreNoise, counter, make_weightless, weightless_model
from ..modeling.families.llava import LLAVA
from ..modeling.reducers.base import feature_layer_index
from ..modeling.vision.tower import _attention, tower_layers

PARTS = ("controller", "projector", "vision", "decoder")
# Scores again, and the gradients of weights, values, queries and keys: five products for attention's two.
FUSED_ATTENTION = 2.5


@dataclass(frozen=True)
class Trained:
    """
    What trains.

    Attributes:
        controller, projector, vision, decoder: whether the part does; the controller with the budget token.
        lora_rank: r of adapters on every linear map of the decoder's layers, which then train in the decoder's place;
            `None` for none.
    """

    controller: bool = False
    projector: bool = False
    vision: bool = False
    decoder: bool = False
    lora_rank: int | None = None

    @classmethod
    def of(cls, train_parts: Sequence[str], lora_rank: int | None = None) -> "Trained":
        """
        Args:
            train_parts: names as in `AdaVTPTrainingArguments`.
            lora_rank: 1 or more, with `"decoder"` among the parts.

        Raises:
            ValueError: if a part is not known or none is named, or adapters are asked for and the decoder is frozen.
        """
        if set(train_parts) - set(PARTS) or not train_parts:
            raise ValueError(f"`train_parts` is {list(train_parts)}; allowed are one or more of {list(PARTS)}.")
        if lora_rank is not None and (lora_rank < 1 or "decoder" not in train_parts):
            raise ValueError(
                f"`lora_rank` is {lora_rank} and `train_parts` {list(train_parts)}; adapters have a rank of 1 or more "
                "and train in the decoder's place, so name 'decoder' among the parts."
            )
        return cls(**dict.fromkeys(train_parts, True), lora_rank=lora_rank)

    @property
    def decoder_weights(self) -> bool:
        """Whether the decoder's own weights train."""
        return self.decoder and self.lora_rank is None


@dataclass(frozen=True)
class Step:
    """
    How a training step is carried out.

    Attributes:
        trained: what trains.
        checkpointing: whether layers keep only what enters them, and run again on the way back.
        gates: `"features"` or `"attention"`, see [`AdaVTPConfig`].
        losses: that are added up, see `AdaVTPTrainingArguments.loss_weights`.
        gates_fused: whether attention keeps no scores where gates are inside it, as on a GPU. On a CPU it does.
    """

    trained: Trained
    checkpointing: bool = False
    gates: str = "features"
    losses: tuple[str, ...] = ("lm",)
    gates_fused: bool = True

    def __post_init__(self) -> None:
        if set(self.losses) - {"lm", "distillation", "relevance"} or not self.losses:
            raise ValueError(f"`losses` is {self.losses}; allowed are one or more of lm, distillation, relevance.")


@dataclass(frozen=True)
class PartFlops:
    """
    A part of the model in one step.

    Attributes:
        forward, backward: the pass and the way back.
        recomputed: what checkpointed layers run again.
    """

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """All three."""
        return self.forward + self.backward + self.recomputed

    def times(self, factor: float) -> "PartFlops":
        """Each, times a number."""
        return PartFlops(factor * self.forward, factor * self.backward, factor * self.recomputed)

    def plus(self, other: "PartFlops") -> "PartFlops":
        """Each, added up."""
        return PartFlops(
            self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed
        )


@dataclass(frozen=True)
class TrainingFlops:
    """
    One training step of a batch, in FLOPs.

    Attributes:
        parts: by name: `"vision"`, `"reducer"` (with the budget's embedding), `"projector"`, `"decoder"`, `"head"`
            (on every position), and `"full_budget"`, the passes that distillation and relevance add.
    """

    parts: Mapping[str, PartFlops] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Everything."""
        return sum(part.total for part in self.parts.values())

    @classmethod
    def weighted(cls, steps: Sequence[tuple[float, "TrainingFlops"]]) -> "TrainingFlops":
        """The sum over steps, each times its weight."""
        parts: dict[str, PartFlops] = {}
        for weight, step in steps:
            for name, part in step.parts.items():
                parts[name] = parts.get(name, PartFlops()).plus(part.times(weight))
        return cls(parts)


# ---------------------------------------------------------------- what users call


def count_training_flops(
    config: AdaVTPConfig,
    text_tokens: Sequence[int],
    step: Step,
    *,
    token_budget: StackBudget | None = None,
    num_images: Sequence[int] | None = None,
) -> TrainingFlops:
    """
    The FLOPs of forward and backward on one padded batch; the optimizer's own are a few per weight and not counted.

    Args:
        config: the model's.
        text_tokens: of each prompt with its answer, placeholders of images not among them.
        step: how it is carried out.
        token_budget: see [`AdaVTPForConditionalGeneration.forward`].
        num_images: of each prompt, one by default.

    Raises:
        ValueError: if an argument is not allowed.
    """
    # A floor on the entropy adds tokens to noise; how many it adds to an image, no count can say.
    changes = {"min_token_entropy": 0.0, "gradient_gates": step.gates, "image_token_id": 0, "trained_reducers": []}
    num_images = [1] * len(text_tokens) if num_images is None else num_images
    inputs = _prompts(config, text_tokens, num_images)
    model = weightless_model(config, **changes).train()
    counted = _count(model, inputs | {"token_budget": token_budget}, step)
    passes = {"distillation", "relevance"} & set(step.losses)
    if not passes or not sum(num_images):
        return counted
    # Each runs the model at full budget; the gradient of relevance comes back to the projected tokens.
    whole = replace(step, trained=Trained(projector=True), checkpointing=False, losses=("lm",))
    once = _count(weightless_model(config, **changes), inputs | {"token_budget": 1.0}, whole).parts
    forward = len(passes) * sum(part.forward for part in once.values())
    back = once["decoder"].backward + once["head"].backward if "relevance" in passes else 0.0
    return TrainingFlops({**counted.parts, "full_budget": PartFlops(forward, back)})


def plain_training_flops(
    config: AdaVTPConfig, text_tokens: Sequence[int], step: Step, num_images: Sequence[int] | None = None
) -> TrainingFlops:
    """
    The same step of plain LLaVA on all visual tokens: no controller, no budget, and the whole tower, whose layers
    above the feature layer run for nothing.

    Args:
        config, text_tokens, step, num_images: see [`count_training_flops`].
    """
    plain = LlavaConfig(
        vision_config=copy.deepcopy(config.vision_config),
        text_config=copy.deepcopy(config.text_config),
        image_token_index=0,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(plain).train()
    make_weightless(model)
    step = replace(step, trained=replace(step.trained, controller=False), losses=("lm",))
    return _count(model, _prompts(config, text_tokens, num_images or [1] * len(text_tokens)), step)


def mean_training_flops(
    config: AdaVTPConfig,
    text_tokens: int,
    step: Step,
    budget_range: tuple[float, float],
    *,
    per: str = "batch",
    rows: int = 1,
) -> TrainingFlops:
    """
    The mean of a sample over budgets b ~ U[low, high], of the parabola through the counts of three budgets. It is
    exact where K says no more than how many tokens projector and decoder get.

    A batch is as long as its longest row. With one budget for each of B samples that row keeps K or fewer tokens with
    probability P(floor(b N) <= K)^B: the more samples, the nearer to the highest budget.

    Args:
        text_tokens: of every sample.
        budget_range: low and high, fractions in [0, 1].
        per: `"batch"` or `"sample"`, see `BudgetCollator`.
        rows: samples of a batch.
        config, step: see [`count_training_flops`].

    Raises:
        ValueError: if the range or `per` is not allowed.
    """
    if per not in ("batch", "sample"):
        raise ValueError(f"`per` is {per!r}; allowed are 'batch' and 'sample'.")
    size, draws = LLAVA.tokens_per_image(config), 1 if per == "batch" else rows
    counts = dict(longest_counts(budget_range, size, draws))
    low, high = min(counts), max(counts)
    places = sorted({low, (low + high) // 2, high})
    weighted = []
    for keep in places:
        # Lagrange's: what the count of this budget adds to the mean of the parabola.
        others = [other for other in places if other != keep]
        weight = sum(
            probability * math.prod((at - other) / (keep - other) for other in others)
            for at, probability in counts.items()
        )
        # As a count, except where it would be a count of one, which only a fraction can ask for.
        budget = 0.0 if keep == 1 else keep
        weighted.append((weight, count_training_flops(config, [text_tokens], step, token_budget=budget)))
    return TrainingFlops.weighted(weighted)


def longest_counts(budget_range: tuple[float, float], num_patches: int, draws: int = 1) -> Iterator[tuple[int, float]]:
    """
    The distribution of max_j K(b_j), K(b) = max(1, floor(b N)), over independent b_j ~ U[low, high].

    Args:
        budget_range: low and high.
        num_patches: N.
        draws: how many b_j.

    Yields:
        K and its probability, for each K that has one.

    Raises:
        ValueError: if the range is empty or leaves [0, 1].
    """
    low, high = budget_range
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"`budget_range` is {budget_range!r}; allowed are two fractions 0 <= low <= high <= 1.")
    if low == high:
        yield max(1, int(round(low * num_patches, 9))), 1.0
        return
    below = 0.0
    for keep in range(1, num_patches + 1):
        # floor(b N) <= K is b < (K + 1) / N.
        reached = min(max(((keep + 1) / num_patches - low) / (high - low), 0.0), 1.0) ** draws
        if reached > below:
            yield keep, reached - below
        below = reached


# ---------------------------------------------------------------- a step


def part_of(name: str, config: AdaVTPConfig | LlavaConfig) -> str:
    """
    The part that a parameter of this name belongs to: one of `PARTS`, the controller's with the budget token and all
    reducers, or `"idle"`: the tower's above the feature layer, which never train.
    """
    words = name.removeprefix("model.").split(".")
    if words[0] == "vision_tower":
        after = {"post_layernorm", "layernorm", "head", "mask_token"} & set(words)
        above = words[1] == "encoder" and int(words[3]) >= feature_layer_index(config)
        return "idle" if after or above else "vision"
    names = {"multi_modal_projector": "projector", "language_model": "decoder", "lm_head": "decoder"}
    return names.get(words[0], "controller")


def linear_maps(layer: nn.Module) -> dict[str, nn.Linear]:
    """By name, the linear maps of a decoder layer, which four bits and adapters are for."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


class Adapted(nn.Module):
    """A linear map with an adapter, y = W x + B A x."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        with torch.device("meta"):
            self.adapter = nn.Sequential(
                nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features, bias=False)
            )
        make_weightless(self.adapter)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states) + self.adapter(hidden_states)


def _prompts(config: AdaVTPConfig, text_tokens: Sequence[int], num_images: Sequence[int]) -> dict[str, Any]:
    """Prompts of images and, behind them, words, filled up to the longest."""
    vision, size = config.vision_config, LLAVA.tokens_per_image(config) + int(config.keep_cls)
    rows = [[0] * size * images + [1] * text for images, text in zip(num_images, text_tokens, strict=True)]
    longest, side = max(map(len, rows)), vision.image_size
    inputs = {
        "input_ids": torch.tensor([row + [1] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "use_cache": False,
    }
    images = {"pixel_values": torch.zeros(sum(num_images), vision.num_channels, side, side)}
    return inputs | images if sum(num_images) else inputs


def _let_train(model: PreTrainedModel, step: Step) -> None:
    trained = step.trained
    whole = {name: getattr(trained, name) for name in PARTS} | {"decoder": trained.decoder_weights}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(whole.get(part_of(name, model.config), False))
    if step.checkpointing:
        model.activation_checkpointing_enable()
    if trained.decoder_weights:
        # No product makes the gradient of the table, which would be as large as it.
        embed = model.get_input_embeddings().requires_grad_(False)
        embed.register_forward_hook(lambda *called: called[-1].requires_grad_())
    for layer in model.get_decoder().layers if trained.lora_rank else []:
        for name, linear in linear_maps(layer).items():
            layer.set_submodule(name, Adapted(linear, trained.lora_rank))


@dataclass(frozen=True)
class Stretch:
    """
    Modules of a part, none inside another's, that stand for several like them.

    Attributes:
        part: as in [`TrainingFlops`].
        modules: that run.
        times: how many they stand for, themselves included.
    """

    part: str
    modules: list[nn.Module]
    times: int = 1


def _shortened(model: PreTrainedModel) -> list[Stretch]:
    """
    Leaves of tower and decoder the layers that are unlike: the first, whose input may want no gradient, the second,
    and in the tower one above the feature layer. Of layers between which a reducer looks or acts all stay.
    """
    config, tower, decoder = model.config, model.model.vision_tower, model.get_decoder()
    reducers = [step.reducer for step in model.model.steps()] if isinstance(config, AdaVTPConfig) else []
    # Keys and values that a reducer asks a layer for are the reducer's.
    halves = [[_attention(layer), layer.mlp] for layer in tower_layers(tower)]
    stretches = [Stretch("vision", [tower.embeddings]), Stretch("decoder", [decoder.rotary_emb])]
    stretches += [Stretch("projector", [model.model.multi_modal_projector]), Stretch("head", [model.lm_head])]
    run, depth = feature_layer_index(config), len(decoder.layers)
    in_tower = any(reducer.stage == "encoder" or "attention" in reducer.needs for reducer in reducers)
    if in_tower or run < 3 or not isinstance(config.vision_feature_layer, int):
        stretches += [Stretch("vision", modules) for modules in halves]
    else:
        times = (1, run - 1, len(halves) - run)
        stretches += [Stretch("vision", *each) for each in zip(halves, times, strict=False)]
        del tower_layers(tower)[3:]
        config.vision_feature_layer = 2
    if not any(reducer.stage == "decoder" for reducer in reducers):
        del decoder.layers[2:]
    times = (depth - 1) // max(len(decoder.layers) - 1, 1)
    layers = [list(layer.children()) for layer in decoder.layers]
    return stretches + [Stretch("decoder", children, times if number else 1) for number, children in enumerate(layers)]


def _count(model: PreTrainedModel, inputs: Mapping[str, Any], step: Step) -> TrainingFlops:
    """One step of a weightless model, which is spent."""
    stretches = _shortened(model)
    _let_train(model, step)
    scores = []
    if set(step.losses) == {"relevance"}:
        controller = model.model.controller
        scores_of = controller.scores
        controller.scores = lambda *asked, **named: scores.append(scores_of(*asked, **named)) or scores[-1]
    watched = [stretch.modules for stretch in stretches]
    # Libraries for CPUs refuse noise whose rows overlap.
    plain = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    with plain, ProductsAreNoise(every=True), counter() as flops, PartsOfAStep(flops, watched) as spent:
        logits = model(**inputs).logits
        (learned,) = scores or [logits]
        if learned.requires_grad:
            learned.backward(torch.ones(()).expand(learned.shape))
    counted = dict.fromkeys(("vision", "reducer", "projector", "decoder", "head"), PartFlops())
    counted["reducer"] = spent.of(None, fused=False)
    for number, stretch in enumerate(stretches):
        each = spent.of(number, stretch.part == "decoder" and step.gates_fused)
        counted[stretch.part] = counted[stretch.part].plus(each.times(stretch.times))
    return TrainingFlops(counted)


class PartsOfAStep(TorchDispatchMode):
    """
    Notes what is spent on which part, forward, on the way back and in layers that run again on it.

    Args:
        flops: torch's counter.
        parts: the modules of each part, none inside another's; what is outside of all is under `None`.
    """

    def __init__(self, flops: FlopCounterMode, parts: Sequence[list[nn.Module]]) -> None:
        super().__init__()
        self.flops, self.spent, self.inside, self.hooks = flops, Counter(), [], []
        # Numbers of autograd's nodes at which parts begin and end, and the part from there on.
        self.numbers, self.parts = [0], [None]
        for part, modules in enumerate(parts):
            for module in modules:
                self.hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self._enter(part)))
                # A layer that runs again stops, by an exception, where nothing further is needed.
                self.hooks.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))

    def _enter(self, part: int) -> None:
        self.inside.append(part)
        self._from_here(part)

    def _leave(self) -> None:
        self.inside.pop()
        self._from_here(None)

    def _from_here(self, part: int | None) -> None:
        self.numbers.append(torch._C._autograd._get_sequence_nr())
        self.parts.append(part)

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = self.flops.get_total_flops()
        result = operation(*args, **(kwargs or {}))
        spent, node = self.flops.get_total_flops() - before, torch._C._current_autograd_node()
        if spent:
            part, phase = self.inside[-1] if self.inside else None, "forward"
            if node is not None:
                phase = "recomputed" if self.inside else "backward"
            if phase == "backward":
                part = self.parts[bisect_right(self.numbers, node._sequence_nr()) - 1]
            self.spent[part, phase, operation is torch.ops.aten.bmm.default] += spent
        return result

    def of(self, part: int | None, fused: bool) -> PartFlops:
        """
        What a part has spent.

        Args:
            part: its place among the parts.
            fused: whether products of batches are attention that a CPU takes apart, with a gradient of its bias, and
                that keeps no scores on a GPU.
        """
        plain = [self.spent[part, phase, False] for phase in ("forward", "backward", "recomputed")]
        attention = [self.spent[part, phase, True] for phase in ("forward", "backward", "recomputed")]
        if fused and attention[1]:
            attention[1] = FUSED_ATTENTION * attention[0]
        return PartFlops(*(float(a + b) for a, b in zip(plain, attention, strict=True)))
