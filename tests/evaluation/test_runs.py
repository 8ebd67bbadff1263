"""The folder of a run: what survives an interruption, what is refused, what two processes leave."""

import json
import os
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from adavtp.evaluation.runs import Answer, Run

SETTINGS = [
    {"reducer": "full", "budget": 1.0, "num_keep": 16},
    {"reducer": "fastv:layer=1", "budget": 8, "num_keep": 8},
    {"reducer": "adaptive", "budget": 0.5, "num_keep": 8},
]


def header(**fields: Any) -> dict[str, Any]:
    return {
        "command": "adavtp evaluate",
        "checkpoint_hash": "c",
        "data_hash": "d",
        "metric": "exact_match",
        "max_new_tokens": 16,
        "settings": SETTINGS,
        "unreachable": [],
    } | fields


def answer(setting: int, index: int, prediction: str = "yes", layers_seen: list[int] | None = None) -> Answer:
    asked = SETTINGS[setting]
    return Answer(
        *(index, f"q{index}", asked["reducer"], asked["budget"], "Is it?", ["yes"], prediction, 1.0, None),
        **{"num_keep": asked["num_keep"], "visual_tokens": 8.0, "text_tokens": 3, "new_tokens": 2, "flops": 1e9},
        **{"ms": 1.5, "layers_seen": layers_seen},
    )


def begun(folder: Path, **fields: Any) -> Run:
    run = Run.begin(folder, header(**fields))
    run.write_header()
    run.merge()
    return run


