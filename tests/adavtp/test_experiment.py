"""Experiments: what variants start from, that they go on where they stopped, and that reports say what runs say."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from adavtp.command_line import app
from adavtp.commands.experiment_runs import Experiment, join_variants, named_experiments, write_start
from adavtp.evaluation.runs import Run
from repository import DIGITS

EXPERIMENT = """
title: A small experiment
data: digit-scenes
budgets: [58/576, 230/576]
seeds: [3, 4]
kinds: [count, existence, largest]
parts:
  - name: methods
    asks: Which method?
    against: adaptive
    questions: 6
    reducers: [full, adaptive, random, downsample]
  - name: heads
    asks: Which head?
    against: dot head
    questions: 6
    controls: [grid]
    fresh_controller: true
    stage:
      kind: conversations
      data: {path: digit-scenes, split: train, num_questions: 6, seed: 5}
      budgets: {budget_range: [0.1, 0.4]}
      training: {max_steps: 1, per_device_train_batch_size: 6, train_parts: [controller], save_steps: 1,
                 logging_steps: 1, loss_weights: {relevance: 1.0}}
    variants:
      dot head: {model: {controller_head: dot}}
      by chance: {reducer: random}
  - name: choices
    asks: Which choice?
    against: spread
    questions: 6
    seeds: [4]
    variants:
      best: {trained_as: heads/dot head}
      spread: {trained_as: heads/dot head, model: {controller_choice: spread}}
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "small.yaml").write_text(
        EXPERIMENT.replace(
            "by chance: {reducer: random}",
            "patch head: {model: {controller_head: patch}, training: {loss_weights: {lm: 1.0}}}",
        )
    )
    result = run("experiment", folder / "small.yaml", "--output", folder / "reports", "--work", folder / "work")
    assert result.exit_code == 0, result.output
    return folder


def test_every_part_has_a_report_and_one_page_says_all_in_short(carried_out: Path) -> None:
    for part in ("methods", "heads", "choices"):
        files = {path.name for path in (carried_out / "reports" / part).iterdir()}
        assert files == {"report.md", "report.json", "curves.png", "curves.svg", "index.html"}
    page = (carried_out / "reports" / "report.md").read_text()
    assert page.startswith("# A small experiment") and "Which method?" in page and "Which head?" in page
    assert "methods/curves.png" in page and "`dot head`" in page


def test_the_page_of_all_parts_has_folded_tables_and_says_which_part_has_no_hard_subset(carried_out: Path) -> None:
    page = (carried_out / "reports" / "report.md").read_text()
    methods, heads = page.partition("## choices")[0].split("## heads")
    (numbers,) = json.loads((carried_out / "reports" / "methods" / "report.json").read_text())["checkpoints"]
    assert "The hard subset: the questions that the control `downsample`" in methods
    assert "No hard subset" not in methods
    assert "No hard subset at K = 14, K = 57" in heads and "`controls: [downsample]`" in heads
    for text in (methods, heads):
        assert text.count("<details><summary>") == text.count("</details>") >= 2
    by_kind = methods.partition("<details><summary>By kind of question")[2]
    for row in numbers["settings"]:
        cells = [f"{100 * row['categories'][kind]['score']:.1f}" for kind in numbers["categories"]]
        name = f"`{row['reducer']}`" + (" (control)" if row["reducer"] in ("random", "downsample") else "")
        assert " | ".join([name, str(row["num_keep"]), *cells]) in by_kind


def test_a_report_s_scores_are_those_of_its_run(carried_out: Path) -> None:
    numbers = json.loads((carried_out / "reports" / "heads" / "report.json").read_text())
    assert [one["checkpoint"] for one in numbers["checkpoints"]] == ["adavtp-digits, seed 3", "adavtp-digits, seed 4"]
    for checkpoint in numbers["checkpoints"]:
        answers = Run.open(heads_of(carried_out, checkpoint["checkpoint"][-1]) / "run").answers()
        assert {row["reducer"] for row in checkpoint["settings"]} == {"dot head", "patch head", "grid"}
        for row in checkpoint["settings"]:
            own = [
                answer.score
                for answer in answers
                if (answer.reducer, answer.num_keep) == (row["reducer"], row["num_keep"])
            ]
            assert len(own) == 6 and row["score"] == pytest.approx(sum(own) / 6)


