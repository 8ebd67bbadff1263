"""That weights are those that their configuration asks for, and numbers.

What is written for others is looked through once, where it is written: by conversion, merging, export and publishing.
Loading does not, since it would read every weight of a large model twice.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from ..modeling.hub.loading import family_class
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.reducers.base import REDUCERS

_SHOWN = 5


def require_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """
    Raises:
        ValueError: if a weight, by name, has a value that is NaN or infinite. `where` says whose they are.
    """
    if broken := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        raise ValueError(
            f"{where} has {len(broken)} weight(s) with values that are NaN or infinite, {', '.join(broken[:_SHOWN])}"
            f"{' and others' * (len(broken) > _SHOWN)}: a model that answers nothing of use. Get the weights again, "
            "or take a checkpoint from before its training diverged."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # The bounds of what has a NaN are NaN; eight bits have no comparison of their own.
    bounds = (tensor.float() if tensor.element_size() == 1 else tensor).aminmax()
    return all(isfinite(bound.item()) for bound in bounds)


def require_sound_weights(folder: Path) -> None:
    """
    Looks through the safetensors files of a saved checkpoint, one at a time. Nothing that it brings is run: weights of
    reducers that are not registered here can be of any shape.

    Raises:
        ValueError: if a weight is missing, has another shape than the configuration asks for, or is not finite.
        OSError: if a file is not whole.
    """
    model_class = family_class(folder, {}) or AdaVTPForConditionalGeneration
    config = model_class.config_class.from_pretrained(folder)
    config.reducers = _registered(config.reducers) or ["random"]
    config.trained_reducers = _registered(config.trained_reducers)
    with _silent():
        _, info = model_class.from_pretrained(folder, config=config, device_map="meta", output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{str(folder)!r} lacks {len(missing)} weight(s) that its configuration asks for, {missing[0]} among them;"
            " get the complete checkpoint, or save the model again."
        )
    for path in sorted(folder.glob("model*.safetensors")):
        require_finite(load_file(path), f"{path.name!r} in {str(folder)!r}")


def _registered(entries: list[str | dict]) -> list[str | dict]:
    names = [entry if isinstance(entry, str) else entry["name"] for entry in entries]
    return [entry for entry, name in zip(entries, names, strict=True) if name in ("adaptive", *REDUCERS)]


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' report of what it loads, which errors say."""
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
