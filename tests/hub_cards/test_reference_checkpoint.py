"""The published reference checkpoint: whole, small, up to date, and as good as its card says."""

import json
from pathlib import Path

import pytest

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.commands.console import reference_checkpoint
from adavtp.evaluation.accuracy import answer_questions
from adavtp.modeling import modeling_adavtp
from adavtp.modeling.hub.saving import code_files
from adavtp.tasks.digit_scenes import load_digit_questions

FOLDER = reference_checkpoint()


@pytest.fixture(scope="module")
def model() -> AdaVTPForConditionalGeneration:
    return AdaVTPForConditionalGeneration.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def processor() -> AdaVTPProcessor:
    return AdaVTPProcessor.from_pretrained(FOLDER)


def test_the_folder_has_at_most_ten_megabytes_and_no_pickles() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


@pytest.mark.parametrize("folder", [FOLDER, FOLDER.parent / "adavtp-digits-seed-1"], ids=lambda folder: folder.name)
def test_the_folders_code_is_the_packages_code(folder: Path) -> None:
    for name, text in code_files(Path(modeling_adavtp.__file__)).items():
        assert (folder / name).read_text() == text, f"{name} is out of date: run `adavtp export` on the folder"


def test_the_card_shows_the_accuracies_of_the_evaluation_file() -> None:
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert evaluation["split"] == "test"
    assert evaluation["num_questions"] >= 2000
    for row in evaluation["rows"]:
        assert f"{100 * row['accuracy']:.1f}" in card


def test_the_evaluation_file_meets_the_promised_accuracy() -> None:
    rows = json.loads((FOLDER / "evaluation.json").read_text())["rows"]
    accuracy = {(row["reducer"], row["budget"]): row["accuracy"] for row in rows}
    assert accuracy["adaptive", 1.0] >= 0.90
    assert accuracy["adaptive", 0.4] >= accuracy["adaptive", 1.0] - 0.03
    assert ("random", 0.4) in accuracy


def test_a_fresh_measurement_agrees_with_the_evaluation_file(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor
) -> None:
    recorded = {
        (row["reducer"], row["budget"]): row["accuracy"]
        for row in json.loads((FOLDER / "evaluation.json").read_text())["rows"]
    }
    results, _ = answer_questions(
        model, processor, load_digit_questions("test", 240), budgets=(1.0, 0.4), reducers=("adaptive", "random")
    )
    for result in results:
        # The recorded share of all questions lies in a (wide) interval around the share of the first 240.
        assert abs(result.accuracy - recorded[result.reducer, result.budget]) < 0.08
