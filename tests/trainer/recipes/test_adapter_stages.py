"""What stages with adapters promise: each leaves an adapter, and what stands behind it gets a whole checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.trainer.recipes.recipe import Recipe, Stage
from adavtp.trainer.recipes.run import FINISHED, run_recipe
from adavtp.trainer.recipes.starting_model import whole_checkpoint
from tiny_adapters import base_checkpoint, trained_adapter
from tiny_conversations import conversation_rows
from tiny_trainers import differing, weights_of

TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "save_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
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
    # What another adapter left there is not taken for this one's.
    (tmp_path / "high" / "merged").mkdir()
    again = AdaVTPForConditionalGeneration.from_pretrained(run_recipe(recipe, tmp_path))
    assert differing(weights_of(again), weights_of(final)) == []


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
    config.pop("controller_head")
    (llava / "config.json").write_text(json.dumps(config))
    AdaVTPProcessor.from_pretrained(base).save_pretrained(llava)
    with pytest.raises(ValueError, match="adavtp convert"):
        run_recipe(Recipe({"checkpoint": str(llava)}, stages), tmp_path / "run")
