"""A training step's FLOPs, forward and on the way back, counted by torch while a weightless model takes the step.

Layers of the decoder that are alike cost alike: one of a kind, and the first, say what all cost.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.schedule import StackBudget
from ..parts import PARTS, never_run_in_tower, parts_of_names
from ..prompt_reduction import PromptReductionMixin
from .counting import FlopsByPart, remembered, visual_modules
from .decoder import first_alike, pass_through
from .model_costs import require_size
from .weightless import (
    ProductsAreNoise,
    family_prompt,
    looks_of,
    make_weightless,
    noise_prompts,
    weightless_model,
    with_budget_in,
)

LOSSES = ("lm", "distillation", "relevance")
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
    config: PreTrainedConfig,
    text_tokens: Sequence[int],
    step: Step,
    *,
    token_budget: StackBudget | None = None,
    num_images: Sequence[int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> TrainingFlops:
    """
    The FLOPs of forward and backward on one padded batch; the optimizer's own are a few per weight and not counted.

    Args:
        config: the model's, of any family.
        text_tokens: of each prompt with its answer, placeholders of images not among them. A controller that reads
            the question word by word is counted as if all of it asked.
        step: how it is carried out.
        token_budget: see [`AdaVTPForConditionalGeneration.forward`].
        num_images: of each prompt, one by default; of other families than LLaVA as many of all.
        image_size: height and width of the images in pixels, see [`ModelCosts`].

    Raises:
        ValueError: if an argument is not allowed.
    """
    num_images = [1] * len(text_tokens) if num_images is None else num_images
    model, inputs = training_prompt(config, text_tokens, step, num_images, image_size)
    counted = _count(model, inputs | {"token_budget": token_budget}, step)
    passes = {"distillation", "relevance"} & set(step.losses)
    if not passes or not sum(num_images):
        return counted
    # Each runs the model at full budget; the gradient of relevance comes back to the projected tokens.
    whole = Step(["projector"], gates=step.gates, gates_fused=step.gates_fused)
    model, inputs = training_prompt(config, text_tokens, whole, num_images, image_size)
    once = _count(model.eval(), inputs | {"token_budget": 1.0}, whole).parts
    forward = len(passes) * sum(part.forward for part in once.values())
    back = once["decoder"].backward + once["head"].backward if "relevance" in passes else 0.0
    return TrainingFlops({**counted.parts, "full_budget": PartFlops(forward, back)})


def training_prompt(
    config: PreTrainedConfig,
    text_tokens: Sequence[int],
    step: Step,
    num_images: Sequence[int],
    image_size: tuple[int, int] | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    A weightless model in training mode, whose loss costs nothing, and prompts for it.

    Args:
        config, text_tokens, step, num_images, image_size: see [`count_training_flops`].
        dtype: of the weights.
    """
    # A floor on the entropy adds tokens to noise; how many it adds to an image, no count can say.
    changes = {"min_token_entropy": 0.0, "gradient_gates": step.gates, "trained_reducers": []}
    if isinstance(config, AdaVTPConfig):
        model = weightless_model(config, dtype, **changes, image_token_id=0)
        inputs = noise_prompts(config, text_tokens, num_images)
    elif len(set(num_images)) > 1 or step.gates != "features":
        raise ValueError(
            f"`num_images` is {list(num_images)} and `gates` {step.gates!r}; for a {config.model_type!r} model all "
            "prompts have equally many, and `gates` is 'features'."
        )
    else:
        model = weightless_model(config, dtype, **changes)
        looks = looks_of(model, [require_size(config, image_size)] * num_images[0]) if num_images[0] else None
        inputs = family_prompt(model, looks, *text_tokens)
    model.loss_function = lambda *_, **__: torch.zeros(())
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    # Text that counts is no answer.
    return model.train(), inputs | {"labels": torch.full_like(inputs["input_ids"], -100)}


def plain_training_flops(
    config: PreTrainedConfig, text_tokens: Sequence[int], step: Step, image_size: tuple[int, int] | None = None
) -> TrainingFlops:
    """
    The same step of the plain model, of transformers' own class, on all visual tokens, one image a prompt: no
    controller, no budget, and the whole tower, whose layers above the feature layer run for nothing.

    Args:
        config, text_tokens, step, image_size: see [`count_training_flops`].
    """
    plain_step = replace(
        step, parts=[part for part in step.parts if part != "controller"], gates="features", losses=("lm",)
    )
    return _plain_of_once(config, tuple(text_tokens), plain_step, image_size)


