"""A recipe runs from nothing to a checkpoint, goes on where it stopped, and says what is wrong before it begins."""

import json
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from typer.testing import CliRunner

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.command_line import app
from adavtp.tasks.digit_scenes import load_digit_questions
from adavtp.trainer.recipes import recipe as recipe_module
from adavtp.trainer.recipes.recipe import Recipe, Stage
from adavtp.trainer.recipes.run import BEGUN, FINISHED, run_recipe
from adavtp.trainer.recipes.stages import check_data
from forked_processes import Forks, as_launched
from tiny_trainers import differing, weights_in

RECIPES = sorted(Path(recipe_module.__file__).parent.glob("*.yaml"))

MODEL = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "image_size": 96,
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "vision_feature_layer": -1,
    "selection_output": "mask",
}
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


def content_of(folder: Path) -> dict[str, Any]:
    """A recipe of all three kinds of stages, two steps each, as it stands in a file."""
    scenes = {"split": "train", "num_scenes": 4, "cache_dir": str(folder / "cache")}
    questions = {"split": "train", "num_questions": 6, "cache_dir": str(folder / "cache")}
    controller = {"train_parts": ["controller", "projector"]}
    content = {
        "seed": 3,
        "model": MODEL,
        "stages": [
            {"name": "see", "kind": "patch_labels", "data": scenes, "training": TRAINING},
            {"name": "speak", "kind": "packed_questions", "data": scenes, "training": TRAINING},
            {
                "name": "choose",
                "kind": "conversations",
                "data": {"path": "digit-scenes"} | questions,
                "eval_data": {"path": "digit-scenes"} | questions | {"split": "validation", "num_questions": 2},
                "budgets": {"budget_range": [0.2, 0.9], "per": "sample"},
                "training": TRAINING
                | controller
                | {"eval_strategy": "steps", "eval_steps": 2, "eval_budgets": [1.0, 0.4]},
            },
        ],
    }
    # A copy, of which a test may change anything.
    return deepcopy(content)


