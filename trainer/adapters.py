"""Adapters: training a large model by a few numbers beside its weights, with PEFT.

The decoder's linear layers, and the tower's if the tower trains, get a low-rank term, W x + (alpha / r) B A x (LoRA,
arXiv 2106.09685); the parts that are ours and small, the controller and the projector, train whole, as copies. All of
it goes into one file, which says what checkpoint it belongs to and is nothing without it; `merge_adapter` adds both
up to an ordinary checkpoint. Underneath, the decoder may lie in four bits (QLoRA, arXiv 2305.14314).
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..configuration.configuration_adavtp import AdaVTPConfig
from ..modeling.hub.custom_reducers import CUSTOM_FILES, is_custom, load_custom_reducers, save_custom_reducers
from ..modeling.hub.loading import new_module_of
from ..modeling.hub.saving import save_code
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from ..modeling.reducers.base import REDUCERS
from .controller_targets import adavtp_model_of
from .trained_parts import never_run_prefixes, part_prefixes
from .training_arguments import TRAIN_PARTS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

# Where adapters go; the other parts train whole.
ADAPTED_PARTS: dict[str, str] = {"decoder": "model.language_model.layers.", "vision": "model.vision_tower.encoder."}
QUANTIZATIONS: tuple[str, ...] = ("nf4",)
SIZES = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# The adapted model's configuration: its reducer and the like, which may not be the base's. By the name config.json
# transformers would take the folder for a whole checkpoint.
ADAPTED_CONFIG = "adavtp_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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

    unknown = set(train_parts) - set(TRAIN_PARTS)
    if unknown or not set(train_parts) & set(ADAPTED_PARTS):
        raise ValueError(
            f"`train_parts` is {list(train_parts)}; of {list(TRAIN_PARTS)} it needs at least one that gets adapters: "
            f"{' or '.join(ADAPTED_PARTS)}. The other parts train whole without any."
        )
    if r < 1 or not 0 <= lora_dropout < 1:
        raise ValueError(f"`r` is {r} and `lora_dropout` {lora_dropout}; allowed are 1 or more, and 0.0 to below 1.0.")
    never_run = never_run_prefixes(adavtp_model_of(model))
    whole = [part for part in train_parts if part not in ADAPTED_PARTS]
    modules = [name for name in _own_parameter_modules(model, "") if f"{name}.".startswith(part_prefixes(whole))]
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
    prefixes = tuple(prefix for part, prefix in ADAPTED_PARTS.items() if part in train_parts)
    there = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefixes) and not f"{name}.".startswith(never_run)
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

    parts = ("vision_tower", "multi_modal_projector", "budget_token", "controller", "reducers")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["lm_head", *(f"model.{part}" for part in parts)],
    )


def save_beside_adapter(model: "PeftModel", folder: str | Path) -> None:
    """
    Completes a folder that PEFT saved: with the adapted model's configuration and the code of reducers that do not
    come with AdaVTP, and without a base model on the card that only this machine knows.
    """
    folder, base = Path(folder), model.get_base_model()
    (folder / ADAPTED_CONFIG).write_text(json.dumps(_config_to_keep(base.config), indent=2), encoding="utf-8")
    reducers = adavtp_model_of(base).reducers
    # A reducer may be inside a wrapper (PEFT), or its class one that sharding (FSDP) made on the spot.
    classes = {
        name: REDUCERS.get(name, type(getattr(reducer, "original_module", reducer)))
        for name, reducer in reducers.items()
    }
    if custom := {name: reducer_class for name, reducer_class in classes.items() if is_custom(reducer_class)}:
        save_code(type(base), folder)
        save_custom_reducers(custom, folder)
    _correct_card(folder / "README.md", model.active_peft_config.base_model_name_or_path)


def _config_to_keep(config: AdaVTPConfig) -> dict[str, Any]:
    """Without what is a matter of how the base was loaded."""
    content = config.to_dict()
    for fields in (content, content["text_config"], content["vision_config"]):
        for name in ("quantization_config", "dtype", "_name_or_path"):
            fields.pop(name, None)
    return content


def _correct_card(path: Path, base: str | None) -> None:
    from huggingface_hub import ModelCard

    if not path.is_file() or not (base is None or Path(base).exists()):
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    # The Hub takes repositories here and refuses paths.
    card.data.base_model = None
    card.data.tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
    card.save(path)


def load_adapter(
    adapter: str | Path, base: str | None = None, is_trainable: bool = False, **kwargs: Any
) -> "PeftModel":
    """
    A base checkpoint with its adapter, as it was trained: with the reducer of then and everything else.

    Args:
        adapter: folder that [`AdaVTPTrainer`] wrote for a model with adapters, or one that PEFT wrote.
        base: folder or Hub repository of the checkpoint; by default what the adapter says, see [`base_of`].
        is_trainable: whether to go on training it.
        kwargs: of `from_pretrained` for the base. Its code is run where it brings reducers.

    Raises:
        ValueError: if there is no adapter in the folder, it does not fit the base, or neither has some weights.
        OSError: if there is no base.
    """
    from peft import PeftModel

    adapter = Path(adapter)
    base = base_of(adapter) if base is None else base
    if (adapter / ADAPTED_CONFIG).is_file():
        config = AdaVTPConfig(**json.loads((adapter / ADAPTED_CONFIG).read_text(encoding="utf-8")))
        if any((adapter / file).is_file() for file in CUSTOM_FILES):
            entries = [*config.reducers, *config.trained_reducers]
            names = [entry if isinstance(entry, str) else entry["name"] for entry in entries]
            load_custom_reducers(str(adapter), [name for name in names if name != "adaptive"], trust_remote_code=True)
        kwargs |= {"config": config}
    try:
        if "config" in kwargs:
            _require_same_sizes(kwargs["config"], AdaVTPConfig.from_pretrained(base), adapter, base)
        model, info = AdaVTPForConditionalGeneration.from_pretrained(
            base, trust_remote_code=True, output_loading_info=True, **kwargs
        )
    except OSError as error:
        raise OSError(
            f"The adapter {str(adapter)!r} belongs to {base!r}, which could not be loaded; name its base checkpoint "
            f"(`--base`). {error}"
        ) from error
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=is_trainable)
    except SafetensorError as error:
        raise OSError(
            f"{str(adapter / ADAPTER_WEIGHTS)!r} is not whole; copy or download it again. {error}"
        ) from error
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"The adapter {str(adapter)!r} does not fit {base!r}: {error}") from error
    _require_fit(adapted, adapter, base, set(info["missing_keys"]))
    return adapted


def base_of(adapter: str | Path) -> str:
    """
    The checkpoint that an adapter belongs to: a folder, or else taken for a Hub repository. Where a relative path does
    not lead anywhere from here, it is tried from the adapter's folder and from those above it.

    Raises:
        ValueError: if there is no adapter in the folder, or it does not say.
    """
    path = Path(adapter) / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(f"`adapter` is {str(adapter)!r}; expected is a folder with {ADAPTER_CONFIG} in it.")
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{str(path)!r} does not say which checkpoint the adapter belongs to; name it (`--base`).")
    if Path(base).is_dir():
        return base
    folders = (path.parent.resolve(), *path.parent.resolve().parents)
    return next((str(folder / base) for folder in folders if (folder / base).is_dir()), base)


def _require_same_sizes(adapted: AdaVTPConfig, config: AdaVTPConfig, adapter: Path, base: str) -> None:
    """That an adapter is not one of another model, of which a part would fit."""
    for part in ("text_config", "vision_config"):
        for name in SIZES:
            was, is_ = (getattr(getattr(of, part), name, None) for of in (adapted, config))
            if was != is_:
                raise ValueError(
                    f"The adapter {str(adapter)!r} does not fit {base!r}: it was trained on a model with `{name}` "
                    f"{was} in its `{part}`, and here it is {is_}. Name the checkpoint that it was trained on."
                )


def _require_fit(model: "PeftModel", adapter: Path, base: str, missing_in_base: set[str]) -> None:
    """That the adapter's weights are the model's, and that together with the base's they are all."""
    from peft import get_peft_model_state_dict

    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        given = set(file.keys())
    expected = set(get_peft_model_state_dict(model))
    if given != expected:
        differing = sorted(given ^ expected)
        raise ValueError(
            f"The adapter {str(adapter)!r} does not fit {base!r}: {len(differing)} weight(s) are in only one of them, "
            f"{differing[0]} among them. Name the checkpoint that it was trained on."
        )
    brought = {name.removeprefix("base_model.model.") for name in given}
    absent = sorted(name for name in missing_in_base if new_module_of(name) is not None and name not in brought)
    if absent:
        raise ValueError(
            f"{len(absent)} weight(s), {absent[0]} among them, are neither in {base!r} nor in the adapter "
            f"{str(adapter)!r}; in training they had values from a random start, which nobody saved. Train on a "
            "checkpoint that has them: `adavtp convert` makes one from LLaVA's, `save_pretrained` one of a model with "
            "a new reducer."
        )


