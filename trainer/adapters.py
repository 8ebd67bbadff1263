"""Adapters: training a large model by a few numbers beside its weights, with PEFT.

The decoder's linear layers, and the tower's if the tower trains, get a low-rank term, W x + (alpha / r) B A x (LoRA,
arXiv 2106.09685); the parts that are ours and small, the controller and the projector, train whole, as copies. All of
it goes into one file, see `adapter_folders.py`. Underneath, the decoder may lie in four bits (QLoRA, arXiv
2305.14314).
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.parts import PARTS, parts_of_names
from .trained_parts import never_run_prefixes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

# Where adapters go; the other parts train whole.
ADAPTED_PARTS: tuple[str, ...] = ("decoder", "vision")
QUANTIZATIONS: tuple[str, ...] = ("nf4",)
# What families have beside their text model.
_NO_DECODER = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "connector", "merger")
_NO_DECODER += ("embed_vision",)


def add_adapters(
    model: AdaVTPForConditionalGeneration,
    train_parts: Sequence[str],
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    target_modules: Sequence[str] | None = None,
) -> "PeftModel":
    """
    Puts adapters into the decoder, and into the tower if it is to train, and copies of the other parts beside them.

    Only what runs gets any, as in [`choose_trained_parts`]: choose the reducer before. The parts that train whole are
    wrapped by PEFT module by module, so that reducers stay what they are to the model: their class, and what they say
    of themselves. What trains is in float32, also beside half-precision weights. A reducer with weights that belong
    to no module inside it is the exception: it is wrapped as a whole and keeps its precision.

    Args:
        model: is changed; its weights stay as they are and no longer train. Four-bit weights are allowed.
        train_parts: as in [`AdaVTPTrainingArguments`], with `"decoder"` or `"vision"` among them.
        r: rank of the adapters, 1 or more.
        lora_alpha: the adapters' term is scaled by `lora_alpha / r`.
        lora_dropout: share of an adapter's input that is dropped in training, in [0, 1).
        target_modules: last names of the linear layers that get adapters, such as `["q_proj", "v_proj"]`; by default
            all in those parts. The head that makes logits gets none.

    Returns:
        A PEFT model that [`AdaVTPTrainer`] trains, with the same `train_parts`.

    Raises:
        ValueError: if a value is not allowed or a name of `target_modules` is not there.
    """
    from peft import LoraConfig, get_peft_model

    unknown = set(train_parts) - set(PARTS)
    if unknown or not set(train_parts) & set(ADAPTED_PARTS):
        raise ValueError(
            f"`train_parts` is {list(train_parts)}; of {list(PARTS)} it needs at least one that gets adapters: "
            f"{' or '.join(ADAPTED_PARTS)}. The other parts train whole without any."
        )
    if r < 1 or not 0 <= lora_dropout < 1:
        raise ValueError(f"`r` is {r} and `lora_dropout` {lora_dropout}; allowed are 1 or more, and 0.0 to below 1.0.")
    never_run, part_of = never_run_prefixes(model), parts_of_names(model)
    whole = [part for part in train_parts if part not in ADAPTED_PARTS]
    modules = [name for name in _own_parameter_modules(model, "") if part_of(name) in whole]
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=_linear_layers(model, train_parts, target_modules, never_run),
        modules_to_save=[name for name in modules if not f"{name}.".startswith(never_run)] if whole else None,
    )
    for module in model.modules():
        # bitsandbytes would repack four-bit weights in the first evaluation on such a processor, and no gradient comes
        # through them in the training that follows.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    adapted = get_peft_model(model, config)
    _train_copies_in_float32(adapted)
    return adapted


def _train_copies_in_float32(model: "PeftModel") -> None:
    """
    The copies of a half-precision model's modules, like its adapters: steps of training are lost in the rounding of
    half-precision weights. They take and give the model's precision as before.
    """
    from peft.utils import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    for copy in (copy for wrapper in wrappers for copy in wrapper.modules_to_save.values()):
        dtype = next(copy.parameters()).dtype
        # What a reducer with weights of its own does with them, only itself can say.
        if dtype != torch.float32 and isinstance(copy, (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Conv2d)):
            copy.float()
            copy.register_forward_pre_hook(_in_its_own_precision)
            copy.register_forward_hook(lambda _, __, output, dtype=dtype: output.to(dtype))


def _in_its_own_precision(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    # Sharding (DeepSpeed, FSDP) may have given the weights another.
    return tuple(value.to(module.weight.dtype) if value.is_floating_point() else value for value in inputs)


def _linear_layers(
    model: nn.Module, train_parts: Sequence[str], target_modules: Sequence[str] | None, never_run: tuple[str, ...]
) -> str:
    """The linear layers that get adapters, as a pattern of their names for PEFT."""
    part_of = parts_of_names(model)
    there = [
        name
        for name, module in model.named_modules()
        # Of a layer: the head that makes logits gets none.
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
        if part_of(name) in {*train_parts} & {*ADAPTED_PARTS} and not f"{name}.".startswith(never_run)
    ]
    last_names = sorted({name.rpartition(".")[2] for name in there})
    wanted = last_names if target_modules is None else list(target_modules)
    if not wanted or set(wanted) - set(last_names):
        raise ValueError(f"`target_modules` is {target_modules}; linear layers of {train_parts}: {last_names}.")
    by_stack: dict[str, dict[str, list[str]]] = {}
    for name in there:
        stack, number, inside = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name).groups()
        if name.rpartition(".")[2] in wanted:
            by_stack.setdefault(stack, {}).setdefault(number, []).append(inside)
    # One pattern a stack of layers says it in a line, and the same each time, which names in a set would not.
    patterns = []
    for stack, layers in by_stack.items():
        insides = dict.fromkeys(inside for names in layers.values() for inside in names)
        patterns.append(rf"{re.escape(stack)}\.({'|'.join(layers)})\.({'|'.join(map(re.escape, insides))})")
    return "|".join(patterns)


def _own_parameter_modules(module: nn.Module, name: str) -> Iterator[str]:
    """Names of the outermost modules with parameters of their own, which are not those of a module inside."""
    lists = (nn.ParameterList, nn.ParameterDict)
    holds_lists = any(isinstance(child, lists) for child in module.children())
    if holds_lists or any(True for _ in module.parameters(recurse=False)):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _own_parameter_modules(child, f"{name}.{child_name}" if name else child_name)


def quantization(quantize: str, compute_dtype: torch.dtype = torch.bfloat16) -> "BitsAndBytesConfig":
    """
    For `from_pretrained(checkpoint, quantization_config=quantization("nf4"), dtype=torch.float32)`.

    In four bits are the linear layers inside the decoder. The tower, the projector, the controller, the reducers and
    the head stay as they are; `dtype` says in what precision, and what trains wants float32.

    Args:
        quantize: `"nf4"`: four-bit NormalFloat with quantised constants (QLoRA, section 3).
        compute_dtype: of the products with four-bit weights.

    Raises:
        ValueError: if `quantize` is not known.
        ImportError: if bitsandbytes is not installed.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"`quantize` is {quantize!r}; allowed are {', '.join(map(repr, QUANTIZATIONS))} and None.")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        # `from_pretrained` adds what a budget has. Of the other names every family has one or two.
        llm_int8_skip_modules=["lm_head", *(f"model.{name}" for name in _NO_DECODER)],
    )
