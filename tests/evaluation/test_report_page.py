"""The page of a report: one file that needs nothing else, with every table, and what was kept of every picture."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adavtp.evaluation.report.blocks import Table, number_of
from adavtp.evaluation.report.joined import join_runs
from adavtp.evaluation.report.numbers import report_numbers
from adavtp.evaluation.report.page import report_page, viewed_examples
from adavtp.evaluation.report.sections import report_sections
from adavtp.evaluation.runs import Run
from adavtp.modeling.vision.shown_image import Place, ShownImage
from run_folders import NUM_LAYERS, write_run

SVG = '<?xml version="1.0"?>\n<svg width="72pt" height="36pt" viewBox="0 0 72 36"><text>adaptive</text></svg>\n'
NASTY = "Is </script><b>this</b> & `that` \"a\" 'test'?"
SCORES = {
    ("full", 1.0): [1.0, 1.0, 0.0, 1.0],
    ("adaptive", 0.25): [1.0, 0.5, 0.0, 1.0],
    ("random", 0.25): [0.0, 1.0, 0.0, 1.0],
}
EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """What is in a page: its elements in order, the text of each kind, and whether they are properly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in EMPTY:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> where something else is open"

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*folders: Path) -> tuple[str, dict[str, Any]]:
    measured = join_runs([Run.open(folder) for folder in folders])
    numbers = report_numbers(measured, None, "Accuracy & <FLOPs>", "adavtp report RUN")
    viewed = [viewed_examples(*pair) for pair in zip(measured, numbers["checkpoints"], strict=True)]
    return report_page(numbers, viewed, SVG), numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        *(tmp_path_factory.mktemp("runs") / "one", SCORES),
        **{"categories": ["count", "count", "colour", "colour"], "questions": [NASTY, "b?", "c?", "d?"], "shown": 3},
        unreachable=[{"reducer": "vtw", "budget": 0.1, "reason": "<b>Out</b> of reach & `such`."}],
    )


@pytest.fixture(scope="module")
def written(folder: Path) -> tuple[str, dict[str, Any]]:
    return page_of(folder)


@pytest.fixture(scope="module")
def page(written: tuple[str, dict[str, Any]]) -> Page:
    return Page(written[0])


@pytest.fixture(scope="module")
def viewed(page: Page) -> dict[str, Any]:
    """What the page shows of the first checkpoint's examples."""
    (text,) = [text for text in page.text["script"] if text.startswith("{")]
    return json.loads(text)["checkpoints"][0]


def test_the_page_is_whole_and_loads_nothing(written: tuple[str, dict[str, Any]], page: Page) -> None:
    assert page.open == []
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), f"<{tag} {name}={attributes[name]!r}>"
        assert tag not in ("link", "iframe", "object", "embed")
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|https?://", written[0])


def test_what_is_named_is_there_and_what_scrolls_can_be_reached_by_keyboard(
    written: tuple[str, dict[str, Any]], page: Page
) -> None:
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    links = [attributes["href"].removeprefix("#") for attributes in page.all("a")]
    links += [attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes]
    assert len(links) > 8 and set(links) <= set(names)
    scrolling = [one for one in page.all("div") if one.get("class") == "scroll"]
    assert scrolling and all(one["tabindex"] == "0" and one["aria-labelledby"] for one in scrolling)
    labels = re.findall(r"<label>.*?</label>", written[0], flags=re.DOTALL)
    assert len(labels) == len(page.all("select")) == sum("<select" in label for label in labels)


def test_every_table_is_in_the_page_with_all_its_cells(written: tuple[str, dict[str, Any]], page: Page) -> None:
    blocks = [block for section in report_sections(written[1]) for block in section.blocks]
    expected = [block for block in blocks if isinstance(block, Table)]
    assert len(expected) >= 6
    # One more for the examples, which the script fills.
    assert len(page.text["caption"]) == len(expected) + 1
    cells = [len(block.rows) * (len(block.columns) - 1) for block in expected]
    assert len(page.all("td")) == sum(cells)
    assert [row["scope"] for row in page.all("th")].count("row") == sum(len(block.rows) for block in expected)
    assert [row["scope"] for row in page.all("th")].count("col") == sum(len(block.columns) for block in expected)


def test_numbers_are_sorted_by_themselves_and_not_by_how_they_are_written(page: Page) -> None:
    values = {cell["data-value"] for cell in page.all("td") if "data-value" in cell}
    # Scores in percent, a difference, tokens, FLOPs.
    assert {"62.5", "-12.5", "4.0", "1.25"} <= values
    cells = ("**-40.0**\\* (-50.0 to -30.0)", "1.25", "57", "`full`", "–", "K = 3")
    assert [number_of(cell) for cell in cells] == [-40.0, 1.25, 57.0, None, None, None]