def heads_of(carried_out: Path, seed: str = "3") -> Path:
    return carried_out / "work" / "adavtp-digits" / "heads" / f"seed_{seed}"


def test_each_seed_trains_another_controller(carried_out: Path) -> None:
    first, second = (
        load_file(heads_of(carried_out, seed) / "dot_head" / "heads" / "model.safetensors") for seed in "34"
    )
    assert {name for name in first if not torch.equal(first[name], second[name])} & set(filter(is_for_choosing, first))


def test_controls_are_those_of_the_checkpoint_as_it_is(carried_out: Path) -> None:
    heads = heads_of(carried_out)
    joined = [answer.prediction for answer in Run.open(heads / "run").answers() if answer.reducer == "grid"]
    output = carried_out / "grid"
    asked = ["--budgets", "58/576", "230/576", "--reducers", "grid", "--questions", 6]
    asked += ["--kinds", "count", "existence", "largest"]
    result = run("evaluate", DIGITS, "--data", "digit-scenes", *asked, "--output", output)
    assert result.exit_code == 0, result.output
    assert joined == [answer.prediction for answer in Run.open(output).answers()]


def test_a_variant_is_what_it_says_and_keeps_the_llava_that_it_starts_from(carried_out: Path) -> None:
    start = load_file(DIGITS / "model.safetensors")
    for variant, head in (("dot_head", "dot"), ("patch_head", "patch")):
        folder = heads_of(carried_out) / variant / "heads"
        assert json.loads((folder / "config.json").read_text())["controller_head"] == head
        training = json.loads((folder / "training_log.json").read_text())["stage"]["training"]
        assert training["loss_weights"] == {"relevance" if head == "dot" else "lm": 1.0}
        trained = load_file(folder / "model.safetensors")
        assert all((tensor == trained[name]).all() for name, tensor in start.items() if not is_for_choosing(name))
        assert any(is_for_choosing(name) for name in trained)


def is_for_choosing(name: str) -> bool:
    return any(part in name for part in ("controller.", "budget_token.", "reducers."))


def test_a_variant_may_be_another_s_training_with_other_fields(carried_out: Path) -> None:
    trained = heads_of(carried_out, "4") / "dot_head" / "heads"
    choices = carried_out / "work" / "adavtp-digits" / "choices" / "seed_4"
    before = json.loads((trained / "config.json").read_text())
    for variant, differs in (("best", {}), ("spread", {"controller_choice": "spread"})):
        folder = choices / variant / "changed"
        assert json.loads((folder / "config.json").read_text()) == before | differs
        assert (folder / "model.safetensors").samefile(trained / "model.safetensors")
    alone = run(
        *("evaluate", choices / "spread" / "changed", "--data", "digit-scenes", "--budgets", "58/576", "230/576"),
        *("--reducers", "adaptive", "--questions", 6, "--kinds", "count", "existence", "largest"),
        *("--output", carried_out / "spread"),
    )
    assert alone.exit_code == 0, alone.output
    joined = [answer.layers_seen for answer in Run.open(choices / "run").answers() if answer.reducer == "spread"]
    assert joined == [answer.layers_seen for answer in Run.open(carried_out / "spread").answers()]
    assert [path.name for path in choices.parent.glob("seed_*")] == ["seed_4"]


def test_asked_again_nothing_is_trained_or_answered_again(carried_out: Path) -> None:
    made = [
        *carried_out.rglob("*.safetensors"),
        *(carried_out / "work").rglob("adavtp-digits/methods/run/answers.jsonl"),
    ]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()[:1000]) for path in made}
    result = run(
        "experiment", carried_out / "small.yaml", "--output", carried_out / "reports", "--work", carried_out / "work"
    )
    assert result.exit_code == 0, result.output
    for path, (time, start) in before.items():
        assert path.read_bytes()[:1000] == start
        assert path.suffix == ".jsonl" or path.stat().st_mtime_ns == time


def test_a_start_has_no_weights_for_choosing(tmp_path: Path) -> None:
    start = load_file(write_start(DIGITS, tmp_path / "start") / "model.safetensors")
    whole = load_file(DIGITS / "model.safetensors")
    missing = set(whole) - set(start)
    assert missing == set(filter(is_for_choosing, whole))
    assert missing and all((start[name] == whole[name]).all() for name in start)


