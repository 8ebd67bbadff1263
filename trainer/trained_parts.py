"""Which of a model's parameters train: those of the named parts, of them only what runs.

In a model with adapters (PEFT) the weights underneath never train. What does is what PEFT added: the adapters, and the
copies of modules that it trains whole.
"""

from torch import nn

from ..modeling.modeling_adavtp import AdaVTPModel
from .training_arguments import TRAIN_PARTS

# What PEFT puts before the names that parameters have in the model that it wraps.
_PEFT_PREFIX = "base_model.model."


def adavtp_model_of(model: nn.Module) -> AdaVTPModel:
    """The [`AdaVTPModel`] inside whatever wraps it: a language-modelling head, adapters, distribution."""
    return next(module for module in model.modules() if isinstance(module, AdaVTPModel))


def choose_trained_parts(model: nn.Module, train_parts: list[str]) -> None:
    """
    Lets the named parts of a model train and freezes the rest.

    Only what runs can train: the tower's layers above the feature layer and its final norm, reducers that are not the
    chosen one and a budget token that it does not ask for never get a gradient, and distributed training would wait
    for one.

    With adapters, what trains is what PEFT made to train, wherever it is, as far as it runs; the named parts have to
    be among it.

    Args:
        model: an [`AdaVTPForConditionalGeneration`], or a PEFT model around one.
        train_parts: names from `TRAIN_PARTS`.

    Raises:
        ValueError: if the model has adapters and nothing of a named part can train, or its adapters were loaded
            without `is_trainable=True`.
    """
    never_run = never_run_prefixes(adavtp_model_of(model))
    if has_adapters(model):
        _let_adapters_train(model, train_parts, never_run)
        return
    prefixes = part_prefixes(train_parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes) and not name.startswith(never_run))


def part_prefixes(train_parts: list[str]) -> tuple[str, ...]:
    """What the names of the parameters of some parts start with."""
    return tuple(prefix for part in train_parts for prefix in TRAIN_PARTS[part])


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT put adapters into a model, around it (`get_peft_model`) or inside it (`model.add_adapter`)."""
    return bool(getattr(model, "peft_config", None))


def _let_adapters_train(model: nn.Module, train_parts: list[str], never_run: tuple[str, ...]) -> None:
    active = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    if any(model.peft_config[adapter].inference_mode for adapter in active):
        raise ValueError(
            f"The adapter {', '.join(map(repr, active))} was loaded to be used and not to be trained; pass "
            "`is_trainable=True` to PeftModel.from_pretrained."
        )
    # Makes them train again that an earlier run with another reducer has frozen.
    model.set_adapter(active[0] if len(active) == 1 else active)
    can_run, trained = set(), set()
    for name, parameter in model.named_parameters():
        name = name.removeprefix(_PEFT_PREFIX)
        runs = not name.startswith(never_run)
        parameter.requires_grad_(parameter.requires_grad and runs)
        parts = {part for part in TRAIN_PARTS if name.startswith(part_prefixes([part]))}
        can_run |= parts if runs else set()
        trained |= parts if parameter.requires_grad else set()
    if missing := [part for part in train_parts if part in can_run - trained]:
        raise ValueError(
            f"`train_parts` is {train_parts}, and nothing of {', '.join(map(repr, missing))} can train: the model has "
            "adapters, under which its own weights stay as they are. Adapters, or modules that PEFT trains whole, are "
            f"in {sorted(trained) or 'no part'}. Name only these, make the adapters with `add_adapters(model, "
            "train_parts)`, or add modules of the part to PEFT's `modules_to_save`."
        )


def never_run_prefixes(model: AdaVTPModel) -> tuple[str, ...]:
    """What the names of parameters start with, in the model with its head, that no forward uses."""
    feature_layers = model.config.vision_feature_layer
    feature_layers = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    num_layers = model.config.vision_config.num_hidden_layers
    num_run = max(layer if layer >= 0 else num_layers + 1 + layer for layer in feature_layers)
    tower = "model.vision_tower."
    # DINOv2's mask token stands for patches that its own pretraining hides.
    beside = [f"{tower}{name}" for name in ("post_layernorm.", "layernorm.", "head.", "embeddings.mask_token")]
    above = [f"{tower}encoder.{name}.{index}." for name in ("layers", "layer") for index in range(num_run, num_layers)]
    steps = model.steps()
    chosen = {step.name for step in steps}
    idle = [f"model.reducers.{name}." for name in model.reducers if name not in chosen]
    if "adaptive" not in chosen:
        idle.append("model.controller.")
    if not any("budget" in step.reducer.needs for step in steps):
        idle.append("model.budget_token.")
    return (*beside, *above, *idle)
