"""The recipes for other families, carried out on tiny checkpoints of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from adavtp import AdaVTPForConditionalGeneration
from adavtp.modeling.parts import parts_of_names
from adavtp.trainer.recipes import recipe as recipe_module
from adavtp.trainer.recipes.recipe import Recipe
from adavtp.trainer.recipes.run import run_recipe
from tiny_conversations import write_conversations
from tiny_processors import family_model, family_processor
from tiny_trainers import weights_of

RECIPES = Path(recipe_module.__file__).parent


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_onevision"])
def test_a_family_s_recipe_trains_its_own_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = family_processor(name)
    start = family_model(name, processor)
    start.save_pretrained(tmp_path / "base")
    # Without torchvision the families' own processors do not load.
    monkeypatch.setattr(type(start), "processor", processor)
    recipe = Recipe.from_file(RECIPES / f"{name}.yaml")
    assert recipe.model["checkpoint"].split("/")[0] in ("Qwen", "llava-hf")
    recipe.model |= {"checkpoint": str(tmp_path / "base"), "dtype": "float32"}
    conversations = write_conversations(tmp_path)
    tiny = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "bf16": False, "save_strategy": "no"}
    tiny |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    tiny |= {"warmup_steps": 0, "learning_rate": 0.01}
    for stage in recipe.stages:
        stage.training |= tiny
        stage.data = {
            "sources": [{"path": str(conversations), "images": str(tmp_path / "images")}],
            "max_length": stage.data["max_length"] // 20,
        }
    finished = run_recipe(recipe, tmp_path / "run")
    stages = [AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "run" / stage.name) for stage in recipe.stages]
    loaded = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert changed_parts(stages[0], loaded, but="controller") == set()
    assert changed_parts(stages[1], stages[0]) == {"controller", "projector", "decoder"}
    assert finished == tmp_path / "run" / "2-tune"
    stock = AutoModelForImageTextToText.from_pretrained(finished)
    assert stock.config.model_type == name and "AdaVTP" not in type(stock).__name__


def changed_parts(model: PreTrainedModel, before: PreTrainedModel, but: str = "") -> set[str]:
    part_of, old = parts_of_names(model), weights_of(before)
    changed = {key for key, value in weights_of(model).items() if not torch.equal(value, old[key])}
    return {part_of(key) for key in changed} - {but}


@pytest.mark.parametrize("kind", ["packed_questions", "patch_labels"])
def test_kinds_for_digit_scenes_are_refused_for_other_families(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = family_processor("qwen2_5_vl")
    start = family_model("qwen2_5_vl", processor)
    start.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(type(start), "processor", processor)
    training: dict[str, Any] = {"max_steps": 1, "use_cpu": True}
    stage = {"name": "1", "kind": kind, "data": {"split": "train", "num_scenes": 2}, "training": training}
    stages = [recipe_module.Stage(**stage)]
    with pytest.raises(ValueError, match="a 'qwen2_5_vl' model learns from 'conversations' alone"):
        run_recipe(Recipe({"checkpoint": str(tmp_path / "base")}, stages), tmp_path / "run")
