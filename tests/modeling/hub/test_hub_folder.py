"""A saved folder stands alone: it has its code, loads where the package is absent, and refuses to be half there."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from adavtp import AdaVTPConfig, AdaVTPForConditionalGeneration, AdaVTPModel, AdaVTPProcessor
from adavtp.modeling.hub.saving import AUTO_MAP, CODE_FOLDER, flat_name
from adavtp.tasks.digit_scenes import draw_scene
from adavtp.tasks.digit_scenes.processor import build_digit_processor
from load_without_package import answers, loaded_elsewhere
from repository import ROOT
from tiny_models import tiny_batch, tiny_config, tiny_model

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
PROCESSOR_FILES = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
DEFAULT_BUDGET = 0.3


@pytest.fixture(scope="module")
def processor() -> AdaVTPProcessor:
    return build_digit_processor(image_size=32, patch_size=8)


def _save(folder: Path, processor: AdaVTPProcessor, **fields: Any) -> Path:
    # With this seed the answers at the budgets differ, and none is empty.
    model = tiny_model(image_token_index=processor.image_token_id, seed=1, **fields)
    model.generation_config.token_budget = DEFAULT_BUDGET
    model.generation_config.max_new_tokens = 6
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    draw_scene("test", 0).image.save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, processor: AdaVTPProcessor) -> Path:
    return _save(tmp_path_factory.mktemp("hub") / "tiny", processor, visual_position_ids="compact")


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory, processor: AdaVTPProcessor) -> Path:
    return _save(tmp_path_factory.mktemp("hub") / "tiny-random", processor, reducer="random")


@pytest.fixture(scope="module")
def elsewhere(
    folder: Path, random_folder: Path, processor: AdaVTPProcessor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What happened in a process that cannot import the package, and the folder that it saved."""
    output = tmp_path_factory.mktemp("elsewhere")
    processor.save_pretrained(output / "processor")
    return loaded_elsewhere(folder, random_folder, output / "processor", output)


@pytest.fixture(scope="module")
def here(folder: Path) -> dict[str, Any]:
    """What the same folder says in this process, with the package."""
    model = AdaVTPForConditionalGeneration.from_pretrained(folder)
    return answers(model, AdaVTPProcessor.from_pretrained(folder, trust_remote_code=True), _image(folder))


def _image(folder: Path) -> Image.Image:
    return Image.open(folder / "image.png")


def _python_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / CODE_FOLDER).iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# What is in the folder
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_opens_on_weights_configuration_processor_and_one_folder_of_code(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == MODEL_FILES | PROCESSOR_FILES | {CODE_FOLDER, "image.png"}
    assert {Path(name).suffix for name in _python_files(folder)} == {".py"}


def test_the_configuration_names_a_class_in_the_folder_for_every_auto_class(folder: Path) -> None:
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == set(AUTO_MAP)
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert module.startswith(f"{CODE_FOLDER}/")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()


def test_every_import_in_the_folder_is_flat_or_of_torch_transformers_or_the_standard_library(folder: Path) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "huggingface_hub"}
    for name, code in _python_files(folder).items():
        for line in code.decode().splitlines():
            words = line.split()
            if words[:1] == ["import"] or (words[:1] == ["from"] and "import" in words):
                module = words[1]
                flat = module.startswith(".") and f"{module[1:]}.py" in _python_files(folder)
                assert flat or module.partition(".")[0] in allowed, f"{name}: {line}"


def test_a_processor_saved_alone_carries_its_own_code(tmp_path: Path, processor: AdaVTPProcessor) -> None:
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == PROCESSOR_FILES | {CODE_FOLDER}
    assert {"processing_adavtp.py", "budget_token_budget.py"} <= set(_python_files(tmp_path))
    assert "modeling_adavtp.py" not in _python_files(tmp_path)


def test_no_two_files_that_travel_have_one_name() -> None:
    files = [path for room in ("modeling", "configuration") for path in (ROOT / room).rglob("*.py")]
    names = [flat_name(path) for path in files if path.name != "__init__.py"]
    assert len(set(names)) == len(names)


def test_a_class_made_on_the_spot_saves_the_code_of_the_class_it_is_made_from(tmp_path: Path) -> None:
    model = tiny_model()
    # As FSDP does with the classes of the modules that it shards.
    model.__class__ = type("FSDPModel", (type(model),), {"__module__": "torch.distributed.fsdp"})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"] == (
        f"{CODE_FOLDER}/modeling_adavtp.AdaVTPForConditionalGeneration"
    )
    assert "modeling_adavtp.py" in _python_files(tmp_path)


def test_only_the_main_process_writes_code(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.rglob("*.py"))


# ---------------------------------------------------------------------------------------------------------------------
# Where the package is absent
# ---------------------------------------------------------------------------------------------------------------------