def written(content: Any, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def read(content: Any, folder: Path) -> Recipe:
    return Recipe.from_file(written(content, folder))


def changed(first: Path, second: Path) -> set[str]:
    """Which parts of the model differ between two checkpoints."""
    before, after = weights_in(first), weights_in(second)
    return {".".join(name.split(".")[:2]) for name in differing(after, before)}


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the whole recipe ran once, under `run`."""
    folder = tmp_path_factory.mktemp("recipe")
    assert run_recipe(read(content_of(folder), folder), folder / "run") == folder / "run" / "choose"
    return folder


# What it leaves


def test_every_stage_leaves_a_checkpoint_with_model_processor_and_log(finished: Path) -> None:
    for stage in content_of(finished)["stages"]:
        folder = finished / "run" / stage["name"]
        model = AdaVTPForConditionalGeneration.from_pretrained(folder)
        processor = AdaVTPProcessor.from_pretrained(folder)
        assert model.config.text_config.vocab_size == len(processor.tokenizer)
        assert model.config.image_token_id == processor.image_token_id
        assert json.loads((folder / FINISHED).read_text())["steps"] == 2
        log = json.loads((folder / "training_log.json").read_text())
        assert log["stage"] == Stage(**stage).__dict__
        assert [entry["step"] for entry in log["log"] if "loss" in entry] == [1, 2]


def test_the_saved_configuration_is_the_recipe_s(finished: Path) -> None:
    config = AdaVTPForConditionalGeneration.from_pretrained(finished / "run" / "choose").config
    for part in ("vision_config", "text_config"):
        for name, value in MODEL[part].items():
            assert getattr(getattr(config, part), name) == value, name
    assert (config.vision_feature_layer, config.selection_output) == (-1, "mask")
    assert config.image_seq_length == config.num_patches == 144
    processor = AdaVTPProcessor.from_pretrained(finished / "run" / "choose")
    text = config.text_config
    tokenizer = processor.tokenizer
    assert (text.pad_token_id, text.bos_token_id, text.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


def test_a_stage_trains_its_parts_and_hands_the_rest_on(finished: Path) -> None:
    run = finished / "run"
    assert {"model.multi_modal_projector", "model.language_model"} <= changed(run / "see", run / "speak")
    assert "model.vision_tower" not in changed(run / "see", run / "speak")
    assert changed(run / "speak", run / "choose") == {
        "model.budget_token",
        "model.controller",
        "model.multi_modal_projector",
    }


def test_the_log_has_evaluations_at_their_budgets(finished: Path) -> None:
    log = json.loads((finished / "run" / "choose" / "training_log.json").read_text())["log"]
    (evaluation,) = [entry for entry in log if "eval_loss" in entry]
    assert {"eval_loss_b1.0", "eval_loss_b0.4"} <= evaluation.keys()


# Going on


def test_a_finished_recipe_is_not_run_again(finished: Path) -> None:
    before = times(finished / "run")
    assert run_recipe(read(content_of(finished), finished), finished / "run") == finished / "run" / "choose"
    assert times(finished / "run") == before


@pytest.mark.parametrize(("stage", "checkpoint"), [("see", 1), ("speak", 2), ("choose", 0)])
def test_an_interrupted_recipe_ends_where_one_without_a_break_ends(
    finished: Path, tmp_path: Path, stage: str, checkpoint: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    names = [stage["name"] for stage in content_of(finished)["stages"]]
    for name in names[names.index(stage) + 1 :]:
        shutil.rmtree(run / name)
    # What a process leaves that is killed while it writes the checkpoints after this one.
    for file in [*(run / stage).iterdir()]:
        is_checkpoint = file.name.startswith("checkpoint-")
        if is_checkpoint and int(file.name.removeprefix("checkpoint-")) > checkpoint:
            (file / "trainer_state.json").unlink()
            (file / "model.safetensors").write_bytes(b"cut off")
        elif not is_checkpoint and file.is_file() and file.name != BEGUN:
            file.unlink()
    before = times(run / names[0]) if stage != names[0] else {}
    run_recipe(read(content_of(finished), finished), run)
    assert before == (times(run / names[0]) if stage != names[0] else {})
    for name in names:
        assert differing(weights_in(run / name), weights_in(finished / "run" / name)) == [], name
        log = json.loads((run / name / "training_log.json").read_text())["log"]
        assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]


def train(recipe: str, output: str) -> None:
    app(["train", recipe, "--output", output])


def test_two_processes_carry_a_recipe_out_as_one_does(forks: Forks, tmp_path: Path) -> None:
    content = content_of(tmp_path)
    _, speak, choose = content["stages"]
    for stage in (speak, choose):
        # Adam makes a step of what is only rounding.
        stage["training"] = stage["training"] | {"optim": "sgd", "save_total_limit": 1}
    # A choice without noise, which every process draws for itself.
    content["stages"] = [speak, choose | {"reducer": "grid"}]
    choose["training"]["train_parts"] = ["projector", "decoder"]
    alone = run_recipe(read(content, tmp_path), tmp_path / "alone")
    for stage in content["stages"]:
        stage["training"] = stage["training"] | {"per_device_train_batch_size": 1}
    arguments = [__file__, "train", str(written(content, tmp_path)), str(tmp_path / "two")]
    forks.begin(arguments, tmp_path / "said", as_launched(2))
    assert forks.exit_codes(300) == [0, 0], (tmp_path / "said").read_text()[-5000:]
    two = tmp_path / "two" / "choose"
    assert {path.name for path in two.iterdir()} == {path.name for path in alone.iterdir()}
    for stage in content["stages"]:
        expected = weights_in(tmp_path / "alone" / stage["name"])
        for name, value in weights_in(tmp_path / "two" / stage["name"]).items():
            assert torch.allclose(value, expected[name], atol=1e-4), name
        logs = [
            json.loads((run / stage["name"] / "training_log.json").read_text()) for run in (alone.parent, two.parent)
        ]
        losses = [[entry.get("loss", entry.get("eval_loss")) for entry in log["log"]] for log in logs]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert changed(two.parent / "speak", two) == {
        "model.multi_modal_projector",
        "model.language_model",
        "lm_head.weight",
    }


def test_a_stage_says_where_the_choice_gets_its_gradient(tmp_path: Path) -> None:
    content = content_of(tmp_path)
    _, speak, choose = content["stages"]
    content["stages"] = [
        speak | {"gradient_gates": "features"},
        choose | {"name": "as-before"},
        choose | {"gradient_gates": "attention"},
    ]
    last = run_recipe(read(content, tmp_path), tmp_path / "run")
    gates = [
        json.loads((last.parent / stage["name"] / "config.json").read_text())["gradient_gates"]
        for stage in content["stages"]
    ]
    assert gates == ["features", "features", "attention"]
    content["stages"][0]["gradient_gates"] = "logits"
    with pytest.raises(ValueError, match="gradient_gates.*'logits'"):
        read(content, tmp_path)


def test_a_folder_of_another_recipe_is_an_error(finished: Path) -> None:
    content = content_of(finished)
    content["stages"].insert(0, content["stages"][0] | {"name": "before"})
    with pytest.raises(ValueError, match="not the recipe's first"):
        run_recipe(read(content, finished), finished / "run")


@pytest.mark.parametrize("field", ["seed", "stage"])
def test_a_finished_stage_is_not_taken_for_one_with_other_settings(finished: Path, field: str) -> None:
    content = content_of(finished)
    if field == "seed":
        content["seed"] = 1234
    else:
        content["stages"][0]["training"]["learning_rate"] = 0.123
    with pytest.raises(ValueError, match="trained with other settings.*(1234|0.123)"):
        run_recipe(read(content, finished), finished / "run")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"steps": 2}', '{"model": {}, "seed": 3, "stage": 5}'])
@pytest.mark.parametrize("name", [BEGUN, FINISHED])
def test_a_folder_that_does_not_say_what_it_was_trained_with_is_refused(
    finished: Path, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / "see").mkdir()
    (tmp_path / "see" / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} does not say what its folder was trained with"):
        run_recipe(read(content_of(finished), finished), tmp_path)


def test_checkpoints_of_another_run_are_not_gone_on_with(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run" / "see" / "checkpoint-1", tmp_path / "see" / "checkpoint-1")
    content = content_of(finished)
    with pytest.raises(ValueError, match=f"has checkpoint-1 and no {BEGUN}"):
        run_recipe(read(content, finished), tmp_path)
    shutil.copy(finished / "run" / "see" / BEGUN, tmp_path / "see")
    for change in ({"seed": 1234}, {"model": MODEL | {"selection_output": "gather"}}):
        with pytest.raises(ValueError, match="see was begun with other settings"):
            run_recipe(read(content | change, finished), tmp_path)
    shutil.rmtree(tmp_path / "see")
    (tmp_path / "see").touch()
    with pytest.raises(ValueError, match="which is a file; choose another folder"):
        run_recipe(read(content, finished), tmp_path)


def test_data_that_load_dataset_takes_are_read_as_sources_are(finished: Path, tmp_path: Path) -> None:
    rows = [{"id": "q7", "messages": [{"role": "user", "content": "a"}]}] * 2
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    content = content_of(finished)
    stage = content["stages"][2] | {"data": {"path": str(tmp_path / "data")}}
    content |= {"model": {"checkpoint": str(finished / "run" / "speak")}, "stages": [without("eval_data", stage)]}
    content["stages"][0]["training"] = TRAINING | {"train_parts": ["controller"]}
    with pytest.raises(ValueError, match="Sample 'q7': the assistant says nothing"):
        run_recipe(read(content, tmp_path), tmp_path / "run")


def test_a_tower_that_one_stage_froze_sees_better_after_the_next(tmp_path: Path) -> None:
    content = content_of(tmp_path)
    see, speak, _ = content["stages"]
    content["stages"] = [speak, see]
    run_recipe(read(content, tmp_path), tmp_path / "run")
    assert changed(tmp_path / "run" / "speak", tmp_path / "run" / "see") == {"model.vision_tower"}


# Where it begins


def test_a_recipe_starts_from_a_checkpoint_with_fields_of_its_own(finished: Path, tmp_path: Path) -> None:
    data = load_digit_questions("train", 4, cache_dir=tmp_path / "cache")
    data.save_to_disk(tmp_path / "data")
    content = content_of(finished)
    stage = content["stages"][2] | {"data": {"path": str(tmp_path / "data")}}
    content["model"] = {"checkpoint": str(finished / "run" / "speak"), "selection_output": "gather"}
    content["stages"] = [stage]
    folder = run_recipe(read(content, tmp_path), tmp_path / "run")
    assert AdaVTPForConditionalGeneration.from_pretrained(folder).config.selection_output == "gather"
    assert "model.language_model" not in changed(finished / "run" / "speak", folder)


# What a file may say


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_can_be_read(path: Path) -> None:
    recipe = Recipe.from_file(path)
    assert recipe.stages


def test_the_example_in_the_documentation_can_be_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", recipe_module.__doc__, flags=re.DOTALL)
    assert read(yaml.safe_load(example), tmp_path).stages[0].budgets["per"] == "sample"


def without(name: str, content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


STAGE = {"name": "see", "kind": "patch_labels"}
TALK = {"name": "talk", "kind": "conversations"}
PLAIN = {"model": {"checkpoint": "somewhere"}, "stages": [STAGE]}
EVALUATION = {"questions": 6, "budgets": [1.0], "reducers": ["adaptive"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found None"),
        ([], "found"),
        (PLAIN | {"sed": 1}, "sed"),
        (without("model", PLAIN), "missing field.*model"),
        (without("stages", PLAIN), "missing field.*stages"),
        (PLAIN | {"stages": []}, "at least one"),
        (PLAIN | {"stages": None}, "at least one"),
        (PLAIN | {"stages": [STAGE, STAGE]}, "no name twice"),
        *(
            (PLAIN | {"stages": [STAGE | {"name": name}]}, "`name` names a folder of the run")
            for name in ("../outside", "/outside", "a/b", "", ".", "..", ".hidden", "a b")
        ),
        *((PLAIN | {"stages": [STAGE | {"name": name}]}, "`name` names a folder of the run") for name in (3, None)),
        (PLAIN | {"stages": [STAGE | {"steps": 3}]}, "steps"),
        (PLAIN | {"stages": [without("name", STAGE)]}, "missing field.*name"),
        (PLAIN | {"stages": ["see"]}, "found 'see'"),
        (
            PLAIN | {"stages": [STAGE | {"kind": "magic"}]},
            "'magic'.*patch_labels, told_questions, told_patches, shown_questions, packed_questions, conversations",
        ),
        (PLAIN | {"stages": [STAGE | {"training": {"max_step": 3}}]}, "max_step"),
        (PLAIN | {"stages": [STAGE | {"training": {"train_parts": ["vision"]}}]}, "train_parts"),
        (PLAIN | {"stages": [TALK | {"budgets": {"range": [0.2, 1.0]}}]}, "range"),
        (PLAIN | {"stages": [TALK | {"budgets": {"budget_range": [0.2, 2.0]}}]}, "budget_range"),
        (PLAIN | {"model": {"vision_config": {}}}, "text_config"),
        (PLAIN | {"model": {}}, "checkpoint"),
        (PLAIN | {"evaluation": EVALUATION | {"num_questions": 6}}, "num_questions"),
        (PLAIN | {"evaluation": without("reducers", EVALUATION)}, "missing field.*reducers"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_carried_out_is_an_error_that_names_what_is_wrong(
    content: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read(content, tmp_path)


# A recipe of one stage; what stands in it is put in the place of `%s`.
WRITTEN = "model: {checkpoint: somewhere}\nstages: [{name: talk, kind: conversations, %s}]\n"
HOSTILE = {
    "broken": ("a: [1\n b: {", "is no YAML"),
    "UTF-16": ("a: b".encode("utf-16"), "is no YAML"),
    "zeros": (bytes(20), "is no YAML"),
    "nested too deeply": ("a: " + "[" * 3000, "is no YAML"),
    "a tag of Python's": (WRITTEN % "data: !!python/object/apply:os.system ['true']", "is no YAML"),
    "a tag": (WRITTEN % "data: !env HOME", "is no YAML"),
    "a name twice": (WRITTEN % "" + "seed: 1\nseed: 2\n", "'seed' comes twice"),
    "a name twice in a stage": (WRITTEN % "data: {path: a, path: b}", "'path' comes twice"),
    "more than memory holds": (
        "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)),
        "more than 10000 values",
    ),
    "what holds itself": ("model: &m {checkpoint: *m}\nstages: []", "more than 10000 values"),
    "a date": (WRITTEN % "data: {path: x, split: 2020-01-01}", "a date; write it in quotes"),
    "a time of day": (WRITTEN % "training: {max_steps: 1:30}", "'1:30' is no decimal number"),
    "an octal number": (WRITTEN % "" + "seed: 010", "'010' is no decimal number"),
    "a number without an end": (WRITTEN % "training: {learning_rate: .inf}", "has inf; allowed are finite"),
    "no number": (WRITTEN % "budgets: {budget_range: [.nan, 1.0]}", "has nan; allowed are finite"),
    "what it goes on from": (WRITTEN % "training: {resume_from_checkpoint: x}", "unknown field.s. resume_from"),
    "a list for a checkpoint": (WRITTEN.replace("somewhere", "[x]") % "", "`checkpoint` is \\['x'\\]"),
    "a number for a name": (WRITTEN % "1: 2", "unknown field\\(s\\) 1"),
    "a model in a word": (WRITTEN.replace("{checkpoint: somewhere}", "x") % "", "`model` is 'x'"),
    "a seed in words": (WRITTEN % "" + "seed: x", "`seed` is 'x'"),
    "a seed below 0": (WRITTEN % "" + "seed: -1", "`seed` is -1"),
    "data in a word": (WRITTEN % "data: x", "`data` is 'x'"),
    "sources in a word": (WRITTEN % "data: {sources: x}", "`sources` is 'x'"),
    "data without a path": (WRITTEN % "data: {split: train}", "has no 'path'"),
    "a length in words": (WRITTEN % "data: {sources: [], max_length: x}", "`max_length` is 'x'"),
    "digit scenes with more": (
        WRITTEN % "data: {path: digit-scenes, split: train, num_questions: 3, shuffle: true}",
        "unexpected keyword argument 'shuffle'",
    ),
    "a range that is a number": (WRITTEN % "budgets: {budget_range: 5}", "`budget_range` is 5"),
    "a range in words": (WRITTEN % "budgets: {budget_range: [a, b]}", "`budget_range` is \\['a', 'b'\\]"),
    "training that is a list": (WRITTEN % "training: [a]", "`training` is \\['a'\\]"),
    "steps in words": (WRITTEN % "training: {max_steps: x}", "`max_steps` is 'x'"),
    "parts in a word": (WRITTEN % "training: {train_parts: controller}", "`train_parts` is 'controller'"),
    "a rank in words": (WRITTEN % "adapters: {r: x}", "`r` is 'x'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_file_says_in_another_form_is_one_sentence(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        for stage in Recipe.from_file(path).stages:
            check_data(stage)


@pytest.mark.parametrize("written_as", ["1e-3", "1E-03", "1.0e-3", "0.001"])
def test_a_number_with_an_exponent_is_a_number(written_as: str, tmp_path: Path) -> None:
    path = written(PLAIN, tmp_path)
    path.write_text(path.read_text() + f"  training: {{learning_rate: {written_as}}}\n")
    assert Recipe.from_file(path).stages[0].training["learning_rate"] == 1e-3


# The command


def test_the_command_carries_a_recipe_out_and_measures(finished: Path, tmp_path: Path) -> None:
    content = content_of(finished)
    content["stages"] = content["stages"][1:2]
    content["evaluation"] = {"questions": 6, "budgets": [1.0, 0.4], "reducers": ["adaptive", "random"]}
    path = written(content, tmp_path)
    result = CliRunner().invoke(app, ["train", str(path), "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "speak" / "evaluation.json").read_text())
    assert [(row["reducer"], row["budget"]) for row in report["rows"]] == [
        ("full", 1.0),
        ("adaptive", 0.4),
        ("random", 0.4),
    ]
    assert report["num_questions"] == 6


def test_a_recipe_is_measured_on_the_task_of_its_model(tmp_path: Path) -> None:
    pages = {"path": "pages", "split": "train", "num_pages": 4, "cache_dir": str(tmp_path / "cache")}
    large = MODEL["vision_config"] | {"image_size": 192, "patch_size": 32}
    content = {
        "model": MODEL | {"task": "pages", "vision_config": large},
        "stages": [{"name": "speak", "kind": "packed_questions", "data": pages, "training": TRAINING}],
        "evaluation": {"questions": 3, "budgets": [1.0], "reducers": ["full"]},
    }
    result = CliRunner().invoke(app, ["train", str(written(content, tmp_path)), "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "speak" / "evaluation.json").read_text())["dataset"] == "pages"
