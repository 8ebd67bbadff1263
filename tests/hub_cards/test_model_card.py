"""A model card says what its files say: results the Hub can read, data, base model and licence, and never more."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import metadata_load
from huggingface_hub.repocard_data import ModelCardData, model_index_to_eval_results
from PIL import Image

from adavtp.hub_cards.curve_picture import save_curve
from adavtp.hub_cards.licence import Origin, origin_of
from adavtp.hub_cards.model_card import model_card
from adavtp.hub_cards.training_record import TrainingRecord, is_hub_id
from adavtp.modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from tiny_conversations import digit_model, digit_processor

LLAVA = "llava-hf/llava-1.5-7b-hf"


def _row(reducer: str, budget: float, num_keep: int, accuracy: float, **more: Any) -> dict[str, Any]:
    interval = {"accuracy_low": accuracy - 0.02, "accuracy_high": accuracy + 0.02}
    cost = {"decoder_tokens": 20.0 + num_keep, "milliseconds": 3.0}
    return {"reducer": reducer, "budget": budget, "num_keep": num_keep, "accuracy": accuracy} | interval | cost | more


def _evaluation(dataset: str | None = None, **more: Any) -> dict[str, Any]:
    rows = [_row("adaptive", 1.0, 80, 0.9), _row("adaptive", 0.25, 20, 0.875), _row("random", 0.25, 20, 0.5)]
    about = {"command": "adavtp evaluate x", "versions": {"torch": "1"}, "split": "test", "num_questions": 40}
    return about | {"rows": rows} | ({} if dataset is None else {"dataset": dataset}) | more


@pytest.fixture(scope="module")
def model() -> AdaVTPForConditionalGeneration:
    return digit_model(digit_processor())


@pytest.fixture(scope="module")
def checkpoint(model: AdaVTPForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    digit_processor().save_pretrained(folder)
    return folder


def _record(folder: Path, recipe: dict[str, Any] | None = None, *evaluations: dict[str, Any]) -> TrainingRecord:
    """A record with these contents, in files as a run leaves them."""
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for number, evaluation in enumerate(evaluations):
        (folder / f"evaluation_{number}.json").write_text(json.dumps(evaluation))
    return TrainingRecord.found_in(folder)


def _recipe(*data: dict[str, Any], **model: Any) -> dict[str, Any]:
    stages = [{"name": f"{n}", "kind": "conversations", "data": one} for n, one in enumerate(data)]
    return {"model": model, "stages": stages}


def _metadata(checkpoint: Path, record: TrainingRecord, folder: Path, origin: Origin | None = None) -> dict[str, Any]:
    """What the Hub reads from the card's file."""
    card = model_card(checkpoint, "somebody/model", record, origin or origin_of(folder, record))
    card.save(folder / "card.md")
    return metadata_load(folder / "card.md")


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def test_results_come_back_from_the_cards_file_through_the_hubs_own_reader(checkpoint: Path, tmp_path: Path) -> None:
    digits, pope = _evaluation(), _evaluation("org/pope", metric="f1")
    data = _metadata(checkpoint, _record(tmp_path, None, digits, pope), tmp_path)
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "model"
    read = [
        (result.dataset_type, result.dataset_name, result.dataset_split, result.metric_type, result.metric_value)
        for result in results
    ]
    assert read == [
        *[("digit-scenes", "digit scenes", "test", "accuracy", value) for value in (0.9, 0.875, 0.5)],
        *[("org/pope", "org/pope", "test", "f1", value) for value in (0.9, 0.875, 0.5)],
    ]
    assert [result.metric_args for result in results[:3]] == [
        {"token_budget": budget, "reducer": reducer}
        for reducer, budget in (("adaptive", 1.0), ("adaptive", 0.25), ("random", 0.25))
    ]


def test_a_card_has_one_result_and_one_picture_for_each_data_set(checkpoint: Path, tmp_path: Path) -> None:
    data = _metadata(checkpoint, _record(tmp_path, None, _evaluation(), _evaluation("org/pope")), tmp_path)
    (entry,) = data["model-index"]
    assert [(result["dataset"]["type"], len(result["metrics"])) for result in entry["results"]] == [
        ("digit-scenes", 3),
        ("org/pope", 3),
    ]
    # What the Hub's library reads, it writes again as it was.
    assert ModelCardData(**data).to_dict()["model-index"] == data["model-index"]
    card = (tmp_path / "card.md").read_text()
    assert "](budget_curve_01.png)" in card and "](budget_curve_02.png)" in card


def test_the_trade_off_is_worked_out_from_the_rows(checkpoint: Path, tmp_path: Path) -> None:
    card = str(model_card(checkpoint, "a/b", _record(tmp_path, None, _evaluation()), Origin(None, None)))
    # 20 + 20 of 20 + 80 decoder tokens; 87.5 against 90.0 percent.
    words = " ".join(card.split())
    assert "decoder sees 20 of 80 visual tokens and 40.0 % of all its tokens" in words
    assert "-2.5 percentage points" in words
    assert "| random | 0.25 | 20 | 50.0 (48.0 to 52.0) | -40.0 | 40.0 | 3.0 |" in card