def test_model_and_processor_load_where_the_package_is_absent_with_their_fields(elsewhere: dict[str, Any]) -> None:
    assert all(name.startswith("transformers_modules.") for name in elsewhere["classes"])
    assert (elsewhere["reducer"], elsewhere["visual_position_ids"]) == ("adaptive", "compact")
    assert elsewhere["processor_alone"]


def test_answers_are_the_same_with_and_without_the_package(elsewhere: dict[str, Any], here: dict[str, Any]) -> None:
    assert elsewhere["auto_model"] == elsewhere["image_text_to_text"] == here
    assert elsewhere["pipeline"] == here["text"], "with the budget in generate_kwargs"
    assert here["text"], "an empty answer would prove nothing"


def test_a_default_budget_in_the_generation_config_survives(elsewhere: dict[str, Any], folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert model.generation_config.token_budget == DEFAULT_BUDGET
    inputs = AutoProcessor.from_pretrained(folder, trust_remote_code=True).of_questions(
        _image(folder), "what colour is the 7 ?"
    )
    said = {budget: model.generate(**inputs, token_budget=budget).tolist() for budget in (None, DEFAULT_BUDGET, 1.0)}
    assert elsewhere["auto_model"]["default"] == said[DEFAULT_BUDGET] == said[None] != said[1.0]


def test_a_model_with_a_published_reducer_keeps_it(elsewhere: dict[str, Any], random_folder: Path) -> None:
    model = AutoModel.from_pretrained(random_folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(random_folder, trust_remote_code=True)
    assert model.config.reducer == "random"
    assert answers(model, processor, _image(random_folder)) == elsewhere["random"]
    assert elsewhere["random"]["kept"] != elsewhere["auto_model"]["kept"]


def test_saving_again_from_such_a_folder_carries_the_same_code_and_weights(
    elsewhere: dict[str, Any], folder: Path, here: dict[str, Any]
) -> None:
    again = elsewhere["folder"]
    assert _python_files(again) == _python_files(folder)
    first, second = (load_file(path / "model.safetensors") for path in (folder, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert elsewhere["again"] == here
    model = AdaVTPForConditionalGeneration.from_pretrained(again)
    assert answers(model, model.processor, _image(folder)) == here


# ---------------------------------------------------------------------------------------------------------------------
# Where the package is installed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_the_installed_package_goes_before_the_code_of_the_folder(auto_class: Any, folder: Path) -> None:
    assert type(auto_class.from_pretrained(folder, trust_remote_code=True)) is AdaVTPForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)) is AdaVTPProcessor


def test_a_sharded_folder_loads_like_a_whole_one(tmp_path: Path, folder: Path, here: dict[str, Any]) -> None:
    model = AdaVTPForConditionalGeneration.from_pretrained(folder)
    processor = model.processor
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = AdaVTPForConditionalGeneration.from_pretrained(tmp_path)
    model.processor = processor
    assert answers(model, processor, _image(folder)) == here


def test_a_reducer_chosen_after_loading_is_saved(tmp_path: Path, folder: Path) -> None:
    model = AdaVTPForConditionalGeneration.from_pretrained(folder)
    model.set_reducer("random")
    model.save_pretrained(tmp_path)
    assert AdaVTPForConditionalGeneration.from_pretrained(tmp_path).config.reducer == "random"


def test_a_model_without_a_head_round_trips(tmp_path: Path) -> None:
    model = AdaVTPModel(tiny_config())
    model.save_pretrained(tmp_path)
    loaded = AdaVTPModel.from_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"]
        == f"{CODE_FOLDER}/modeling_adavtp.AdaVTPModel"
    )
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("head", ["late_interaction", "cross_attention"])
def test_a_controller_that_reads_the_question_s_words_round_trips(head: str, tmp_path: Path) -> None:
    model = tiny_model(controller_head=head, controller_estimator="differentiable_top_k")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert (loaded.config.controller_head, loaded.config.controller_estimator) == (head, "differentiable_top_k")
    batch = tiny_batch(model.config)
    assert torch.equal(loaded(**batch, token_budget=0.4).logits, model(**batch, token_budget=0.4).logits)
    assert any("question_head" in name for name in loaded.state_dict())


def test_a_head_tied_to_the_embeddings_round_trips_tied(tmp_path: Path) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = AdaVTPForConditionalGeneration.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_generation_config_of_ones_own_is_saved_as_it_is(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(token_budget=8, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    loaded = AdaVTPForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert (loaded.token_budget, loaded.max_new_tokens) == (8, 3)


def test_an_adapter_folder_without_configuration_loads_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")
    model = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules=r".*language_model.*q_proj", r=2)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    loaded = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    assert any("lora" in name for name, _ in loaded.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are not whole
# ---------------------------------------------------------------------------------------------------------------------


def _weights_changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def _cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _without_new_modules(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "controller" in name or "budget_token" in name]:
        del weights[name]


NORM = "model.language_model.norm.weight"

DAMAGES = {
    "a missing weight": (_weights_changed(lambda weights: weights.pop(NORM)), ValueError, NORM),
    "a missing head": (_weights_changed(lambda weights: weights.pop("lm_head.weight")), ValueError, "lm_head.weight"),
    "a part of the controller": (
        _weights_changed(lambda weights: weights.pop("model.controller.score.bias")),
        ValueError,
        "1 of the .* of budget_token and controller .*model.controller.score.bias",
    ),
    "a weight of another shape": (
        _weights_changed(lambda weights: weights.update({NORM: torch.zeros(5)})),
        ValueError,
        rf"{NORM}` has \(5,\), expected \(32,\)",
    ),
    "a file cut off": (_cut_off, OSError, "model.safetensors' has .* bytes, expected .* cut off"),
    "an empty file": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        OSError,
        "model.safetensors' has 0 bytes",
    ),
    "no weight file": (lambda folder: (folder / "model.safetensors").unlink(), OSError, "model.safetensors"),
    "only a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        OSError,
        "model.safetensors",
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), OSError, "no config.json"),
    "a broken configuration": (lambda folder: (folder / "config.json").write_text("{"), OSError, "config.json"),
    "another kind of model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        ValueError,
        "`model_type` is 'bert'.*'adavtp', 'llava'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name_and_the_next_one_loads(damage: str, folder: Path, tmp_path: Path) -> None:
    change, error, message = DAMAGES[damage]
    shutil.copytree(folder, tmp_path / "damaged")
    change(tmp_path / "damaged")
    with pytest.raises(error, match=message):
        AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "damaged")
    assert AdaVTPForConditionalGeneration.from_pretrained(folder).config.reducer == "adaptive"


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AdaVTPForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({"controller_head": head} for head in ("dot", "patch", "late_interaction", "cross_attention")),
        {"question_aware": False},
        {"budget_fusion": "post"},
    ],
    ids=str,
)
def test_a_configuration_for_another_controller_is_refused(change: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ValueError, match="budget_token and controller.*configuration that the checkpoint was trained"):
        AdaVTPForConditionalGeneration.from_pretrained(folder, **change)


