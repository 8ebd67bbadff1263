"""Loading in the ways that people load any model: quantised, offloaded, by any Auto class, with code or without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from PIL import Image
from transformers import AutoModelForMultimodalLM, BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration

from adavtp import AdaVTPForConditionalGeneration
from adavtp.evaluation.settings import Setting
from armed_folders import armed_folder
from tiny_conversations import digit_processor
from tiny_families import Writer, batch_of, stock_model
from tiny_models import tiny_batch, tiny_model, tiny_text_config, tiny_vision_config

Model = AdaVTPForConditionalGeneration
QUESTION = "how many digits are there ?"


def wide_model() -> Model:
    """A model whose layers fill a block of four-bit weights."""
    vision, text = tiny_vision_config(), tiny_text_config(hidden_size=64, intermediate_size=128, head_dim=16)
    vision.hidden_size, vision.intermediate_size = 64, 128
    return tiny_model(vision_config=vision, text_config=text)


def answers(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    return model.generate(**batch, do_sample=False, min_new_tokens=3, max_new_tokens=3, **options)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_decides_is_not_quantised(bits: int, tmp_path: Path) -> None:
    wide_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = Model.from_pretrained(tmp_path, quantization_config=config)
    batch = tiny_batch(model.config)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(answers(model, batch, token_budget=1.0), answers(stock, batch))
    assert answers(model, batch, token_budget=0.4).shape[1] == batch["input_ids"].shape[1] + 3
    quantised = {name.split(".")[1] for name, module in model.named_modules() if "bit" in type(module).__name__}
    assert "language_model" in quantised and not quantised & {"budget_token", "controller", "reducers"}
    assert config.llm_int8_skip_modules is None, "the caller's configuration was written to"


@pytest.mark.parametrize("budget", [1.0, 0.4])
@pytest.mark.parametrize("way", ["to the CPU", "to disk", "the tower on disk"])
def test_weights_may_be_offloaded(way: str, budget: float, tmp_path: Path) -> None:
    model = tiny_model()
    batch = tiny_batch(model.config)
    expected = answers(model, batch, token_budget=budget)
    if way == "to the CPU":
        cpu_offload(model, execution_device="cpu")
    elif way == "to disk":
        disk_offload(model, tmp_path / "offloaded", execution_device="cpu")
    else:
        model.save_pretrained(tmp_path / "saved")
        places = {f"model.{name}": "cpu" for name, _ in model.model.named_children()} | {"lm_head": "cpu"}
        model = Model.from_pretrained(
            tmp_path / "saved",
            device_map=places | {"model.vision_tower": "disk"},
            offload_folder=tmp_path / "offloaded",
        )
    assert torch.equal(answers(model, batch, token_budget=budget), expected)


def test_the_class_of_any_to_any_pipelines_is_one_of_the_model_s(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is Model


@pytest.fixture
def armed(tmp_path: Path) -> Path:
    return armed_folder(tmp_path)


@pytest.mark.parametrize("consent", [None, False, True])
def test_code_of_a_processor_runs_only_with_the_consent_that_the_model_was_loaded_with(
    consent: bool | None, armed: Path
) -> None:
    model = Model.from_pretrained(armed, trust_remote_code=consent)
    if consent:
        assert isinstance(model.generate(Image.new("RGB", (32, 32)), QUESTION, max_new_tokens=2), str)
    else:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            model.generate(Image.new("RGB", (32, 32)), QUESTION, max_new_tokens=2)
    assert (armed / "ran").exists() == bool(consent)


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _fields(name: str, part: str | None = None, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (content if part is None else content[part]).update(fields)
        (folder / name).write_text(json.dumps(content))

    return change


def _linked_to_itself(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return change


DEEP = "[" * 3000 + "]" * 3000
DAMAGES = {
    "a configuration too deep": _text("config.json", DEEP),
    "a configuration that links to itself": _linked_to_itself("config.json"),
    "a text model in words": _fields("config.json", text_config="x"),
    "a negative size": _fields("config.json", "text_config", hidden_size=-32),
    "a size beyond all memory": _fields("config.json", "text_config", hidden_size=2**40),
    "a size in words": _fields("config.json", "text_config", num_hidden_layers="2"),
    "no heads": _fields("config.json", "text_config", num_attention_heads=0),
    "patches of nothing": _fields("config.json", "vision_config", patch_size=0),
    "an unknown activation": _fields("config.json", projector_hidden_act="nope"),
    "an unknown dtype": _fields("config.json", dtype="float99"),
    "defaults that are a number": _text("generation_config.json", "3"),
    "defaults that are nothing": _text("generation_config.json", "null"),
    "weights without a header": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
    "weights with a header that is a list": lambda folder: (folder / "model.safetensors").write_bytes(
        (2).to_bytes(8, "little") + b"[]"
    ),
    "an index without metadata": _text("model.safetensors.index.json", '{"weight_map": {"x": "model.safetensors"}}'),
    "an index that is a list": _text("model.safetensors.index.json", "[1]"),
    "a tokenizer too deep": _text("tokenizer.json", DEEP),
    "a tokenizer cut off": _text("tokenizer.json", '{"added_tokens": []'),
    "a tokenizer of nothing": _text("tokenizer.json", '{"added_tokens": [], "model": {}}'),
    "a processor that is a number": _text("processor_config.json", "3"),
    "a template cut off": _text("chat_template.jinja", "{% for"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_a_sentence_that_names_it(damage: str, tmp_path: Path) -> None:
    processor, folder = digit_processor(), tmp_path / "checkpoint"
    tiny_model(image_token_index=processor.image_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)
    if "index" in damage:
        (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    DAMAGES[damage](folder)
    with pytest.raises((ValueError, OSError), match="checkpoint|chat template|`text_config` is 'x'") as said:
        model = Model.from_pretrained(folder)
        model.generate(Image.new("RGB", (32, 32)), QUESTION, max_new_tokens=1)
    assert "Traceback" not in str(said.value)


def test_what_transformers_refuses_of_a_caller_is_not_laid_to_the_files(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="with a meta device context manager"):
        Model.from_pretrained(tmp_path)


@pytest.fixture(params=["llava", "idefics3"])
def released(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Model, dict[str, torch.Tensor]]:
    """A checkpoint as its family releases it, loaded with a budget, and a batch."""
    if request.param == "idefics3":
        stock_model("idefics3").save_pretrained(tmp_path)
        model, batch = (
            Model.from_pretrained(tmp_path, dtype=torch.float64),
            batch_of("idefics3", [Writer("idefics3").prompt()]),
        )
    else:
        ours = tiny_model()
        fields = ours.config.to_dict()
        kept = {name: fields[name] for name in ("vision_config", "text_config", "image_token_index")}
        stock = LlavaForConditionalGeneration(LlavaConfig(**kept, vision_feature_select_strategy="default"))
        stock.save_pretrained(tmp_path)
        model, batch = Model.from_pretrained(tmp_path), tiny_batch(ours.config)
    return model, batch


def test_a_controller_that_nobody_trained_is_not_measured(
    released: tuple[Model, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    model, batch = released
    before = model.config.to_dict()
    reason = "has no weights for the reducer 'adaptive'"
    for ask in (model, model.select_tokens, model.generate):
        with pytest.raises(ValueError, match=reason):
            ask(**batch, token_budget=0.4)
    assert reason in model.unreachable(**batch, token_budget=0.4)
    assert reason in Setting("adaptive", 0.4).unreachable(model, batch)
    # At full budget nothing is asked of it, and what needs no training chooses as ever.
    for choice in ({"token_budget": 1.0}, {"token_budget": 0.4, "reducer": "random"}):
        assert model.unreachable(**batch, **choice) is None
        model(**batch, **choice)
    assert model.config.to_dict() == before
    # Saved with its random weights it says so, until it is trained.
    for is_trained in (False, True):
        if is_trained:
            labels = batch["input_ids"].clone()
            labels[:, :-2] = -100
            model.train()(**batch, labels=labels, token_budget=0.4)
            model.eval()
        model.save_pretrained(tmp_path / "saved")
        again = Model.from_pretrained(tmp_path / "saved", dtype=model.dtype)
        assert (again.unreachable(**batch, token_budget=0.4) is None) == is_trained
