"""`adavtp report` on runs of the drawn tasks: its numbers are those of the run's lines, worked out here again."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adavtp.command_line import app
from adavtp.tasks.drawn_tasks import drawn_task
from adavtp.trainer.recipes.starting_model import new_model
from repository import DIGITS

Line = dict[str, Any]

# Far too small to learn to read; 36 patches.
TINY_READER = {
    "task": "pages",
    "vision_config": {"model_type": "clip_vision_model", "image_size": 192, "patch_size": 32, "hidden_size": 32}
    | {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "text_config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 2},
}


def distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Characters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for number, one in enumerate(first, start=1):
        before, row = row, [number]
        for place, other in enumerate(second):
            row.append(min(before[place + 1] + 1, row[-1] + 1, before[place] + (one != other)))
    return row[-1]


def entries(text: str) -> Counter[tuple[str, str]]:
    found, key = Counter(), ""
    for word in text.split():
        if word.isupper():
            key = word
        else:
            found[key, word] += 1
    return found


def character_accuracy(line: Line) -> float:
    prediction, (answer,) = " ".join(line["prediction"].split()), line["answers"]
    return max(0.0, 1 - distance(prediction, answer) / len(answer))


def entry_f1(line: Line) -> float:
    read, there = entries(line["prediction"]), entries(line["answers"][0])
    return 2 * (read & there).total() / (read.total() + there.total())


OWN_METRICS = {"read_line": ("character_accuracy", character_accuracy), "read_entries": ("entry_f1", entry_f1)}


def written(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def lines_of(folder: Path) -> list[Line]:
    return [json.loads(line) for line in (folder / "run" / "answers.jsonl").read_text().splitlines()]


def reported(folder: Path) -> tuple[list[Line], dict[str, Any], str]:
    """The run's lines, the report's numbers of its checkpoint, and its page."""
    written("report", folder / "run", "--output", folder / "report")
    lines = lines_of(folder)
    (checkpoint,) = json.loads((folder / "report" / "report.json").read_text())["checkpoints"]
    return lines, checkpoint, (folder / "report" / "report.md").read_text()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Line], dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("scenes")
    asked = ["--budgets", 0.1, "--reducers", "full", "adaptive", "grid", "downsample", "--questions", 24]
    limits = ["--max-new-tokens", 4, "--batch-size", 24]
    written("evaluate", DIGITS, "--data", "digit-scenes", *asked, *limits, "--output", folder / "run")
    return reported(folder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Line], dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("pages")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = new_model(TINY_READER)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    asked = ["--budgets", 0.4, "--reducers", "full", "random", "downsample", "--questions", 24]
    written("evaluate", folder / "model", "--data", "pages", *asked, "--output", folder / "run")
    # So that something was read: everything kept leaves out a word here and there.
    lines = lines_of(folder)
    for line in lines:
        if line["reducer"] == "full" and line["category"] in OWN_METRICS:
            words = line["answers"][0].split()
            del words[line["index"] % len(words)]
            line["prediction"] = " ".join(words)
    (folder / "run" / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return reported(folder)


def test_the_hard_subset_of_digit_scenes_is_that_of_the_run_s_lines(
    scenes: tuple[list[Line], dict[str, Any], str],
) -> None:
    lines, checkpoint, text = scenes
    wrong = {line["index"] for line in lines if line["reducer"] == "downsample" and line["score"] == 0}
    assert 0 < len(wrong) < 24
    (subset,) = checkpoint["hard_subsets"]
    assert (subset["num_keep"], subset["num_examples"], subset["share"]) == (14, len(wrong), len(wrong) / 24)
    assert {row["reducer"] for row in subset["settings"]} == {"full", "adaptive", "grid"}
    scores = {
        reducer: {
            line["index"]: line["score"] for line in lines if line["reducer"] == reducer and line["index"] in wrong
        }
        for reducer in ("full", "adaptive", "grid")
    }
    for row in subset["settings"]:
        own = scores[row["reducer"]]
        assert row["score"] == pytest.approx(fmean(own.values()))
        assert f"{100 * row['score']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})" in text
    differences = [scores["grid"][index] - scores["adaptive"][index] for index in wrong]
    (grid,) = [row for row in subset["settings"] if row["reducer"] == "grid"]
    assert grid["against"]["difference"] == pytest.approx(fmean(differences))


def test_every_kind_has_its_score_at_every_budget(scenes: tuple[list[Line], dict[str, Any], str]) -> None:
    lines, checkpoint, text = scenes
    assert checkpoint["categories"] == dict(sorted(Counter(line["category"] for line in lines[:24]).items()))
    for row in checkpoint["settings"]:
        for kind in checkpoint["categories"]:
            own = [line["score"] for line in lines if (line["reducer"], line["category"]) == (row["reducer"], kind)]
            assert row["categories"][kind]["score"] == pytest.approx(fmean(own))
            assert "metric" not in row["categories"][kind]
    table = text.partition("### By kind of question")[2].partition("</details>")[0]
    assert all(f"| `{row['reducer']}`" in table for row in checkpoint["settings"])


def test_long_answers_of_pages_have_their_own_metric_beside_exact_match(
    pages: tuple[list[Line], dict[str, Any], str],
) -> None:
    lines, checkpoint, text = pages
    assert set(OWN_METRICS) < set(checkpoint["categories"])
    found = set()
    for row in checkpoint["settings"]:
        for kind, cell in row["categories"].items():
            asked = [line for line in lines if (line["reducer"], line["category"]) == (row["reducer"], kind)]
            assert cell["score"] == pytest.approx(fmean(line["score"] for line in asked))
            assert ("metric" in cell) == (kind in OWN_METRICS)
            if kind in OWN_METRICS:
                name, score = OWN_METRICS[kind]
                assert cell["metric"]["name"] == name
                assert cell["metric"]["score"] == pytest.approx(fmean(map(score, asked)))
                found.add(cell["metric"]["score"])
    assert len(found - {0.0, 1.0}) == 2
    assert "| read_line, character_accuracy |" in text and "| read_entries, entry_f1 |" in text


def test_a_long_answer_may_be_as_long_as_the_task_s_longest(pages: tuple[list[Line], dict[str, Any], str]) -> None:
    longest = max(line["new_tokens"] for line in pages[0])
    assert 16 < longest <= drawn_task("pages").max_new_tokens


def test_a_reader_that_reads_nothing_has_a_hard_subset_of_all_it_was_asked(
    pages: tuple[list[Line], dict[str, Any], str],
) -> None:
    lines, checkpoint, _ = pages
    wrong = [line for line in lines if line["reducer"] == "downsample" and line["score"] < 0.5]
    (subset,) = checkpoint["hard_subsets"]
    assert subset["share"] == len(wrong) / 24 > 0.5
    assert {row["reducer"] for row in subset["settings"]} == {"full", "random"}
