"""What a training run costs is counted as torch counts it, and weighed as torch allocates it."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.loss.loss_utils import ForCausalLMLoss

from adavtp import AdaVTPForConditionalGeneration
from adavtp.evaluation.training_budgets import longest_counts, mean_training_flops
from adavtp.evaluation.training_memory import (
    LOGIT_BYTES,
    NF4_BYTES,
    Layout,
    Weights,
    activations,
    kept_by_weights,
)
from adavtp.modeling.costs.training_step import (
    Step,
    TrainingFlops,
    count_training_flops,
    plain_training_flops,
)
from adavtp.modeling.costs.weightless import family_prompt, looks_of
from adavtp.modeling.vision.encode import encode_image
from adavtp.modeling.vision.features import VisionFeatures
from adavtp.trainer.data.group_by_length import length_groups
from adavtp.trainer.losses import full_budget_logits, recorded_scores, visual_relevance
from adavtp.trainer.trained_parts import choose_trained_parts
from counted_flops import ON_A_CPU, BytesAlive, storage_of, uneven_model
from tiny_families import stock_model, with_budget
from tiny_models import GATES, targets, tiny_batch

LLAMA = {
    "vocab_size": 67,
    "hidden_size": 40,
    "intermediate_size": 104,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
WHOLE = ["controller", "projector", "decoder"]
ALL_PARTS = [["controller"], ["projector"], ["vision"], ["decoder"], WHOLE]


def attention_and_back(_: Any, query: tuple, key: tuple, value: tuple, *__: Any, **___: Any) -> int:
    """Scores again, and the gradients of weights, values, queries and keys."""
    batch, heads, rows, width = query
    return batch * heads * 2 * rows * key[2] * (3 * width + 2 * value[3])


COUNTED = ON_A_CPU | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_and_back}


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=COUNTED)


def training_model(parts: list[str], checkpointing: bool = False, **fields: Any) -> AdaVTPForConditionalGeneration:
    """Every size another, ready to train the parts."""
    model = uneven_model(**fields).train()
    choose_trained_parts(model, parts)
    if checkpointing:
        model.activation_checkpointing_enable()
    return model


def seen_by_torch(model: AdaVTPForConditionalGeneration, batch: dict[str, torch.Tensor], **asked: Any) -> tuple:
    """FLOPs of a forward pass, and of the way back with all that runs again."""
    with counter() as flops:
        loss = model(**({"labels": targets(batch)} | batch), **asked).loss
        forward = flops.get_total_flops()
        loss.backward()
    return forward, flops.get_total_flops() - forward


def forward_and_back(counted: TrainingFlops) -> tuple[float, float]:
    forward = sum(part.forward for part in counted.parts.values())
    return forward, counted.total - forward


def step_of(parts: list[str], gates: str = "features", **others: Any) -> Step:
    return Step(parts, gates=gates, gates_fused=False, **others)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    ("gates", "parts"), [(gates, parts) for gates in GATES[:2] for parts in ALL_PARTS] + [(GATES[2], WHOLE)], ids=str
)
def test_every_choice_of_trained_parts_costs_what_torch_counts(
    gates: dict, parts: list[str], checkpointing: bool
) -> None:
    model = training_model(parts, checkpointing, **gates)
    batch, budget = tiny_batch(model.config, (1, 1), (6, 9)), [0.5, 0.7]
    step = step_of(parts, gates["gradient_gates"], checkpointing=checkpointing)
    counted = count_training_flops(model.config, [6, 9], step, token_budget=budget)
    assert forward_and_back(counted) == pytest.approx(seen_by_torch(model, batch, token_budget=budget), rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        # Whether the budget token makes the patches want a gradient.
        ({"budget_fusion": "post"}, ["controller"]),
        ({"budget_attention": "mutual"}, ["controller"]),
        ({"question_aware": False}, ["controller"]),
        ({"controller_head": "dot"}, ["controller"]),
        ({"controller_head": "budget_token", "controller_choice": "spread"}, ["controller"]),
        ({"controller_head": "patch"}, ["controller", "vision"]),
        ({"controller_head": "late_interaction"}, ["controller"]),
        ({"controller_head": "cross_attention", "budget_fusion": "post"}, ["controller", "vision"]),
        ({"controller_estimator": "differentiable_top_k"}, ["controller", "projector"]),
        ({"vision": "siglip"}, ["controller", "vision"]),
        ({"vision": "dinov2", "text": "qwen3"}, ["controller", "vision"]),
        ({"vision_feature_select_strategy": "full"}, ["controller", "vision"]),
        ({"vision_feature_layer": [-2, -4]}, ["controller", "vision"]),
    ],
    ids=str,
)
def test_every_kind_of_model_costs_what_torch_counts(fields: dict[str, Any], parts: list[str]) -> None:
    checkpointing = "vision" in parts
    model = training_model(parts, checkpointing, gradient_gates="features", **fields)
    counted = count_training_flops(model.config, [9], step_of(parts, checkpointing=checkpointing), token_budget=0.4)
    batch = tiny_batch(model.config, (1,), (9,))
    # Where a controller reads words, the count is of a prompt that does nothing but ask.
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    seen = seen_by_torch(model, batch, token_budget=0.4)
    assert forward_and_back(counted) == pytest.approx(seen, rel=1e-4)


@pytest.mark.parametrize("reducer", ["visionzip", "divprune", "tome", "fastv"])
def test_methods_without_weights_cost_what_torch_counts(reducer: str) -> None:
    model = training_model(["projector", "decoder"], reducer=reducer)
    counted = count_training_flops(model.config, [9], step_of(["projector", "decoder"]), token_budget=0.5)
    seen = seen_by_torch(model, tiny_batch(model.config, (1,), (9,)), token_budget=0.5)
    assert forward_and_back(counted) == pytest.approx(seen, rel=1e-2)


def test_each_part_costs_what_torch_counts_in_it() -> None:
    model = training_model(WHOLE, gradient_gates="features")
    num_keep, columns, width = 32, 9 + 32, 40
    question = torch.randn(1, width, requires_grad=True)
    sequence = torch.randn(1, columns, width, requires_grad=True)
    budget, pixels = torch.tensor([0.5]), torch.randn(1, 3, 32, 32)
    inner, seen = model.model, {}
    controller, decoder = inner.controller, inner.language_model
    budget_token = inner.budget_token(budget, question)
    image = VisionFeatures(torch.randn(1, 64, 32, requires_grad=True), torch.arange(64)[None], budget=budget_token)
    runs = {
        "projector": lambda: inner.multi_modal_projector(torch.randn(num_keep, 32, requires_grad=True)),
        "decoder": lambda: decoder(inputs_embeds=sequence).last_hidden_state,
        "head": lambda: model.lm_head(sequence),
        "token": lambda: inner.budget_token(budget, question),
        "controller": lambda: controller(replace(image, budget=budget_token.detach()), torch.tensor([32])).gates,
        "tower": lambda: (
            encode_image(inner.vision_tower, pixels, model.config, inner.budget_token, budget, question).patches
        ),
    }
    for part, run in runs.items():
        with counter() as flops:
            run().sum().backward()
        seen[part] = flops.get_total_flops()
    # The tower's run makes the budget token on its way.
    seen["vision"] = seen.pop("tower") - seen["token"]
    seen["reducer"] = seen.pop("token") + seen.pop("controller")
    step = step_of(WHOLE)
    counted = count_training_flops(model.config, [9], step, token_budget=0.5)
    assert {part: of.total for part, of in counted.parts.items()} == pytest.approx(seen, rel=1e-3)


@pytest.mark.parametrize(("images", "text"), [((0, 0), (9, 9)), ((2, 0, 1), (9, 30, 7))], ids=["none", "several"])
@pytest.mark.parametrize("gates", ["attention", "features"])
def test_prompts_with_several_images_and_with_none_cost_what_torch_counts(
    gates: str, images: tuple[int, ...], text: tuple[int, ...]
) -> None:
    model, budgets = training_model(WHOLE, gradient_gates=gates), [0.5, 0.4, 0.7][: len(text)]
    counted = count_training_flops(model.config, text, step_of(WHOLE, gates), token_budget=budgets, num_images=images)
    seen = seen_by_torch(model, tiny_batch(model.config, images, text), token_budget=budgets)
    assert forward_and_back(counted) == pytest.approx(seen, rel=1e-2)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("others", [[], ["controller", "projector"]], ids=["alone", "with others"])
def test_adapters_cost_what_torch_counts(others: list[str], checkpointing: bool) -> None:
    peft = pytest.importorskip("peft")
    model = training_model(others or ["projector"], gradient_gates="features")
    model.requires_grad_(False) if not others else None
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    maps = r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=maps))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name or name.removeprefix("base_model.model.") in kept)
    if checkpointing:
        model.activation_checkpointing_enable()
    step = Step([*others, "decoder"], lora_rank=3, checkpointing=checkpointing)
    counted = count_training_flops(model.config, [9], step, token_budget=0.4)
    seen = seen_by_torch(adapted, tiny_batch(model.config, (1,), (9,)), token_budget=0.4)
    assert forward_and_back(counted) == pytest.approx(seen, rel=1e-2)


def test_relevance_alone_is_on_the_way_back_through_the_scores() -> None:
    model = training_model(["controller"], gradient_gates="features")
    batch = tiny_batch(model.config, (1,), (9,))
    # No text of it is an answer.
    labels = torch.full_like(batch["input_ids"], -100)
    with recorded_scores(model.model.controller) as scores, counter() as flops:
        model(**batch, labels=labels, token_budget=0.5)
        forward = flops.get_total_flops()
        scores[0][1].sum().backward()
    seen = forward, flops.get_total_flops() - forward
    step = step_of(["controller"], losses=("relevance",))
    parts = dict(count_training_flops(model.config, [9], step, token_budget=0.5).parts)
    del parts["full_budget"]
    assert parts["decoder"].backward == parts["projector"].backward == 0 < parts["reducer"].backward
    assert forward_and_back(TrainingFlops(parts)) == pytest.approx(seen, rel=1e-4)


def test_passes_at_full_budget_cost_what_torch_counts() -> None:
    model = training_model(WHOLE, gradient_gates="features")
    batch = tiny_batch(model.config, (1,), (9,))
    inputs = batch | {"labels": targets(batch)}
    for loss, run in (("distillation", full_budget_logits), ("relevance", visual_relevance)):
        with counter() as flops:
            run(model, inputs)
        step = step_of(WHOLE, losses=("lm", loss))
        counted = count_training_flops(model.config, [9], step, token_budget=0.5)
        assert counted.parts["full_budget"].total == pytest.approx(flops.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_plain_llava_costs_what_torch_counts(checkpointing: bool) -> None:
    config = uneven_model().config
    plain = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=config.image_token_id,
            image_seq_length=config.image_seq_length,
        )
    ).train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    if checkpointing:
        plain.activation_checkpointing_enable()
    batch = tiny_batch(config, (1, 1), (9, 9))
    step = Step(["projector", "decoder"], checkpointing=checkpointing)
    counted = plain_training_flops(config, [9, 9], step)
    assert forward_and_back(counted) == pytest.approx(seen_by_torch(plain, batch), rel=1e-2)


# Height and width in pixels of an image of each family: several tiles, or several windows.
FAMILY_SIZES = {"qwen2_5_vl": (24, 32), "llava_onevision": (48, 40), "internvl": (48, 96)}
EVERY_PART = ["controller", "projector", "vision", "decoder"]


def family_to_train(
    name: str, parts: list[str], checkpointing: bool = False, text_tokens: int = 9
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A family's tiny model in float32 that is ready to train the parts, and a prompt with its targets."""
    model = with_budget(name).float().train()
    choose_trained_parts(model, parts)
    if checkpointing:
        model.activation_checkpointing_enable()
    inputs = family_prompt(model, looks_of(model, [FAMILY_SIZES[name]]), text_tokens)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    return model, inputs | {"labels": labels, "token_budget": 0.5}


