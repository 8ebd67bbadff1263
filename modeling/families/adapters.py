"""Which adapter a model type has; without one of its own it has the default."""

from transformers import PreTrainedConfig

from .anyres import LLAVA_NEXT, LLAVA_ONEVISION
from .encoded import EncodingFamily
from .gemma3 import GEMMA3, PALIGEMMA
from .gemma4 import GEMMA4
from .idefics3 import IDEFICS3
from .internvl import INTERNVL
from .minicpmv import MINICPMV
from .mistral3 import MISTRAL3
from .qwen_vl import GLM4V, QWEN2_5_VL, QWEN_VL

ADAPTERS: dict[str, EncodingFamily] = {
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    "glm4v": GLM4V,
    "idefics3": IDEFICS3,
    "internvl": INTERNVL,
    "llava_next": LLAVA_NEXT,
    "llava_onevision": LLAVA_ONEVISION,
    "minicpmv4_6": MINICPMV,
    "mistral3": MISTRAL3,
    "paligemma": PALIGEMMA,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen2_vl": QWEN_VL,
    "qwen3_5": QWEN_VL,
    "qwen3_5_moe": QWEN_VL,
    "qwen3_vl": QWEN_VL,
    "qwen3_vl_moe": QWEN_VL,
    "smolvlm": IDEFICS3,
}


def adapter_of(config: PreTrainedConfig) -> EncodingFamily:
    """The adapter for models of a configuration."""
    return ADAPTERS.get(config.model_type, EncodingFamily())
