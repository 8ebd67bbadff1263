"""The model that a stage of a recipe starts from: a new one, the recipe's checkpoint, or what the stage before left.

An adapter belongs to a checkpoint that lies somewhere, so a stage that trains one starts from a checkpoint on disk and
leaves an adapter beside it. Whoever needs an ordinary checkpoint of it, the next stage or an evaluation, gets it
merged, in the stage's folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.integrations import deepspeed

from ...configuration.configuration_adavtp import AdaVTPConfig
from ...modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ...tasks.drawn_tasks import drawn_task
from ..adapter_folders import ADAPTER_CONFIG, merge_adapter
from ..adapters import quantization
from ..looking_around import look_around
from ..looking_back import look_back
from .recipe import DEFAULT_TASK, Recipe, Stage

# What a recipe says of its checkpoint and a saved configuration does not.
HOW_TO_LOAD = ("attn_implementation", "dtype")

# In the folder of a stage with adapters, the checkpoint that the adapter and its base are together.
MERGED = "merged"

ModelAndProcessor = tuple[PreTrainedModel, ProcessorMixin]


def new_model(model: dict[str, Any]) -> ModelAndProcessor:
    """A model for a drawn task with random weights, of what a recipe says of it: see [`Recipe`]."""
    fields = dict(model)
    task = drawn_task(fields.pop("task", DEFAULT_TASK))
    looks_around, looks_back = fields.pop("look_around", False), fields.pop("look_back", False)
    vision = fields["vision_config"]
    processor = task.build_processor(vision["image_size"], vision["patch_size"])
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = AutoConfig.for_model(**fields["text_config"] | special | {"vocab_size": len(tokenizer)})
    config = AdaVTPConfig(
        **fields | {"vision_config": AutoConfig.for_model(**vision), "text_config": text},
        image_token_index=processor.image_token_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )
    made = AdaVTPForConditionalGeneration(config)
    if looks_around:
        look_around(made.model.vision_tower)
    if looks_back:
        look_back(made.model.language_model)
    # Without a limit of its own `generate` counts the prompt towards twenty.
    made.generation_config.max_new_tokens = task.max_new_tokens
    return made, processor


def model_on_disk(recipe: Recipe, stage: Stage, before: Path | None) -> ModelAndProcessor:
    """What a stage starts from: what the stage before it left in a folder, or the recipe's checkpoint."""
    fields = dict(recipe.model)
    if before is not None:
        fields = {name: fields[name] for name in HOW_TO_LOAD if name in fields}
        fields["checkpoint"] = str(whole_checkpoint(before))
    checkpoint = fields.pop("checkpoint")
    if stage.adapters:
        fields |= _under_adapters(checkpoint, stage)
    try:
        model = AdaVTPForConditionalGeneration.from_pretrained(checkpoint, **fields)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"`model` has {', '.join(fields)}, of which one is unknown: {error}") from error
    return model, model.processor


def _under_adapters(checkpoint: str, stage: Stage) -> dict[str, Any]:
    """What `from_pretrained` is told for weights that stay as they are, of four bits if the stage says so."""
    content = PreTrainedConfig.get_config_dict(checkpoint)[0]
    # A checkpoint that has a controller has its settings, whatever its family; a LLaVA with one is an AdaVTP.
    kind, has_settings = content.get("model_type"), "controller_head" in content
    if kind == "llava" or (kind != "adavtp" and not has_settings):
        raise ValueError(
            f"stage {stage.name!r} has adapters, and {checkpoint!r}, which they would belong to, is a "
            f"{kind!r} model without a controller: that, and the budget token, would start from "
            "numbers that are saved nowhere. Train a stage without adapters before, or make a whole checkpoint of it: "
            "of LLaVA `adavtp convert` does, of others "
            "`AdaVTPForConditionalGeneration.from_pretrained(...).save_pretrained(...)`."
        )
    if stage.adapters.get("quantize") is None:
        return {}
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    computes_in = next((dtype for name, dtype in half.items() if stage.training.get(name)), torch.float32)
    return {"quantization_config": quantization(stage.adapters["quantize"], computes_in), "dtype": torch.float32}


def whole_checkpoint(folder: Path) -> Path:
    """A finished stage's folder; or the checkpoint that its adapter and its base are together, made now if need be."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return folder
    merged = folder / MERGED
    with PartialState().main_process_first():
        if not merged.is_dir():
            with _whole_models():
                merge_adapter(folder, merged)
    return merged


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