@pytest.mark.parametrize(
    ("parts", "checkpointing"),
    [(["controller"], False), (EVERY_PART, True)],
    ids=["controller", "whole, checkpointed"],
)
@pytest.mark.parametrize("name", FAMILY_SIZES)
def test_a_step_of_a_family_costs_what_torch_counts(name: str, parts: list[str], checkpointing: bool) -> None:
    model, inputs = family_to_train(name, parts, checkpointing)
    step = step_of(parts, checkpointing=checkpointing)
    size = FAMILY_SIZES[name]
    counted = count_training_flops(model.config, [9], step, token_budget=0.5, image_size=size)
    with counter() as flops:
        loss = model(**inputs).loss
        forward = flops.get_total_flops()
        loss.backward()
    assert forward_and_back(counted) == pytest.approx((forward, flops.get_total_flops() - forward), rel=1e-2)


def test_the_plain_model_of_a_family_costs_what_torch_counts() -> None:
    plain = deepcopy(stock_model("qwen2_5_vl")).float().train()
    _, inputs = family_to_train("qwen2_5_vl", EVERY_PART)
    del inputs["token_budget"]
    with counter() as flops:
        plain(**inputs).loss.backward()
    size = FAMILY_SIZES["qwen2_5_vl"]
    counted = plain_training_flops(with_budget("qwen2_5_vl").config, [9], step_of(EVERY_PART), size)
    assert counted.total == pytest.approx(flops.get_total_flops(), rel=1e-2)


