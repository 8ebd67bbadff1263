"""Shapes of well-known checkpoints, for counting without a download.

Each is the configuration that an AdaVTP model made from that checkpoint has, with the sizes that the checkpoint's own
config.json states (llava-hf, Qwen/Qwen2.5-VL-7B-Instruct, llava-hf/llava-onevision-qwen2-7b-ov-hf on the Hub).
"""

import math
from collections.abc import Callable
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from ...configuration.configuration_adavtp import AdaVTPConfig
from ...configuration.configuration_families import family_config_class


def clip_large_336() -> PreTrainedConfig:
    """CLIP ViT-L/14 at 336 pixels: 576 patches."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


def siglip_so400m_384(num_layers: int = 27) -> PreTrainedConfig:
    """SigLIP So400m/14 at 384 pixels: 729 patches."""
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )


def llama(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, **others: Any
) -> PreTrainedConfig:
    """A Llama text model; by default with Vicuna's vocabulary as LLaVA extends it, and a key for every query."""
    sizes = {"vocab_size": 32000, "num_key_value_heads": num_heads, "max_position_embeddings": 4096}
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        **(sizes | others),
    )


QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}


def qwen2_5_vl_7b() -> PreTrainedConfig:
    """Qwen2.5-VL-7B: tokens of 28 x 28 pixels."""
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return family_config_class(Qwen2_5_VLConfig)(text_config=QWEN2_7B, vision_config=vision, dtype="bfloat16")


def llava_onevision_7b() -> PreTrainedConfig:
    """LLaVA-OneVision-7B: a view of 729 tokens, and tiles with up to nine times as many."""
    return family_config_class(LlavaOnevisionConfig)(
        text_config=Qwen2Config(**(QWEN2_7B | {"vocab_size": 152128})),
        vision_config=siglip_so400m_384(num_layers=26),
        image_grid_pinpoints=[[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
        vision_aspect_ratio="anyres_max_9",
        dtype="bfloat16",
    )


LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
# Tower, text model, and what of the tower's features is used.
LLAVA_PRESETS: dict[str, Callable[[], tuple[PreTrainedConfig, PreTrainedConfig, str]]] = {
    "llava-1.5-7b": lambda: (clip_large_336(), llama(4096, 11008, 32, 32), "default"),
    "llava-1.5-13b": lambda: (clip_large_336(), llama(5120, 13824, 40, 40), "default"),
    "llava-llama-3-8b": lambda: (clip_large_336(), llama(4096, 14336, 32, 32, **LLAMA_3), "default"),
    "llava-siglip-qwen2-7b": lambda: (siglip_so400m_384(), Qwen2Config(**QWEN2_7B), "full"),
}
FAMILY_PRESETS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2.5-vl-7b": qwen2_5_vl_7b,
    "llava-onevision-7b": llava_onevision_7b,
}
PRESETS = (*LLAVA_PRESETS, *FAMILY_PRESETS)


def preset_config(name: str, visual_tokens: int | None = None) -> PreTrainedConfig:
    """
    The configuration of a well-known shape, with a cache of half precision.

    Args:
        name: one of `PRESETS`.
        visual_tokens: N, patches of an image, a square; by default the checkpoint's own. Another number is another
            image size. Only of LLaVA, whose images all have one.

    Raises:
        ValueError: if there is no such shape, or the number is no square or not the preset's to have.
    """
    if name not in PRESETS:
        raise ValueError(f"`preset` is {name!r}; allowed: {', '.join(PRESETS)}.")
    if name in FAMILY_PRESETS:
        if visual_tokens is not None:
            raise ValueError(f"`visual_tokens` is {visual_tokens}; of {name!r} the size of an image says its tokens.")
        return FAMILY_PRESETS[name]()
    vision, text, strategy = LLAVA_PRESETS[name]()
    if visual_tokens is not None and visual_tokens != (vision.image_size // vision.patch_size) ** 2:
        side = math.isqrt(max(visual_tokens, 0))
        if side < 1 or side * side != visual_tokens:
            raise ValueError(
                f"`visual_tokens` is {visual_tokens}; an image's patches are a square grid, so it has to be a square."
            )
        vision.image_size = side * vision.patch_size
    num_patches = (vision.image_size // vision.patch_size) ** 2
    return AdaVTPConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_select_strategy=strategy,
        image_seq_length=num_patches,
        dtype="float16",
    )
