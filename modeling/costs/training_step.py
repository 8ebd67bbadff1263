"""A training step's FLOPs, forward and on the way back, counted by torch while a weightless model takes the step.

Layers of tower and decoder are alike, from the second on: two of them say what all cost.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.schedule import StackBudget
from ..families.llava import LLAVA
from ..reducers.base import feature_layer_index
from ..vision.tower import tower_layers
from .counting import FlopsByPart, halves_of_tower_layers, remembered, weights_on_parabola
from .weightless import ProductsAreNoise, make_weightless, noise_prompts, weightless_model

PARTS, LOSSES = ("controller", "projector", "vision", "decoder"), ("lm", "distillation", "relevance")
# Scores again, and the gradients of weights, values, queries and keys: five products for attention's two.
FUSED_ATTENTION = 2.5


@dataclass(frozen=True)
class Step:
    """
    How a training step is carried out.

    Attributes:
        parts: that train, names as in `AdaVTPTrainingArguments`; the controller with the budget token.
        lora_rank: r of adapters on every linear map of the decoder's layers, which then train in the decoder's place;
            `None` for none.
        checkpointing: whether layers keep only what enters them, and run again on the way back.
        gates: `"features"` or `"attention"`, see [`AdaVTPConfig`].
        losses: that are added up, see `AdaVTPTrainingArguments.loss_weights`.
        gates_fused: whether attention keeps no scores where gates are inside it, as on a GPU. On a CPU it does.

    Raises:
        ValueError: if a part or a loss is not known or none is named, or adapters are asked for and the decoder is
            frozen.
    """

    parts: Sequence[str]
    lora_rank: int | None = None
    checkpointing: bool = False
    gates: str = "features"
    losses: tuple[str, ...] = ("lm",)
    gates_fused: bool = True

    def __post_init__(self) -> None:
        if set(self.parts) - set(PARTS) or not self.parts:
            raise ValueError(f"`train_parts` is {list(self.parts)}; allowed are one or more of {list(PARTS)}.")
        if self.lora_rank is not None and (self.lora_rank < 1 or "decoder" not in self.parts):
            raise ValueError(
                f"`lora_rank` is {self.lora_rank} and `train_parts` {list(self.parts)}; adapters have a rank of 1 or "
                "more and train in the decoder's place, so name 'decoder' among the parts."
            )
        if set(self.losses) - set(LOSSES) or not self.losses:
            raise ValueError(f"`losses` is {self.losses}; allowed are one or more of {', '.join(LOSSES)}.")
        object.__setattr__(self, "parts", tuple(self.parts))

    def trains(self, part: str) -> bool:
        """Whether a part's own weights train; with adapters the decoder's do not."""
        return part in self.parts and not (part == "decoder" and self.lora_rank is not None)


class PartFlops(NamedTuple):
    """What a part spends in the forward pass, on the way back, and where checkpointed layers run again."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """All three."""
        return sum(self)


def weighted_sum(parts: Sequence[tuple[float, PartFlops]]) -> PartFlops:
    """The sum over parts, each times its weight."""
    return PartFlops(*(float(sum(weight * part[phase] for weight, part in parts)) for phase in range(3)))


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
        names = dict.fromkeys(name for _, step in steps for name in step.parts)
        none = PartFlops()
        return cls(
            {name: weighted_sum([(weight, step.parts.get(name, none)) for weight, step in steps]) for name in names}
        )


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
    inputs = noise_prompts(config, text_tokens, num_images)
    # Text that counts is no answer.
    labels = torch.full_like(inputs["input_ids"], -100)
    asked = inputs | {"token_budget": token_budget, "labels": labels}
    counted = _count(weightless_model(config, **changes).train(), asked, step)
    passes = {"distillation", "relevance"} & set(step.losses)
    if not passes or not sum(num_images):
        return counted
    # Each runs the model at full budget; the gradient of relevance comes back to the projected tokens.
    whole = Step(["projector"], gates=step.gates, gates_fused=step.gates_fused)
    once = _count(weightless_model(config, **changes), inputs | {"token_budget": 1.0}, whole).parts
    forward = len(passes) * sum(part.forward for part in once.values())
    back = once["decoder"].backward + once["head"].backward if "relevance" in passes else 0.0
    return TrainingFlops({**counted.parts, "full_budget": PartFlops(forward, back)})


def plain_training_flops(config: AdaVTPConfig, text_tokens: Sequence[int], step: Step) -> TrainingFlops:
    """
    The same step of plain LLaVA on all visual tokens, one image a prompt: no controller, no budget, and the whole
    tower, whose layers above the feature layer run for nothing.

    Args:
        config, text_tokens, step: see [`count_training_flops`].
    """
    plain_step = replace(
        step, parts=[part for part in step.parts if part != "controller"], gates="features", losses=("lm",)
    )
    return _plain_of_once(config, tuple(text_tokens), plain_step)


@remembered
def _plain_of_once(config: AdaVTPConfig, text_tokens: tuple[int, ...], step: Step) -> TrainingFlops:
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
    return _count(model, noise_prompts(config, text_tokens, [1] * len(text_tokens)), step)


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
    counts = dict(longest_counts(budget_range, LLAVA.tokens_per_image(config), 1 if per == "batch" else rows))
    low, high = min(counts), max(counts)
    places = sorted({low, (low + high) // 2, high})
    weights = [0.0] * len(places)
    for keep, probability in counts.items():
        for number, weight in enumerate(weights_on_parabola(keep, places)):
            weights[number] += probability * float(weight)
    counted = [_of_kept(config, text_tokens, step, keep) for keep in places]
    return TrainingFlops.weighted(list(zip(weights, counted, strict=True)))


@remembered
def _of_kept(config: AdaVTPConfig, text_tokens: int, step: Step, keep: int) -> TrainingFlops:
    # As a count, except where it would be a count of one, which only a fraction can ask for.
    return count_training_flops(config, [text_tokens], step, token_budget=0.0 if keep == 1 else keep)


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
    low, high = budget_range if len(budget_range) == 2 else (1.0, 0.0)
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


def _let_train(model: PreTrainedModel, step: Step) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(step.trains(part_of(name, model.config)))
    if step.checkpointing:
        model.activation_checkpointing_enable()
    if step.trains("decoder"):
        # No product makes the gradient of the table, which would be as large as it.
        embed = model.get_input_embeddings().requires_grad_(False)
        embed.register_forward_hook(lambda *called: called[-1].requires_grad_())
    for layer in model.get_decoder().layers if step.lora_rank else []:
        for name, linear in linear_maps(layer).items():
            layer.set_submodule(name, Adapted(linear, step.lora_rank))


class Stretch(NamedTuple):
    """Modules of a part, none inside another's, that stand for so many like them, themselves included."""

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
    halves = halves_of_tower_layers(tower)
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
    stretches, scores = _shortened(model), []
    _let_train(model, step)
    if set(step.losses) == {"relevance"}:
        # It learns from the scores alone, and nothing behind them is on the way back.
        controller = model.model.controller
        scores_of = controller.scores
        controller.scores = lambda *asked, **named: scores.append(scores_of(*asked, **named)) or scores[-1]
    watched = {number: stretch.modules for number, stretch in enumerate(stretches)}
    # Libraries for CPUs refuse noise whose rows overlap.
    plain = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    with plain, ProductsAreNoise(every=True), FlopsByPart(watched) as counted:
        logits = model(**inputs, use_cache=False).logits
        (learned,) = scores or [logits]
        if learned.requires_grad:
            learned.backward(torch.ones(()).expand(learned.shape))
    parts = {name: [] for name in ("vision", "reducer", "projector", "decoder", "head")}
    parts["reducer"].append((1, _phases(counted, None)))
    for number, stretch in enumerate(stretches):
        is_fused = stretch.part == "decoder" and step.gates_fused
        parts[stretch.part].append((stretch.times, _phases(counted, number, is_fused)))
    return TrainingFlops({name: weighted_sum(stretches) for name, stretches in parts.items()})


def _phases(counted: FlopsByPart, part: int | None, is_fused: bool = False) -> PartFlops:
    """
    What a part has spent. Products of batches in the decoder are attention that a CPU takes apart, with a gradient of
    its bias; fused, it keeps no scores, as on a GPU.
    """
    phases = ("forward", "backward", "recomputed")
    others, batches = ([counted.spent[part, phase, of_batches] for phase in phases] for of_batches in (False, True))
    if is_fused and batches[1]:
        batches[1] = FUSED_ATTENTION * batches[0]
    return weighted_sum([(1, PartFlops(*others)), (1, PartFlops(*batches))])
