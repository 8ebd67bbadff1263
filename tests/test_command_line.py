"""The command line, run on the reference checkpoint as the README says."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from adavtp.command_line import app
from adavtp.trainer.digit_scenes import draw_scene


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    draw_scene("test", 0).image.save(path)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_demo_prints_five_budgets_and_writes_two_pictures(tmp_path: Path) -> None:
    result = run("demo", "--questions", 12, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    for tokens in ("144", "115", "86", "57", "28"):
        assert tokens in result.output
    for name in ("kept_patches.png", "accuracy.png"):
        assert min(Image.open(tmp_path / name).size) > 300


@pytest.mark.parametrize(("budget", "kept"), [("1.0", 144), ("0.4", 57), ("30", 30)])
def test_ask_answers_within_the_budget_and_shows_what_it_kept(
    scene: Path, tmp_path: Path, budget: str, kept: int
) -> None:
    result = run("ask", scene, "how many digits are there ?", "--budget", budget, "--show", tmp_path / "kept.png")
    assert result.exit_code == 0, result.output
    assert result.output.split()[0] in "23456"
    assert f"{kept} of 144 visual tokens" in result.output
    assert Image.open(tmp_path / "kept.png").size == (288, 288)


@pytest.mark.parametrize("budget", ["1", "1.5", "-0.1", "nan", "much"])
def test_ask_refuses_a_budget_that_is_none(scene: Path, budget: str) -> None:
    result = run("ask", scene, "how many digits are there ?", "--budget", budget)
    assert result.exit_code == 2
    assert budget in result.output


def test_ask_refuses_a_file_that_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("not an image")
    assert run("ask", path, "how many digits are there ?").exit_code == 2


def test_evaluate_writes_its_command_and_a_row_for_each_reducer_and_budget(tmp_path: Path) -> None:
    from adavtp.command_line import reference_checkpoint

    output = tmp_path / "evaluation.json"
    result = run(
        "evaluate", reference_checkpoint(), "--questions", 12, "--budget", 1.0, "--budget", 0.4, "--output", output
    )
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    rows = [(row["reducer"], row["budget"], row["num_keep"]) for row in report["rows"]]
    assert rows == [("adaptive", 1.0, 144), ("adaptive", 0.4, 57), ("random", 0.4, 57)]
    assert report["num_questions"] == 12 and report["command"]
