"""What a checkpoint names stays inside its folder, whoever reads it: the model, conversion, merging, publishing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.utils import hub as transformers_hub

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.hub_cards.conversion.convert import convert_checkpoint
from adavtp.hub_cards.export import export_checkpoint
from adavtp.hub_cards.licence import Origin
from adavtp.hub_cards.published_folder import published_folder
from adavtp.hub_cards.space_folder import space_folder
from adavtp.hub_cards.training_record import TrainingRecord
from adavtp.trainer.whole_checkpoints import finish_checkpoint, require_whole
from llava_folders import transformers_folder
from tiny_conversations import digit_processor
from tiny_models import tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several weight files."""
    folder, processor = tmp_path_factory.mktemp("whole") / "checkpoint", digit_processor()
    tiny_model(image_token_index=processor.image_token_id).save_pretrained(folder, max_shard_size="60KB")
    processor.save_pretrained(folder)
    assert (folder / INDEX).is_file()
    return folder


def load(folder: Path) -> None:
    AdaVTPForConditionalGeneration.from_pretrained(folder)


def load_processor(folder: Path) -> None:
    AdaVTPProcessor.from_pretrained(folder)


def publish(folder: Path) -> None:
    target = folder.parent / "published"
    target.mkdir()
    published_folder(folder, target, "user/name", TrainingRecord.found_in(folder), Origin(None, "mit"))


def export(folder: Path) -> None:
    export_checkpoint(folder, folder.parent / "exported")


def convert(folder: Path) -> None:
    convert_checkpoint(folder, folder.parent / "converted")


def resume(folder: Path) -> None:
    finish_checkpoint(folder)
    require_whole(folder)


