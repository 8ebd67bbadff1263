"""The hard subset of a report: which questions are in it, worked out from answers, and what is said without one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from adavtp.commands.experiment import part_summary
from adavtp.commands.experiment_runs import Part
from adavtp.evaluation.report.findings import hard_subset_notes, lead, statistics_in_short
from adavtp.evaluation.report.joined import join_runs
from adavtp.evaluation.report.numbers import report_numbers
from adavtp.evaluation.report.sections import report_markdown
from adavtp.evaluation.runs import Run
from run_folders import Scores, write_run

ROOT = Path(__file__).parents[2]

# `downsample` with K = 4 is wrong on the first eight of 20 questions, with K = 8 on the first five.
SMALLER = {4: [0.0] * 8 + [1.0] * 12, 8: [0.0] * 5 + [1.0] * 15}
SCORES: Scores = {
    ("full", 1.0): [0.0] * 2 + [1.0] * 18,
    ("adaptive", 0.25): [0.0] * 2 + [1.0] * 10 + [0.0] * 8,
    ("adaptive", 0.5): [0.0] + [1.0] * 19,
    ("downsample", 0.25): SMALLER[4],
    ("downsample", 0.5): SMALLER[8],
    ("random", 0.25): [1.0] + [0.0] * 7 + [1.0] * 12,
    ("random", 0.5): [0.0] * 10 + [1.0] * 10,
    ("grid", 0.25): [0.0] * 6 + [1.0] * 2 + [0.0] * 12,
    ("fastv", 0.5): [1.0] * 2 + [0.0] * 18,
}


def numbers_of(*folders: Path, against: str | None = None) -> dict[str, Any]:
    return report_numbers(join_runs([Run.open(folder) for folder in folders]), against, "A title", "adavtp report RUN")


def checkpoint_of(folder: Path, scores: Scores, **how: Any) -> dict[str, Any]:
    return numbers_of(write_run(folder, scores, **how))["checkpoints"][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one", SCORES)


@pytest.fixture(scope="module")
def numbers(folder: Path) -> dict[str, Any]:
    return numbers_of(folder)


@pytest.fixture(scope="module")
def checkpoint(numbers: dict[str, Any]) -> dict[str, Any]:
    return numbers["checkpoints"][0]


def subset_at(checkpoint: dict[str, Any], num_keep: int | float) -> dict[str, Any]:
    (subset,) = [one for one in checkpoint["hard_subsets"] if one["num_keep"] == num_keep]
    return subset


def rows_at(checkpoint: dict[str, Any], num_keep: int | float) -> dict[str, dict[str, Any]]:
    return {row["reducer"]: row for row in subset_at(checkpoint, num_keep)["settings"]}


def wilson(share: float, number: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z = 1.959963984540054
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2)) / (1 + z**2 / number)
    return middle - half, middle + half


def without(*reducers: str) -> dict[tuple[str, float | int], Any]:
    return {key: own for key, own in SCORES.items() if key[0] not in reducers}


# Numbers.


def test_the_subset_is_what_the_smaller_picture_answers_wrongly_with_the_same_k(checkpoint: dict[str, Any]) -> None:
    for num_keep, number in ((4, 8), (8, 5)):
        subset = subset_at(checkpoint, num_keep)
        assert subset["by"] == {"reducer": "downsample", "num_keep": num_keep, "visual_tokens": num_keep}
        assert (subset["num_examples"], subset["share"]) == (number, number / 20)
        assert (subset["low"], subset["high"]) == pytest.approx(wilson(number / 20, 20))
    scores = {reducer: row["score"] for reducer, row in rows_at(checkpoint, 4).items()}
    # Of the eight: full and adaptive all but the first two, random the first, grid the last two.
    assert scores == {"full": 6 / 8, "adaptive": 6 / 8, "random": 1 / 8, "grid": 2 / 8}
    scores = {reducer: row["score"] for reducer, row in rows_at(checkpoint, 8).items()}
    assert scores == {"full": 3 / 5, "adaptive": 4 / 5, "random": 0.0, "fastv": 2 / 5}
    row = rows_at(checkpoint, 4)["adaptive"]
    assert (row["low"], row["high"]) == pytest.approx(wilson(6 / 8, 8))


def test_differences_are_on_the_subset_alone(checkpoint: dict[str, Any]) -> None:
    rows = rows_at(checkpoint, 4)
    assert rows["random"]["against"]["difference"] == pytest.approx((1 - 6) / 8)
    # The first question speaks for `random`, six of the others for `adaptive`.
    assert rows["random"]["against"]["p"] == pytest.approx(2 * (1 + 7) / 2**7)
    assert rows["random"]["against"]["low"] < -5 / 8 < rows["random"]["against"]["high"]
    # On all questions `random` is the better control, here it is `grid`.
    assert checkpoint["best_controls"][0] == {"num_keep": 4, "reducer": "random"}
    assert subset_at(checkpoint, 4)["best_control"] == "grid"
    assert rows["adaptive"]["control"]["difference"] == pytest.approx((6 - 2) / 8)
    assert rows["grid"]["full"]["difference"] == pytest.approx((2 - 6) / 8)
    assert "control" not in rows["random"] and "against" not in rows["full"] and "against" not in rows["adaptive"]


def test_corrected_p_values_count_the_differences_of_their_kind_at_every_k(checkpoint: dict[str, Any]) -> None:
    own = [row["against"] for num_keep in (4, 8) for row in rows_at(checkpoint, num_keep).values() if "against" in row]
    assert len(own) == 4
    smallest = min(own, key=lambda one: one["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 4 * smallest["p"]))


def test_a_score_below_one_half_is_wrong(tmp_path: Path) -> None:
    scores = {("downsample", 0.5): [0.0, 0.3, 0.5, 0.6, 1.0], ("adaptive", 0.5): [1.0, 0.6, 0.0, 0.0, 0.0]}
    checkpoint = checkpoint_of(tmp_path / "run", scores, metric="vqa_accuracy")
    assert subset_at(checkpoint, 8)["num_examples"] == 2
    assert rows_at(checkpoint, 8)["adaptive"]["score"] == pytest.approx(0.8)


def test_the_smaller_picture_may_be_in_another_run_of_the_same(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    smaller = {key: own for key, own in SCORES.items() if key[0] == "downsample"}
    runs = write_run(tmp_path / "a", without("downsample")), write_run(tmp_path / "b", smaller)
    assert numbers_of(*runs)["checkpoints"][0]["hard_subsets"] == checkpoint["hard_subsets"]


def test_nothing_is_compared_with_what_chose_the_subset(folder: Path) -> None:
    (one,) = numbers_of(folder, against="downsample")["checkpoints"]
    assert all("against" not in row for num_keep in (4, 8) for row in rows_at(one, num_keep).values())


# The nearest below, and none.


def test_where_it_was_not_measured_the_nearest_k_below_is_taken_and_the_page_says_so(tmp_path: Path) -> None:
    scores = {key: own for key, own in SCORES.items() if key != ("downsample", 0.5)} | {("adaptive", 0.75): [1.0] * 20}
    numbers = numbers_of(write_run(tmp_path / "run", scores | {("adaptive", 2): [1.0] * 20}))
    (checkpoint,) = numbers["checkpoints"]
    for num_keep in (8, 12):
        assert (
            subset_at(checkpoint, num_keep)["by"]["num_keep"] == 4 and subset_at(checkpoint, num_keep)["share"] == 0.4
        )
    assert rows_at(checkpoint, 8)["fastv"]["score"] == 2 / 8
    assert subset_at(checkpoint, 2) == {"num_keep": 2, "by": None}
    text = report_markdown(numbers)
    assert "- K = 12: the hard subset is that of K = 4, the nearest below at which `downsample` was measured." in text
    assert "- No hard subset at K = 2. `downsample` was not measured there; to have one, add `--reducers" in text
    assert "of the 40.0% of questions that `downsample` answers wrongly at K = 4" in text


def test_what_could_not_be_run_is_said_with_its_reason(tmp_path: Path) -> None:
    unreachable = [{"reducer": "downsample", "budget": budget, "reason": "It sees tiles."} for budget in (0.25, 0.5)]
    checkpoint = checkpoint_of(tmp_path / "run", without("downsample"), unreachable=unreachable)
    said = ["No hard subset at K = 4, K = 8. `downsample` could not be run there: It sees tiles."]
    assert hard_subset_notes(checkpoint) == said
    scores = {key: own for key, own in SCORES.items() if key != ("downsample", 0.5)}
    notes = hard_subset_notes(checkpoint_of(tmp_path / "below", scores, unreachable=unreachable))
    assert notes[1].endswith("was measured. `downsample` could not be run there: It sees tiles.")


def test_without_the_control_the_report_names_the_option_that_adds_it(tmp_path: Path) -> None:
    numbers = numbers_of(write_run(tmp_path / "run", without("downsample")))
    text = report_markdown(numbers)
    assert "No hard subset at K = 4, K = 8." in text and "add `--reducers downsample` to `adavtp evaluate`" in text
    assert "On the hard subset: Mean" not in text and "answers wrongly" not in lead(numbers["checkpoints"][0])


def test_fractions_and_numbers_of_tokens_are_not_compared_where_images_differ(tmp_path: Path) -> None:
    scores = {("downsample", 0.25): SMALLER[4], ("adaptive", 0.5): [1.0] * 20, ("adaptive", 8): [1.0] * 20}
    folder = write_run(tmp_path / "run", scores)
    lines = [json.loads(line) | {"num_keep": None} for line in (folder / "answers.jsonl").read_text().splitlines()]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    header = json.loads((folder / "run.json").read_text()) | {"num_patches": None}
    header["settings"] = [entry | {"num_keep": None} for entry in header["settings"]]
    (folder / "run.json").write_text(json.dumps(header))
    (checkpoint,) = numbers_of(folder)["checkpoints"]
    assert subset_at(checkpoint, 0.5)["by"]["num_keep"] == 0.25
    assert subset_at(checkpoint, 8)["by"] is None
    notes = " ".join(hard_subset_notes(checkpoint))
    assert "budget 0.5: the hard subset is that of budget 0.25" in notes and "No hard subset at K = 8." in notes


def test_an_empty_subset_and_a_metric_without_right_and_wrong_are_said(tmp_path: Path) -> None:
    scores = {("downsample", 0.5): [1.0] * 4, ("adaptive", 0.5): [1.0, 0.0, 1.0, 1.0]}
    checkpoint = checkpoint_of(tmp_path / "right", scores)
    assert (subset_at(checkpoint, 8)["num_examples"], subset_at(checkpoint, 8)["settings"]) == (0, [])
    assert "K = 8: the hard subset is empty, `downsample` answers everything right." in hard_subset_notes(checkpoint)
    checkpoint = checkpoint_of(tmp_path / "cider", scores, metric="cider")
    assert hard_subset_notes(checkpoint) == ["There is no hard subset: cider does not say which answers are right."]


def test_tokens_that_layers_saw_are_said_where_they_are_not_k(tmp_path: Path) -> None:
    off_by = {"tokens_off_by": lambda reducer, budget, index: -1.0 if reducer == "downsample" else 0.0}
    notes = hard_subset_notes(checkpoint_of(tmp_path / "run", SCORES, **off_by))
    assert "K = 8: layers saw 7.0 tokens of `downsample`, mean of examples." in notes
    assert all("layers saw" not in note for note in hard_subset_notes(checkpoint_of(tmp_path / "exact", SCORES)))


# Pages.


def test_finding_statistics_and_tables_have_the_numbers(numbers: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    said = (
        " Of the 40.0% of questions that `downsample` answers wrongly, the controller (`adaptive`) answers 75.0% "
        "right, the best control (`grid`) 25.0% and the model with all tokens 75.0%."
    )
    assert lead(checkpoint).endswith(said)
    lines = statistics_in_short(checkpoint)
    assert lines[1].endswith("; of the 25.0% of questions that `downsample` answers wrongly: `adaptive` with 80.0%.")
    text = report_markdown(numbers)
    low, high = wilson(8 / 20, 20)
    heading = f"K = 4 (0.25): 40.0% ({100 * low:.1f} to {100 * high:.1f}) of questions"
    # Scores, and differences to `adaptive`, the best control and everything kept.
    assert text.count(heading) == 4
    low, high = wilson(2 / 8, 8)
    assert f"| `grid` (control) | 25.0 ({100 * low:.1f} to {100 * high:.1f}) | – |" in text
    table = text.partition("On the hard subset: Mean exact_match, percent: difference to `adaptive`")[2]
    one = rows_at(checkpoint, 4)["random"]["against"]
    assert f"-62.5** ({100 * one['low']:+.1f} to {100 * one['high']:+.1f})" in table
    assert "on the hard subset `grid` at K = 4, `random` at K = 8" in text
    assert text.index("### Where choosing matters") < text.index("### Cost")


def test_several_checkpoints_stand_beside_each_other_each_on_its_own_subset(tmp_path: Path, folder: Path) -> None:
    scores = dict(SCORES) | {("downsample", 0.25): [0.0] * 4 + [1.0] * 16}
    numbers = numbers_of(folder, write_run(tmp_path / "two", scores, checkpoint="second"))
    (over,) = numbers["over_checkpoints"]
    (row,) = [row for row in over["hard_settings"] if (row["reducer"], row["num_keep"]) == ("adaptive", 4)]
    assert row["values"] == [6 / 8, 2 / 4] and row["mean"] == pytest.approx(5 / 8)
    assert "62.5 (50.0 to 75.0)" in report_markdown(numbers).partition("each on its checkpoint's own hard subset")[2]


SHIPPED = sorted([ROOT / "docs" / "reducers.json", *(ROOT / "reports").glob("*/*/report.json")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_numbers_that_are_older_than_the_subset_are_read_and_the_page_says_they_have_none(path: Path) -> None:
    numbers = json.loads(path.read_text())
    for checkpoint in numbers["checkpoints"]:
        checkpoint.pop("hard_subsets", None)
    for over in numbers["over_checkpoints"]:
        over.pop("hard_settings", None)
    part = Part("methods", "Which?", "adaptive", questions=1, reducers=["adaptive"])
    for text in (report_markdown(numbers), "\n\n".join(part_summary(part, numbers))):
        assert text.count("There is no hard subset: these numbers are older") == len(numbers["checkpoints"])
        assert "On the hard subset: Mean" not in text and "<details><summary>" in text