def test_runs_of_other_questions_are_not_joined(carried_out: Path, tmp_path: Path) -> None:
    heads = heads_of(carried_out)
    runs = {name: Run.open(heads / name / "run") for name in ("dot_head", "patch_head")}
    runs["patch_head"].header["data_hash"] = "other"
    with pytest.raises(ValueError, match="'patch_head'.*data_hash 'other'"):
        join_variants(runs, tmp_path / "joined", {})


def test_experiment_1_is_what_the_plan_asks_for() -> None:
    experiment = Experiment.from_file(named_experiments()["1-digits"])
    assert [str(budget) for budget in experiment.budgets][2:] == [
        f"{count}/576" for count in (115, 230, 345, 460, 576)
    ]
    parts = {part.name: part for part in experiment.parts}
    assert {"full", "prumerge", "prumerge+", "fastv", "adaptive", "random", "grid", "downsample"} <= set(
        parts["methods"].reducers
    )
    fields = [variant.get("model", {}) for variant in parts["controller"].variants.values()]
    assert {} in fields and {"budget_fusion": "post"} in fields and {"budget_attention": "mutual"} in fields
    assert {field["controller_head"] for field in fields if "controller_head" in field} == {
        "budget_token",
        "patch",
        "dot",
    }
    forms = [variant["model"].get("selection_output") for variant in parts["gradient"].variants.values()]
    assert {"gather", "mask"} <= set(forms)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("questions: 6\n    reducers", "question: 6\n    reducers", "unknown field.*question"),
        (
            "reducers: [full, adaptive, random, downsample]",
            "reducers: []",
            "'methods'.*needs reducers alone, or variants",
        ),
        ("{reducer: random}", "{reduce: random}", "'by chance'.*unknown field.*reduce"),
        ("{reducer: random}", "{training: {steps: 1}}", "'heads'.*steps"),
        ("title: A small experiment", "", "missing field.*title"),
        ("seeds: [3, 4]", "seeds: [3, 3]", "`seeds` is .3, 3.; allowed are one or more"),
        ("seeds: [4]", "seeds: [4, 4]", "`seeds` is .4, 4.; allowed are one or more"),
        ("best: {trained_as: heads/dot head}", "best: {}", "'choices'.*a stage by which they train"),
        (
            "{trained_as: heads/dot head}",
            "{trained_as: heads/best}",
            "'heads/best'; allowed are heads/dot head, heads",
        ),
        (
            "{trained_as: heads/dot head}",
            "{trained_as: heads/dot head, reducer: random}",
            "'best': it has `trained_as` and reducer; allowed beside it is `model`",
        ),
        ("data: digit-scenes\n", "data: photographs\n", "`data` is 'photographs'; allowed are pages, digit-scenes"),
    ],
)
def test_what_is_written_wrong_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "wrong.yaml").write_text(EXPERIMENT.replace(old, new))
    with pytest.raises(ValueError, match=message):
        Experiment.from_file(tmp_path / "wrong.yaml")


def test_another_checkpoint_under_the_same_name_is_refused(carried_out: Path, tmp_path: Path) -> None:
    other = shutil.copytree(DIGITS, tmp_path / "adavtp-digits")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"controller_choice": "best"}))
    options = ("--checkpoint", other, "--output", tmp_path / "reports", "--work", carried_out / "work")
    result = run("experiment", carried_out / "small.yaml", *options)
    assert result.exit_code == 2 and "another checkpoint" in " ".join(result.output.split())


def test_a_variant_that_was_trained_otherwise_is_refused(carried_out: Path, tmp_path: Path) -> None:
    changed = (carried_out / "small.yaml").read_text().replace("controller_head: dot", "controller_head: patch")
    (tmp_path / "small.yaml").write_text(changed)
    options = ("--output", tmp_path / "reports", "--work", carried_out / "work", "--part", "heads")
    result = run("experiment", tmp_path / "small.yaml", *options)
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and "trained with other settings" in said and "'controller_head': 'dot'" in said


def test_what_is_asked_wrong_is_refused_by_name(tmp_path: Path) -> None:
    other = shutil.copytree(DIGITS, tmp_path / "adavtp-digits")
    for arguments, said in (
        (["seven"], "'seven'"),
        (["1-digits", "--parts", "nothing"], "'nothing'; this experiment's parts: methods"),
        (["1-digits", "--checkpoints", DIGITS, other], "last names"),
    ):
        result = run("experiment", *arguments, "--output", tmp_path / "reports")
        assert result.exit_code == 2 and said in " ".join(result.output.split())
