"""The checkpoints that come with the package: whole, small, up to date, and as good as their cards say."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModel, AutoProcessor

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.commands.console import REFERENCES, reference_checkpoint
from adavtp.hub_cards.licence import Origin
from adavtp.hub_cards.published_folder import files_by_kind, published_folder
from adavtp.hub_cards.reference_code import LEADING_FILE, write_reference_code
from adavtp.hub_cards.training_record import TrainingRecord
from adavtp.modeling.hub.saving import AUTO_MAP, CODE_FOLDER
from adavtp.tasks.digit_scenes import load_digit_questions
from repository import DIGITS, ROOT
from stock_batches import pipeline_answers, stock_answers
from without_package import run_without_package

EVERY_FOLDER = pytest.mark.parametrize("folder", list(map(reference_checkpoint, REFERENCES)), ids=list(REFERENCES))


@pytest.fixture(scope="module")
def model() -> AdaVTPForConditionalGeneration:
    return AdaVTPForConditionalGeneration.from_pretrained(DIGITS).eval()


@pytest.fixture(scope="module")
def processor() -> AdaVTPProcessor:
    return AdaVTPProcessor.from_pretrained(DIGITS)


@EVERY_FOLDER
def test_a_folder_has_at_most_twelve_megabytes_and_no_pickles(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def without_code(folder: Path, parent: Path) -> Path:
    """A copy of the folder as git has it."""
    return shutil.copytree(folder, parent / folder.name, ignore=shutil.ignore_patterns(CODE_FOLDER))


@EVERY_FOLDER
def test_with_the_package_the_auto_classes_load_a_folder_as_git_has_it(folder: Path, tmp_path: Path) -> None:
    without = without_code(folder, tmp_path)
    for trust in (None, True):
        model = AutoModel.from_pretrained(without, trust_remote_code=trust)
        processor = AutoProcessor.from_pretrained(without, trust_remote_code=trust)
        assert (type(model), type(processor)) == (AdaVTPForConditionalGeneration, AdaVTPProcessor)


def test_a_batch_answers_as_its_questions_do_alone_in_stock_code(tmp_path: Path) -> None:
    former = shutil.copytree(DIGITS, tmp_path / "former")
    file = former / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"left"', '"right"'))
    how = {"place": shutil.copyfile}
    published_folder(former, _made(tmp_path / "published"), "user/name", TrainingRecord(), Origin(None, None), **how)
    scene = load_digit_questions("test", 1, 0)[0]["images"][0]
    questions = ["what colour is the 7 ?", "how many digits are there ?", "is there a red digit in the picture ?"]
    for folder in (DIGITS, tmp_path / "published"):
        alone = [stock_answers(folder, scene, [question])[0] for question in questions]
        assert stock_answers(folder, scene, questions) == alone and len(set(alone)) > 1
        assert pipeline_answers(folder, scene, questions, 3) == pipeline_answers(folder, scene, questions, 1) == alone


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("target", ["demo", "test"])
def test_both_set_up_commands_write_the_code_before_anything_else(target: str) -> None:
    # `make test` runs this test, and a make inside a make says where it is.
    command = ["make", "--no-print-directory", "--dry-run", target]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"-m adavtp\.hub_cards\.reference_code\n.*(adavtp demo|pytest .*)\n$", told)
    assert f"/hub_cards/*/{CODE_FOLDER}/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_readmes_first_example_runs_where_the_package_is_absent(tmp_path: Path) -> None:
    write_reference_code()
    without = without_code(reference_checkpoint(), tmp_path)
    example = re.search(r"## Use it\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = f"""
import os
from transformers import AutoConfig, AutoProcessor
for auto_class in (AutoConfig, AutoProcessor):
    try:
        auto_class.from_pretrained({str(without)!r}, trust_remote_code=True)
    except OSError as error:
        print(error)
os.chdir({str(ROOT)!r})
{example}
print(output.shape[0], kept.shape[0], type(model).__module__)
"""
    first, second, result = run_without_package(code, tmp_path).splitlines()
    for error in (first, second):
        assert f"does not appear to have a file named {CODE_FOLDER}/{LEADING_FILE}.py" in error
    assert result.startswith("2 2 transformers_modules.adavtp_hyphen_pages.")


@EVERY_FOLDER
def test_a_folder_is_published_with_its_code_and_without_the_file_that_leads_to_it(
    folder: Path, tmp_path: Path
) -> None:
    write_reference_code()
    stays_behind = published_folder(folder, tmp_path, "somebody/model", TrainingRecord(), Origin(None, "apache-2.0"))
    fields = [json.loads((tmp_path / name).read_text()) for name in ("config.json", "processor_config.json")]
    assert fields[0]["auto_map"] | fields[1]["auto_map"] == AUTO_MAP
    assert LEADING_FILE not in {path.stem for path in files_by_kind(tmp_path)["code"]} and stays_behind == []


@EVERY_FOLDER
def test_a_card_shows_the_accuracies_of_the_evaluation_file(folder: Path) -> None:
    evaluation = json.loads((folder / "evaluation.json").read_text())
    card = (folder / "README.md").read_text()
    assert evaluation["split"] == "test"
    assert evaluation["num_questions"] >= 2000
    for row in evaluation["rows"]:
        assert f"{100 * row['accuracy']:.1f}" in card


def test_the_evaluation_file_of_digit_scenes_meets_the_promised_accuracy() -> None:
    rows = json.loads((DIGITS / "evaluation.json").read_text())["rows"]
    accuracy = {(row["reducer"], row["budget"]): row["accuracy"] for row in rows}
    assert accuracy["adaptive", 1.0] >= 0.90
    assert accuracy["adaptive", 0.4] >= accuracy["adaptive", 1.0] - 0.03
    assert ("random", 0.4) in accuracy


def test_the_evaluation_file_of_pages_sets_the_controller_apart_from_the_published_method() -> None:
    rows = json.loads((reference_checkpoint("pages") / "evaluation.json").read_text())["rows"]
    accuracy = {(row["reducer"], row["budget"]): row["accuracy"] for row in rows}
    assert accuracy["full", 1.0] >= 0.85
    assert accuracy["adaptive", 0.1] >= max(accuracy["full", 1.0] - 0.05, accuracy["cdpruner", 0.1] + 0.10)
    assert accuracy["adaptive", 0.05] >= accuracy["cdpruner", 0.05] + 0.30


def test_a_fresh_measurement_agrees_with_the_evaluation_file(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor
) -> None:
    recorded = {
        (row["reducer"], row["budget"]): row["accuracy"]
        for row in json.loads((DIGITS / "evaluation.json").read_text())["rows"]
    }
    rows = load_digit_questions("test", 96)
    inputs = processor.of_questions(list(rows["images"]), list(rows["question"]))
    for reducer, budget in (("adaptive", 1.0), ("adaptive", 0.4), ("random", 0.4)):
        ids = model.generate(**inputs, reducer=reducer, token_budget=budget, max_new_tokens=8)
        said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [text.strip() == answer for text, answer in zip(said, rows["answer"], strict=True)]
        # The recorded share of all questions lies in a (wide) interval around the share of the first 96.
        assert abs(sum(right) / len(right) - recorded[reducer, budget]) < 0.1