def test_budgets_are_averaged_as_they_are_drawn() -> None:
    low, high, patches = 0.2, 0.9, 64
    generator = torch.Generator().manual_seed(0)
    for draws in (1, 4):
        budgets = low + (high - low) * torch.rand(200_000, draws, generator=generator, dtype=torch.float64)
        drawn = (budgets * patches).floor().long().amax(dim=1).bincount(minlength=patches + 1) / len(budgets)
        exact = torch.zeros(patches + 1).double()
        for count in longest_counts((low, high), [patches], draws):
            exact[count.keep] = count.probability
        assert exact.sum() == pytest.approx(1.0)
        assert (exact - drawn).abs().max() < 3e-3
    assert list(longest_counts((0.4, 0.4), [100])) == [(40, 1.0, 0.4)]
    with pytest.raises(ValueError, match="`budget_range` is"):
        list(longest_counts((0.9, 0.2), [100]))


def test_a_batch_with_a_budget_for_each_sample_is_as_long_as_its_longest() -> None:
    config, step = uneven_model().config, step_of(WHOLE)
    per_batch, per_sample, full = (
        mean_training_flops(config, 9, step, budgets, per=per, rows=4).parts["decoder"].total
        for budgets, per in (((0.2, 1.0), "batch"), ((0.2, 1.0), "sample"), ((1.0, 1.0), "batch"))
    )
    assert per_batch < per_sample < full
    with pytest.raises(ValueError, match="`per` is 'token'"):
        mean_training_flops(config, 9, step, (0.2, 1.0), per="token")


