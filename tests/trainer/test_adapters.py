"""What adapters promise: they and the small parts train and are saved, and the weights under them stay as they are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from adavtp import (
    AdaVTPForConditionalGeneration,
    AdaVTPProcessor,
    BudgetCollator,
    Selection,
    TokenReducer,
    VisionFeatures,
    register_reducer,
)
from adavtp.modeling.budget.top_k import sample_top_k, top_k_mask
from adavtp.modeling.reducers.adaptive import VisionTokenController
from adavtp.modeling.reducers.base import REDUCERS
from adavtp.trainer.adapter_folders import load_adapter, merge_adapter
from adavtp.trainer.adapters import add_adapters, quantization
from adavtp.trainer.recipes.recipe import Recipe, Stage
from adavtp.trainer.recipes.run import FINISHED, run_recipe
from adavtp.trainer.recipes.starting_model import whole_checkpoint
from adavtp.trainer.trained_parts import choose_trained_parts
from tiny_adapters import (
    MIXED,
    PARTS,
    adapted_model,
    adapter_trainer,
    base_checkpoint,
    trained_adapter,
)
from tiny_conversations import conversation_rows, digit_model, digit_processor, picture
from tiny_trainers import weights_of

QUESTION = "which digit is red ?"
WHOLE = ("model.budget_token.", "model.controller.", "model.multi_modal_projector.")
# A key's bias adds the same to all scores of a query, the last bias of the controller to those of all patches.
WITHOUT_EFFECT = ("controller.score.bias",)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    """A model with adapters after two steps, and the folder where they are saved."""
    folder = tmp_path_factory.mktemp("adapter")
    return trained_adapter(folder, base), folder


def weights_under(model: PeftModel) -> dict[str, torch.Tensor]:
    """The base's weights inside a model with adapters, by the names that they have in the base."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def inputs() -> dict[str, torch.Tensor]:
    """Three prompts, of which one is text and one has two images."""
    batch = BudgetCollator(digit_processor(), (0.5, 0.5))(conversation_rows(3, MIXED))
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@torch.no_grad()
def logits(model: nn.Module, **choice: Any) -> torch.Tensor:
    return model.eval()(**inputs(), **choice).logits


# What trains


def test_adapters_train_and_the_weights_under_them_do_not(base: Path, trained: tuple[PeftModel, Path]) -> None:
    model, before = trained[0], load_file(base / "model.safetensors")
    under = weights_under(model)
    assert under.keys() == before.keys()
    assert all(torch.equal(under[name], before[name]) for name in before)
    for name, value in model.state_dict().items():
        if ".lora_B." in name:
            assert value.abs().max() > 0, f"{name} starts at 0 and is to learn"
        if ".modules_to_save." in name and not name.endswith(WITHOUT_EFFECT):
            own = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
            assert own.endswith(WITHOUT_EFFECT) or not torch.equal(value, before[own]), name


def test_the_file_has_exactly_the_adapters_and_the_parts_that_train_whole(
    base: Path, trained: tuple[PeftModel, Path]
) -> None:
    before, saved = load_file(base / "model.safetensors"), load_file(trained[1] / "adapter_model.safetensors")
    expected = {}
    for name, value in before.items():
        if name.startswith(WHOLE):
            expected[name] = tuple(value.shape)
        elif name.startswith("model.language_model.layers.") and value.dim() == 2:
            layer = name.removesuffix(".weight")
            expected |= {f"{layer}.lora_A.weight": (4, value.shape[1]), f"{layer}.lora_B.weight": (value.shape[0], 4)}
    assert {name.removeprefix("base_model.model."): tuple(v.shape) for name, v in saved.items()} == expected
    assert len(expected) > 2 * 7 * 2


@pytest.mark.parametrize("vision", ["clip", "dinov2"])
def test_a_tower_that_trains_gets_adapters_in_the_layers_that_run(vision: str) -> None:
    model = add_adapters(digit_model(digit_processor(), vision=vision), ["vision"], target_modules=None)
    choose_trained_parts(model, ["vision"])
    names = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names and all("vision_tower.encoder." in name for name in names)
    # Three layers, of which the features are those behind the second.
    layers = {name.partition("encoder.")[2].split(".")[1] for name in names}
    assert layers == {"0", "1"}
    per_layer = {"clip": 6, "dinov2": 6}[vision]
    assert len(names) == 2 * 2 * per_layer


