"""AdaVTP models small enough for a test: hidden size 32, two or three layers, 16 patches, 64 words."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from adavtp import AdaVTPConfig, AdaVTPForConditionalGeneration

VOCAB_SIZE = 64
PAD_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID, IMAGE_TOKEN_ID = 0, 1, 2, 63
IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES = 32, 8, 16

# Weights of the default 0.02 make every prompt sound the same at this width; these make answers depend on images.
INITIALIZER_RANGE = 0.2

# The ways in which the choice gets its gradient: gates inside attention, which need all tokens in place, and gates on
# the features in either form.
GATES = [
    {"gradient_gates": "attention"},
    {"gradient_gates": "features", "selection_output": "gather"},
    {"gradient_gates": "features", "selection_output": "mask"},
]
GATE_IDS = ["attention gates", "feature gates, gather", "feature gates, mask"]

VISION_CONFIGS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig, "dinov2": Dinov2Config}
TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def tiny_vision_config(vision: str = "clip", num_layers: int = 3) -> PreTrainedConfig:
    """A vision tower's configuration; `vision` is a key of `VISION_CONFIGS`."""
    sizes = {"mlp_ratio": 2} if vision == "dinov2" else {"intermediate_size": 64}
    return VISION_CONFIGS[vision](
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        initializer_range=INITIALIZER_RANGE,
        **sizes,
    )


def tiny_text_config(text: str = "llama", num_layers: int = 2, **fields: Any) -> PreTrainedConfig:
    """A text model's configuration with grouped-query attention; `text` is a key of `TEXT_CONFIGS`."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": INITIALIZER_RANGE,
        "pad_token_id": PAD_TOKEN_ID,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "tie_word_embeddings": False,
    }
    return TEXT_CONFIGS[text](**(sizes | fields))


def tiny_config(vision: str = "clip", text: str = "llama", **adavtp_fields: Any) -> AdaVTPConfig:
    """
    An AdaVTP configuration.

    Args:
        vision: `"clip"`, `"siglip"` (without CLS, so with select strategy "full") or `"dinov2"`.
        text: `"llama"`, `"mistral"`, `"qwen2"` or `"qwen3"`.
        adavtp_fields: fields of `AdaVTPConfig` that differ from the defaults.
    """
    fields = {
        "vision_config": tiny_vision_config(vision),
        "text_config": tiny_text_config(text),
        "image_token_index": IMAGE_TOKEN_ID,
        "image_seq_length": NUM_PATCHES,
        "tie_word_embeddings": False,
    }
    if vision == "siglip":
        fields["vision_feature_select_strategy"] = "full"
    return AdaVTPConfig(**(fields | adavtp_fields))


def tiny_model(
    vision: str = "clip",
    text: str = "llama",
    seed: int = 0,
    attn_implementation: str | None = None,
    **adavtp_fields: Any,
) -> AdaVTPForConditionalGeneration:
    """A model with random weights, in evaluation mode; the same seed makes the same weights."""
    config = tiny_config(vision, text, **adavtp_fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AdaVTPForConditionalGeneration(config).eval()
    if attn_implementation is not None:
        model.model.language_model.set_attn_implementation(attn_implementation)
    return model


def tiny_batch(
    config: AdaVTPConfig,
    images_per_sample: Sequence[int] = (1, 1),
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """
    Random images in random prompts, padded on the left.

    Args:
        config: the model's configuration.
        images_per_sample: images in each prompt; 0 for a prompt of text.
        lengths: text tokens of each prompt, BOS included; by default 6, 8, 10, ...
        seed: of the ids and the pixels.

    Returns:
        `input_ids` and `attention_mask` `[batch, sequence]`, and `pixel_values` `[num_images, 3, height, width]` if
        there are images. BOS and a word precede the first image, and a word stands
        after each, as far as `lengths` has words for it.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or range(6, 6 + 2 * len(images_per_sample), 2)
    prompts = []
    for num_images, length in zip(images_per_sample, lengths, strict=True):
        text = torch.randint(EOS_TOKEN_ID + 1, IMAGE_TOKEN_ID, (length - 1,), generator=generator).tolist()
        prompt = [BOS_TOKEN_ID, *text[:1]]
        for image in range(num_images):
            prompt += [IMAGE_TOKEN_ID] * config.num_image_tokens + text[1 + image : 2 + image]
        prompts.append(prompt + text[1 + num_images :])
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[PAD_TOKEN_ID] * (longest - len(prompt)) + prompt for prompt in prompts])
    batch = {"input_ids": input_ids, "attention_mask": (input_ids != PAD_TOKEN_ID).long()}
    if sum(images_per_sample):
        size = config.vision_config.image_size
        batch["pixel_values"] = torch.randn(sum(images_per_sample), 3, size, size, generator=generator)
    return batch


def targets(batch: dict[str, torch.Tensor], num_targets: int = 3) -> torch.Tensor:
    """Labels for a batch padded on the left: the last `num_targets` tokens of every prompt."""
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -num_targets:] = batch["input_ids"][:, -num_targets:]
    return labels


def padded_on_the_right(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with every column of padding moved from the left to the right."""
    order = (1 - batch["attention_mask"]).argsort(dim=-1, stable=True)
    columns = ("input_ids", "attention_mask", "labels")
    return {name: value.gather(1, order) if name in columns else value for name, value in batch.items()}


def alone(batch: dict[str, torch.Tensor], row: int, images_per_sample: Sequence[int]) -> dict[str, torch.Tensor]:
    """One sample of a batch, without padding, as a batch of its own."""
    is_real = batch["attention_mask"][row].bool()
    columns = ("input_ids", "attention_mask", "labels")
    sample = {name: batch[name][row : row + 1, is_real] for name in columns if name in batch}
    first = sum(images_per_sample[:row])
    if images_per_sample[row]:
        sample["pixel_values"] = batch["pixel_values"][first : first + images_per_sample[row]]
    return sample