def test_grouping_by_length_nearly_makes_up_for_a_budget_for_each_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    text = (200 * torch.exp(0.6 * torch.randn(2048, generator=generator))).round()
    tokens = text + ((0.2 + 0.8 * torch.rand(2048, generator=generator)) * 576).floor()
    groups = torch.tensor(length_groups(tokens.long().expand(256, -1), 8, generator))
    as_they_come = tokens.view(-1, 8).amax(dim=1).mean()
    assert tokens[groups].amax(dim=1).mean() < 1.05 * tokens.mean()
    assert as_they_come > 1.3 * tokens.mean()


# ---------------------------------------------------------------- memory


def bytes_saved(run: Any, parameters: Any) -> int:
    """What autograd keeps while `run` runs, each storage once, parameters not among them."""
    own, kept = {storage_of(parameter) for parameter in parameters}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if storage_of(tensor) not in own:
            kept[storage_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    del result
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("dtype", "padded"), [(torch.float32, False), (torch.bfloat16, True)], ids=["equal", "padded, in half precision"]
)
@pytest.mark.parametrize("parts", ALL_PARTS, ids="+".join)
def test_activations_are_what_autograd_saves(parts: list[str], dtype: torch.dtype, padded: bool) -> None:
    model = training_model(parts, gradient_gates="features").to(dtype)
    batch = tiny_batch(model.config, (1, 1), (40, 35 if padded else 40))
    inputs = batch | {"labels": targets(batch), "pixel_values": batch["pixel_values"].to(dtype)}
    saved = bytes_saved(lambda: model(**inputs, token_budget=0.5).loss, model.parameters())
    sizes = {"rows": 2, "text_tokens": 40, "token_budget": 0.5, "padded": padded, "dtype": dtype}
    counted = activations(model.config, Step(parts), **sizes)
    # Of the logits only the log-probabilities are saved.
    log_probabilities = 4 * 2 * 72 * 67
    counted["logits or a layer"] = log_probabilities
    assert sum(counted.values()) == pytest.approx(saved, rel=0.06)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("parts", [["projector"], ["controller"], WHOLE], ids="+".join)
