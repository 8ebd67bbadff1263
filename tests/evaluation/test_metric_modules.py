"""Metrics as modules of `evaluate`: loaded from this package's folder, offline, by several processes at once."""

import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

import evaluate
import pytest

from adavtp.evaluation.metric_modules import METRICS, SCORED_TOGETHER, load_metric, score_examples
from repository import ROOT

# Four examples on which no metric is all right or all wrong.
PREDICTIONS = ["yes", "no", "Yes, 12", "a red cat"]
COLUMNS = {
    "pope": {"references": [["yes"], ["yes"], ["yes"], ["no"]]},
    "mme": {
        "references": [["yes"], ["yes"], ["yes"], ["no"]],
        "images": ["1", "1", "2", "2"],
        "categories": ["OCR"] * 4,
    },
    "multiple_choice": {"references": [["A"], ["A"], ["yes"], ["B"]], "choices": [["yes", "no"]] * 4},
}
COLUMNS["scienceqa_accuracy"] = COLUMNS["multiple_choice"] | {"references": [["A"], ["A"], ["A"], ["B"]]}
OTHERS = {"references": [["yes"] * 10, ["yes"] * 10, ["yes"] * 10, ["a red cat"] * 10]}


def columns(name: str) -> dict[str, list]:
    predictions = ["A", "B", "E", "B"] if name == "scienceqa_accuracy" else PREDICTIONS
    return {"predictions": predictions} | COLUMNS.get(name, OTHERS)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_the_mean_of_its_examples_scores_in_batches_and_at_once(name: str) -> None:
    given, metric = columns(name), load_metric(name)
    scores = score_examples(name, given["predictions"], given["references"], given.get("choices"))
    figures = metric.compute(**given)
    assert 0 < sum(scores) < 10 * len(scores)
    assert figures["accuracy" if name == "mme" else name] == pytest.approx(sum(scores) / len(scores))
    for start, end in ((0, 1), (1, 4)):
        metric.add_batch(**{column: values[start:end] for column, values in given.items()})
    assert metric.compute() == figures
    alone = [
        score_examples(name, *([given[column][place]] for column in ("predictions", "references")), choices)[0]
        for place, choices in enumerate([[own] for own in given.get("choices", [None] * 4)])
    ]
    assert (alone == scores) == (name not in SCORED_TOGETHER)
    assert score_examples(name, [], [], [] if "choices" in given else None) == []
    with pytest.raises(ValueError, match="predictions is empty"):
        metric.compute(**dict.fromkeys(given, []))


def test_what_is_not_a_metric_or_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no metric 'accuracy'; there are exact_match, "):
        load_metric("accuracy")
    with pytest.raises(ValueError, match="needs references for each of 2 predictions; there are 1"):
        score_examples("anls", ["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="needs choices for each of 1 predictions; there are none"):
        score_examples("multiple_choice", ["A"], [["A"]])
    with pytest.raises(ValueError, match=r"choices\[1\] is None; it has to be a list of strings"):
        score_examples("multiple_choice", ["A", "A"], [["A"], ["A"]], [["red", "blue"], None])
    # A string is no list of answers: its letters would be taken for them.
    with pytest.raises(ValueError, match=r"references\[1\] is 'red'; it has to be a list of strings"):
        score_examples("exact_match", ["a", "r"], [["a"], "red"])


@pytest.mark.parametrize("name", ["exact_match", "vqa_accuracy", "multiple_choice"])
def test_a_folder_alone_is_the_metric_and_refuses_other_configurations(name: str, tmp_path: Path) -> None:
    copy = shutil.copytree(METRICS[name], tmp_path / METRICS[name].name)
    metric = evaluate.load(str(copy), keep_in_memory=True)
    assert metric.compute(**columns(name)) == load_metric(name).compute(**columns(name))
    with pytest.raises(ValueError, match="config_name is 'squad'; allowed are"):
        evaluate.load(str(copy), "squad")


LOAD_ALL = """
import json, multiprocessing, socket, sys

def refuse(*arguments, **options):
    raise AssertionError("the network was asked for")

socket.socket.connect = socket.getaddrinfo = refuse
# No metric needs it, and `evaluate` is loaded faster where there is none.
sys.modules["transformers"] = None

import evaluate

del sys.modules["transformers"]

def load_all(metrics, given, all_are_here, results):
    all_are_here.wait()
    loaded = {name: evaluate.load(folder, name) for name, folder in metrics.items()}
    results.put({name: metric.compute(**given[name]) for name, metric in loaded.items()})

fork = multiprocessing.get_context("fork")
all_are_here, results = fork.Barrier(2), fork.SimpleQueue()
arguments = (*map(json.loads, sys.argv[1:]), all_are_here, results)
processes = [fork.Process(target=load_all, args=arguments) for _ in range(2)]
for process in processes:
    process.start()
for process in processes:
    process.join()
    assert process.exitcode == 0
print(json.dumps([results.get() for _ in processes]))
"""


def test_two_processes_load_at_once_offline_into_an_empty_cache(tmp_path: Path) -> None:
    # One configuration of each folder.
    names = list({folder: name for name, folder in METRICS.items()}.values())
    metrics = json.dumps({name: str(METRICS[name]) for name in names})
    given = json.dumps({name: columns(name) for name in names})
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, metrics, given],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [{name: load_metric(name).compute(**columns(name)) for name in names}] * 2


def test_nothing_that_is_added_is_written_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    metric = load_metric("exact_match")
    metric.add_batch(predictions=["red"], references=[["red"]])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_package_installs_the_folders() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["adavtp.evaluation"].replace(",", " ").split()
    files = [path.relative_to(ROOT / "evaluation") for path in (ROOT / "evaluation" / "metrics").rglob("*.py")]
    assert {file.parent.name for file in files} == {folder.name for folder in METRICS.values()}
    assert all(any(fnmatch(file.as_posix(), pattern) for pattern in patterns) for file in files)