def test_answers_come_in_the_order_of_settings_and_examples_whoever_wrote_them(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.append([answer(2, 1), answer(0, 1)], process=1)
    run.append([answer(1, 0), answer(0, 0)], process=0)
    expected = [answer(0, 0), answer(0, 1), answer(1, 0), answer(2, 1)]
    assert Run.open(tmp_path).answers() == expected
    run.merge()
    lines = [Answer(**json.loads(text)) for text in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines == expected
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["answers.jsonl"]
    run.append([answer(1, 1)], process=1)
    assert Run.open(tmp_path).answers() == [*expected[:3], answer(1, 1), expected[3]]


@pytest.mark.parametrize("length", [1, 12, 29])
def test_a_line_that_was_cut_off_is_asked_again_and_no_other(tmp_path: Path, length: int) -> None:
    run = begun(tmp_path)
    run.append([answer(0, 0), answer(0, 1)])
    own = next(tmp_path.glob("answers_*"))
    own.write_text(own.read_text() + (json.dumps(vars(answer(0, 2))) + "\n")[:length])
    again = begun(tmp_path)
    assert again.done() == {("full", 1.0, 0), ("full", 1.0, 1)}
    again.append([answer(0, 2)])
    assert Run.open(tmp_path).answers() == [answer(0, 0), answer(0, 1), answer(0, 2)]


def test_whoever_is_killed_while_merging_leaves_every_answer_once(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.append([answer(0, 0), answer(0, 1)])
    own = next(tmp_path.glob("answers_*"))
    content = own.read_text()
    run.merge()
    # Killed after the merged file was written, and before the other was taken away.
    own.write_text(content)
    assert Run.open(tmp_path).answers() == [answer(0, 0), answer(0, 1)]
    begun(tmp_path)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_a_broken_line_in_the_middle_is_reported_with_its_place(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.append([answer(0, 0)])
    own = next(tmp_path.glob("answers_*"))
    own.write_text('{"index": \n' + own.read_text())
    with pytest.raises(ValueError, match=f"{own.name}, line 1"):
        run.answers()


def append_for_ever(folder: Path, last: Any) -> None:
    for index in range(10**9):
        Run(folder, header()).append([answer(0, index, prediction="x" * 3000)])
        last.value = index


def test_what_was_appended_before_a_kill_is_there(tmp_path: Path) -> None:
    forking = get_context("fork")
    last = forking.Value("q", -1)
    process = forking.Process(target=append_for_ever, args=(tmp_path, last))
    process.start()
    while last.value < 50:
        time.sleep(0.01)
    process.kill()
    process.join()
    indices = [one.index for one in Run(tmp_path, header()).answers()]
    assert indices == list(range(len(indices))) and last.value <= indices[-1] <= last.value + 1


@pytest.mark.parametrize("name", ["checkpoint_hash", "data_hash", "metric", "max_new_tokens"])
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    begun(tmp_path).append([answer(0, 0)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=name) as error:
        Run.begin(tmp_path, header(**{name: "other"}))
    assert str(tmp_path) in str(error.value) and "'other'" in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("left", ["answers.jsonl", "answers_of_process_00000.jsonl", "pictures/0.png"])
def test_what_a_run_left_whose_record_is_gone_is_nobody_s(tmp_path: Path, left: str) -> None:
    run = begun(tmp_path)
    run.append([answer(0, 0)])
    if left == "answers.jsonl":
        run.merge()
    elif left == "pictures/0.png":
        run.picture(0).write_bytes(b"")
        next(tmp_path.glob("answers_of*")).unlink()
    if left != "answers.jsonl":
        run.path.unlink()
    (tmp_path / "run.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=f"{left} and no file run.json"):
        Run.begin(tmp_path, header(checkpoint_hash="other"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]", "null", "3", "[" * 100_000),
        *(
            json.dumps(header(**{name: {"a": 1}}))
            for name in ("command", "settings", "unreachable", "metric", "seconds")
        ),
        json.dumps({name: value for name, value in header().items() if name != "data_hash"}),
        json.dumps(header(settings=[1])),
        json.dumps(header(settings=[{"reducer": "full", "budget": 1.0}])),
        json.dumps(header(unreachable=[{"reducer": ["full"], "budget": 1.0}])),
        json.dumps(header(measurements=[{"reducer": "full"}])),
    ],
    ids=lambda text: text[:40],
)
def test_a_record_in_another_form_is_one_sentence(tmp_path: Path, text: str) -> None:
    begun(tmp_path)
    (tmp_path / "run.json").write_text(text)
    for look in (lambda: Run.open(tmp_path), lambda: Run.begin(tmp_path, header())):
        with pytest.raises(ValueError, match="run.json"):
            look()


@pytest.mark.parametrize(
    "change",
    [
        *({name: ["x"]} for name in ("index", "reducer", "budget", "prediction", "score", "num_keep", "flops", "ms")),
        *({"index": index} for index in (-1, 7, True)),
        *({"reducer": "grid"}, {"num_keep": 3}, {"more": 1}, {"answers": "yes"}, {"layers_seen": "x"}),
    ],
    ids=str,
)
def test_an_answer_of_another_form_or_of_another_run_is_one_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    run = begun(tmp_path, num_examples=3)
    run.path.write_text(json.dumps(vars(answer(0, 0)) | change) + "\n")
    with pytest.raises(ValueError, match="is no answer|of different runs"):
        run.answers()


def test_what_is_no_folder_and_no_file_of_a_run_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        Run.begin(tmp_path / "file", header())
    (tmp_path / "run/run.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="and no file run.json"):
        Run.begin(tmp_path / "run", header())
    run = begun(tmp_path / "other")
    run.path.unlink()
    os.mkfifo(run.path)
    with pytest.raises(ValueError, match="answers.jsonl is no file"):
        run.answers()


def test_settings_may_be_added_behind_those_that_are_there(tmp_path: Path) -> None:
    begun(tmp_path, settings=SETTINGS[1:], unreachable=[{"reducer": "full", "budget": 1.0, "reason": "broken"}])
    run = begun(tmp_path, command="adavtp evaluate --more", settings=[SETTINGS[2], SETTINGS[0]])
    assert Run.open(tmp_path).header == run.header
    assert run.header["settings"] == [SETTINGS[1], SETTINGS[2], SETTINGS[0]]
    assert run.header["unreachable"] == []
    assert run.header["command"] == "adavtp evaluate\nadavtp evaluate --more"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run.json"):
        Run.open(tmp_path)
