"""What a user can get wrong at the command line is answered with a sentence; what we got wrong says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from adavtp.command_line import app
from adavtp.commands.console import Command, reference_checkpoint
from armed_folders import armed_folder


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
    shutil.copytree(reference_checkpoint(), folder)
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
