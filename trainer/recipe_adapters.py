"""Stages of a recipe that train adapters: what they start from, and what the stage after them starts from.

An adapter belongs to a checkpoint that lies somewhere, so such a stage starts from one on disk and leaves an adapter
beside it. Whoever needs an ordinary checkpoint of it, the next stage or an evaluation, gets it merged, in the stage's
folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import PreTrainedConfig
from transformers.integrations import deepspeed

from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from .adapters import ADAPTER_CONFIG, add_adapters, merge_adapter, quantization
from .recipe import Stage

if TYPE_CHECKING:
    from peft import PeftModel

MERGED = "merged"


def loading_arguments(model: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """
    What `from_pretrained` is told beside the recipe's own arguments, for the model that a stage starts from.

    Args:
        model: `{"checkpoint": ...}` and more, as in a recipe.
        stage: what is done.

    Returns:
        Nothing for a stage without adapters or with adapters on plain weights.

    Raises:
        ValueError: if the stage has adapters and the checkpoint is not a whole AdaVTP one.
    """
    if not stage.adapters:
        return {}
    model_type = PreTrainedConfig.get_config_dict(model["checkpoint"])[0].get("model_type")
    if model_type != "adavtp":
        raise ValueError(
            f"stage {stage.name!r} has adapters, and {model['checkpoint']!r}, which they would belong to, is of type "
            f"{model_type!r}: its budget token and controller would start from numbers that are saved nowhere. "
            "`adavtp convert` makes a whole checkpoint of it."
        )
    quantize = stage.adapters.get("quantize")
    if quantize is None:
        return {}
    computes_in = [
        dtype for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)) if stage.training.get(name)
    ]
    return {
        "quantization_config": quantization(quantize, *(computes_in or [torch.float32])),
        "dtype": torch.float32,
    }


def with_adapters(model: AdaVTPForConditionalGeneration, stage: Stage, train_parts: list[str]) -> "PeftModel":
    """The model with the adapters that a stage asks for."""
    return add_adapters(model, train_parts, **{k: v for k, v in stage.adapters.items() if k != "quantize"})


def whole_checkpoint(folder: Path) -> Path:
    """A finished stage's folder; or the checkpoint that its adapter and its base are together, made now if need be."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return folder
    with PartialState().main_process_first():
        if not (folder / MERGED).is_dir():
            with _whole_models():
                merge_adapter(folder, folder / MERGED)
    return folder / MERGED


@contextmanager
def _whole_models() -> Iterator[None]:
    """Under DeepSpeed ZeRO-3 every model is made in parts, by all processes. The one that merges is alone with its."""
    noted = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if noted is not None and noted() is not None:
            deepspeed.set_hf_deepspeed_config(noted())
