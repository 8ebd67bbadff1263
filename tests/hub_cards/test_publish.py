"""
Publishing, against a Hub on this machine: what goes up comes down, loads by its id where the package is absent, and
answers as it did; and nothing goes that should not, or to where it should not.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants, metadata_load
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner, Result

from adavtp import AdaVTPProcessor, AdaVTPTrainer, AdaVTPTrainingArguments, BudgetCollator
from adavtp.command_line import app
from adavtp.hub_cards.publish import HubRefused
from adavtp.modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from adavtp.tasks.digit_scenes import draw_scene, load_digit_questions
from adavtp.trainer.adapters import add_adapters
from adavtp.trainer.whole_checkpoints import what_is_missing
from load_without_package import answers
from local_hub import READING_TOKEN, STRANGERS_TOKEN, LocalHub, local_hub
from tiny_conversations import conversation_rows, digit_model, digit_processor
from tiny_models import tiny_model
from tiny_processors import family_folder
from without_package import run_without_package_from_the_start, snippet_of

EVALUATION = {
    "command": "adavtp evaluate tiny",
    "versions": {"torch": "9.8.7"},
    "split": "test",
    "num_questions": 6,
    "rows": [
        {"reducer": "adaptive", "budget": budget, "num_keep": num_keep, "accuracy": 0.5, "accuracy_low": 0.4}
        | {"accuracy_high": 0.6, "decoder_tokens": 9.0 + num_keep, "milliseconds": 2.5}
        for budget, num_keep in ((1.0, 16), (0.4, 6))
    ],
}
LOG = {"stage": {"name": "1-see", "kind": "patch_labels"}, "log": [{"step": 1, "loss": 3.4}, {"step": 2, "loss": 1.2}]}
LEFTOVERS = ["optimizer.pt", "training_args.bin", "trainer_state.json", "notes.txt"]


@pytest.fixture(scope="module")
def processor() -> AdaVTPProcessor:
    return digit_processor()


@pytest.fixture(scope="module")
def checkpoint(processor: AdaVTPProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run's last folder, with all that runs leave in theirs."""
    folder = tmp_path_factory.mktemp("checkpoint")
    # With this seed the answers at the budgets differ, and none is empty.
    model = tiny_model(image_token_index=processor.image_token_id, seed=1)
    model.generation_config.max_new_tokens = 6
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "training_log.json").write_text(json.dumps(LOG))
    for name in LEFTOVERS:
        (folder / name).write_bytes(b"x" * 99)
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with local_hub(tmp_path / "home") as hub:
        yield hub


def adavtp(*arguments: Any) -> Result:
    """What the command line does, in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def words(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def round_trip(
    checkpoint: Path, processor: AdaVTPProcessor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A model and a data set published from here and used by a process that knows their ids and nothing else."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    draw_scene("test", 0).image.save(elsewhere / "image.png")
    with local_hub(elsewhere / "home") as hub:
        model = adavtp("publish", checkpoint, "somebody/tiny")
        sizes = ("--data", "digit-scenes", "--train", 12, "--validation", 6, "--test", 9)
        data = adavtp("publish-data", "somebody/digit-scenes", *sizes)
        assert (model.exit_code, data.exit_code) == (0, 0), model.output + data.output
        files = {"model": hub.files("somebody/tiny"), "dataset": hub.files("somebody/digit-scenes", "dataset")}
        snippets = [snippet_of(files[kind]["README.md"].decode()) for kind in files]
        code = f"""
