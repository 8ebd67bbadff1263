"""Which of a model's parameters train: those of the named parts, of them only what runs.

In a model with adapters (PEFT) the weights underneath never train. What does is what PEFT added: the adapters, and the
copies of modules that it trains whole.
"""

from torch import nn
from transformers import PreTrainedModel

from ..modeling.parts import never_run_in_tower, parts_of_names
from ..modeling.prompt_reduction import PromptReductionMixin

# What PEFT puts before the names that parameters have in the model that it wraps.
_PEFT_PREFIX = "base_model.model."


def adavtp_model_of(model: nn.Module) -> PromptReductionMixin:
    """The model that has the budget inside whatever wraps it: for LLaVA a head, adapters, distribution."""
    return next(module for module in model.modules() if isinstance(module, PromptReductionMixin))


def model_with_head(model: nn.Module) -> PreTrainedModel:
    """The same with its language-modelling head, inside whatever wraps it."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def choose_trained_parts(model: nn.Module, train_parts: list[str]) -> None:
    """
    Lets the named parts of a model train and freezes the rest.

    Only what runs can train: the tower's layers above the feature layer and its final norm, reducers that are not the
    chosen one and a budget token that it does not ask for never get a gradient, and distributed training would wait
    for one.

    With adapters, what trains is what PEFT made to train, wherever it is, as far as it runs; the named parts have to
    be among it.

    Args:
        model: an [`AdaVTPForConditionalGeneration`] of any family, or a PEFT model around one.
        train_parts: names from `PARTS`.

    Raises:
        ValueError: if nothing of the named parts is in the model; if it has adapters and nothing of a named part can
            train, or its adapters were loaded without `is_trainable=True`.
    """
    never_run = never_run_prefixes(model)
    if has_adapters(model):
        _let_adapters_train(model, train_parts, never_run)
        return
    part_of = parts_of_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in train_parts and not name.startswith(never_run))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"`train_parts` is {train_parts}, and this model has nothing of that which could train. It has a "
            "scheduler if its configuration names one, such as scheduler={'dials': ['depth']}."
        )


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
    can_run, trained, part_of = set(), set(), parts_of_names(model_with_head(model))
    for name, parameter in model.named_parameters():
        name = name.removeprefix(_PEFT_PREFIX)
        runs = not name.startswith(never_run)
        parameter.requires_grad_(parameter.requires_grad and runs)
        can_run |= {part_of(name)} if runs else set()
        trained |= {part_of(name)} if parameter.requires_grad else set()
    if missing := [part for part in train_parts if part in can_run - trained]:
        raise ValueError(
            f"`train_parts` is {train_parts}, and nothing of {', '.join(map(repr, missing))} can train: the model has "
            "adapters, under which its own weights stay as they are. Adapters, or modules that PEFT trains whole, are "
            f"in {sorted(trained) or 'no part'}. Name only these, make the adapters with `add_adapters(model, "
            "train_parts)`, or add modules of the part to PEFT's `modules_to_save`."
        )


def never_run_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of parameters start with, in the model with its head, that no forward uses."""
    inner = adavtp_model_of(model)
    # LLaVA's budget is below its head.
    below = "" if hasattr(inner, "lm_head") else "model."
    steps = inner.steps()
    chosen = {step.name for step in steps}
    idle = [f"{below}reducers.{name}." for name in inner.reducers if name not in chosen]
    if "adaptive" not in chosen:
        idle.append(f"{below}controller.")
    if not any("budget" in step.reducer.needs for step in steps):
        idle.append(f"{below}budget_token.")
    return (*never_run_in_tower(model_with_head(model)), *idle)
