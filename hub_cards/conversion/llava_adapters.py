"""LLaVA folders without a language model: a projector alone, or LoRA's weights and what was trained beside them.

LLaVA's training leaves such folders. What is in them takes the place of the base's tensors, or is added to them; the
rest is the base's, the language model or the LLaVA that training began with.
"""

import re
from math import isfinite
from pathlib import Path
from typing import Any

from .llava_files import read_json, tensors_of
from .llava_names import target_name
from .llava_source import LowRank

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE = ("non_lora_trainables.bin", "mm_projector.bin")
# What makes something else of an adapter than W + s B A, or of the weights that it is added to.
_UNUSUAL = ("use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters", "use_qalora")
_UNUSUAL += ("alora_invocation_tokens", "megatron_config")
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda")


def trained_files(folder: Path) -> list[Path]:
    """The files of such a folder; none where it is a whole checkpoint, or nothing."""
    adapter = [folder / name for name in _ADAPTERS if (folder / name).is_file()][:1]
    return adapter + [folder / name for name in _BESIDE if (folder / name).is_file()]


def low_rank_changes(folder: Path) -> dict[str, LowRank]:
    """
    What LoRA's weights add, by the target's name of the weight.

    Raises:
        ValueError: if they are not those of plain LoRA, or do not fit together.
        OSError: if their configuration is missing.
    """
    path = next((path for path in trained_files(folder) if path.name in _ADAPTERS), None)
    if path is None:
        return {}
    if not (folder / ADAPTER_CONFIG).is_file():
        raise OSError(f"{str(path)!r} has no {ADAPTER_CONFIG} beside it, which says how its weights are added.")
    fields = read_json(folder / ADAPTER_CONFIG)
    _require_plain(fields)
    tensors, changes = tensors_of(path), {}
    for name in tensors:
        if match := re.fullmatch(r"(.*)\.lora_A\.weight", name):
            a, b = tensors[name], tensors.get(f"{match[1]}.lora_B.weight")
            if b is None or a.dim() != 2 or b.dim() != 2 or b.shape[1] != a.shape[0]:
                raise ValueError(f"{str(path)!r} has `{name}` without a `lora_B` that fits it; download it again.")
            target = target_name(f"{match[1]}.weight", "adapter")
            changes[str(target)] = LowRank(a, b, _scaling(fields, match[1], a.shape[0], path))
    return changes


def _require_plain(fields: dict[str, Any]) -> None:
    named = {name: fields[name] for name in _UNUSUAL if fields.get(name)}
    if fields.get("peft_type") != "LORA":
        named["peft_type"] = fields.get("peft_type")
    if str(fields.get("init_lora_weights")).startswith(_CHANGES_BASE):
        named["init_lora_weights"] = fields["init_lora_weights"]
    for name, value in named.items():
        raise ValueError(
            f"`{name}` is {value!r} in the source's {ADAPTER_CONFIG}; supported is LoRA alone. Merge the adapter with "
            "the code that it was trained with."
        )


def _scaling(fields: dict[str, Any], name: str, rank: int, path: Path) -> float:
    """PEFT's: alpha / r, or alpha / sqrt(r), where a layer may have its own r and alpha."""
    module = name.removeprefix("base_model.model.")
    own_rank, alpha = (
        _own(fields.get(f"{what}_pattern"), module, fields.get(key))
        for what, key in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    if own_rank != rank or isinstance(alpha, bool) or not isinstance(alpha, int | float) or not isfinite(alpha):
        raise ValueError(
            f"The source's {ADAPTER_CONFIG} has rank {own_rank!r} and alpha {alpha!r} for `{module}`, which has rank "
            f"{rank} in {path.name!r}; expected are numbers, and the same rank."
        )
    return alpha / (rank**0.5 if fields.get("use_rslora") else rank)


def _own(patterns: Any, module: str, otherwise: Any) -> Any:
    """A layer's own value: that of the first pattern that its name ends with."""
    patterns = patterns if isinstance(patterns, dict) else {}
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)
