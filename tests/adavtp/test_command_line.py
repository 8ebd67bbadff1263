"""The command line, run on a checkpoint that comes with the package as the README says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner, Result

from adavtp.command_line import app
from adavtp.commands.presets import GALLERY_TEXT, PUBLISHED
from adavtp.evaluation.report.sections import report_markdown
from adavtp.modeling.families.adapters import ADAPTERS
from adavtp.modeling.reducers.base import REDUCERS, STAGES
from adavtp.tasks.digit_scenes import draw_scene
from repository import DIGITS
from tiny_processors import family_folder, released_folder

# Brightness of a patch that none, one, ... and all four of the checkpoint's decoder layers see.
LEVELS = (0.18, 0.385, 0.59, 0.795, 1.0)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    draw_scene("test", 0).image.save(path)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# Of commands that ask a drawn task's questions.
OF_DIGITS = ("--data", "digit-scenes")


def ask(*arguments: str | Path) -> Result:
    return run("ask", *arguments, "--checkpoint", DIGITS)


def test_demo_prints_five_budgets_of_four_reducers_and_writes_two_pictures(tmp_path: Path) -> None:
    result = run("demo", "--checkpoint", DIGITS, *OF_DIGITS, "--questions", 6, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    for shown in ("144", "57", "28", "14", "7", "full", "adaptive", PUBLISHED, "random"):
        assert shown in result.output
    for name in ("kept_patches.png", "accuracy.png"):
        assert min(Image.open(tmp_path / name).size) > 300


@pytest.mark.parametrize(("budget", "kept"), [("1.0", 144), ("230/576", 57), ("30", 30)])
def test_ask_answers_within_the_budget_and_shows_what_it_kept(
    scene: Path, tmp_path: Path, budget: str, kept: int
) -> None:
    result = ask(scene, "how many digits are there ?", "--budget", budget, "--show", tmp_path / "kept.png")
    assert result.exit_code == 0, result.output
    assert result.output.split()[0] in "23456"
    assert f"{kept} of 144 visual tokens" in result.output
    assert Image.open(tmp_path / "kept.png").size == (288, 288)


def test_ask_runs_a_part_of_the_decoder_and_shows_which(scene: Path, tmp_path: Path) -> None:
    num_layers = json.loads((DIGITS / "config.json").read_text())["text_config"]["num_hidden_layers"]
    asked = (scene, "how many digits are there ?", "--scheduler", "first", "--show-plan", tmp_path / "plan.png")
    result = ask(*asked, "--depth-budget", 0.5)
    assert result.exit_code == 0, result.output
    ran = (
        f"{num_layers // 2} of {num_layers} decoder layers ran, 50% of all attention heads and 50% of all MLP channels"
    )
    assert ran in " ".join(result.output.split()) and "144 of 144 visual tokens" in result.output
    # Lit below, dark above.
    pixels = np.asarray(Image.open(tmp_path / "plan.png").convert("L"))
    above, below = pixels[: len(pixels) // 3], pixels[len(pixels) // 2 : -len(pixels) // 4]
    assert (above < 60).sum() > 1000 and (below < 60).sum() < (above < 60).sum() / 10
    result = ask(*asked, "--compute-budget", 0.5)
    assert result.exit_code == 0, result.output
    assert "decoder layers ran" in result.output and "144 of 144" not in result.output
    result = ask(*asked, "--compute-budget", 0.5, "--budget", 0.5)
    assert result.exit_code != 0 and "`compute_budget` and `token_budget` were both given" in result.output


@pytest.mark.parametrize(("name", "units"), [("llava_next", 5), ("idefics3", 5), ("paligemma", 1)])
def test_ask_takes_a_folder_of_another_family(name: str, units: int, scene: Path, tmp_path: Path) -> None:
    folder, show = family_folder(name, tmp_path / name), tmp_path / "kept.png"
    arguments = ("--checkpoint", folder, "--budget", 0.4, "--reducer", "random", "--max-new-tokens", 2)
    result = run("ask", scene, "how many digits are there ?", *arguments, "--show", show)
    assert result.exit_code == 0, result.output
    # Where there are tiles, four and a view of the whole; of each floor(0.4 * 16).
    assert f"{units * 6} of {units * 16} visual tokens" in result.output
    # The tiles in their places, and the view of the whole beside them.
    assert Image.open(show).size == (288 + (9 + 144) * (units > 1), 288)


def test_ask_of_a_released_checkpoint_is_answered_without_a_controller_and_says_by_what(
    scene: Path, tmp_path: Path
) -> None:
    folder = released_folder("idefics3", tmp_path / "model")
    asked = ("ask", scene, "which digit is red ?", "--checkpoint", folder, "--budget", 0.5, "--max-new-tokens", 1)
    result = run(*asked)
    assert result.exit_code == 0 and "40 of 80 visual tokens, chosen by divprune" in result.output, result.output
    result = run(*asked, "--reducer", "adaptive")
    assert result.exit_code == 2 and "has no weights for the reducer 'adaptive'" in " ".join(result.output.split())


def test_ask_draws_what_is_kept_on_an_image_that_is_not_cut(tmp_path: Path) -> None:
    folder, image = family_folder("idefics3", tmp_path / "model"), tmp_path / "image.png"
    Image.new("RGB", (48, 48), "white").save(image)
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.do_image_splitting = False
    processor.save_pretrained(folder)
    arguments = ("--checkpoint", folder, "--budget", 4, "--reducer", "grid", "--max-new-tokens", 1)
    result = run("ask", image, "which digit is red ?", *arguments, "--show", tmp_path / "kept.png")
    assert result.exit_code == 0 and "4 of 16 visual tokens" in result.output, result.output
    drawn = np.asarray(Image.open(tmp_path / "kept.png").convert("L"))
    assert drawn.shape == (288, 288)
    # Places in the middle of the 4 x 4 patches, of which four are as bright as the image.
    assert (drawn[36::72, 36::72] == 255).sum() == 4 and (drawn[36::72, 36::72] == 46).sum() == 12


@pytest.mark.parametrize("budget", ["1", "1.5", "nan", "much"])
def test_ask_refuses_a_budget_that_is_none(scene: Path, budget: str) -> None:
    result = ask(scene, "how many digits are there ?", "--budget", budget)
    assert result.exit_code == 2
    assert budget in result.output


def test_ask_shows_how_many_layers_see_a_patch(scene: Path, tmp_path: Path) -> None:
    levels = {}
    for reducers in (["fastv:layer=2"], ["grid", "vtw:layer=2"]):
        options = [word for reducer in reducers for word in ("--reducer", reducer)]
        result = ask(
            *(scene, "how many digits are there ?", "--budget", 0.6, *options, "--show", tmp_path / "kept.png")
        )
        assert result.exit_code == 0, result.output
        assert "86 of 144 visual tokens, mean over decoder layers" in result.output
        picture = np.asarray(Image.open(tmp_path / "kept.png").convert("L"), dtype=float)
        original = np.asarray(Image.open(scene).convert("L").resize(picture.shape), dtype=float)
        share = (picture.reshape(12, 24, 12, 24).sum((1, 3)) / original.reshape(12, 24, 12, 24).sum((1, 3))).flatten()
        levels[reducers[0]] = [int((abs(share - level) < 0.05).sum()) for level in LEVELS]
    # FastV shows all patches to two layers of four, and 28 to all: 144 * 2 + 28 * 2 = 86 * 4.
    assert levels["fastv:layer=2"] == [0, 0, 116, 0, 28]
    # The grid leaves 111, the root of the budget's share; 111 * 3 + 11 = 86 * 4.
    assert levels["grid"] == [33, 0, 0, 100, 11]


@pytest.mark.parametrize(
    ("budget", "reducer", "reason"),
    [("0.1", "fastv:layer=2", "cannot go below"), ("0.5", "fastv:depth=2", "depth"), ("0.5", "nosuch", "nosuch")],
)
def test_ask_refuses_what_a_reducer_cannot_do(scene: Path, budget: str, reducer: str, reason: str) -> None:
    result = ask(scene, "how many digits are there ?", "--budget", budget, "--reducer", reducer)
    assert result.exit_code == 2
    assert reason in " ".join(result.output.split())


def test_ask_refuses_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    assert ask(tmp_path / "text.png", "how many digits are there ?").exit_code == 2


def test_reducers_lists_every_one() -> None:
    rows = json.loads(run("reducers", "--json").output)
    assert {row["name"] for row in rows} == set(REDUCERS)
    table = run("reducers").output
    assert all(name in table for name in REDUCERS)


# Its images are no videos, and it has no dial of its own.
NOT_OF_LLAVA = {"evs", "vidcom2", "progressive", "native"}


def test_families_says_of_each_what_a_budget_is_for_and_why_a_reducer_is_refused() -> None:
    rows = {row["name"]: row for row in json.loads(run("families", "--json").output)}
    assert set(rows) == {"adavtp", *ADAPTERS}
    assert rows["adavtp"]["stages"] == list(STAGES) and set(rows["adavtp"]["refused"]) == NOT_OF_LLAVA
    assert rows["llava_onevision"]["units"] == ["view", "tile", "video"]
    assert "acts inside the vision tower" in rows["qwen2_5_vl"]["refused"]["tome"]
    printed = " ".join(run("families").output.split())
    assert all(name in printed for name in rows)
    # A reason that several families have is printed once, in words that fit all of them.
    assert printed.count("it acts inside the vision tower, behind which this family makes one token") == 1


def test_compare_writes_a_page_two_pictures_and_the_numbers_of_a_run_it_goes_on_with(tmp_path: Path) -> None:
    folders = ("--output", tmp_path / "page", "--work", tmp_path / "run")
    for reducers in (["vtw"], ["adaptive", "vtw"]):
        asked = ("--questions", 6, "--reducers", *reducers, "--budgets", 0.1, 0.6)
        result = run("compare", DIGITS, *OF_DIGITS, *asked, *folders)
        assert result.exit_code == 0, result.output
    names = {"reducers.md", "reducers.json", "reducers_accuracy.png", "reducers_gallery.png"}
    assert {path.name for path in (tmp_path / "page").iterdir()} == names
    page, numbers = ((tmp_path / "page" / name).read_text() for name in ("reducers.md", "reducers.json"))
    assert "| `vtw` | 0.1 | `token_budget` asks for" in page and "(reducers_gallery.png)" in page
    (checkpoint,) = json.loads(numbers)["checkpoints"]
    measured = [(row["reducer"], row["num_keep"]) for row in checkpoint["settings"]]
    assert measured == [("full", 144), ("vtw", 86), ("adaptive", 14), ("adaptive", 86)]
    assert (
        report_markdown(json.loads(numbers), "reducers_accuracy.png", {GALLERY_TEXT: "reducers_gallery.png"}) == page
    )


def test_compare_of_another_family_has_its_numbers_and_pictures_of_its_tiles(tmp_path: Path) -> None:
    folder, page = family_folder("idefics3", tmp_path / "model"), tmp_path / "page"
    asked = ("--questions", 6, "--reducers", "random", "tome", "--budgets", 0.5, "--output", page)
    result = run("compare", folder, *OF_DIGITS, *asked, "--work", tmp_path / "run")
    assert result.exit_code == 0, result.output
    names = {"reducers.md", "reducers.json", "reducers_accuracy.png", "reducers_gallery.png"}
    assert {path.name for path in page.iterdir()} == names
    numbers = json.loads((page / "reducers.json").read_text())
    full, random = numbers["checkpoints"][0]["settings"]
    # Its tiles are alike, so that FLOPs are counted; five of 16 tokens.
    assert (full["visual_tokens"], random["visual_tokens"]) == (80, 40) and 0 < random["flops"] < full["flops"]
    text = (page / "reducers.md").read_text()
    assert report_markdown(numbers, "reducers_accuracy.png", {GALLERY_TEXT: "reducers_gallery.png"}) == text


def test_compare_refuses_a_budget_that_is_nothing_to_compare(tmp_path: Path) -> None:
    result = run("compare", "--questions", 12, "--budget", 1.0, "--output", tmp_path)
    assert result.exit_code == 2 and "1.0" in result.output


@pytest.mark.parametrize("command", ["demo --checkpoint", "evaluate", "measure", "compare"])
def test_a_checkpoint_that_is_not_there_is_refused_without_a_traceback(command: str, tmp_path: Path) -> None:
    result = run(*command.split(), tmp_path / "nowhere")
    # A long path is broken over lines, in a frame.
    said = re.sub(r"[\s│]", "", result.output)
    assert result.exit_code == 2 and "nowhere" in said and "Traceback" not in said