def merge_adapter(adapter: str | Path, output_dir: str | Path, base: str | None = None) -> Path:
    """
    Writes the ordinary checkpoint that a base and its adapter are together: W + (alpha / r) B A.

    The base is loaded in the precision that it is stored in, also if the adapter was trained over four bits of it:
    the adapter has learned to correct rounding that is then not there, which is small, and the merged weights have
    none.

    Args:
        adapter, base: see [`load_adapter`].
        output_dir: a folder that is new or empty. Nothing is in it unless everything could be written.

    Returns:
        `output_dir`, which loads like any checkpoint, without PEFT. It has the processor from the adapter's folder,
        or else the base's, and the training log of the former.

    Raises:
        ValueError: if `output_dir` has something in it; and as [`load_adapter`] does.
        OSError: if there is no base.
    """
    adapter, output_dir = Path(adapter), Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`output_dir` is {str(output_dir)!r}, which has something in it; name a new folder.")
    base = base_of(adapter) if base is None else base
    adapted = load_adapter(adapter, base)
    merged = adapted.merge_and_unload(safe_merge=True)
    has_processor = (adapter / "processor_config.json").is_file()
    processor = AdaVTPProcessor.from_pretrained(str(adapter) if has_processor else base, trust_remote_code=True)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that it moves into place by renaming.
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary:
        folder = Path(temporary) / "merged"
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
        for log in adapter.glob("training_log*.json"):
            shutil.copy(log, folder)
        folder.replace(output_dir)
    return output_dir
