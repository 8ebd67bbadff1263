"""Which of a model's parameters train: those of the named parts, of them only what runs."""

from torch import nn

from .training_arguments import TRAIN_PARTS


def choose_trained_parts(model: nn.Module, train_parts: list[str]) -> None:
    """
    Lets the named parts of a model train and freezes the rest.

    Only what runs can train: the tower's layers above the feature layer and its final norm, reducers that are not the
    chosen one and a budget token that it does not ask for never get a gradient, and distributed training would wait
    for one.

    Args:
        model: an [`AdaVTPForConditionalGeneration`].
        train_parts: names from `TRAIN_PARTS`.
    """
    never_run = _never_run(model)
    prefixes = tuple(prefix for part in train_parts for prefix in TRAIN_PARTS[part])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes) and not name.startswith(never_run))


def _never_run(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters that no forward uses."""
    feature_layers = model.config.vision_feature_layer
    feature_layers = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    num_layers = model.config.vision_config.num_hidden_layers
    num_run = max(layer if layer >= 0 else num_layers + 1 + layer for layer in feature_layers)
    tower = "model.vision_tower."
    # DINOv2's mask token stands for patches that its own pretraining hides.
    beside = [f"{tower}{name}" for name in ("post_layernorm.", "layernorm.", "head.", "embeddings.mask_token")]
    above = [f"{tower}encoder.{name}.{index}." for name in ("layers", "layer") for index in range(num_run, num_layers)]
    steps = model.model.steps()
    chosen = {step.name for step in steps}
    idle = [f"model.reducers.{name}." for name in model.model.reducers if name not in chosen]
    if "adaptive" not in chosen:
        idle.append("model.controller.")
    if not any("budget" in step.reducer.needs for step in steps):
        idle.append("model.budget_token.")
    return (*beside, *above, *idle)