def test_the_worst_moment_is_what_torch_allocates(parts: list[str], checkpointing: bool) -> None:
    model = training_model(parts, checkpointing, gradient_gates="features").to(torch.bfloat16)
    batch = tiny_batch(model.config, (1,) * 8, (100,) * 8)
    inputs = batch | {"labels": targets(batch), "pixel_values": batch["pixel_values"].bfloat16()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with BytesAlive() as alive:
        model(**inputs, token_budget=0.5).loss.backward()
    step = Step(parts, checkpointing=checkpointing)
    counted = activations(model.config, step, rows=8, text_tokens=100, token_budget=0.5, padded=False)
    assert sum(counted.values()) == pytest.approx(alive.peak, rel=0.1)


def test_logits_take_what_torch_allocates_for_them() -> None:
    positions, vocab_size = 512, 997
    head, hidden = torch.nn.Linear(40, vocab_size, bias=False).bfloat16(), torch.randn(1, positions, 40).bfloat16()
    labels = torch.randint(0, vocab_size, (1, positions))

    def loss() -> torch.Tensor:
        return ForCausalLMLoss(head(hidden), labels, vocab_size)

    with BytesAlive() as alive:
        loss().backward()
    assert alive.peak == pytest.approx(LOGIT_BYTES * positions * vocab_size, rel=0.05)


@pytest.mark.parametrize("vision", ["siglip", "dinov2"])
def test_activations_of_other_towers_are_what_autograd_saves(vision: str) -> None:
    model = training_model(["vision"], vision=vision, gradient_gates="features")
    batch = tiny_batch(model.config, (1,), (40,))
    inputs = batch | {"labels": targets(batch)}
    saved = bytes_saved(lambda: model(**inputs, token_budget=0.5).logits, model.parameters())
    sizes = {"rows": 1, "text_tokens": 40, "token_budget": 0.5, "dtype": torch.float32}
    counted = activations(model.config, Step(["vision"]), **sizes)
    del counted["logits or a layer"]
    assert sum(counted.values()) == pytest.approx(saved, rel=0.02)


def test_adapters_keep_what_autograd_saves() -> None:
    peft = pytest.importorskip("peft")
    model = training_model(["projector"], gradient_gates="features").bfloat16()
    maps = r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj"
    adapters = peft.LoraConfig(r=3, target_modules=maps, lora_dropout=0.05)
    adapted = peft.get_peft_model(model, adapters, autocast_adapter_dtype=False).train()
    batch = tiny_batch(model.config, (1,), (40,))
    inputs = batch | {"labels": targets(batch), "pixel_values": batch["pixel_values"].bfloat16()}
    saved = bytes_saved(lambda: adapted(**inputs, token_budget=0.5).logits, adapted.parameters())
    counted = activations(model.config, Step(["decoder"], lora_rank=3), rows=1, text_tokens=40, token_budget=0.5)
    del counted["logits or a layer"]
    # A GPU keeps dropout's masks in bytes, a CPU in numbers of the input's kind.
    masks = 8 * 72 * (5 * 40 + 48 + 104)
    assert sum(counted.values()) + masks == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("name", FAMILY_SIZES)
def test_activations_of_a_family_are_what_autograd_saves(name: str) -> None:
    for parts in (EVERY_PART, ["projector"]):
        model, inputs = family_to_train(name, parts, text_tokens=40)
        saved = bytes_saved(lambda: model(**inputs).logits, model.parameters())  # noqa: B023
        sizes = {"rows": 1, "text_tokens": 40, "token_budget": 0.5, "image_size": FAMILY_SIZES[name]}
        counted = activations(model.config, Step(parts), dtype=torch.float32, **sizes)
        # Of the logits only the log-probabilities are saved.
        counted["logits or a layer"] = 4 * model(**inputs).logits.numel()
        assert sum(counted.values()) == pytest.approx(saved, rel=0.06)


def test_the_worst_moment_of_a_family_is_what_torch_allocates() -> None:
    model, inputs = family_to_train("qwen2_5_vl", EVERY_PART, text_tokens=400)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with BytesAlive() as alive:
        model(**inputs).loss.backward()
    sizes = {"rows": 1, "text_tokens": 400, "token_budget": 0.5, "image_size": FAMILY_SIZES["qwen2_5_vl"]}
    counted = activations(model.config, Step(EVERY_PART), dtype=torch.float32, **sizes)
    assert sum(counted.values()) == pytest.approx(alive.peak, rel=0.1)


@pytest.mark.parametrize("parts", [["controller"], ["projector", "decoder"]], ids="+".join)
def test_where_products_cast_their_inputs_those_are_saved_too(parts: list[str]) -> None:
    model = training_model(parts, gradient_gates="features")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16() if not parameter.requires_grad else parameter.data
    batch = tiny_batch(model.config, (1,), (100,))
    inputs = batch | {"labels": targets(batch)}
    with torch.autocast("cpu", torch.bfloat16):
        saved = bytes_saved(lambda: model(**inputs, token_budget=0.5).logits, model.parameters())
    # The copies of the weights are counted with the weights.
    maps = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    copies = 2 * sum(weight.numel() for weight in maps if weight.requires_grad)
    sizes = {"rows": 1, "text_tokens": 100, "token_budget": 0.5}
    counted = activations(model.config, Step(parts), autocast=True, **sizes)
    del counted["logits or a layer"]
    assert sum(counted.values()) + copies == pytest.approx(saved, rel=0.06)


@pytest.mark.parametrize("name", FAMILY_SIZES)
def test_parameters_of_a_family_are_counted_by_what_trains(name: str) -> None:
    for parts in (["controller"], ["vision"], ["projector", "decoder"]):
        model, _ = family_to_train(name, parts)
        weights = Weights.of(model.config, Step(parts))
        assert weights.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        assert weights.trained + weights.frozen == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("parts", ALL_PARTS, ids="+".join)
def test_parameters_are_counted_by_what_trains(parts: list[str]) -> None:
    model = training_model(parts, vision="clip")
    weights = Weights.of(model.config, Step(parts))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert weights.trained == sum(parameter.numel() for parameter in trained)
    assert weights.trained + weights.frozen == sum(parameter.numel() for parameter in model.parameters())
    kept = kept_by_weights(weights, Layout("ddp", 1))
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert kept["optimizer"] == sum(moment.nbytes for moment in moments)
    assert kept["gradients"] == sum(parameter.grad.nbytes for parameter in trained)


def test_adapters_and_four_bits_weigh_what_their_libraries_make() -> None:
    peft = pytest.importorskip("peft")
    model = uneven_model()
    maps = r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=maps))
    adapters = sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name)
    weights = Weights.of(model.config, Step(["decoder"], lora_rank=3))
    assert weights.trained == adapters
    functional = pytest.importorskip("bitsandbytes.functional")
    quantized, state = functional.quantize_4bit(torch.randn(1024, 512), quant_type="nf4", compress_statistics=True)
    blocks = [quantized, state.absmax, state.state2.absmax]
    assert pytest.approx(sum(tensor.nbytes for tensor in blocks), rel=1e-3) == NF4_BYTES * 1024 * 512