@remembered
def _plain_of_once(
    config: PreTrainedConfig, text_tokens: tuple[int, ...], step: Step, image_size: tuple[int, int] | None
) -> TrainingFlops:
    ours, inputs = training_prompt(config, text_tokens, step, [1] * len(text_tokens), image_size)
    del inputs["labels"]
    if isinstance(config, AdaVTPConfig):
        stock = LlavaForConditionalGeneration
        plain = LlavaConfig(
            vision_config=copy.deepcopy(config.vision_config),
            text_config=copy.deepcopy(config.text_config),
            image_token_index=0,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
    else:
        stock = next(kind for kind in type(ours).__mro__ if kind.__module__.startswith("transformers."))
        plain = stock.config_class.from_dict(config.to_dict())
    with torch.device("meta"):
        model = stock(plain).train()
    make_weightless(model)
    return _count(model, inputs, step)


# ---------------------------------------------------------------- a step


def parts_that_train(model: PreTrainedModel) -> Callable[[str], str]:
    """
    What says of a parameter's name in a model the part that it belongs to: one of `PARTS`, or `"idle"`: what never
    runs in the tower, and so never trains.
    """
    part_of, idle = parts_of_names(model), never_run_in_tower(model)
    return lambda name: "idle" if name.startswith(idle) else part_of(name)


def linear_maps(layer: nn.Module) -> dict[str, nn.Linear]:
    """By name, the linear maps of a decoder layer, which four bits and adapters are for."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


class Adapted(nn.Module):
    """A linear map with an adapter, y = W x + B A dropout(x)."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        with torch.device("meta"):
            self.adapter = nn.Sequential(
                nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features, bias=False)
            )
        make_weightless(self.adapter)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # As on a GPU, whose mask is of bytes.
        dropped, _ = torch.native_dropout(hidden_states, 0.05, self.training)
        return self.linear(hidden_states) + self.adapter(dropped)


def let_train(model: PreTrainedModel, step: Step) -> None:
    """Makes those parameters of a weightless model want a gradient that train in a step."""
    part_of, decoder = parts_that_train(model), model.get_decoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(step.trains(part_of(name)))
    if step.checkpointing:
        model.activation_checkpointing_enable()
    if step.trains("decoder"):
        # No product makes the gradient of a table, which would be as large as it.
        for table in [module for module in decoder.modules() if isinstance(module, nn.Embedding)]:
            table.requires_grad_(False)
            table.register_forward_hook(lambda *called: called[-1].requires_grad_())
    for layer in decoder.layers if step.lora_rank else []:
        for name, linear in linear_maps(layer).items():
            layer.set_submodule(name, Adapted(linear, step.lora_rank))


class Stretch(NamedTuple):
    """Modules of a part, none inside another's, that stand for so many like them, themselves included."""

    part: str
    modules: list[nn.Module]
    times: int = 1


def layers_that_run(model: PreTrainedModel) -> dict[int, int]:
    """
    Lets of the decoder's layers that are alike only one run, and the first, whose input may want no gradient. Of
    layers between which a reducer acts all run.

    Returns:
        For each that runs how many it stands for, itself included.
    """
    layers, reader = model.get_decoder().layers, with_budget_in(model)
    steps = reader.steps() if isinstance(reader, PromptReductionMixin) else []
    kinds: list[Any] = first_alike(layers, model.config.get_text_config())
    if any(step.reducer.stage == "decoder" for step in steps):
        kinds = list(range(len(layers)))
    kinds[0] = "first"
    for index, layer in enumerate(layers):
        if kinds.index(kinds[index]) < index:
            pass_through(layer)
    return {kinds.index(kind): kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _stretches(model: PreTrainedModel) -> list[Stretch]:
    decoder, times = model.get_decoder(), layers_that_run(model)
    around = [child for child in decoder.children() if child is not decoder.layers]
    return [
        *(Stretch(part, modules) for part, modules in visual_modules(model).items()),
        Stretch("head", [model.lm_head]),
        Stretch("decoder", around),
        *(Stretch("decoder", list(decoder.layers[index].children()), number) for index, number in times.items()),
    ]


def _count(model: PreTrainedModel, inputs: Mapping[str, Any], step: Step) -> TrainingFlops:
    """One step of a weightless model, which is spent."""
    stretches, scores = _stretches(model), []
    let_train(model, step)
    if set(step.losses) == {"relevance"}:
        # It learns from the scores alone, and nothing behind them is on the way back.
        controller = with_budget_in(model).controller
        scores_of = controller.scores
        controller.scores = lambda *asked, **named: scores.append(scores_of(*asked, **named)) or scores[-1]
    watched = {number: stretch.modules for number, stretch in enumerate(stretches)}
    # Libraries for CPUs refuse noise whose rows overlap.
    plain = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    with plain, ProductsAreNoise(lambda: True), FlopsByPart(watched) as counted:
        logits = model(**inputs, use_cache=False).logits
        (learned,) = scores or [logits]
        if learned.requires_grad:
            learned.backward(torch.ones(()).to(learned).expand(learned.shape))
    parts = {name: [] for name in ("vision", "reducer", "projector", "decoder", "head")}
    parts["reducer"].append((1, _phases(counted, None)))
    for number, stretch in enumerate(stretches):
        is_fused = stretch.part == "decoder" and step.gates == "attention" and step.gates_fused
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