def test_only_the_layers_that_are_named_get_adapters() -> None:
    model = add_adapters(digit_model(digit_processor()), ["decoder"], target_modules=["q_proj", "v_proj"])
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert {name.removeprefix("base_model.model.model.language_model.layers.") for name in adapted} == {
        f"{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"train_parts": ["controller"]}, "train_parts"),
        ({"train_parts": ["decoder", "head"]}, "train_parts"),
        ({"train_parts": ["decoder"], "r": 0}, "`r` is 0"),
        ({"train_parts": ["decoder"], "lora_dropout": 1.0}, "lora_dropout"),
        ({"train_parts": ["decoder"], "target_modules": ["query"]}, "target_modules.*q_proj"),
    ],
)
def test_adapters_that_cannot_be_are_errors(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        add_adapters(digit_model(digit_processor()), **arguments)


def test_reducers_stay_what_they_are_to_the_model(trained: tuple[PeftModel, Path]) -> None:
    controller = trained[0].get_base_model().model.controller
    assert type(controller) is VisionTokenController and controller.config is trained[0].get_base_model().config


def test_a_part_that_one_reducer_leaves_idle_trains_again_with_the_next(base: Path) -> None:
    model = adapted_model(base)
    copies = [p for name, p in model.named_parameters() if "controller" in name and ".modules_to_save." in name]
    model.set_reducer("random")
    choose_trained_parts(model, PARTS)
    assert copies and not any(p.requires_grad for p in copies)
    model.set_reducer("adaptive")
    choose_trained_parts(model, PARTS)
    assert all(p.requires_grad for p in copies)


def test_a_part_that_could_not_train_under_the_adapters_is_an_error(base: Path, trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'controller'.*modules_to_save"):
        adapter_trainer(tmp_path, adapted_model(base, ["projector", "decoder"]))
    frozen = PeftModel.from_pretrained(AdaVTPForConditionalGeneration.from_pretrained(base), trained[1])
    with pytest.raises(ValueError, match="is_trainable=True"):
        adapter_trainer(tmp_path, frozen)


# How it trains


@pytest.mark.parametrize("images_per_row", [(1,), (0,)], ids=["images", "text alone"])
@pytest.mark.parametrize("output", ["gather", "mask"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_reach_every_adapter_of_the_decoder_through_checkpointed_layers(
    base: Path, images_per_row: tuple[int, ...], output: str, reentrant: bool
) -> None:
    model = adapted_model(base, ["decoder"]).train()
    choose_trained_parts(model, ["decoder"])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batch = BudgetCollator(digit_processor(), (0.5, 0.5))(conversation_rows(2, images_per_row))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, selection_output=output).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".lora_B." in name}
    assert len(gradients) == 14
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


def test_checkpointing_gives_the_same_adapters(base: Path, tmp_path: Path) -> None:
    weights = []
    for checkpointing in (False, True):
        step = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "gradient_checkpointing": checkpointing}
        trainer = adapter_trainer(tmp_path, adapted_model(base), **step)
        before = weights_of(trainer.model)
        trainer.train()
        weights.append(weights_of(trainer.model))
        assert any(not torch.equal(value, before[name]) for name, value in weights[-1].items() if ".lora_B." in name)
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-5), name