def test_spread_over_gpus_a_model_takes_its_share_of_each() -> None:
    weights = Weights(trained=8_000_000_000, frozen=800_000_000, quantized=0, layer=200_000_000, head=130_000_000)
    states = ("weights", "gradients", "optimizer")
    # Sixteen bytes for a trained parameter and two for a frozen one, wherever they are.
    whole = 16 * 8.0 + 2 * 0.8
    for strategy, on_each in (("zero3", whole / 8), ("fsdp2", whole / 8), ("zero2", 2 * 8.8 + 14 * 8.0 / 8)):
        kept = kept_by_weights(weights, Layout(strategy, 8))
        assert sum(kept[name] for name in states) / 1e9 == pytest.approx(on_each)
    assert sum(kept_by_weights(weights, Layout("ddp", 8))[name] for name in states) / 1e9 == pytest.approx(whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Step(["head"]), "`train_parts` is"),
        (lambda: Step(["controller"], lora_rank=4), "`lora_rank` is 4"),
        (lambda: Step(["decoder"], losses=("guess",)), "`losses` is"),
        (lambda: Layout("zero1", 8), "`strategy` is 'zero1'"),
        (lambda: Layout("ddp", 0), "`gpus` is 0"),
        (lambda: Weights.of(uneven_model().config, Step(["decoder"]), quantize=True), "`quantize` is True"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
