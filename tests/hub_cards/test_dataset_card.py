"""The data set repository of a drawn task: files that load as they were, and a card whose numbers are counted."""

import re
from collections import Counter
from pathlib import Path

import datasets
import pytest
from huggingface_hub import DatasetCard, metadata_load

from adavtp.hub_cards.dataset_card import TEMPLATE, dataset_folder
from adavtp.tasks import digit_scenes, pages

SIZES = {"train": 24, "validation": 6, "test": 12}
COMMAND = "adavtp publish-data somebody/scenes --train 24"
TASKS = {
    "digit-scenes": (digit_scenes.load_digit_questions, digit_scenes.QUESTION_KINDS),
    "pages": (pages.load_page_questions, pages.QUESTION_KINDS),
}


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def splits(task: str) -> dict[str, datasets.Dataset]:
    load_questions, _ = TASKS[task]
    return {split: load_questions(split, size) for split, size in SIZES.items()}


@pytest.fixture(scope="module")
def folder(task: str, splits: dict[str, datasets.Dataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset_folder(task, splits, tmp_path_factory.mktemp("scenes"), "somebody/scenes", COMMAND)


@pytest.fixture(scope="module")
def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_the_folder_loads_with_splits_features_and_rows_as_they_were(
    folder: Path, splits: dict[str, datasets.Dataset], tmp_path: Path
) -> None:
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert {split: len(data) for split, data in loaded.items()} == SIZES
    for split, data in loaded.items():
        assert data.features == splits[split].features
        for row, drawn in zip(data, splits[split], strict=True):
            assert row["images"][0].tobytes() == drawn["images"][0].tobytes()
            assert {name: row[name] for name in row if name != "images"} == {
                name: drawn[name] for name in drawn if name != "images"
            }


def test_the_metadata_are_what_the_data_are(task: str, folder: Path) -> None:
    data = metadata_load(folder / "README.md")
    info = data["dataset_info"]
    assert {split["name"]: split["num_examples"] for split in info["splits"]} == SIZES
    assert info["download_size"] == sum(path.stat().st_size for path in (folder / "data").iterdir())
    assert datasets.Features._from_yaml_list(info["features"])["images"] == datasets.List(datasets.Image())
    assert data["size_categories"] == ["n<1K"]
    licences = {"digit-scenes": "cc-by-4.0", "pages": "apache-2.0"}
    assert (data["license"], data["language"]) == (licences[task], ["en"]) and task in data["tags"]
    assert "visual-question-answering" in data["task_categories"]
    paths = {one["split"]: one["path"] for one in data["configs"][0]["data_files"]}
    assert all(len(list(folder.glob(path))) == 1 for path in paths.values()) and set(paths) == set(SIZES)


def test_the_card_counts_rows_and_kinds(task: str, card: str, splits: dict[str, datasets.Dataset]) -> None:
    for split, size in SIZES.items():
        assert f"| {split} | {size} |" in card
    counted = {split: Counter(data["kind"]) for split, data in splits.items()}
    rows = {
        row[0]: row[1:] for row in re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (.+) \| (.+) \|$", card, re.M)
    }
    assert set(rows) == set(TASKS[task][1])
    for kind, (*numbers, question, answer) in rows.items():
        assert [int(number) for number in numbers] == [counted[split][kind] for split in SIZES]
        asked = [row for row in splits["train"].remove_columns("images") if row["kind"] == kind]
        assert (question, answer) == (asked[0]["question"], asked[0]["answer"])


def test_the_card_says_how_it_was_made_and_of_whose_writing(task: str, card: str) -> None:
    assert COMMAND in card
    facts = {
        "digit-scenes": ("96 x 96 pixels", "E. Alpaydin", "C. Kaynak", "UCI", "Creative Commons Attribution 4.0"),
        "pages": ("192 x 192 pixels", "Computer Modern", "Apache"),
    }
    for name, own in facts.items():
        assert [fact in " ".join(card.split()) for fact in own] == [name == task] * len(own)


def test_the_card_has_no_line_left_over_from_the_template(card: str) -> None:
    assert "{{" not in card and "{%" not in card and "\n\n\n" not in card
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert DatasetCard(card).data.pretty_name == "scenes"


def test_the_template_has_no_number_of_its_own() -> None:
    text = re.sub(r"\{[%{#].*?[%}#]\}", "", TEMPLATE.read_text(), flags=re.DOTALL)
    # The source's year, place and licence, and what indexes a first row.
    for known in ("Repository, 1998", "dataset/80/", "Attribution 4.0", "data[0]", '["images"][0]'):
        assert known in text
        text = text.replace(known, "")
    assert not re.findall(r"\d", text)
