"""Shapes of well-known checkpoints, for counting without a download.

Each is the configuration that an AdaVTP model made from that checkpoint has, with the sizes that the checkpoint's own
config.json states.
"""

import math
from collections.abc import Callable
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from ...configuration.configuration_adavtp import AdaVTPConfig


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


def siglip_so400m_384() -> PreTrainedConfig:
    """SigLIP So400m/14 at 384 pixels: 729 patches."""
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
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


def qwen2_7b() -> PreTrainedConfig:
    """Qwen2-7B."""
    return Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    )


LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
# Tower, text model, and what of the tower's features is used.
PRESETS: dict[str, Callable[[], tuple[PreTrainedConfig, PreTrainedConfig, str]]] = {
    "llava-1.5-7b": lambda: (clip_large_336(), llama(4096, 11008, 32, 32), "default"),
    "llava-1.5-13b": lambda: (clip_large_336(), llama(5120, 13824, 40, 40), "default"),
    "llava-llama-3-8b": lambda: (clip_large_336(), llama(4096, 14336, 32, 32, **LLAMA_3), "default"),
    "llava-siglip-qwen2-7b": lambda: (siglip_so400m_384(), qwen2_7b(), "full"),
}


def preset_config(name: str, visual_tokens: int | None = None) -> AdaVTPConfig:
    """
    The configuration of a well-known shape, with a cache of half precision.

    Args:
        name: a key of `PRESETS`.
        visual_tokens: N, patches of an image, a square; by default the checkpoint's own. Another number is another
            image size.

    Raises:
        ValueError: if there is no such shape, or the number is no square.
    """
    if name not in PRESETS:
        raise ValueError(f"`preset` is {name!r}; allowed: {', '.join(PRESETS)}.")
    vision, text, strategy = PRESETS[name]()
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
