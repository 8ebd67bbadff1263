"""Which part of a model a parameter belongs to, in every family, by its name."""

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from .families.adapters import adapter_of
from .families.encoded import layers_of
from .hub.loading import NEW_MODULES

PARTS: tuple[str, ...] = ("controller", "scheduler", "projector", "vision", "decoder")


def parts_of_names(model: PreTrainedModel) -> Callable[[str], str]:
    """
    What says of a name in a model which part it belongs to, one of `PARTS`.

    transformers knows the vision tower of every family, and its text model, with which the head goes. Controller and
    scheduler are what budgets add. All that is left is the projector: what stands between tower and text model,
    embeddings of newlines, and what towers merge their patches with.

    Args:
        model: with its head, of any family, with a budget or without.

    Returns:
        A function of the name of a parameter or of a module.
    """
    places = {id(module): f"{name}." for name, module in model.named_modules()}
    tower, decoder = places[id(model.get_encoder(modality="image"))], places[id(model.get_decoder())]
    merging = tuple(f"{tower}{name}." for name in adapter_of(model.config).projector_in_tower)
    # LLaVA's are below its head.
    below = ("", f"{model.base_model_prefix}.")
    added = tuple(f"{prefix}{name}." for name in NEW_MODULES for prefix in below)

    def part_of(name: str) -> str:
        name = f"{name}."
        if name.startswith(added):
            return "scheduler" if name.startswith(tuple(f"{prefix}scheduler." for prefix in below)) else "controller"
        if name.startswith((decoder, "lm_head.")):
            return "decoder"
        return "vision" if name.startswith(tower) and not name.startswith(merging) else "projector"

    return part_of


def modules_of_parts(model: PreTrainedModel, layers_apart: bool = False) -> dict[str, list[nn.Module]]:
    """
    The outermost modules of tower and projector that run as modules do, none inside another: of lists their members,
    of what holds a list its children, since a tower may walk through the list by itself, and so of the tower.

    Args:
        model: see [`parts_of_names`].
        layers_apart: whether the tower's layers are taken apart too: something may act between their halves.
    """
    part_of, modules = parts_of_names(model), {"vision": [], "projector": []}
    tower = model.get_encoder(modality="image")
    apart = {tower, *(layers_of(tower) if layers_apart else ())}

    def add(module: nn.Module, name: str) -> None:
        holds = any(isinstance(child, nn.ModuleList) for child in module.children())
        if module in apart or holds or isinstance(module, nn.ModuleList):
            for child_name, child in module.named_children():
                add(child, f"{name}.{child_name}")
        elif (part := part_of(name)) in modules:
            modules[part].append(module)

    for name, module in model.base_model.named_children():
        add(module, f"{model.base_model_prefix}.{name}")
    return modules


def never_run_in_tower(model: PreTrainedModel) -> tuple[str, ...]:
    """
    What the names of parameters of the tower start with that no forward uses: its layers above the feature layer, and
    what stands behind all layers where features are read from between them.

    Args:
        model: see [`parts_of_names`].
    """
    places = {id(module): f"{name}." for name, module in model.named_modules()}
    tower = places[id(model.get_encoder(modality="image"))]
    layers = getattr(model.config, "vision_feature_layer", None)
    # DINOv2's mask token stands for patches that its own pretraining hides.
    unused = [f"{tower}{name}" for name in ("head.", "embeddings.mask_token")]
    if layers is None:
        return tuple(unused)
    num_layers = model.config.vision_config.num_hidden_layers
    layers = [layers] if isinstance(layers, int) else layers
    num_run = max(layer if layer >= 0 else num_layers + 1 + layer for layer in layers)
    if layers != [-1] or not adapter_of(model.config).reads_last_norm:
        unused += [f"{tower}{name}" for name in ("post_layernorm.", "layernorm.")]
    above = range(num_run, num_layers)
    return (*unused, *(f"{tower}encoder.{name}.{index}." for name in ("layers", "layer") for index in above))