def test_an_untrained_adapter_is_taught_what_its_base_is_taught(base: Path, tmp_path: Path) -> None:
    """B starts as 0: the first step's losses, the teacher's among them, are those of the model without adapters."""
    losses = []
    for model in (AdaVTPForConditionalGeneration.from_pretrained(base), adapted_model(base, lora_dropout=0.0)):
        weights = {"lm": 1.0, "distillation": 1.0, "relevance": 1.0}
        trainer = adapter_trainer(tmp_path, model, max_steps=1, loss_weights=weights)
        trainer.data_collator.budgets.budget_range = (0.3, 0.3)
        trainer.train_dataset = conversation_rows(2)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_trains_beside_half_precision_weights_is_in_float32(tmp_path: Path) -> None:
    base = base_checkpoint(tmp_path / "base", torch.bfloat16)
    model = adapted_model(base)
    untrained = AdaVTPForConditionalGeneration.from_pretrained(base)
    # Of all tokens, since which of some are kept may depend on the rounding; and without autocast, as in `generate`.
    expected = logits(untrained, token_budget=1.0).float()
    assert torch.allclose(logits(model, token_budget=1.0).float(), expected, atol=0.05 * float(expected.abs().max()))
    trainer = adapter_trainer(tmp_path / "run", model, bf16=True, learning_rate=1e-4)
    precisions = {p.requires_grad: p.dtype for p in model.parameters()}
    assert precisions == {True: torch.float32, False: torch.bfloat16}
    copies = {n: p.detach().clone() for n, p in model.named_parameters() if "controller.score.modules_to_save" in n}
    trainer.train()
    # Steps of 1e-4 that weights of bfloat16 would not have taken.
    for name, before in copies.items():
        after = model.state_dict()[name]
        assert name.endswith("bias") or not torch.equal(after, before)
        assert (after - before).abs().max() < 1e-3
    answer = model.eval().generate(picture(0), QUESTION, token_budget=0.4, max_new_tokens=4)
    assert isinstance(answer, str)
    trainer.save_model(str(tmp_path / "adapter"))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}


