"""`adavtp evaluate` on a checkpoint of ours: as it is typed, killed, shared by processes, and read by others."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from adavtp.command_line import app
from adavtp.commands.console import load_checkpoint, repeated_options
from adavtp.commands.evaluate import REDUCERS, evaluate_checkpoint, named_data
from adavtp.evaluation.answering import inputs_of
from adavtp.evaluation.report.hard_subset import SMALLER_PICTURE
from adavtp.evaluation.runs import Run
from adavtp.evaluation.settings import CONTROLLER
from adavtp.modeling.costs.model_costs import ModelCosts
from forked_processes import Forks, as_launched
from repository import DIGITS
from tiny_processors import family_folder

# The settings that most tests run, as they are typed; 58 of 144 is what 230 of 576 is.
ASKED = ["--budgets", "0.1", "230/576", "576", "--reducers", "full", "prumerge", "fastv:layer=1", "adaptive"]
SIZES = ["--questions", "12", "--batch-size", "4", "--max-new-tokens", "4"]
DRAWN = ["--data", "digit-scenes"]
OF_DIGITS = [str(DIGITS), *DRAWN]

# Of the command, what it imports as it goes along.
IMPORTS = """
import evaluate
from sklearn import datasets
from adavtp.command_line import app
from adavtp.evaluation import answering, summary
from adavtp.tasks import digit_scenes
"""


def run_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments: str | Path) -> Result:
    return run_command("evaluate", *arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = run(*OF_DIGITS, *ASKED, *SIZES, "--output", folder)
    assert result.exit_code == 0, result.output
    return Run.open(folder)


def untimed(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (folder / "answers.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "ms"} for line in lines]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("x --budgets 1 2 --reducers a b", "x --budgets 1 --budgets 2 --reducers a --reducers b"),
        ("--budgets 1 --budgets 2 3", "--budgets 1 --budgets 2 --budgets 3"),
        ("--budgets=1 2 --data d", "--budgets=1 --budgets 2 --data d"),
        ("--data d x --budget 1 2", "--data d x --budget 1 --budget 2"),
        ("x", "x"),
    ],
)
def test_several_values_may_follow_one_name(typed: str, meant: str) -> None:
    several = {"--budgets", "--budget", "--reducers", "--reducer"}
    assert repeated_options(typed.split(), several) == meant.split()


def test_compute_budgets_are_asked_counted_and_reported(tmp_path: Path) -> None:
    asked = ["--compute-budgets", "0.6", "0.8", "1.0", "--scheduler", "even", "--reducers", "adaptive", "grid"]
    result = run(*OF_DIGITS, *asked, *SIZES, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    opened = Run.open(tmp_path / "run")
    reached = [(setting["reducer"], setting["budget"]) for setting in opened.header["settings"]]
    assert reached == [("full", 1.0), *[(name, budget) for name in ("adaptive", "grid") for budget in (0.6, 0.8)]]
    model, processor = load_checkpoint(str(DIGITS))
    example, costs = named_data("digit-scenes", None, None, 12).examples[0], ModelCosts(model.config)
    inputs = inputs_of(processor, [example])
    whole = costs.of_prompt(int(inputs["input_ids"].shape[1]) - 144, reducer="full").prefill
    for answer in (one for one in opened.answers() if one.index == 0):
        how = {"compute_budget": answer.budget, "reducer": answer.reducer, "scheduler": "even"}
        how = {"token_budget": 1.0} if answer.reducer == "full" else how
        outputs = model.generate(**inputs, **how, max_new_tokens=4, return_dict_in_generate=True)
        kept = int(outputs["selection"].num_keep)
        asked = {"token_budget": kept, "reducer": answer.reducer, "plan": outputs["plan"]}
        cost = costs.of_prompt(answer.text_tokens, **asked)
        assert answer.visual_tokens == kept and answer.flops == pytest.approx(cost.with_new_tokens(answer.new_tokens))
        assert cost.prefill <= answer.budget * whole
        # With four layers, three have to do below a budget of 3/4, and above it fewer tokens are as good a way.
        assert (kept < 144) == (answer.reducer != "full") and (outputs["plan"] is not None) == (answer.budget == 0.6)
    result = run_command("report", tmp_path / "run", "--output", tmp_path / "report")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report" / "report.md").read_text()
    assert "% of the full model's FLOPs for a prompt" in text and "budgets of compute" in text
    result = run(*OF_DIGITS, *ASKED, *SIZES, "--output", tmp_path / "run")
    assert result.exit_code != 0 and "has a run with dial 'compute_budget'" in " ".join(result.output.split())


def test_every_setting_answers_every_question_once(whole: Run) -> None:
    reached = [(setting["reducer"], setting["budget"], setting["num_keep"]) for setting in whole.header["settings"]]
    exact = 230 / 576
    assert reached == [
        ("full", 1.0, 144),
        ("prumerge", 0.1, 14),
        ("prumerge", exact, 57),
        ("fastv:layer=1", exact, 57),
        ("adaptive", 0.1, 14),
        ("adaptive", exact, 57),
    ]
    assert [(row["reducer"], row["budget"]) for row in whole.header["unreachable"]] == [("fastv:layer=1", 0.1)]
    lines = untimed(whole.folder)
    assert [(line["reducer"], line["budget"], line["index"]) for line in lines] == [
        (reducer, budget, index) for reducer, budget, _ in reached for index in range(12)
    ]
    full = [line["score"] for line in lines if line["reducer"] == "full"]
    assert sum(full) / len(full) > 0.7
    assert {line["category"] for line in lines} >= {"count", "relation", "largest"}


def test_the_header_says_what_was_measured_with_what(whole: Run) -> None:
    header = whole.header
    assert (header["data"], header["split"], header["metric"]) == ("digit-scenes", "test", "exact_match")
    assert (header["num_examples"], header["num_patches"], header["num_layers"], header["shown"]) == (12, 144, 4, 12)
    assert header["checkpoint"] == "adavtp-digits" and len(header["checkpoint_hash"]) == 64
    assert {"command", "versions", "machine", "data_hash", "max_new_tokens", "batch_size"} <= set(header)
    total_ms = sum(answer.ms for answer in whole.answers())
    assert header["model_seconds"] == pytest.approx(total_ms / 1000, rel=0.01)
    assert header["seconds"] > header["model_seconds"] + header["evaluation_seconds"] > 0


def test_the_summary_is_printed_and_a_model_card_reads_it(whole: Run, tmp_path: Path) -> None:
    result = run(*OF_DIGITS, *ASKED, *SIZES, "--output", whole.folder)
    assert result.exit_code == 0, result.output
    full = [answer.score for answer in whole.answers() if answer.reducer == "full"]
    assert f"{100 * sum(full) / len(full):.1f}" in result.output and "GFLOPs" in result.output
    assert "cannot go below" in " ".join(result.output.split())
    from adavtp.hub_cards.licence import Origin
    from adavtp.hub_cards.model_card import model_card
    from adavtp.hub_cards.training_record import TrainingRecord

    path = whole.folder / "evaluation.json"
    report = json.loads(path.read_text())
    rows = {(row["reducer"], row["budget"]): row for row in report["rows"]}
    assert rows["full", 1.0]["accuracy"] == sum(full) / len(full)
    assert report["num_questions"] == 12 and report["split"] == "test"
    record = TrainingRecord.found_in(DIGITS, evaluations=[path])
    card = str(model_card(DIGITS, "adavtp-digits", record, Origin(None, "apache-2.0")))
    assert "prumerge" in card and f"{100 * rows['adaptive', 0.1]['accuracy']:.1f}" in card


def test_a_finished_run_answers_nothing_again_and_new_settings_are_added(whole: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    before = (folder / "answers.jsonl").read_bytes()
    assert run(*OF_DIGITS, *ASKED, *SIZES, "--output", folder).exit_code == 0
    assert (folder / "answers.jsonl").read_bytes() == before
    assert run(*OF_DIGITS, "--budget", 0.2, "--reducer", "random", *SIZES, "--output", folder).exit_code == 0
    assert (folder / "answers.jsonl").read_bytes().startswith(before)
    added = Run.open(folder).answers()[len(before.splitlines()) :]
    assert [answer.key for answer in added] == [("random", 0.2, index) for index in range(12)]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        (["--split", "validation"], "data_hash"),
        (["--max-new-tokens", "5"], "max_new_tokens"),
        (["--metric", "anls"], "metric"),
    ],
)
def test_another_run_s_folder_is_refused(whole: Run, changed: list[str], name: str) -> None:
    result = run(*OF_DIGITS, *ASKED, *SIZES, *changed, "--output", whole.folder)
    assert result.exit_code == 2 and name in " ".join(result.output.split())


def test_another_checkpoint_s_folder_is_refused(whole: Run, tmp_path: Path) -> None:
    other = shutil.copytree(DIGITS, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"token_budget": 0.5}))
    result = run(other, *DRAWN, *ASKED, *SIZES, "--output", whole.folder)
    assert result.exit_code == 2 and "checkpoint_hash" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--budgets 1.5", "1.5"),
        ("--budgets 0.4 much", "much"),
        ("--reducers nosuch", "nosuch"),
        ("--metric nosuch", "nosuch"),
        ("--data nothing.json", "nothing.json"),
        ("--data gqa:nothing", "no folder"),
        ("--kinds nosuch", "nosuch"),
        ("--data pages --kinds relation", "'relation'; allowed are value_of_key"),
        ("--data gqa:nothing --kinds count", "kinds are those of digit-scenes and pages alone"),
    ],
)
def test_what_is_not_allowed_is_refused_with_the_reason(arguments: str, reason: str, tmp_path: Path) -> None:
    result = run(*OF_DIGITS, *arguments.split(), "--questions", 6, "--output", tmp_path / "run")
    assert result.exit_code == 2 and reason in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def test_a_benchmark_s_files_are_evaluated_with_its_metric(tmp_path: Path) -> None:
    folder = tmp_path / "pope"
    (folder / "coco").mkdir(parents=True)
    (folder / "val2014").mkdir()
    rows = []
    for number in range(4):
        name = f"COCO_val2014_{number:012d}.jpg"
        Image.new("RGB", (120, 80), (60 * number, 30, 90)).save(folder / "val2014" / name)
        rows.append({"question_id": number, "image": name, "text": f"is there a {number} ?", "category": "random"})
    labels = [row | {"label": ["yes", "no"][place % 2]} for place, row in enumerate(rows)]
    (folder / "llava_pope_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "coco" / "coco_pope_random.json").write_text("".join(json.dumps(row) + "\n" for row in labels))
    options = ["--reducers", "full", "--output", tmp_path / "run", "--latency-repeats", 1]
    result = run(DIGITS, "--data", f"pope:{folder}", *options)
    assert result.exit_code == 0, result.output
    finished = Run.open(tmp_path / "run")
    assert finished.header["metric"] == "pope"
    for line, label in zip(finished.answers(), labels, strict=True):
        says_no = bool({"No", "no", "not"} & set(line.prediction.split()))
        assert line.score == float(says_no == (label["label"] == "no"))
    said_yes = [not {"No", "no", "not"} & set(line.prediction.split()) for line in finished.answers()]
    right = sum(said and label["label"] == "yes" for said, label in zip(said_yes, labels, strict=True))
    (row,) = finished.header["figures"]
    assert row["figures"]["yes_ratio"] == sum(said_yes) / 4 and row["figures"]["recall"] == right / 2
    (measured,) = finished.header["measurements"]
    assert measured["reducer"] == "full" and measured["time_to_first_token_ms"] > 0


def test_where_nothing_can_be_measured_that_is_an_error(tmp_path: Path) -> None:
    asked = ("--budgets", "0.1", "--reducers", "fastv:layer=1", "--questions", "6")
    result = run(*OF_DIGITS, *asked, "--output", tmp_path / "run")
    assert result.exit_code == 2 and "cannot go below" in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def lines_of_processes(folder: Path) -> Iterator[int]:
    return (path.read_bytes().count(b"\n") for path in folder.glob("answers_of_process_*.jsonl"))


def test_two_processes_killed_and_begun_again_leave_the_same_file_as_one(whole: Run, tmp_path: Path) -> None:
    folder, printed = tmp_path / "two", tmp_path / "printed"
    command = ["adavtp", "evaluate", *OF_DIGITS, *ASKED, *SIZES, "--output", str(folder)]
    with Forks(IMPORTS, "app()") as forks:
        processes = forks.begin(command, printed, as_launched(2))
        while sum(lines_of_processes(folder)) < 12 or len(list(lines_of_processes(folder))) < 2:
            assert not forks.are_over(0.005), printed.read_text()
        for process in processes:
            os.kill(process, signal.SIGKILL)
        assert forks.exit_codes() == [-signal.SIGKILL] * 2
        assert 12 <= sum(lines_of_processes(folder)) < len(untimed(whole.folder))
        printed.unlink()

        forks.begin(command, printed, as_launched(2))
        assert forks.exit_codes() == [0, 0], printed.read_text()
    assert untimed(folder) == untimed(whole.folder)
    assert not list(lines_of_processes(folder))
    assert printed.read_text().count("95% CI") == 1
    shown = {f"{index}.{kind}" for index in range(12) for kind in ("png", "json")}
    assert {path.name for path in (folder / "pictures").iterdir()} == shown


def test_python_gets_the_finished_run(tmp_path: Path) -> None:
    finished = evaluate_checkpoint(
        str(DIGITS), "digit-scenes", [0.5], ["adaptive"], output=tmp_path / "run", questions=6, max_new_tokens=2
    )
    assert [answer.reducer for answer in finished.answers()] == ["adaptive"] * 6


def test_only_kinds_that_were_named_are_asked(tmp_path: Path) -> None:
    asked = ["--reducers", "full", "--kinds", "count", "largest", "--questions", 6, "--max-new-tokens", 2]
    result = run(*OF_DIGITS, *asked, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert [answer.category for answer in Run.open(tmp_path / "run").answers()] == ["count", "largest"] * 3


def test_by_default_a_run_has_the_hard_subset_s_control() -> None:
    assert SMALLER_PICTURE in REDUCERS and CONTROLLER in REDUCERS


def test_a_folder_of_another_family_is_evaluated_and_reported_by_what_its_prompts_had(tmp_path: Path) -> None:
    folder, output = family_folder("llava_next", tmp_path / "model"), tmp_path / "run"
    settings = [*DRAWN, "--budgets", "0.4", "4", "115/576", "--reducers", "full", "random", "evs"]
    result = run(
        folder, *DRAWN, *settings, "--questions", 6, "--batch-size", 4, "--max-new-tokens", 2, "--output", output
    )
    assert result.exit_code == 0, result.output
    finished = Run.open(output)
    assert finished.header["num_patches"] is None
    # Five units of 16 tokens, each with its own share.
    seen = {answer.setting: answer.visual_tokens for answer in finished.answers()}
    assert seen == {("full", 1.0): 80, ("random", 0.4): 30, ("random", 4): 20, ("random", 115 / 576): 15}
    assert {answer.num_keep for answer in finished.answers()} == {None}
    assert all(answer.flops > 0 for answer in finished.answers())
    assert all("frames of a video" in row["reason"] for row in finished.header["unreachable"])
    shown, grids = finished.shown_image(5)
    assert len(shown.places) == 5 and grids == [(4, 4)] * 5
    assert {len(answer.layers_seen) for answer in finished.answers()} == {80}
    report = CliRunner().invoke(app, ["report", str(output), "--output", str(tmp_path / "report")])
    assert report.exit_code == 0, report.output
    text = (tmp_path / "report" / "report.md").read_text()
    assert "FLOPs are not counted" not in text and "| budget 0.199653 | budget 0.4 | K = 4 |" in text
    assert "| `random` (control) | 0.4 | 30.0 |" in text


def test_a_family_without_chats_is_evaluated_by_single_questions(tmp_path: Path) -> None:
    folder, output = family_folder("paligemma", tmp_path / "model"), tmp_path / "run"
    settings = ["--budgets", "0.4", "--reducers", "full", "random", "--questions", 6]
    result = run(folder, *DRAWN, *settings, "--max-new-tokens", 2, "--output", output)
    assert result.exit_code == 0, result.output
    seen = {answer.setting: answer.visual_tokens for answer in Run.open(output).answers()}
    assert seen == {("full", 1.0): 16, ("random", 0.4): 6}