import json
{snippets[0]}
from load_without_package import answers
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained("somebody/tiny", trust_remote_code=True)
results = answers(model, processor, image)
results["class"] = type(model).__module__.split(".")[0]
{snippets[1]}
results["features"] = sorted(data.features)
results["splits"] = {{name: list(split["question"]) for name, split in load_dataset("somebody/digit-scenes").items()}}
results["message"] = data[0]["messages"]
print(json.dumps(results))
"""
        printed = run_without_package_from_the_start(code, elsewhere)
    return {"files": files, "printed": model.output, "data_printed": data.output, "folder": elsewhere} | json.loads(
        printed.splitlines()[-1]
    )


# ---------------------------------------------------------------------------------------------------------------------
# The round trip
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_loaded_by_its_id_answers_as_it_does_here(
    round_trip: dict[str, Any], checkpoint: Path, processor: AdaVTPProcessor
) -> None:
    model = AdaVTPForConditionalGeneration.from_pretrained(checkpoint)
    here = answers(model, processor, Image.open(round_trip["folder"] / "image.png"))
    assert round_trip["class"] == "transformers_modules"
    assert {name: round_trip[name] for name in here} == here
    assert len(here["text"].split()) > 1


def test_a_repository_has_what_belongs_there_and_nothing_else(round_trip: dict[str, Any], checkpoint: Path) -> None:
    published = round_trip["files"]["model"]
    record = {"training_log_01_1-see.json", "evaluation.json", "budget_curve.png", "README.md"}
    saved = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    saved -= {*LEFTOVERS, "training_log.json"}
    assert set(published) == saved | record
    for name in saved - {"README.md"}:
        assert published[name] == (checkpoint / name).read_bytes(), name


def test_the_summary_says_what_goes_and_what_stays(round_trip: dict[str, Any]) -> None:
    printed = " ".join(round_trip["printed"].split())
    total = sum(map(len, round_trip["files"]["model"].values()))
    assert "public model repository" in printed and "licence apache-2.0" in printed
    assert f"{len(round_trip['files']['model'])} │ {total:,}" in printed
    assert f"stays behind: {', '.join(sorted(LEFTOVERS))}" in printed
    assert "/somebody/tiny" in printed


def test_a_data_set_loaded_by_its_id_has_the_questions_that_are_drawn_here(round_trip: dict[str, Any]) -> None:
    assert round_trip["features"] == ["answer", "images", "kind", "messages", "question"]
    assert round_trip["splits"] == {
        split: list(load_digit_questions(split, size)["question"])
        for split, size in (("train", 12), ("validation", 6), ("test", 9))
    }
    assert round_trip["message"] == load_digit_questions("test", 9)[0]["messages"]
    scene = Image.open(round_trip["folder"] / "scene.png")
    assert scene.tobytes() == draw_scene("test", 0).image.tobytes()


def test_a_data_set_has_its_splits_as_files(round_trip: dict[str, Any]) -> None:
    files = {f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")}
    assert set(round_trip["files"]["dataset"]) == {"README.md", *files}
    assert "train: 12 questions, validation: 6 questions, test: 9 questions" in round_trip["data_printed"]


# ---------------------------------------------------------------------------------------------------------------------
# Again, privately, and not at all
# ---------------------------------------------------------------------------------------------------------------------


def test_a_second_publication_is_one_commit_that_takes_out_what_is_outdated_and_nothing_else(
    hub: LocalHub, checkpoint: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        assert adavtp("publish", checkpoint, "somebody/tiny").exit_code == 0
    commits = hub.repositories["model", "somebody/tiny"].commits
    assert len(commits) == 2, "creating it, and one commit with everything; none for what has not changed"
    by_hand = {"notes/own_adavtp.py": b"mine", "LICENSE": b"terms"}
    outdated = ("gone_adavtp.py", "adavtp_code/gone.py", "model-00001-of-00002.safetensors")
    for name, content in (by_hand | dict.fromkeys(outdated, b"old")).items():
        HfApi().upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="somebody/tiny")
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    (changed / "evaluation.json").unlink()
    before = len(commits)
    assert adavtp("publish", changed, "somebody/tiny").exit_code == 0
    assert len(commits) == before + 1
    assert set(commits[before - 1].files) - set(commits[-1].files) == {
        "evaluation.json",
        "budget_curve.png",
        *outdated,
    }
    assert {name: commits[-1].files[name].content for name in by_hand} == by_hand


def test_another_model_is_not_replaced(hub: LocalHub, checkpoint: Path) -> None:
    HfApi().create_repo("somebody/llama")
    theirs = {"config.json": b'{"model_type": "llama"}', "model-00001-of-00002.safetensors": b"weights"}
    for name, content in theirs.items():
        HfApi().upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="somebody/llama")
    result = adavtp("publish", checkpoint, "somebody/llama")
    assert result.exit_code == 1 and "has a 'llama' model" in words(result)
    files = hub.repositories["model", "somebody/llama"].commits[-1].files
    assert {name: file.content for name, file in files.items()} == theirs


def test_a_private_repository_is_its_owners_alone(hub: LocalHub, checkpoint: Path) -> None:
    result = adavtp("publish", checkpoint, "somebody/secret", "--private")
    assert result.exit_code == 0 and "Published (private)" in result.output
    assert HfApi().repo_info("somebody/secret").private
    for token in (STRANGERS_TOKEN, False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).repo_info("somebody/secret")


def test_what_is_to_be_private_does_not_go_to_a_public_repository(hub: LocalHub, checkpoint: Path) -> None:
    HfApi().create_repo("somebody/open")
    result = adavtp("publish", checkpoint, "somebody/open", "--private")
    assert result.exit_code == 1 and "exists and is public" in words(result)
    assert hub.files("somebody/open") == {}


@pytest.mark.parametrize(
    "command", [["publish"], ["publish-data", "--train", "6", "--validation", "6", "--test", "6"]]
)
def test_a_dry_run_needs_no_token_and_asks_the_hub_nothing(
    command: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    with local_hub(tmp_path / "home", token=None) as hub:
        named = [checkpoint] if command == ["publish"] else []
        result = adavtp(command[0], *named, "somebody/tiny", *command[1:], "--dry-run")
        assert result.exit_code == 0, result.output
        assert "README.md" in result.output and "together" in result.output
        assert not hub.requests
    assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before


def test_a_dry_run_of_another_family_s_folder_says_what_would_go(tmp_path: Path) -> None:
    folder, named = family_folder("idefics3", tmp_path / "model"), ["--license", "apache-2.0"]
    with local_hub(tmp_path / "home", token=None) as hub:
        result = adavtp("publish", folder, "somebody/tiny", *named, "--base-model", "someone/idefics3", "--dry-run")
        assert result.exit_code == 0, result.output
        assert "base model someone/idefics3" in result.output and "code" in result.output
        assert not hub.requests
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "auto_map"}))
    result = adavtp("publish", folder, "somebody/tiny", *named, "--dry-run")
    assert result.exit_code == 2 and "`adavtp export` makes a checkpoint of it" in words(result)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_a_licence_that_is_not_known_has_to_be_said(hub: LocalHub, checkpoint: Path, tmp_path: Path) -> None:
    unknown = shutil.copytree(checkpoint, tmp_path / "unknown")
    (unknown / "training_log.json").unlink()
    result = adavtp("publish", unknown, "somebody/tiny")
    assert result.exit_code == 2 and "licence of this model is not known" in words(result)
    assert "--license" in result.output and not hub.repositories
    assert adavtp("publish", unknown, "somebody/tiny", "--license", "llama2").exit_code == 0
    (tmp_path / "card.md").write_bytes(hub.files("somebody/tiny")["README.md"])
    assert metadata_load(tmp_path / "card.md")["license"] == "llama2"


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, "There is no token of the Hub: log in with `hf auth login`"),
        ("hf_expired", "the token is not valid"),
        (READING_TOKEN, "the token has no right to write to somebody/tiny"),
    ],
)
def test_a_token_without_the_right_is_answered_with_what_to_do(
    token: str | None, reason: str, checkpoint: Path, tmp_path: Path
) -> None:
    with local_hub(tmp_path / "home", token=token) as hub:
        result = adavtp("publish", checkpoint, "somebody/tiny")
        assert result.exit_code == 1 and reason in words(result)
        assert "Traceback" not in result.output and not hub.repositories


def test_a_hub_that_cannot_be_reached_is_said_so(
    hub: LocalHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    result = adavtp("publish", checkpoint, "somebody/tiny")
    assert result.exit_code == 1 and "http://127.0.0.1:9 could not be reached" in words(result)


def test_an_id_that_is_none_is_refused(hub: LocalHub, checkpoint: Path) -> None:
    for repo_id in ("tiny", "a/b/c", "somebody/", "somebody/ti ny"):
        result = adavtp("publish", checkpoint, repo_id)
        assert result.exit_code == 2 and "`repo_id` is" in words(result)
    assert not hub.repositories


def _only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _llava(folder: Path) -> None:
    fields = tiny_model().config.to_dict()
    config = LlavaConfig(vision_config=fields["vision_config"], text_config=fields["text_config"])
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def _without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00002-of-00002.safetensors"}}')


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


NORM = "model.language_model.norm.weight"

REFUSED = {
    "a weight that is NaN": (_tensors(lambda all_: all_[NORM][3:].fill_(nan)), f"NaN or infinite, {NORM}"),
    "a weight that is infinite": (_tensors(lambda all_: all_[NORM][:1].fill_(-inf)), f"NaN or infinite, {NORM}"),
    "another shape": (
        _tensors(lambda all_: all_.update({NORM: torch.ones(31)})),
        f"`{NORM}` has (31,), expected (32,)",
    ),
    "a weight that is missing": (_tensors(lambda all_: all_.pop(NORM)), f"that its configuration asks for, {NORM}"),
    "no controller": (
        _tensors(lambda all_: [all_.pop(name) for name in list(all_) if "controller" in name or "budget_" in name]),
        "weight(s) that its configuration asks for, model.budget_token",
    ),
    "a pickle": (_only_a_pickle, "has no weights; a published folder needs weights in safetensors form"),
    "LLaVA": (_llava, "has a 'llava' model; expected is an 'adavtp' model; `adavtp convert` makes"),
    "text alone": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        "has a 'bert' model; expected is an 'adavtp' model. `model_type` is 'bert', and transformers",
    ),
    "an adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "`adavtp merge` makes a whole"),
    "a missing shard": (_without_a_shard, "has no model-00002-of-00002.safetensors"),
    "no code": (lambda folder: shutil.rmtree(folder / "adavtp_code"), "has no code"),
    "no processor": (
        lambda folder: [path.unlink() for path in [*folder.glob("*token*"), *folder.glob("*proc*.json")]],
        "has no processor",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_that_nobody_could_load_is_not_published(
    kind: str, hub: LocalHub, checkpoint: Path, tmp_path: Path
) -> None:
    change, reason = REFUSED[kind]
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    change(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    result = adavtp("publish", folder, "somebody/tiny")
    assert result.exit_code == 2 and reason in words(result), words(result)
    assert not hub.repositories


# ---------------------------------------------------------------------------------------------------------------------
# The trainer's own push
# ---------------------------------------------------------------------------------------------------------------------


def _trainer(
    folder: Path, processor: AdaVTPProcessor, base: str = "", adapters: bool = False, **arguments: Any
) -> AdaVTPTrainer:
    model = digit_model(processor)
    # As if it had been loaded from there.
    model.config.name_or_path = base
    plain = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True} | (
        {"train_parts": ["decoder"]} if adapters else {}
    )
    return AdaVTPTrainer(
        add_adapters(model, ["decoder"], r=1) if adapters else model,
        AdaVTPTrainingArguments(str(folder), **plain | quiet | arguments),
        train_dataset=conversation_rows(4),
        data_collator=BudgetCollator(processor, (0.3, 0.9)),
    )


def test_what_a_trainer_pushes_is_what_publish_makes_of_the_folder_it_saved_and_says_how_it_was_trained(
    hub: LocalHub, processor: AdaVTPProcessor, tmp_path: Path
) -> None:
    trainer = _trainer(tmp_path / "out", processor, "llava-hf/llava-1.5-7b-hf", hub_model_id="somebody/pushed")
    trainer.train()
    commit = trainer.push_to_hub(private=True)
    assert hub.repositories["model", "somebody/pushed"].private
    assert commit.oid == hub.repositories["model", "somebody/pushed"].commits[-1].oid
    assert adavtp("publish", tmp_path / "out", "somebody/published").exit_code == 0
    pushed, published = hub.files("somebody/pushed"), hub.files("somebody/published")
    assert pushed.keys() == published.keys()
    assert {"model.safetensors", "processor_config.json", "adavtp_code/modeling_adavtp.py"} <= pushed.keys()
    for name in pushed:
        assert pushed[name].replace(b"pushed", b"published") == published[name], name
    # Nothing that was made on the way stays.
    assert not list((tmp_path / "out").glob("_publishing*"))
    card = pushed["README.md"].decode()
    (tmp_path / "card.md").write_text(card)
    data = metadata_load(tmp_path / "card.md")
    assert (data["base_model"], data["license"]) == ("llava-hf/llava-1.5-7b-hf", "llama2")
    first, *_, last = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert f"| out | conversations | not named | 2 | 2 | 5e-05 | 0.3 to 0.9 | {first:.3f} to {last:.3f} |" in card


def test_a_trainer_asked_to_push_stops_before_training_if_the_licence_is_not_known(
    hub: LocalHub, processor: AdaVTPProcessor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="licence of this model is not known.*`hub_license`"):
        _trainer(tmp_path / "out", processor, push_to_hub=True)
    assert not hub.repositories
    with pytest.raises(ValueError, match="push_to_hub\\(license=...\\)"):
        _trainer(tmp_path / "out", processor).push_to_hub()
    trainer = _trainer(tmp_path / "out", processor)
    with pytest.raises(ValueError, match="got {'dataset': 'org/data'}"):
        trainer.push_to_hub(license="mit", dataset="org/data")
    trainer.push_to_hub(license="mit")
    assert "license: mit" in hub.files("somebody/out")["README.md"].decode()


def test_saving_pushes_where_the_arguments_ask_for_it(
    hub: LocalHub, processor: AdaVTPProcessor, tmp_path: Path
) -> None:
    arguments = {"push_to_hub": True, "hub_model_id": "somebody/pushed"}
    trainer = _trainer(tmp_path / "out", processor, "llava-hf/llava-1.5-7b-hf", **arguments)
    trainer.save_model()
    commits = hub.repositories["model", "somebody/pushed"].commits
    assert [commit.message for commit in commits] == ["initial commit", "Model save"]


@pytest.mark.parametrize("strategy", ["end", "checkpoint", "all_checkpoints"])
def test_checkpoints_are_pushed_as_the_strategy_says(
    strategy: str, hub: LocalHub, processor: AdaVTPProcessor, tmp_path: Path
) -> None:
    arguments = {"push_to_hub": True, "hub_model_id": "somebody/pushed", "hub_always_push": True}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "hub_strategy": strategy}
    trainer = _trainer(tmp_path / "out", processor, "llava-hf/llava-1.5-7b-hf", **arguments, **saving)
    trainer.train()
    trainer._finish_current_push()
    commits = hub.repositories["model", "somebody/pushed"].commits
    steps = [f"Training in progress, step {step}" for step in (1, 2)]
    assert [commit.message for commit in commits] == ["initial commit"] + steps * (strategy != "end")
    folders = {path.partition("/")[0] for path in commits[-1].files if "/" in path} - {"adavtp_code"}
    whole = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert folders == whole.get(strategy, set())
    assert ("last-checkpoint/optimizer.pt" in commits[-1].files) == (strategy == "checkpoint")
    for path, file in commits[-1].files.items():
        (tmp_path / "down" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "down" / path).write_bytes(file.content)
    assert all(what_is_missing(tmp_path / "down" / folder) is None for folder in folders), "to resume from"
    top = [path for path in commits[-1].files if "/" not in path]
    assert not [path for path in top if path.endswith((".pt", ".bin", ".pth"))]
    assert not list((tmp_path / "out").glob("_publishing*"))


def test_a_checkpoint_that_cannot_be_published_does_not_end_the_training(
    hub: LocalHub, processor: AdaVTPProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_weights(trainer: AdaVTPTrainer, output_dir: str | None = None, **_: Any) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)

    # As where each process saves its own shard.
    monkeypatch.setattr(AdaVTPTrainer, "save_model", without_weights)
    arguments = {"push_to_hub": True, "hub_model_id": "somebody/pushed", "save_strategy": "steps", "save_steps": 1}
    trainer = _trainer(tmp_path / "out", processor, "llava-hf/llava-1.5-7b-hf", **arguments)
    assert trainer.train().global_step == 2
    assert hub.files("somebody/pushed") == {}


def test_a_model_with_adapters_is_to_be_merged_first(
    hub: LocalHub, processor: AdaVTPProcessor, tmp_path: Path
) -> None:
    trainer = _trainer(tmp_path / "out", processor, adapters=True)
    with pytest.raises(ValueError, match="has adapters.*`adavtp merge`"):
        trainer.push_to_hub(license="mit")
    with pytest.raises(ValueError, match="has adapters.*`adavtp merge`"):
        _trainer(tmp_path / "out", processor, adapters=True, push_to_hub=True)
    assert not hub.repositories


def test_what_model_and_processor_push_themselves_is_what_they_save(
    hub: LocalHub, processor: AdaVTPProcessor, tmp_path: Path
) -> None:
    folder, model = tmp_path / "tiny", digit_model(processor)
    for part in (model, processor):
        part.save_pretrained(folder, push_to_hub=True, repo_id="somebody/direct")
    saved = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert saved == hub.files("somebody/direct").keys()
    assert {"adavtp_code/modeling_adavtp.py", "adavtp_code/processing_adavtp.py", "model.safetensors"} <= saved
    model.push_to_hub("somebody/again")
    loaded = AdaVTPForConditionalGeneration.from_pretrained("somebody/again", cache_dir=tmp_path / "cache")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_errors_of_the_hub_come_out_of_a_trainer_as_sentences(processor: AdaVTPProcessor, tmp_path: Path) -> None:
    with local_hub(tmp_path / "home", token=READING_TOKEN) as hub:
        HfApi(token="hf_of_somebody").create_repo("somebody/pushed")
        trainer = _trainer(tmp_path / "out", processor, hub_model_id="somebody/pushed")
        with pytest.raises(HubRefused, match="no right to write to somebody/pushed"):
            trainer.push_to_hub(license="mit")
        assert hub.files("somebody/pushed") == {}