def test_paths_of_somebodys_machine_are_not_on_the_card(checkpoint: Path, tmp_path: Path) -> None:
    record = _record(tmp_path, _recipe({"path": "/home/me/secret/mix.json"}), _evaluation("pope:/home/me/secret/pope"))
    card = str(model_card(checkpoint, "a/b", record, Origin(None, None)))
    assert "secret" not in card
    assert "mix.json" in card and "pope:pope" in card


# ---------------------------------------------------------------------------------------------------------------------
# The picture
# ---------------------------------------------------------------------------------------------------------------------


def test_the_same_evaluation_gives_the_same_small_picture(tmp_path: Path) -> None:
    counted = _evaluation(rows=[_row("a", 0.1 * n, n, 0.05 * n, flops=1e9 * n) for n in range(1, 10)])
    for name in ("one.png", "two.png"):
        save_curve(counted, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").stat().st_size < 60_000


def test_the_picture_changes_with_the_numbers_and_has_a_second_panel_where_flops_are_counted(tmp_path: Path) -> None:
    rows = _evaluation()["rows"]
    pictures = {
        "as_measured": rows,
        "worse": [row | {"accuracy": row["accuracy"] - 0.1} for row in rows],
        "counted": [row | {"flops": 1e9 * row["num_keep"]} for row in rows],
    }
    for name, some in pictures.items():
        save_curve(_evaluation(rows=some), tmp_path / f"{name}.png")
    images = {name: Image.open(tmp_path / f"{name}.png").convert("RGB") for name in pictures}
    assert images["as_measured"].tobytes() != images["worse"].tobytes()
    assert images["counted"].width > 1.5 * images["as_measured"].width


# ---------------------------------------------------------------------------------------------------------------------
# Data, base model, licence
# ---------------------------------------------------------------------------------------------------------------------


def test_metadata_name_the_data_sets_that_are_on_the_hub_and_the_text_names_all(
    checkpoint: Path, tmp_path: Path
) -> None:
    sources = [{"path": "org/chat", "weight": 0.5}, {"path": "llava_v1_5_mix665k.json", "images": "coco"}]
    tar = {"path": "shards/*.tar", "format": "webdataset", "streaming": True}
    record = _record(tmp_path, _recipe({"path": "org/vqa"}, {"sources": [*sources, tar, {"path": "org/vqa"}]}))
    assert _metadata(checkpoint, record, tmp_path)["datasets"] == ["org/vqa", "org/chat"]
    card = (tmp_path / "card.md").read_text()
    assert "llava_v1_5_mix665k.json" in card and "*.tar" in card


def test_a_folder_is_not_taken_for_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    assert is_hub_id("org/mine") and not is_hub_id("data/mine")
    assert not any(map(is_hub_id, ["digit-scenes", "a/b/c", "/a", "folder/train.json", "folder/*.tar", None]))


@pytest.mark.parametrize(
    ("base", "licence"), [(LLAVA, "llama2"), ("liuhaotian/llava-v1.5-13b", "llama2"), ("somebody/unknown", None)]
)
def test_a_model_inherits_the_licence_of_a_base_that_is_known_and_no_other(
    base: str, licence: str | None, checkpoint: Path, tmp_path: Path
) -> None:
    record = _record(tmp_path, _recipe({"path": "org/vqa"}, checkpoint=base))
    data = _metadata(checkpoint, record, tmp_path)
    assert (data["base_model"], data["base_model_relation"], data.get("license")) == (base, "finetune", licence)


@pytest.mark.parametrize("task", ["digit-scenes", "pages"])
def test_what_learned_a_drawn_task_from_nothing_is_apache_and_from_llava_is_not(task: str, tmp_path: Path) -> None:
    drawn = {"path": task}
    of_recipe = {}
    for name, recipe in {
        "nothing": _recipe(drawn),
        "llava": _recipe(drawn, checkpoint=LLAVA),
        "photographs": _recipe(drawn, {"path": "org/photographs"}),
    }.items():
        (tmp_path / name).mkdir()
        of_recipe[name] = origin_of(tmp_path / name, _record(tmp_path / name, recipe)).license
    assert of_recipe == {"nothing": "apache-2.0", "llava": "llama2", "photographs": None}


@pytest.mark.parametrize(
    ("path", "question", "content"),
    [
        ("digit-scenes", "What colour is the largest digit?", "coloured handwritten digits"),
        (None, "What colour is the largest digit?", "coloured handwritten digits"),
        ("pages", "How many entries are there?", "pages of dense text"),
        ("org/vqa", "What is in the picture?", "where the cost of looking has to be limited"),
    ],
)
def test_the_card_has_a_question_and_a_use_for_what_was_learned(
    path: str | None, question: str, content: str, checkpoint: Path, tmp_path: Path
) -> None:
    recipe = _recipe({} if path is None else {"path": path})
    # What such a stage draws it need not say.
    recipe["stages"][0]["kind"] = "conversations" if path == "org/vqa" else "packed_questions"
    data = _metadata(checkpoint, _record(tmp_path, recipe), tmp_path)
    card = (tmp_path / "card.md").read_text()
    assert f'image, "{question}", token_budget' in card and content in " ".join(card.split())
    assert ("digit-scenes" in data["tags"], "pages" in data["tags"]) == ("largest" in question, path == "pages")


def test_a_folder_that_training_began_with_says_its_base_and_licence(tmp_path: Path) -> None:
    converted, run = tmp_path / "converted", tmp_path / "run"
    converted.mkdir()
    run.mkdir()
    (converted / "README.md").write_text(f"---\nlicense: llama2\nbase_model: {LLAVA}\n---\n\n# x\n")
    record = _record(run, _recipe({"path": "org/vqa"}, checkpoint=str(converted)))
    assert origin_of(run, record) == Origin(LLAVA, "llama2")


def test_what_was_trained_or_converted_says_what_it_began_with(tmp_path: Path) -> None:
    contents = {
        "converted": ("conversion.json", {"source": LLAVA}),
        "stage": ("finished.json", {"steps": 3, "model": {"checkpoint": LLAVA}}),
        "run": ("finished.json", {"steps": 3, "model": {"checkpoint": str(tmp_path / "converted")}}),
    }
    for name, (file, content) in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(content))
        assert origin_of(tmp_path / name, TrainingRecord.found_in(tmp_path / name)) == Origin(LLAVA, "llama2")


