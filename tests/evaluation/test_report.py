"""What a report says of runs: its numbers worked out here, its sentences from its numbers, its tables from both."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adavtp.command_line import app
from adavtp.evaluation.report.blocks import Table
from adavtp.evaluation.report.curves import save_curves
from adavtp.evaluation.report.findings import lead, statistics_in_short
from adavtp.evaluation.report.joined import join_runs
from adavtp.evaluation.report.numbers import report_numbers
from adavtp.evaluation.report.over_checkpoints import agreement_of_checkpoints, compared_checkpoints
from adavtp.evaluation.report.sections import report_markdown, report_sections
from adavtp.evaluation.runs import Run
from run_folders import FULL_FLOPS, measurement, write_run

NUM_EXAMPLES = 40


def right(number: int) -> list[float]:
    """The first ones right, the others wrong."""
    return [1.0] * number + [0.0] * (NUM_EXAMPLES - number)


def wrong(number: int) -> list[float]:
    """The first ones wrong, the others right."""
    return [0.0] * number + [1.0] * (NUM_EXAMPLES - number)


SCORES = {
    ("full", 1.0): right(38),
    ("adaptive", 0.25): right(36),
    ("adaptive", 0.5): right(37),
    ("random", 0.25): right(20),
    ("random", 0.5): right(26),
    ("grid", 0.25): right(22),
    ("grid", 0.5): right(25),
    ("fastv:layer=2", 0.5): right(37),
}
UNREACHABLE = [{"reducer": "fastv:layer=2", "budget": 0.25, "reason": "2 of 4 | all tokens."}]


def off_by(reducer: str, budget: float | int, index: int) -> float:
    return -0.5 if reducer.startswith("fastv") and index < 4 else 0.0


def numbers_of(*folders: Path, against: str | None = None) -> dict[str, Any]:
    return report_numbers(join_runs([Run.open(folder) for folder in folders]), against, "A title", "adavtp report RUN")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    categories = ["count"] * 10 + ["colour"] * 30
    measurements = [measurement("full", 1.0, 80.0), measurement("adaptive", 0.25, 20.0)]
    return write_run(
        *(tmp_path_factory.mktemp("runs") / "one", SCORES),
        **{"categories": categories, "unreachable": UNREACHABLE, "measurements": measurements},
        tokens_off_by=off_by,
    )


@pytest.fixture(scope="module")
def numbers(folder: Path) -> dict[str, Any]:
    return numbers_of(folder)


@pytest.fixture(scope="module")
def checkpoint(numbers: dict[str, Any]) -> dict[str, Any]:
    return numbers["checkpoints"][0]


def setting(checkpoint: dict[str, Any], reducer: str, num_keep: int) -> dict[str, Any]:
    (row,) = [row for row in checkpoint["settings"] if (row["reducer"], row["num_keep"]) == (reducer, num_keep)]
    return row


# Numbers of one checkpoint.


def test_a_score_is_the_mean_over_examples_with_its_cost(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    row = setting(checkpoint, "adaptive", 4)
    assert row["score"] == 36 / 40 and row["low"] < 0.9 < row["high"]
    assert row["flops"] == FULL_FLOPS * (0.5 + 0.5 * 4 / 16)
    assert (row["milliseconds"], row["visual_tokens"], row["off_by_most"]) == (41.0, 4.0, 0)
    assert setting(checkpoint, "fastv:layer=2", 8)["off_by_most"] == 0.5
    # A question without a picture is not off its budget.
    off_by = {"tokens_off_by": lambda reducer, budget, index: -8.0 if index == 3 else 0.25}
    (one,) = numbers_of(write_run(tmp_path / "run", {("adaptive", 0.5): right(3)}, **off_by))["checkpoints"]
    assert one["settings"][0]["off_by_most"] == 0.25


def test_a_difference_is_on_the_same_examples_and_at_the_same_budget(checkpoint: dict[str, Any]) -> None:
    one = setting(checkpoint, "random", 8)["against"]
    assert one["other"] == "adaptive"
    assert one["difference"] == pytest.approx((26 - 37) / 40)
    assert one["low"] < one["difference"] < one["high"] < 0
    assert one["p"] == pytest.approx(2 / 2**11)
    same = setting(checkpoint, "fastv:layer=2", 8)["against"]
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    # Everything kept is compared with every budget.
    assert setting(checkpoint, "adaptive", 4)["full"]["difference"] == pytest.approx((36 - 38) / 40)
    assert setting(checkpoint, "random", 8)["full"]["difference"] == pytest.approx((26 - 38) / 40)


def test_corrected_p_values_count_the_differences_of_their_kind(checkpoint: dict[str, Any]) -> None:
    own = [row["against"] for row in checkpoint["settings"] if "against" in row]
    assert len(own) == 5
    smallest = min(own, key=lambda one: one["p"])
    assert smallest["p_holm"] == pytest.approx(5 * smallest["p"])


def test_the_best_control_is_found_at_each_budget(checkpoint: dict[str, Any]) -> None:
    best = {one["num_keep"]: one["reducer"] for one in checkpoint["best_controls"]}
    assert best == {4: "grid", 8: "random"}
    assert setting(checkpoint, "adaptive", 4)["control"]["difference"] == pytest.approx((36 - 22) / 40)
    assert setting(checkpoint, "adaptive", 8)["control"]["difference"] == pytest.approx((37 - 26) / 40)
    assert "control" not in setting(checkpoint, "grid", 8)


def test_categories_have_their_own_examples(checkpoint: dict[str, Any]) -> None:
    assert checkpoint["categories"] == {"colour": 30, "count": 10}
    own = setting(checkpoint, "random", 4)["categories"]
    assert (own["count"]["score"], own["colour"]["score"]) == (1.0, pytest.approx(10 / 30))
    assert own["count"]["against"]["difference"] == 0
    assert own["colour"]["against"]["difference"] == pytest.approx((10 - 26) / 30)


def test_an_area_is_the_mean_score_over_the_flops_that_all_cover(checkpoint: dict[str, Any]) -> None:
    """All reach from K = 8 to everything kept; those that reach K = 4 too have a second, wider area."""
    narrow, wide = checkpoint["areas"]
    assert (narrow["low_flops"], narrow["high_flops"]) == (0.75 * FULL_FLOPS, FULL_FLOPS)
    areas = {row["reducer"]: row["area"] for row in narrow["rows"]}
    assert areas["random"] == pytest.approx((26 + 38) / 2 / 40)
    assert areas["fastv:layer=2"] == pytest.approx((37 + 38) / 2 / 40)
    assert wide["low_flops"] == 0.625 * FULL_FLOPS
    areas = {row["reducer"]: row["area"] for row in wide["rows"]}
    assert set(areas) == {"adaptive", "random", "grid"}
    assert areas["random"] == pytest.approx(((20 + 26) / 2 * 1 + (26 + 38) / 2 * 2) / 3 / 40)
    pairs = {(pair["reducer"], pair["other"]): pair for pair in narrow["pairs"]}
    assert len(pairs) == 4 * 3 / 2
    assert pairs["adaptive", "random"]["difference"] == pytest.approx((37 - 26) / 2 / 40)
    assert pairs["adaptive", "random"]["low"] > 0
    assert pairs["adaptive", "fastv:layer=2"]["low"] == pairs["adaptive", "fastv:layer=2"]["high"] == 0


def test_without_a_common_range_there_is_no_area(tmp_path: Path) -> None:
    scores = {
        ("adaptive", 0.25): right(3),
        ("adaptive", 0.5): right(4),
        ("tome", 0.6): right(3),
        ("tome", 0.9): right(4),
    }
    numbers = numbers_of(write_run(tmp_path / "run", scores))
    assert numbers["checkpoints"][0]["areas"] == []
    assert "No range of FLOPs is covered by all" in report_markdown(numbers)


def test_scores_that_are_no_shares_are_written_as_they_are(tmp_path: Path) -> None:
    scores = {("adaptive", 0.5): [0.5, 2.25, 1.0, 3.25], ("random", 0.5): [0.5, 1.0, 1.0, 1.0]}
    numbers = numbers_of(write_run(tmp_path / "run", scores, metric="cider"))
    row = setting(numbers["checkpoints"][0], "adaptive", 8)
    assert not numbers["checkpoints"][0]["is_share"]
    assert row["low"] < row["score"] == 1.75 < row["high"]
    assert "| `adaptive` | vision |  | 1.750 (" in report_markdown(numbers)


# Joining runs.


def split(tmp_path: Path, second: dict[tuple[str, float | int], list[float]], **how: Any) -> list[Path]:
    first = {key: own for key, own in SCORES.items() if key[0] in ("full", "adaptive")}
    return [write_run(tmp_path / "a", first), write_run(tmp_path / "b", second, **how)]


def test_reducers_measured_in_different_runs_are_one_measurement(
    tmp_path: Path, folder: Path, checkpoint: dict[str, Any]
) -> None:
    others = {key: own for key, own in SCORES.items() if key[0] not in ("full", "adaptive")}
    first, second = split(tmp_path, others, unreachable=UNREACHABLE, tokens_off_by=off_by)
    (joined,) = numbers_of(first, second)["checkpoints"]
    without_categories = [
        {name: own for name, own in row.items() if name != "categories"} for row in checkpoint["settings"]
    ]
    assert joined["settings"] == without_categories
    for name in ("areas", "best_controls", "unreachable"):
        assert joined[name] == checkpoint[name]
    assert [run["folder"] for run in joined["runs"]] == ["a", "b"]


def test_what_was_answered_twice_alike_counts_once_also_as_a_fraction_and_a_count(tmp_path: Path) -> None:
    (one,) = numbers_of(*split(tmp_path, {("adaptive", 8): right(37), ("random", 8): right(26)}))["checkpoints"]
    assert [row["reducer"] for row in one["settings"]] == ["full", "adaptive", "adaptive", "random"]
    assert setting(one, "adaptive", 8)["asked"] == [0.5, 8]
    assert setting(one, "random", 8)["against"]["other"] == "adaptive"
    assert one["budgets"][1] == {"num_keep": 8, "asked": [0.5, 8]}


def test_what_one_run_could_not_reach_and_another_did_is_not_unreachable(tmp_path: Path) -> None:
    unreachable = [{"reducer": "adaptive", "budget": 0.5, "reason": "then"}, *UNREACHABLE]
    folders = split(tmp_path, {("random", 0.5): right(26)}, unreachable=unreachable)
    assert numbers_of(*folders)["checkpoints"][0]["unreachable"] == UNREACHABLE


def rewrite(path: Path, old: str, new: str, count: int = -1) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


# File of the second run, what is changed in it, and the reason that is given.
NOT_JOINED = [
    ("run.json", '"metric": "exact_match"', '"metric": "anls"', "differ in 'metric'"),
    ("run.json", '"num_patches": 16', '"num_patches": 20', "differ in 'num_patches'"),
    ("run.json", '"max_new_tokens": 4', '"max_new_tokens": 9', "differ in 'max_new_tokens'"),
    ("answers.jsonl", '"q7"', '"q99"', "has the example 7 'q99', where another run of the same data has 7 'q7'"),
    ("answers.jsonl", '"no"', '"nay"', "'adaptive' with K = 8 was answered twice and differs: example 'q37'"),
    ("answers.jsonl", '"score": 1.0', '"score": null', "not finished: 'adaptive' at 0.5 has no scores yet"),
]


@pytest.mark.parametrize(("file", "old", "new", "reason"), NOT_JOINED)
def test_runs_that_do_not_belong_together_are_refused_with_the_reason(
    tmp_path: Path, file: str, old: str, new: str, reason: str
) -> None:
    folders = split(tmp_path, {("adaptive", 0.5): right(37), ("random", 0.5): right(26)})
    rewrite(folders[1] / file, old, new)
    with pytest.raises(ValueError, match=reason):
        numbers_of(*folders)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {("adaptive", 0.5): right(3), ("random", 0.5): right(2)})
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="not finished: 'random' at 0.5 has 39 of 40 examples"):
        numbers_of(folder)


def test_where_there_is_nothing_to_report_or_to_compare_with_that_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="`runs` is empty"):
        numbers_of()
    with pytest.raises(ValueError, match="`against` is 'tome'; measured were full, adaptive, random"):
        numbers_of(folder, against="tome")
    entry = {"reducer": "fastv", "budget": 0.1, "reason": "out of reach"}
    with pytest.raises(ValueError, match="run has no setting that could be measured"):
        numbers_of(write_run(tmp_path / "run", {}, unreachable=[entry]))


def test_another_reducer_may_be_the_one_to_compare_with(folder: Path) -> None:
    (one,) = numbers_of(folder, against="random")["checkpoints"]
    assert setting(one, "adaptive", 4)["against"] | {"other": "random"} == setting(one, "adaptive", 4)["against"]
    assert setting(one, "adaptive", 4)["against"]["difference"] == pytest.approx((36 - 20) / 40)


# Sentences.


def checkpoint_with(tmp_path: Path, scores: dict[tuple[str, float | int], list[float]], **how: Any) -> dict[str, Any]:
    return numbers_of(write_run(tmp_path, scores, **how))["checkpoints"][0]


def test_the_finding_stands_first_in_plain_words(numbers: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    text = (
        "At 25% of the visual tokens the controller (`adaptive`) answers 90.0% right, the best control (`grid`) "
        "55.0% and the model with all tokens 95.0%."
    )
    assert lead(checkpoint) == text
    assert report_markdown(numbers).startswith(f"# A title\n\n{text}\n\n![")


@pytest.mark.parametrize(
    ("controller", "fastv", "said"),
    [
        (right(37), right(20), "`adaptive` is better than `fastv` beyond chance"),
        (right(20), right(37), "`fastv` is better than `adaptive` beyond chance"),
        (right(37), right(36), "The answers do not tell `adaptive` and `fastv` apart."),
    ],
)
def test_the_finding_follows_the_numbers_when_they_are_turned_round(
    tmp_path: Path, controller: list[float], fastv: list[float], said: str
) -> None:
    scores = {("adaptive", 0.5): controller, ("fastv", 0.5): fastv, ("own", 0.5): right(40)}
    text = lead(checkpoint_with(tmp_path / "run", scores))
    first, second = (f"{100 * sum(own) / NUM_EXAMPLES:.1f}%" for own in (controller, fastv))
    assert text.startswith(f"At 50% of the visual tokens the controller (`adaptive`) answers {first} right")
    assert f" right and the best published method (`fastv`) {second}." in text and said in text


def test_a_finding_needs_no_controller_and_no_control(tmp_path: Path) -> None:
    text = lead(checkpoint_with(tmp_path / "run", {("tome", 0.5): right(30), ("own", 0.5): right(20)}))
    assert text == "At 50% of the visual tokens `tome` answers 75.0% right and the best other method (`own`) 50.0%."
    everything = lead(checkpoint_with(tmp_path / "full", {("full", 1.0): right(30)}))
    assert everything == "With all tokens the score is 75.0%; nothing else was measured."


def test_statistics_say_how_many_are_on_which_side(tmp_path: Path) -> None:
    above, below, even = (
        statistics_in_short(checkpoint_with(tmp_path / name, {("adaptive", 0.5): own, ("random", 0.5): other}))[0]
        for name, own, other in (
            ("above", right(37), right(20)),
            ("below", right(20), right(37)),
            ("even", right(37), right(36)),
        )
    )
    assert above == (
        "K = 8: highest of 2 is `adaptive` with 92.5%; beside `adaptive`: 0 above, 1 below (1 after Holm's "
        "correction), 0 not told apart; beside the best control, `random`: 1 above (1 after Holm's correction), "
        "0 below, 0 not told apart."
    )
    assert "`random` with 92.5%" in below and "beside `adaptive`: 1 above (1 after Holm's" in below
    assert even.count("0 above, 0 below, 1 not told apart") == 2


def test_statistics_say_what_only_a_single_interval_tells_and_that_there_is_no_control(tmp_path: Path) -> None:
    """5 answers better and none worse: the interval leaves out 0, and the exact test has p = 1/16."""
    scores = {("adaptive", 0.5): right(25), ("random", 0.5): right(20), ("adaptive", 0.25): right(3)}
    alone, beside = statistics_in_short(checkpoint_with(tmp_path / "run", scores))[:2]
    assert "beside the best control, `random`: 1 above (0 after Holm's correction)" in beside
    assert "no control was measured" in alone


def test_the_largest_area_stands_beside_what_is_not_told_apart_from_it(
    checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    text = "Area under the score-FLOPs curve, 4 reducers: the largest is that of"
    assert f"{text} `adaptive`, `fastv:layer=2`." in statistics_in_short(checkpoint)
    scores = {key: wrong(sum(map(int, own))) if key[0] != "full" else own for key, own in SCORES.items()}
    turned = statistics_in_short(checkpoint_with(tmp_path / "run", scores))
    assert f"{text} `grid` (control); not told apart from it: `random`." in turned


# Several checkpoints.


@pytest.fixture(scope="module")
def over_two(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, Any]:
    scores = dict(SCORES) | {("adaptive", 0.5): right(33), ("fastv:layer=2", 0.5): wrong(30), ("grid", 0.5): right(32)}
    del scores["grid", 0.25]
    return numbers_of(folder, write_run(tmp_path_factory.mktemp("runs") / "two", scores, checkpoint="second"))


def test_checkpoints_keep_their_own_figures_beside_mean_and_spread(over_two: dict[str, Any]) -> None:
    assert [one["checkpoint"] for one in over_two["checkpoints"]] == ["first", "second"]
    (over,) = over_two["over_checkpoints"]
    (row,) = [row for row in over["settings"] if (row["reducer"], row["num_keep"]) == ("adaptive", 8)]
    assert row["values"] == [37 / 40, 33 / 40]
    assert (row["mean"], row["lowest"], row["highest"]) == pytest.approx((35 / 40, 33 / 40, 37 / 40))
    assert ("grid", 4) not in {(row["reducer"], row["num_keep"]) for row in over["settings"]}
    assert over["not_in_all"] == 1


def test_the_order_of_methods_is_compared_by_kendalls_tau(over_two: dict[str, Any]) -> None:
    """Areas from K = 8 on go by 37, 26, 25, 37 and 33, 26, 32, 10. One of six pairs is tied; 2 agree, 3 do not."""
    (over,) = over_two["over_checkpoints"]
    assert over["area_agreement"]["tau"] == pytest.approx([(2 - 3) / (5 * 6) ** 0.5])


def test_what_holds_for_every_checkpoint_is_said_of_all(over_two: dict[str, Any]) -> None:
    found = agreement_of_checkpoints(over_two["over_checkpoints"][0], over_two["checkpoints"])
    at_8 = [line for line in found if line.startswith("K = 8: below `adaptive` in each of the 2 checkpoints")]
    assert len(at_8) == 1 and at_8[0].endswith(": `random`.")


def test_checkpoints_of_the_same_name_are_told_apart_by_their_hash(tmp_path: Path, folder: Path) -> None:
    other = write_run(tmp_path / "other", SCORES, checkpoint="second")
    rewrite(other / "run.json", '"checkpoint": "second"', '"checkpoint": "first"')
    names = [one["checkpoint"] for one in numbers_of(folder, other)["checkpoints"]]
    assert names == ["first (hash of )"] * 2


def test_only_checkpoints_on_the_same_data_by_the_same_metric_are_compared(tmp_path: Path) -> None:
    scores = {("adaptive", 0.5): [1.0, 0.0, 1.0, 1.0], ("random", 0.5): [0.0, 0.0, 1.0, 1.0]}
    others = {"first": {}, "second": {}, "third": {"metric": "anls"}, "fourth": {"data": "photographs"}}
    numbers = numbers_of(*(write_run(tmp_path / name, scores, checkpoint=name, **how) for name, how in others.items()))
    (over,) = numbers["over_checkpoints"]
    assert [one["checkpoint"] for one in compared_checkpoints(numbers, over)] == ["first", "second"]
    assert "each of the 4" not in report_markdown(numbers)


# The pages.


def test_every_row_of_every_table_has_a_cell_for_every_column(over_two: dict[str, Any]) -> None:
    blocks = [block for section in report_sections(over_two) for block in section.blocks]
    tables = [block for block in blocks if isinstance(block, Table)]
    assert len(tables) > 15
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)


def test_the_tables_have_the_numbers(numbers: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    text = report_markdown(numbers)
    row = setting(checkpoint, "adaptive", 4)
    assert f"90.0 ({100 * row['low']:.1f} to {100 * row['high']:.1f})" in text
    one = setting(checkpoint, "random", 4)["against"]
    assert f"**-40.0**\\* ({100 * one['low']:+.1f} to {100 * one['high']:+.1f})" in text
    assert "Everything kept (K = 16): 95.0" in text
    assert "| `fastv:layer=2` | 0.25 | 2 of 4 \\| all tokens. |" in text
    assert "differ by at most 0.5 tokens (`fastv:layer=2`, K = 8)" in text
    assert "| `adaptive` | 0.25 | 20.0 (18.0 to 22.0) | 50.0 (45.0 to 55.0) | 25.0 | 3.30 |" in text
    assert "adavtp evaluate first --data questions" in text and "adavtp report RUN" in text
    assert "answering took 3.0% more time than `generate` alone" in text
    assert "x86_64, 1 threads" in text and "torch 2.13.0" in text and "hash of questions" in text


def test_the_same_numbers_draw_the_same_curves_with_every_reducer(tmp_path: Path, numbers: dict[str, Any]) -> None:
    for name in ("a", "b"):
        save_curves(numbers["checkpoints"], tmp_path / f"{name}.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and "<dc:date>" not in drawn
    words = re.findall(r">([^<>]+)</text>", drawn)
    for label in ("adaptive", "fastv:layer=2", "random (control)", "grid (control)", "everything kept"):
        assert label in words
    assert "GFLOPs an example" in words and "visual tokens kept, of 16" in words


def test_many_reducers_are_drawn_by_stage(tmp_path: Path) -> None:
    names = ["tome", "dynamicvit", "visionzip", "prumerge", "pool", "dart", "divprune", "cdpruner", "fastv", "vtw"]
    scores = {(name, 0.5): right(20 + place) for place, name in enumerate([*names, "adaptive", "random"])}
    save_curves(numbers_of(write_run(tmp_path / "run", scores))["checkpoints"], tmp_path / "curves.svg")
    words = re.findall(r">([^<>]+)</text>", (tmp_path / "curves.svg").read_text())
    stages = [word for word in words if word.startswith("stage: ")]
    assert stages == ["stage: encoder", "stage: vision", "stage: projector", "stage: decoder"]
    assert [words.count(name) for name in names] == [1] * len(names)


# The command.


def run_command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_tables_curves_numbers_and_a_page(tmp_path: Path, folder: Path) -> None:
    done = run_command(folder, "--output", tmp_path / "out", "--title", "Ours")
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.md", "report.json", "curves.png", "curves.svg", "index.html"}
    assert (tmp_path / "out" / "report.md").read_text().startswith("# Ours\n")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["checkpoints"][0]["num_examples"] == NUM_EXAMPLES


def test_the_command_says_why_it_refuses(tmp_path: Path, folder: Path) -> None:
    done = run_command(folder, "--output", tmp_path / "out", "--against", "tome")
    assert done.exit_code == 2 and "measured were" in done.output
    assert not (tmp_path / "out").exists()
    done = run_command(tmp_path, "--output", tmp_path / "out")
    assert done.exit_code == 2 and "run.json" in done.output


def test_other_figures_of_a_metric_have_a_table_of_their_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {("full", 1.0): [1.0, 0.0]}, metric="pope")
    header = json.loads((folder / "run.json").read_text())
    figures = {"pope": 0.5, "f1": 0.625, "yes_ratio": 0.25}
    by_category = {"random": {"pope": 0.75, "f1": 0.875}}
    row = {"reducer": "full", "budget": 1.0, "figures": figures, "by_category": by_category}
    (folder / "run.json").write_text(json.dumps(header | {"figures": [row]}))
    page = report_markdown(numbers_of(folder))
    assert "| reducer | budget | pope | f1 | yes_ratio |" in page and "| `full` | 1 | 0.5 | 0.625 | 0.25 |" in page
    assert "Figures of pope, random" in page and "| `full` | 1 | 0.75 | 0.875 |" in page