def weights_elsewhere(name: str) -> Callable[[Path], None]:
    """The first weight file lies outside, and the index names it so."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        file = sorted(set(index["weight_map"].values()))[0]
        shutil.move(folder / file, folder.parent / "outside.safetensors")
        named = name.format(parent=folder.parent)
        index["weight_map"] = {key: named if at == file else at for key, at in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))

    return change


def linked(name: str) -> Callable[[Path], None]:
    """A file, the last of its kind, is a link to where it lies outside."""

    def change(folder: Path) -> None:
        file = sorted(folder.glob(name))[-1]
        shutil.move(file, folder.parent / f"outside{file.suffix}")
        file.symlink_to(folder.parent / f"outside{file.suffix}")

    return change


def code_elsewhere(file: str, reference: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": [None, reference]}}))

    return change


OUTSIDE = {
    "a name with dots": weights_elsewhere("../outside.safetensors"),
    "an absolute name": weights_elsewhere("{parent}/outside.safetensors"),
    "dots in the middle": weights_elsewhere("adavtp_code/../../outside.safetensors"),
    "a name as on Windows": weights_elsewhere("..\\outside.safetensors"),
    "a drive": weights_elsewhere("C:outside.safetensors"),
    "a name that is none": weights_elsewhere(""),
    "a link for weights": linked("model-*.safetensors"),
    "a link for the configuration": linked("config.json"),
    "a link for the tokenizer": linked("tokenizer.json"),
    "a link for code": linked("adavtp_code/prompt.py"),
    "a link for the folder of code": linked("adavtp_code"),
    "code above": code_elsewhere("tokenizer_config.json", "../outside.Code"),
    "code of the root": code_elsewhere("config.json", "/outside.Code"),
    "code above another repository": code_elsewhere("processor_config.json", "user/name--../outside.Code"),
}


@pytest.mark.parametrize("way", [load, publish, export, resume])
@pytest.mark.parametrize("damage", OUTSIDE)
def test_what_lies_outside_is_not_followed(
    damage: str, way: Callable[[Path], None], whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "checkpoint")
    OUTSIDE[damage](folder)
    with pytest.raises(
        ValueError, match="leads out of its folder|allowed are (files|modules) in the same folder"
    ) as said:
        way(folder)
    assert str(folder) in str(said.value)


@pytest.mark.parametrize("damage", ["a link for the tokenizer", "code above", "code above another repository"])
def test_a_processor_reads_nothing_outside(damage: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "checkpoint")
    OUTSIDE[damage](folder)
    with pytest.raises(ValueError, match="leads out of its folder|allowed are modules in the same folder"):
        load_processor(folder)


@pytest.mark.parametrize("damage", ["a name with dots", "an absolute name", "a link for weights"])
def test_conversion_reads_nothing_outside(damage: str, tmp_path: Path) -> None:
    folder = transformers_folder(tmp_path / "source").path
    OUTSIDE[damage](folder)
    with pytest.raises(ValueError, match="leads out of its folder|allowed are files in the same folder"):
        convert(folder)
    assert not (tmp_path / "converted").exists()


def test_links_of_the_hubs_cache_are_followed(whole: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--user--name"
    snapshot = repository / "snapshots" / "0123"
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        blob = repository / "blobs" / f"{path.stat().st_size}-{path.name}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(whole)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    expected = AdaVTPForConditionalGeneration.from_pretrained(whole).state_dict()
    loaded = AdaVTPForConditionalGeneration.from_pretrained(snapshot).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    load_processor(snapshot)
    # A neighbour of the blobs is none of the repository's files.
    secret = repository / "secret.json"
    secret.write_text("{}")
    (snapshot / "generation_config.json").unlink()
    (snapshot / "generation_config.json").symlink_to(secret)
    with pytest.raises(ValueError, match="leads out of its folder"):
        load(snapshot)


def test_links_inside_the_folder_are_followed(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "checkpoint")
    file = sorted(folder.glob("model-*.safetensors"))[0]
    (folder / "weights").mkdir()
    shutil.move(file, folder / "weights" / file.name)
    file.symlink_to(folder / "weights" / file.name)
    load(folder)


def test_an_index_in_the_cache_of_a_repository_names_nothing_outside(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_hub, "is_offline_mode", lambda: True)
    repository = tmp_path / "models--user--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    folder = shutil.copytree(whole, repository / "snapshots" / "0123")
    weights_elsewhere("../outside.safetensors")(folder)
    with pytest.raises(ValueError, match="allowed are files in the same folder"):
        AdaVTPForConditionalGeneration.from_pretrained("user/name", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("name", ["LICENSE", "training_log.json", "evaluation.json", "recipe.yaml"])
def test_nothing_outside_is_published(name: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "checkpoint")
    (tmp_path / "secret").write_text("{}")
    (folder / name).symlink_to(tmp_path / "secret")
    for way in (publish, export):
        with pytest.raises(ValueError, match="leads out of its folder"):
            way(folder)


@pytest.mark.parametrize("name", ["../../outside", "/outside", "..\\outside", "", "\0", 3])
def test_a_stage_of_a_training_log_names_no_other_folder(name: object, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "checkpoint")
    log = {"stage": {"name": name, "kind": "conversations"}, "log": [{"step": 1, "loss": 1.0}]}
    (folder / "training_log.json").write_text(json.dumps(log))
    with pytest.raises(ValueError, match="has a stage named|expected is str"):
        publish(folder)


def test_a_space_has_no_example_from_outside(tmp_path: Path) -> None:
    examples = tmp_path / "examples"
    examples.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (examples / "scene.png").symlink_to(tmp_path / "secret.png")
    (examples / "questions.json").write_text('[["scene.png", "what is it?"]]')
    with pytest.raises(ValueError, match="leads out of its folder"):
        space_folder(tmp_path / "space", "user/name", examples)


def test_a_checkpoint_in_several_files_is_published(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "checkpoint")
    publish(folder)
    names = {path.name for path in folder.glob("model*")}
    assert len(names) > 2 and names <= {path.name for path in (tmp_path / "published").iterdir()}