def test_folders_that_name_each_other_do_not_hang_the_search(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        content = {"steps": 3, "model": {"checkpoint": str(tmp_path / other)}}
        (tmp_path / name / "finished.json").write_text(json.dumps(content))
    assert origin_of(tmp_path / "a", TrainingRecord.found_in(tmp_path / "a")) == Origin(None, None)


def test_what_the_user_says_goes_before_everything(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# x\n")
    record = _record(tmp_path, _recipe({"path": "digit-scenes"}, checkpoint=LLAVA))
    assert origin_of(tmp_path, record) == Origin(LLAVA, "mit")
    assert origin_of(tmp_path, record, "org/base", "other") == Origin("org/base", "other")


def test_an_unknown_licence_is_not_in_the_metadata_and_the_text_says_so(checkpoint: Path, tmp_path: Path) -> None:
    assert "license" not in _metadata(checkpoint, TrainingRecord(), tmp_path)
    assert "Nobody said under which licence" in (tmp_path / "card.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Size
# ---------------------------------------------------------------------------------------------------------------------


def test_parameters_are_counted_in_the_weight_files_shards_and_all(
    model: AdaVTPForConditionalGeneration, checkpoint: Path, tmp_path: Path
) -> None:
    number = f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    assert f"It has {number} parameters (float32)" in str(
        model_card(checkpoint, "a/b", TrainingRecord(), Origin(None, None))
    )
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    digit_processor().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert f"It has {number} parameters (float32)" in str(
        model_card(tmp_path, "a/b", TrainingRecord(), Origin(None, None))
    )


def test_published_records_have_no_place_of_this_machine_and_no_token(tmp_path: Path) -> None:
    home = "/home/alice/private data"
    stage = {"name": "a", "kind": "conversations", "data": {"path": f"{home}/rows.json"}}
    secret = stage | {"training": {"hub_token": "hf_secret", "max_steps": 3}}
    (tmp_path / "log.json").write_text(json.dumps({"stage": secret, "log": []}))
    (tmp_path / "own.yaml").write_text(f"# ours\nmodel: {{checkpoint: {home}/llava}}\nstages: [{json.dumps(stage)}]\n")
    row = {"reducer": "grid", "budget": 0.4, "num_keep": 4} | dict.fromkeys(
        ("accuracy", "accuracy_low", "accuracy_high", "decoder_tokens", "milliseconds"), 0.5
    )
    command = f"adavtp evaluate runs/a --data 'vqav2:{home}' --output=/home/alice/out"
    measured = {"command": command, "versions": {}, "split": "test", "num_questions": 3, "rows": [row]}
    (tmp_path / "measured.json").write_text(json.dumps(measured | {"dataset": f"vqav2:{home}"}))
    files = [tmp_path / name for name in ("own.yaml", "log.json", "measured.json")]
    (tmp_path / "out").mkdir()
    record = TrainingRecord.found_in(tmp_path, files[0], [files[1]], [files[2]]).copy_to(tmp_path / "out")
    published = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "alice" not in published and "hf_secret" not in published
    assert record.stages[0]["data"] == {"path": "rows.json"} and record.base_model == "llava"
    assert "# ours" in record.recipe.read_text()
    assert record.results[0]["command"] == "adavtp evaluate runs/a --data 'vqav2:private data' --output=out"