def test_a_resumed_run_ends_where_one_without_a_break_ends(base: Path, tmp_path: Path) -> None:
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = adapter_trainer(tmp_path / "whole", adapted_model(base), **fields)
    whole.train()
    torch.manual_seed(99)
    model = add_adapters(AdaVTPForConditionalGeneration.from_pretrained(base), PARTS, r=4, lora_alpha=8)
    resumed = adapter_trainer(tmp_path / "resumed", model, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = weights_of(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(resumed.model).items())
    assert [e["loss"] for e in resumed.state.log_history if "loss" in e] == [
        e["loss"] for e in whole.state.log_history if "loss" in e
    ]


def test_evaluation_and_prediction_are_those_of_the_merged_model(
    trained: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    merged = AutoModel.from_pretrained(merge_adapter(trained[1], tmp_path / "merged"))
    measured = []
    for model in (trained[0], merged):
        trainer = adapter_trainer(tmp_path, model, eval_budgets=[1.0, 0.4])
        metrics = trainer.evaluate() | trainer.predict(conversation_rows(3)).metrics
        measured.append([metrics[name] for name in ("eval_loss_b1.0", "eval_loss_b0.4", "test_loss")])
    assert measured[0] == pytest.approx(measured[1], abs=1e-5)
    assert len(set(measured[0])) == 3


# What is left of it


@pytest.mark.parametrize(
    "reducer", ["adaptive", "visionzip", "tome", "fastv", "sparsevlm", ["tome", "adaptive", "fastv"]]
)
def test_the_merged_model_s_logits_are_the_adapted_one_s(
    trained: tuple[PeftModel, Path], merged: AdaVTPForConditionalGeneration, base: Path, reducer: Any
) -> None:
    for budget in (1.0, 0.7, [0.5, 0.8, 1.0]):
        choice = {"token_budget": budget, "reducer": reducer}
        expected = logits(trained[0], **choice)
        assert torch.allclose(logits(merged, **choice), expected, atol=1e-5)
    untrained = AdaVTPForConditionalGeneration.from_pretrained(base)
    assert not torch.allclose(logits(untrained, **choice), expected, atol=0.1)


@pytest.fixture(scope="module")
def merged(
    trained: tuple[PeftModel, Path], tmp_path_factory: pytest.TempPathFactory
) -> AdaVTPForConditionalGeneration:
    folder = tmp_path_factory.mktemp("merged")
    return AdaVTPForConditionalGeneration.from_pretrained(merge_adapter(trained[1], folder / "merged"))


def test_a_merged_weight_is_the_base_s_and_the_scaled_product(
    base: Path, trained: tuple[PeftModel, Path], merged: AdaVTPForConditionalGeneration
) -> None:
    before, adapter = load_file(base / "model.safetensors"), load_file(trained[1] / "adapter_model.safetensors")
    for name, value in merged.state_dict().items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        expected = adapter.get(f"base_model.model.{name}", before[name])
        if f"{layer}.lora_A.weight" in adapter:
            expected = before[name] + 8 / 4 * adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
        assert torch.allclose(value, expected, atol=1e-6), name


def test_a_base_with_its_adapter_is_the_model_that_was_trained(base: Path, trained: tuple[PeftModel, Path]) -> None:
    model, folder = trained
    loaded = {
        "ours": load_adapter(folder),
        "PEFT's": PeftModel.from_pretrained(AdaVTPForConditionalGeneration.from_pretrained(base), folder),
        "transformers'": AutoModel.from_pretrained(folder),
    }
    expected = logits(model, token_budget=0.4)
    for name, other in loaded.items():
        assert torch.equal(logits(other, token_budget=0.4), expected), name


def test_a_model_with_adapters_answers_at_a_budget(
    trained: tuple[PeftModel, Path], merged: AdaVTPForConditionalGeneration
) -> None:
    for budget in (0.2, 0.8):
        choice = {"token_budget": budget, "max_new_tokens": 6}
        answer = trained[0].generate(picture(0), QUESTION, **choice)
        assert answer and answer == merged.generate(picture(0), QUESTION, **choice)


def test_the_folder_says_what_it_is_for_without_naming_this_machine_s_paths_on_its_card(
    base: Path, trained: tuple[PeftModel, Path]
) -> None:
    folder = trained[1]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert str(base.parent) not in (folder / "README.md").read_text()
    assert isinstance(AdaVTPProcessor.from_pretrained(folder), AdaVTPProcessor)
    # By that name transformers would take the folder for a whole checkpoint.
    assert not (folder / "config.json").exists()


def test_a_repository_stays_on_the_card(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = adapted_model(base)
    model.peft_config["default"].base_model_name_or_path = "somebody/some-model"
    model.config._name_or_path = "somebody/some-model"
    adapter_trainer(tmp_path / "run", model).save_model(str(tmp_path))
    assert "base_model: somebody/some-model" in (tmp_path / "README.md").read_text()


# With other parts of the package, and of others


@pytest.fixture
def registry() -> Iterator[None]:
    """What a test registers is gone behind it."""
    before = dict(REDUCERS)
    yield
    REDUCERS.clear()
    REDUCERS.update(before)


class Scaled(TokenReducer):
    """A user's reducer, with a weight that belongs to no module inside it."""

    trained = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.arange(float(config.vision_config.hidden_size)))

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        scores = (features.patches * self.weight).mean(dim=-1)
        if not self.training:
            return Selection.from_keep(top_k_mask(scores, num_keep))
        return Selection.from_keep(*sample_top_k(scores, num_keep, 1.0, training=True))


def test_reducers_that_train_go_with_the_adapter(base: Path, tmp_path: Path, registry: None) -> None:
    register_reducer("scaled")(Scaled)
    for name in ("resampler", "scaled"):
        model = AdaVTPForConditionalGeneration.from_pretrained(base)
        model.set_reducer(name)
        model = add_adapters(model, PARTS, r=4)
        folder = tmp_path / name
        trainer = adapter_trainer(folder / "run", model)
        trainer.train()
        trainer.save_model(str(folder))
        merged = AdaVTPForConditionalGeneration.from_pretrained(merge_adapter(folder, tmp_path / f"merged {name}"))
        saved = load_file(folder / "adapter_model.safetensors")
        (weight,) = [key for key in saved if key.endswith((f"{name}.weight", "queries.weight"))]
        assert not torch.equal(saved[weight], model.state_dict()[weight.replace(".weight", ".original_module.weight")])
        assert merged.config.reducer == name
        assert torch.allclose(logits(merged, token_budget=0.4), logits(model, token_budget=0.4), atol=1e-5)
    assert isinstance(merged.model.reducers["scaled"], TokenReducer)
    assert "class Scaled(TokenReducer)" in (folder / "adavtp_code/reducers_custom.py").read_text()


def test_a_model_that_peft_adapted_by_itself_trains(base: Path, tmp_path: Path) -> None:
    # PEFT goes by the ends of names, so the tower gets adapters too; its last layer never runs.
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["controller", "multi_modal_projector"]
    )
    model = get_peft_model(AdaVTPForConditionalGeneration.from_pretrained(base), config)
    trainer = adapter_trainer(tmp_path / "run", model, train_parts=PARTS)
    idle = [p for name, p in model.named_parameters() if "encoder.layers.2." in name and ".lora_" in name]
    assert idle and not any(parameter.requires_grad for parameter in idle)
    before = load_file(base / "model.safetensors")
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights_under(model).items())
    learned = {name for name, value in model.state_dict().items() if ".lora_B." in name and value.abs().max() > 0}
    assert {name.split(".layers.")[0].rpartition(".model.")[2] for name in learned} == {
        "language_model",
        "vision_tower.encoder",
    }
    trainer.save_model(str(tmp_path / "adapter"))
    merged = AdaVTPForConditionalGeneration.from_pretrained(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    for budget in (1.0, 0.4):
        assert torch.allclose(logits(merged, token_budget=budget), logits(model, token_budget=budget), atol=1e-5)


# Four bits


def quantized(base: Path, dtype: torch.dtype = torch.float32) -> AdaVTPForConditionalGeneration:
    pytest.importorskip("bitsandbytes")
    return AdaVTPForConditionalGeneration.from_pretrained(
        base, quantization_config=quantization("nf4", dtype), dtype=torch.float32
    )


def test_adapters_train_over_four_bits_and_are_merged_into_the_precision_of_the_base(tmp_path: Path) -> None:
    base = base_checkpoint(tmp_path / "base", torch.bfloat16)
    model = quantized(base)
    in_four_bits = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert in_four_bits == {
        name.removesuffix(".weight")
        for name, value in load_file(base / "model.safetensors").items()
        if name.startswith("model.language_model.layers.") and value.dim() == 2
    }
    others = [p.dtype for name, p in model.named_parameters() if name.removesuffix(".weight") not in in_four_bits]
    assert set(others) == {torch.float32}
    model = add_adapters(model, PARTS, r=4, lora_alpha=8)
    before = {name: module.weight.clone() for name, module in model.named_modules() if name.endswith("base_layer")}
    trainer = adapter_trainer(tmp_path / "run", model, max_steps=6, gradient_checkpointing=True)
    trainer.train_dataset = conversation_rows(2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert before and all(torch.equal(model.get_submodule(name).weight, value) for name, value in before.items())
    assert isinstance(model.eval().generate(picture(0), QUESTION, token_budget=0.4, max_new_tokens=4), str)

    trainer.save_model(str(tmp_path / "adapter"))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    stored, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj"
    product = 2 * adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
    expected = stored[f"{name}.weight"].float() + product
    assert torch.allclose(merged[f"{name}.weight"].float(), expected, rtol=1e-2, atol=1e-2)
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_four_bits_answer_nearly_as_all_of_them_do(base: Path) -> None:
    expected = logits(AdaVTPForConditionalGeneration.from_pretrained(base), token_budget=0.4).flatten()
    four = logits(add_adapters(quantized(base), ["decoder"]), token_budget=0.4).flatten()
    assert torch.corrcoef(torch.stack([expected, four]))[0, 1] > 0.8
    assert not torch.allclose(expected, four, atol=1e-3)


def test_a_reducer_that_is_chosen_over_four_bits_is_not_in_four_bits(base: Path) -> None:
    model = quantized(base)
    model.set_reducer("resampler")
    assert {parameter.dtype for parameter in model.model.reducers.parameters()} == {torch.float32}


def test_gradients_over_four_bits_are_the_same_after_an_evaluation(base: Path) -> None:
    model = add_adapters(quantized(base), ["decoder"], lora_dropout=0.0)
    batch = BudgetCollator(digit_processor(), (0.5, 0.5))(conversation_rows(2))
    gradients = []
    for _ in range(2):
        model.train().zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if ".lora_B." in name})
        assert all(gradient.abs().max() > 0 for gradient in gradients[-1].values())
        logits(model, token_budget=0.5)
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_quantizations_that_are_not_known_are_errors() -> None:
    with pytest.raises(ValueError, match="nf4"):
        quantization("int8")


