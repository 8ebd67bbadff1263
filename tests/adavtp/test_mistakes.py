"""What a user can get wrong at the command line is answered with a sentence; what we got wrong says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner, Result

from adavtp.command_line import app
from adavtp.commands.console import Command
from armed_folders import armed_folder
from repository import DIGITS


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text_of(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def field(name: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))

    return change


# What is done to a checkpoint's folder.
DAMAGES = {
    "a configuration that is no JSON": written("config.json", '{"a":'),
    "a configuration that is a list": written("config.json", "[1]"),
    "a configuration of another model": field("model_type", "llama"),
    "a budget in words": field("token_budget", "x"),
    "a text model that is a number": field("text_config", 3),
    "weights cut off": lambda folder: (folder / "model.safetensors").write_bytes(b"123"),
    "a tokenizer that is no JSON": written("tokenizer.json", "{"),
    "a tokenizer that is a list": written("tokenizer.json", "[]"),
    "a processor that is a list": written("processor_config.json", "[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_a_sentence(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(DIGITS, folder)
    DAMAGES[damage](folder)
    result = run("ask", Path("docs/scene.png").resolve(), "q", "--checkpoint", folder)
    assert result.exit_code == 2, text_of(result)
    assert "fault of AdaVTP" not in text_of(result)
    published = run("publish", folder, "user/name", "--dry-run", "--license", "mit")
    assert published.exit_code == 2 and "fault of AdaVTP" not in text_of(published), text_of(published)
    if damage.startswith(("a configuration", "a budget", "a text")):
        for command in (["flops", "--checkpoint", folder], ["plan", "--checkpoint", folder]):
            result = run(*command)
            assert result.exit_code == 2 and "fault of AdaVTP" not in text_of(result), text_of(result)


RECIPES = {
    "no YAML": "a: [1\n b: {",
    "a list": "- 1\n- 2\n",
    "a word": "hello",
    "nothing": "",
    "stages that are a word": "stages: hi\n",
    "a stage that is a number": "stages: [1]\n",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_no_recipe_is_a_sentence(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPES[recipe])
    result = run("train", file)
    assert result.exit_code == 2 and "fault of AdaVTP" not in text_of(result), text_of(result)


STAGE = {"name": "a", "kind": "packed_questions", "data": {"split": "train", "num_scenes": 8}}
# What a stage, or another field of a recipe, has in place of what it should.
STAGES = {
    "name": ["", 3, "../x"],
    "kind": ["nothing", 3, [1]],
    "data": ["x", [1], None, {"x": 1}, {"split": "train"}, {"split": "train", "num_scenes": "x"}],
    "eval_data": ["x", {"x": 1}],
    "budgets": ["x", {"budget_range": "x"}, {"budget_range": ["a", "b"]}, {"budget_range": None}, {"seed": "x"}],
    "reducer": [3, [[1]], {}, {"name": 3}, "nothing"],
    "training": ["x", [1], {"max_steps": "x"}, {"learning_rate": "x"}, {"train_parts": 3}, {"bf16": "x"}]
    + [{"gradient_accumulation_steps": 0}, {"per_device_train_batch_size": 0}, {"hub_token": "hf_x"}],
    "adapters": ["x", {"r": "x"}, {"target_modules": 3}, {"quantize": 4}],
}
OTHERS = {
    "model": ["x", None, [1], {}, {"checkpoint": "/nowhere"}, {"vision_config": 1, "text_config": 2}]
    + [{"vision_config": {}, "text_config": {}}, {"checkpoint": str(DIGITS), "nonsense": 1}],
    "stages": [None, "x", [1], {"a": 1}, [STAGE, STAGE]],
    "seed": ["x", [1], 1.5, None],
    "reducer": [3, "nothing"],
    "evaluation": ["x", {"questions": "x", "budgets": [0.4], "reducers": ["grid"]}]
    + [
        {"questions": 0, "budgets": [0.4], "reducers": ["grid"]},
        {"questions": 6, "budgets": [7.5], "reducers": ["grid"]},
    ]
    + [{"questions": 6, "budgets": [0.4], "reducers": ["nothing"]}, {"questions": 6, "budgets": 3, "reducers": 4}],
}
RECIPE = {"model": {"checkpoint": str(DIGITS)}, "stages": [STAGE]}
BROKEN_RECIPES = [
    *[(name, RECIPE | {"stages": [STAGE | {name: value}]}) for name, values in STAGES.items() for value in values],
    *[(name, RECIPE | {name: value}) for name, values in OTHERS.items() for value in values],
]


@pytest.mark.parametrize("number", range(len(BROKEN_RECIPES)))
def test_a_recipe_with_something_else_in_a_field_is_a_sentence_before_anything_is_trained(
    number: int, tmp_path: Path
) -> None:
    name, content = BROKEN_RECIPES[number]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    result = run("train", tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "fault of AdaVTP" not in text_of(result), text_of(result)
    assert not list(tmp_path.glob("out/**/*.*")), "a checkpoint was written, or a part of it"


PART = {"name": "a", "asks": "q", "against": "random", "questions": 6, "reducers": ["grid", "random"]}
VARIANTS = {"reducers": [], "variants": {"random": {}}, "stage": {"kind": "packed_questions"}}
PARTS = {
    "name": ["../up", "/up", "", 3],
    "asks": [3],
    "against": ["nothing", 3],
    "questions": ["x", 0, None],
    "reducers": ["grid", [3], None],
    "budgets": ["x", [7.5], [[0.4]]],
}
BROKEN_EXPERIMENTS = [
    *[{"parts": [PART | {name: value}]} for name, values in PARTS.items() for value in values],
    *[{"parts": parts} for parts in ("x", [1], None, [], [PART, PART])],
    *[{"budgets": budgets} for budgets in ("x", 0.4, None, [7.5])],
    *[
        {"parts": [PART | VARIANTS | other]}
        for other in ({"variants": [1]}, {"variants": {"random": 1}}, {"stage": "x"})
    ],
    *[{"parts": [PART | VARIANTS | {"stage": stage}]} for stage in ({"x": 1}, {"kind": "nothing"})],
    {"parts": [PART | VARIANTS | {"variants": {"random": {"model": "x"}}}]},
    {"seed": "x"},
    {"title": 3},
]


@pytest.mark.parametrize("number", range(len(BROKEN_EXPERIMENTS)))
def test_an_experiment_with_something_else_in_a_field_is_a_sentence_and_begins_nothing(
    number: int, tmp_path: Path
) -> None:
    content = {"title": "t", "budgets": [0.4], "parts": [PART]} | BROKEN_EXPERIMENTS[number]
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content))
    places = ["--work", tmp_path / "in" / "work", "--output", tmp_path / "in" / "out"]
    result = run("experiment", tmp_path / "experiment.yaml", *places)
    assert result.exit_code == 2 and "fault of AdaVTP" not in text_of(result), text_of(result)
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.yaml"]


LOG = {"stage": {"name": "a", "kind": "packed_questions"}, "log": []}
ROW = {"reducer": "grid", "num_keep": 4} | dict.fromkeys(
    ("budget", "accuracy", "accuracy_low", "accuracy_high", "decoder_tokens", "milliseconds"), 0.5
)
MEASURED = {"command": "adavtp evaluate", "versions": {}, "split": "test", "num_questions": 3, "rows": [ROW]}
BROKEN_RECORDS = [
    *[("--log", LOG | change) for change in ({"stage": 3}, {"stage": {}}, {"log": 3}, {"log": [1]})],
    *[("--log", LOG | {"stage": LOG["stage"] | {"name": name}}) for name in ("../../x", 3)],
    ("--log", LOG | {"stage": LOG["stage"] | {"data": 3}}),
    *[("--evaluation", MEASURED | change) for change in ({"rows": []}, {"rows": 4}, {"rows": [1]}, {"versions": 2})],
    *[("--evaluation", MEASURED | {"rows": [ROW | {name: [1]}]}) for name in ROW],
    ("--evaluation", MEASURED | {"dataset": 3}),
    *[("--recipe", content) for content in ({"model": 3, "stages": []}, {"model": {}, "stages": [1]}, [1], None)],
]


@pytest.mark.parametrize("number", range(len(BROKEN_RECORDS)))
def test_a_record_with_something_else_in_a_field_is_a_sentence_and_nothing_is_exported(
    number: int, tmp_path: Path
) -> None:
    option, content = BROKEN_RECORDS[number]
    (tmp_path / "record").write_text(json.dumps(content))
    result = run("export", DIGITS, tmp_path / "out", option, tmp_path / "record")
    assert result.exit_code == 2 and "fault of AdaVTP" not in text_of(result), text_of(result)
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


HEADER = {
    **{"settings": [{"reducer": "full", "budget": 1.0, "num_keep": 4}], "unreachable": [], "num_examples": 1},
    **dict.fromkeys(("command", "checkpoint", "checkpoint_hash", "data", "data_hash"), "x"),
    **{"metric": "exact_match", "num_patches": 4, "num_layers": 2, "max_new_tokens": 4, "versions": {}},
}
ANSWER = {
    **{"index": 0, "id": "a", "reducer": "full", "budget": 1.0, "question": "q", "answers": ["a"], "prediction": "a"},
    **{"score": 1.0, "category": None, "num_keep": 4, "visual_tokens": 4.0, "text_tokens": 3, "new_tokens": 1},
    **{"flops": 1.0, "ms": 1.0},
}
BROKEN_RUNS = [
    *[(HEADER | {name: value}, ANSWER) for name in HEADER for value in (None, [[1]])],
    *[(HEADER | {name: value}, ANSWER) for name in ("settings", "unreachable") for value in ([1], [{}], 3)],
    *[(HEADER | {"measurements": value}, ANSWER) for value in (3, [1], [{}])],
    *[([1], ANSWER), ("x", ANSWER), ({}, ANSWER)],
    *[(HEADER, ANSWER | {name: [[1]]}) for name in ANSWER],
    *[(HEADER, [1]), (HEADER, {}), (HEADER, ANSWER | {"reducer": "another"})],
]


@pytest.mark.parametrize("number", range(len(BROKEN_RUNS)))
def test_a_run_with_something_else_in_a_field_is_a_sentence_and_no_report(number: int, tmp_path: Path) -> None:
    header, answer = BROKEN_RUNS[number]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(header))
    (folder / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    result = run("report", folder, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "fault of AdaVTP" not in text_of(result), text_of(result)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


SCENE = Path("docs/scene.png").resolve()
ASK, PLAN = ["ask", SCENE, "q"], ["plan", "--preset", "llava-1.5-7b"]
# In a folder with `file`, `folder/file` and `list.json`.
COMMAND_LINES = {
    "a value that is an empty variable": ([*ASK, "--checkpoint", ""], "A value is empty, behind '--checkpoint'"),
    "another": (["flops", "--preset", "llava-1.5-7b", "--dtype="], "A value is empty, of '--dtype'"),
    "a parameter that renames a reducer": ([*ASK, "--reducer", "fastv:name=tome"], "is no reducer"),
    "a parameter twice": ([*ASK, "--reducer", "fastv:layer=1:layer=2"], "is no reducer"),
    "no such device": (["measure", "--device", "nothing"], "`device` is 'nothing'"),
    "a device that holds nothing": (["measure", "--device", "meta"], "`device` is 'meta'"),
    "a type for storing": (["measure", "--dtype", "float8_e4m3fn"], "`dtype` is 'float8_e4m3fn'"),
    "more patches than count": (["flops", "--preset", "llava-1.5-7b", "--visual-tokens", str(10**16)], "1048576"),
    "a number beyond all numbers": (["flops", "--preset", "llava-1.5-7b", "--text-tokens", "9" * 40], "below 2**31"),
    "a number that is none": ([*PLAN, "--peak", "nan"], "--peak is nan; allowed are numbers below"),
    "a number without an end": ([*PLAN, "--utilisation", "0.5", "1e400"], "--utilisation is inf"),
    "a rank beyond all widths": ([*PLAN, "--lora", "2147483647"], "less than or equal to"),
    "a measurement too deep": ([*PLAN, "--measured", "deep.json"], "`measured` is 'deep.json'"),
    "a checkpoint too deep": (["export", "deep", "out"], "checkpoint in 'deep' cannot be read"),
    "an export onto what is too deep": (["export", DIGITS, "deep"], "config.json' is not JSON"),
    "a parameter too deep": ([*ASK, "--reducer", "fastv:layer=" + "[" * 5000], "`layer`"),
    "a source too deep": (["convert", "deep", "out"], "config.json' is not JSON"),
    "a measurement that is a list": ([*PLAN, "--measured", "list.json"], "`measured` is 'list.json'"),
    "a report onto a file": (["report", "folder", "--output", "file"], "'file' is a file"),
    "a name that no system takes": (["report", "folder", "--output", "x" * 300], "File name too long"),
    "a demo below a file": (["demo", "--output", "file/x"], "'file' is a file"),
    "a demo of nothing": (["demo", "--checkpoint", "folder", "--output", "out"], "Unrecognized model in folder"),
    "a comparison onto a file": (["compare", "--output", "file"], "'file' is a file"),
    "a comparison's work onto a file": (["compare", "--work", "file"], "'file' is a file"),
    "an evaluation below a file": (["evaluate", "--output", "file/x"], "'file' is a file"),
    "an experiment onto a file": (["experiment", "1", "--output", "file"], "'file' is a file"),
    "an experiment's work onto a file": (["experiment", "1", "--work", "file/x"], "'file' is a file"),
    "a stage below a file": (["train", "recipe.yaml", "--output", "file/x"], "'file' is a file"),
    "an adapter that says nothing": (["merge", "adapter", "out"], "is a list"),
    "an adapter exported": (["export", "adapter", "out"], "adavtp merge"),
    "an adapter evaluated": (["evaluate", "adapter"], "adavtp merge"),
    "a base that is a folder": (["export", "file", "out", "--base-model", "./x"], "`base_model` is './x'"),
    "a licence in words": (["export", "file", "out", "--license", "a: b"], "`license` is 'a: b'"),
    "an export onto a file": (["export", DIGITS, "file"], "holds something else"),
    "a space onto something else": (["space", "user/name", "--export", "folder"], "holds something else"),
    "a picture without a form": ([*ASK, "--show", "kept.nothing"], "nothing"),
    "a picture below a file": ([*ASK, "--show", "file/kept.png"], "cannot be read or written"),
    "a merge onto a file": (["merge", "adapter", "file", "--base", "x"], "has something in it"),
}


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_a_mistaken_command_line_is_a_sentence_and_leaves_nothing_behind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "adapter", "deep"):
        Path(folder).mkdir()
    for file in ("deep.json", "deep/config.json"):
        Path(file).write_text("[" * 5000)
    for file in ("file", "folder/file"):
        Path(file).write_text("mine")
    for file in ("list.json", "adapter/adapter_config.json"):
        Path(file).write_text("[1]")
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments, sentence = COMMAND_LINES[name]
    result = run(*arguments)
    assert result.exit_code == 2 and sentence in text_of(result), text_of(result)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"folder", "adapter", "deep"}


def test_what_does_not_fit_into_memory_is_no_fault_of_ours() -> None:
    ours = typer.Typer()

    @ours.command(cls=Command)
    def ask_for_much() -> None:
        torch.empty(2**50, dtype=torch.uint8).fill_(1)

    result = CliRunner().invoke(ours, [])
    assert result.exit_code == 2 and "does not fit into memory" in text_of(result), text_of(result)


def test_a_package_that_is_not_there_is_named() -> None:
    ours = typer.Typer()

    @ours.command(cls=Command)
    def stumble() -> None:
        import a_package_that_nobody_has.part  # noqa: F401

    result = CliRunner().invoke(ours, [])
    assert result.exit_code == 2 and "pip install a_package_that_nobody_has`" in text_of(result), text_of(result)


def test_an_error_that_is_ours_says_so_and_shows_where_when_asked() -> None:
    ours = typer.Typer()

    @ours.command(cls=Command)
    def stumble(name: str) -> None:
        {}[name]

    result = CliRunner().invoke(ours, ["x"])
    assert result.exit_code == 1
    assert "KeyError: 'x' This is a fault of AdaVTP" in text_of(result) and "--debug" in text_of(result)
    assert isinstance(CliRunner().invoke(ours, ["x", "--debug"]).exception, KeyError)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_checkpoint_s_code_runs_only_when_the_command_says_so(trusted: bool, tmp_path: Path) -> None:
    folder = armed_folder(tmp_path)
    flags = ["--trust-remote-code"] * trusted
    result = run("ask", Path("docs/scene.png").resolve(), "q", "--checkpoint", folder, *flags)
    assert (folder / "ran").exists() == trusted
    assert result.exit_code == (0 if trusted else 2), text_of(result)
    if not trusted:
        assert run("export", folder, tmp_path / "exported").exit_code == 2
        assert run("space", folder).exit_code == 2
        assert not (folder / "ran").exists()