def test_curves_are_inside_and_take_their_size_from_the_page(written: tuple[str, dict[str, Any]], page: Page) -> None:
    (svg,) = page.all("svg")
    assert svg["viewbox"] == "0 0 72 36" and "width" not in svg and "height" not in svg
    assert page.text["text"] == ["adaptive"]
    assert "<?xml" not in written[0]


def test_words_of_the_data_are_words_and_no_markup(page: Page, viewed: dict[str, Any]) -> None:
    assert viewed["examples"][0]["question"] == NASTY
    assert page.all("b") == []
    assert "<b>Out</b> of reach & such." in page.text["td"]
    assert page.text["h1"] == page.text["title"] == ["Accuracy & <FLOPs>"]


def test_the_first_examples_are_shown_with_every_answer_and_what_was_kept(
    written: tuple[str, dict[str, Any]], viewed: dict[str, Any], folder: Path
) -> None:
    assert [one["id"] for one in viewed["examples"]] == ["q0", "q1", "q2"]
    assert viewed["examples"][1]["category"] == "count"
    assert (viewed["reducers"], viewed["budgets"]) == (["full", "adaptive", "random"], [4, 16])
    assert viewed["num_layers"] == NUM_LAYERS
    # Runs of earlier versions, as these are, show squares.
    square = {"place": [0, 0, 1, 1], "grid": [4, 4], "begin": 0}
    assert [(one["shape"], one["panels"]) for one in viewed["examples"]] == [([32, 32], [[square]])] * 3
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["layers_seen"]]
    shown = {(one["reducer"], index): one for index in range(3) for one in viewed["examples"][index]["answered"]}
    assert len(lines) == len(shown) == 9
    for line in lines:
        one = shown[line["reducer"], line["index"]]
        assert (one["score"], one["prediction"]) == (line["score"], line["prediction"])
        assert list(base64.b64decode(one["layers"])) == line["layers_seen"]
    # A picture is in the page once.
    assert written[0].count("data:image/png;base64,") == 3
    encoded = viewed["examples"][2]["picture"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(encoded) == (folder / "pictures" / "2.png").read_bytes()


def test_pictures_may_come_from_another_run_of_the_same(tmp_path: Path, folder: Path) -> None:
    other = write_run(tmp_path / "run", {("grid", 0.25): [1.0] * 4}, questions=[NASTY, "b?", "c?", "d?"], shown=2)
    (text,) = [text for text in Page(page_of(folder, other)[0]).text["script"] if text.startswith("{")]
    examples = json.loads(text)["checkpoints"][0]["examples"]
    drawn = [[one["reducer"] for one in example["answered"] if one["layers"]] for example in examples]
    assert drawn == [[*("full", "adaptive", "random"), "grid"]] * 2 + [["full", "adaptive", "random"]]


def test_tiles_are_drawn_in_their_places_and_a_view_of_the_whole_beside_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {("adaptive", 0.25): [1.0, 0.0]}, shown=1)
    run = Run.open(folder)
    places = [Place(0.0, 0.0, 1.0, 1.0), Place(0.0, 0.0, 1.0, 0.5), Place(0.0, 0.5, 1.0, 1.0)]
    run.save_shown_image(0, ShownImage(Image.new("RGB", (32, 24)), places), [(2, 4), (1, 4), (1, 3)])
    first, second = (folder / "answers.jsonl").read_text().splitlines()
    for seen, is_drawn in (([4] * 8 + [0] * 7, True), ([4] * 16, False)):
        line = json.loads(first) | {"layers_seen": seen}
        (folder / "answers.jsonl").write_text(json.dumps(line) + "\n" + second + "\n")
        (text,) = [text for text in Page(page_of(folder)[0]).text["script"] if text.startswith("{")]
        (example,) = json.loads(text)["checkpoints"][0]["examples"]
        tiles = [
            {"place": [0, 0, 1, 0.5], "grid": [1, 4], "begin": 8},
            {"place": [0, 0.5, 1, 1], "grid": [1, 3], "begin": 12},
        ]
        assert (example["shape"], example["panels"][0]) == ([32, 24], tiles)
        assert example["panels"][1:] == [[{"place": [0, 0, 1, 1], "grid": [2, 4], "begin": 0}]]
        assert (example["answered"][0]["layers"] is not None) == is_drawn


def test_without_pictures_there_are_no_examples_to_look_at(tmp_path: Path) -> None:
    page = Page(page_of(write_run(tmp_path / "run", SCORES))[0])
    assert "examples" not in [attributes.get("id") for _, attributes in page.elements]
    assert page.all("select") == []
    assert page.open == []
