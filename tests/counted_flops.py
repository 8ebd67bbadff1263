"""What torch counts while a model runs, part by part, to compare with what is counted without running it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import IMAGE_TOKEN_ID, NUM_PATCHES, TEXT_CONFIGS, VISION_CONFIGS, tiny_batch, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from adavtp import AdaVTPForConditionalGeneration
from adavtp.evaluation.flops import count_batch_flops
from adavtp.modeling.modeling_adavtp import ReducerSpec
from adavtp.modeling.stack_adavtp import StackBudget
from adavtp.modeling.tower_adavtp import tower_layers

PARTS = ("vision", "reducer", "projector", "prefill")


def attention_on_a_cpu(query: tuple, key: tuple, value: tuple, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products, [n, d] @ [d, k] and [n, k] @ [k, d], in every head; torch's own table has it for GPUs only."""
    batch, heads, rows, width = query
    return batch * heads * (2 * rows * width * key[2] + 2 * rows * key[2] * value[3])


ON_A_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_on_a_cpu}


def uneven_model(vision: str = "clip", text: str = "llama", **fields: Any) -> AdaVTPForConditionalGeneration:
    """
    A model no two of whose sizes are alike, so that no formula can take one for another: 64 patches, a tower 32 wide,
    a decoder 40 wide with queries 48 and keys 24 wide, and eight layers.
    """
    sizes = {"mlp_ratio": 3} if vision == "dinov2" else {"intermediate_size": 72}
    sizes |= fields.pop("vision_fields", {})
    vision_config = VISION_CONFIGS[vision](
        hidden_size=32, num_hidden_layers=5, num_attention_heads=4, image_size=32, patch_size=4, **sizes
    )
    text_config = TEXT_CONFIGS[text](
        vocab_size=67,
        hidden_size=40,
        intermediate_size=104,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        **fields.pop("text_fields", {}),
    )
    return tiny_model(
        vision, text, vision_config=vision_config, text_config=text_config, image_seq_length=4 * NUM_PATCHES, **fields
    )


def parts_that_torch_counts(model: AdaVTPForConditionalGeneration, **inputs: Any) -> dict[str, float]:
    """
    Runs a forward under torch's counter and adds up what it saw in each part's own modules: in the tower the halves of
    its layers, so that keys which a reducer asks a layer for are the reducer's; everything else is the reducer's too.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        model(**inputs, logits_to_keep=1)
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    names = {module: f"{type(model).__name__}.{name}" for name, module in model.named_modules()}
    tower, decoder = model.model.vision_tower, model.model.language_model
    halves = [half for layer in tower_layers(tower) for half in (layer_attention(layer), layer.mlp)]
    parts = {
        "vision": [tower.embeddings, *halves],
        "projector": [model.model.multi_modal_projector],
        "prefill": [*decoder.layers, model.lm_head],
    }
    counted = {part: float(sum(counts.get(names[module], 0) for module in modules)) for part, modules in parts.items()}
    return {**counted, "reducer": counts["Global"] - sum(counted.values())}


def layer_attention(layer: torch.nn.Module) -> torch.nn.Module:
    """A tower layer's attention, under whichever of its names."""
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def all_that_torch_counts(run: Callable[[], Any]) -> float:
    """Everything that is counted while `run` runs."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        run()
    return float(counter.get_total_flops())


def text_lengths(batch: dict[str, torch.Tensor]) -> list[int]:
    """Text tokens of each prompt."""
    is_text = (batch["attention_mask"] > 0) & (batch["input_ids"] != IMAGE_TOKEN_ID)
    return is_text.sum(dim=-1).tolist()


def assert_counted(
    model: AdaVTPForConditionalGeneration,
    reducer: ReducerSpec | None,
    token_budget: StackBudget | None,
    images: tuple[int, ...] = (1,),
    lengths: tuple[int, ...] = (4,),
    selection_output: str = "gather",
) -> None:
    """
    Every part of a batch is counted as torch counts it. In a prompt of four text tokens two stand behind its image,
    and one of them is SparseVLM's rater.
    """
    batch = tiny_batch(model.config, images, lengths)
    asked = {"token_budget": token_budget, "reducer": reducer, "selection_output": selection_output}
    seen = parts_that_torch_counts(model, **batch, **asked)
    words = [length - 1 - shown for length, shown in zip(lengths, images, strict=True)]
    counted = count_batch_flops(model.config, text_lengths(batch), num_images=images, question_tokens=words, **asked)
    assert {part: getattr(counted, part) for part in PARTS} == pytest.approx(seen, rel=1e-3)