def test_another_reducer_can_be_chosen_while_loading(folder: Path, random_folder: Path) -> None:
    for saved, chosen in ((folder, "random"), (random_folder, "adaptive")):
        assert AdaVTPForConditionalGeneration.from_pretrained(saved, reducer=chosen).config.reducer == chosen


def test_new_modules_may_all_be_missing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "without")
    _weights_changed(_without_new_modules)(tmp_path / "without")
    model, info = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "without", output_loading_info=True)
    assert info["missing_keys"] and all("controller" in key or "budget_token" in key for key in info["missing_keys"])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_half_a_checkpoint_loads_for_whoever_asks_what_is_missing(tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight"):
        AdaVTPForConditionalGeneration.from_pretrained(tmp_path)
    model, info = AdaVTPForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert torch.isfinite(model.lm_head.weight).all()


def test_weights_in_hand_need_no_checkpoint() -> None:
    config = tiny_config()
    model = AdaVTPForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
    assert all(parameter.device.type == "cpu" and parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("save_original_format", [True, False])
def test_a_llava_folder_loads_with_only_new_modules_missing(save_original_format: bool, tmp_path: Path) -> None:
    fields = tiny_config().to_dict()
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=fields["vision_config"], text_config=fields["text_config"])
    )
    llava.save_pretrained(tmp_path, save_original_format=save_original_format)
    model = AdaVTPForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.model_type == "adavtp"
    loaded = model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in llava.state_dict().items())


def test_weights_of_another_shape_can_be_replaced_on_demand(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    DAMAGES["a weight of another shape"][0](tmp_path / "other")
    model, info = AdaVTPForConditionalGeneration.from_pretrained(
        tmp_path / "other", ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [name for name, _, _ in info["mismatched_keys"]] == [NORM]
    assert model.get_parameter(NORM).shape == (32,)


def test_loading_passes_every_other_argument_on(folder: Path) -> None:
    config = AdaVTPConfig.from_pretrained(folder)
    model = AdaVTPForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=torch.bfloat16, device_map="cpu", key_mapping={"^nothing": "nowhere"}
    )
    assert model.dtype == torch.bfloat16
    assert AdaVTPForConditionalGeneration.from_pretrained(folder, token_budget=0.5).config.token_budget == 0.5