# Recipes

TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "save_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("data") / "conversations"
    Dataset.from_list(conversation_rows(6)).save_to_disk(str(folder))
    return {"path": str(folder)}


def stage(name: str, data: dict[str, str], **fields: Any) -> Stage:
    budgets = {"budget_range": [0.3, 0.9], "per": "sample"}
    return Stage(name, "conversations", data=data, budgets=budgets, training=TRAINING, **fields)


def test_a_stage_leaves_an_adapter_and_the_next_starts_from_it_merged(
    base: Path, data: dict[str, str], tmp_path: Path
) -> None:
    stages = [
        stage("low", data, adapters={"r": 4, "lora_alpha": 8}),
        stage("high", data, adapters={"r": 2}),
        stage("whole", data),
    ]
    recipe = Recipe({"checkpoint": str(base), "token_budget": 0.5}, stages)
    last = run_recipe(recipe, tmp_path)
    for name, on in (("low", str(base)), ("high", str(tmp_path / "low" / "merged"))):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == on
        assert AdaVTPProcessor.from_pretrained(tmp_path / name) and (tmp_path / name / FINISHED).is_file()
        assert not (tmp_path / name / "model.safetensors").exists()
    final = AdaVTPForConditionalGeneration.from_pretrained(last)
    assert final.config.token_budget == 0.5, "of the recipe, through two adapters"

    # As if the run had been broken off in the second stage and begun again.
    (tmp_path / "high" / FINISHED).unlink()
    (tmp_path / "whole" / FINISHED).unlink()
    for folder in (
        tmp_path / "high" / "checkpoint-2",
        tmp_path / "high" / "merged",
        tmp_path / "whole" / "checkpoint-1",
    ):
        folder.rename(tmp_path / f"away {folder.parent.name} {folder.name}")
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "away whole")
    before = weights_of(final)
    again = AdaVTPForConditionalGeneration.from_pretrained(run_recipe(recipe, tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_what_is_evaluated_is_merged(base: Path, data: dict[str, str], tmp_path: Path, quantize: str | None) -> None:
    if quantize:
        pytest.importorskip("bitsandbytes")
    evaluation = {"questions": 6, "budgets": [1.0], "reducers": ["adaptive"]}
    stages = [stage("low", data, adapters={"r": 2, "quantize": quantize})]
    recipe = Recipe({"checkpoint": str(base)}, stages, evaluation=evaluation)
    assert run_recipe(recipe, tmp_path) == tmp_path / "low" / "merged"
    assert AutoModel.from_pretrained(tmp_path / "low" / "merged")
    assert (tmp_path / "low" / "merged" / "training_log.json").is_file(), "which the model card cites"


def test_one_process_merges_a_whole_model_where_others_are_made_in_parts(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    trained_adapter(tmp_path, base)
    in_parts = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    merged = whole_checkpoint(tmp_path)
    assert is_deepspeed_zero3_enabled() and in_parts.is_zero3()
    unset_hf_deepspeed_config()
    assert load_file(merged / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"adapters": {"rank": 4}}, "rank.*lora_alpha"),
        ({"adapters": {"r": 4, "quantize": "int3"}}, "int3.*nf4"),
        ({"adapters": {"r": 4}, "training": {"train_parts": ["controller"]}}, "train_parts.*decoder"),
        ({"adapters": {"r": 4}, "kind": "patch_labels", "training": {}}, "patch_labels"),
    ],
)
def test_a_stage_with_adapters_that_cannot_be_is_an_error(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Stage(**({"name": "low", "kind": "conversations"} | fields))


def test_adapters_need_a_whole_checkpoint_to_belong_to(base: Path, data: dict[str, str], tmp_path: Path) -> None:
    stages = [stage("low", data, adapters={"r": 2})]
    with pytest.raises(ValueError, match="`checkpoint`"):
        Recipe({"vision_config": {}, "text_config": {}}, stages)
    llava = tmp_path / "llava"
    llava.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"model_type": "llava"}
    (llava / "config.json").write_text(json.dumps(config))
    AdaVTPProcessor.from_pretrained(base).save_pretrained(llava)
    with pytest.raises(ValueError, match="adavtp convert"):
        run_recipe(Recipe({"checkpoint": str(llava)}, stages), tmp_path / "run")
