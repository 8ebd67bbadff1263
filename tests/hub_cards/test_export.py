"""An exported folder loads, says on its card what was measured and nothing else, and runs the card's own snippet."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from adavtp import AdaVTPForConditionalGeneration
from adavtp.hub_cards.export import export_checkpoint
from adavtp.hub_cards.model_card import TEMPLATE
from adavtp.tasks.digit_scenes import draw_scene
from adavtp.tasks.digit_scenes.processor import build_digit_processor
from tiny_models import tiny_model
from tiny_processors import family_folder
from without_package import run_without_package, snippet_of

EVALUATION = {
    "command": "adavtp evaluate tiny --questions 2400",
    "versions": {"torch": "9.8.7", "transformers": "6.5.4"},
    "machine": "a test, 1 threads",
    "split": "test",
    "num_questions": 2400,
    "rows": [
        {
            "reducer": reducer,
            "budget": budget,
            "num_keep": num_keep,
            "accuracy": accuracy,
            "accuracy_low": accuracy - 0.01,
            "accuracy_high": accuracy + 0.01,
            "accuracy_by_kind": {"count": accuracy - 0.1, "relation": accuracy + 0.02},
            "decoder_tokens": 10.0 + num_keep,
            "milliseconds": 2.5,
        }
        for reducer, budget, num_keep, accuracy in [
            ("adaptive", 1.0, 16, 0.9317),
            ("adaptive", 0.4, 6, 0.9153),
            ("random", 0.4, 6, 0.4471),
        ]
    ],
}
STAGES = [
    {"name": "1-see", "kind": "patch_labels", "data": {"num_scenes": 321}, "training": {"max_steps": 7}},
    {
        "name": "2-choose",
        "kind": "conversations",
        "data": {"path": "digit-scenes", "num_questions": 654},
        "budgets": {"budget_range": [0.25, 0.85]},
        "training": {"max_steps": 9, "learning_rate": 0.0123, "per_device_train_batch_size": 48},
    },
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run's folder: a checkpoint, and the files that say how it came about."""
    folder = tmp_path_factory.mktemp("run")
    processor = build_digit_processor(image_size=32, patch_size=8)
    tiny_model(image_token_index=processor.image_token_id).save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": {}, "stages": STAGES}))
    for stage in STAGES:
        log = [{"step": 1, "loss": 3.4567}, {"step": 5, "loss": 0.1234}, {"step": 5, "eval_loss": 0.2}]
        (folder / f"{stage['name']}.json").write_text(json.dumps({"stage": stage, "log": log}))
    return folder


def _export(run: Path, output: Path, **changes: Any) -> Path:
    arguments = {
        "recipe": run / "run.yaml",
        "training_logs": [run / "1-see.json", run / "2-choose.json"],
        "evaluations": [run / "evaluation.json"],
    }
    return export_checkpoint(run / "checkpoint", output, **arguments | changes)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(run, tmp_path_factory.mktemp("exported") / "tiny-digits")


def test_an_exported_folder_has_the_checkpoints_weights_and_everything_the_card_cites(
    exported: Path, run: Path
) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (run / "checkpoint", exported))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    names = {path.name for path in exported.iterdir()}
    assert names >= {
        *("README.md", "config.json", "adavtp_code", "processor_config.json"),
        *("recipe.yaml", "evaluation.json", "training_log_01_1-see.json", "training_log_02_2-choose.json"),
        "budget_curve.png",
    }
    assert not [path for path in exported.parent.iterdir() if path != exported], "left something beside the folder"


def test_the_cards_snippet_runs_as_it_stands(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Where the package is absent, test_publish.py runs that of a published card.
    draw_scene("test", 0).image.save(exported.parent / "image.png")
    monkeypatch.chdir(exported.parent)
    names: dict[str, Any] = {}
    exec(snippet_of((exported / "README.md").read_text()), names)
    assert capsys.readouterr().out.endswith("\n")
    assert isinstance(names["model"], AdaVTPForConditionalGeneration)
    (exported.parent / "image.png").unlink()


def test_the_card_shows_every_measured_row(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "| adaptive | 1.0 | 16 | 93.2 (92.2 to 94.2) |  | 26.0 | 2.5 |" in card
    assert "| adaptive | 0.4 | 6 | 91.5 (90.5 to 92.5) | -1.6 | 16.0 | 2.5 |" in card
    assert "| random | 0.4 | 6 | 44.7 (43.7 to 45.7) | -48.5 | 16.0 | 2.5 |" in card
    assert "| count | 83.2 | 81.5 |" in card
    for words in (EVALUATION["command"], "2400 questions", "`test` split", "torch 9.8.7", "a test, 1 threads"):
        assert words in card


def test_the_card_says_how_the_model_was_trained(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert (
        "| 1-see | patch labels | digit scenes, num_scenes 321 | 7 | default | default | 1.0 | 3.457 to 0.123 |"
        in card
    )
    assert "| 2-choose | conversations | digit scenes, num_questions 654 | 9 | 48 | 0.0123 |" in card
    assert "0.25 to 0.85" in card
    assert "adavtp train recipe.yaml" in card


def test_the_cards_metadata_is_what_the_hub_reads(exported: Path) -> None:
    data = ModelCard.load(exported / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "image-text-to-text")
    assert data.model_name == "tiny-digits"
    assert "adavtp" in data.tags
    assert [round(result.metric_value, 4) for result in data.eval_results] == [0.9317, 0.9153, 0.4471]
    assert data.eval_results[1].metric_args == {"token_budget": 0.4, "reducer": "adaptive"}
    assert data.eval_results[0].dataset_split == "test"


def test_the_template_has_no_number_of_its_own() -> None:
    text = re.sub(r"\{[%{#].*?[%}#]\}", "", TEMPLATE.read_text(), flags=re.DOTALL)
    # What a budget may be, how wide the intervals of evaluations are, and how a snippet reads an answer.
    read = ("max_new_tokens=64", 'output[0, inputs["input_ids"].shape[1] :]')
    for known in ("95 %", "from 0.0 to 1.0", "two CPU cores", *read):
        text = text.replace(known, "")
    assert not re.findall(r"\d", text)


def test_the_card_has_no_line_left_over_from_the_template(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "{{" not in card and "{%" not in card and "None" not in card
    assert "\n\n\n" not in card
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_a_checkpoint_without_logs_and_results_has_a_card_that_says_so(run: Path, tmp_path: Path) -> None:
    folder = export_checkpoint(run / "checkpoint", tmp_path / "bare")
    card = (folder / "README.md").read_text()
    assert "Not measured." in card and "No training log" in card
    assert ModelCard.load(folder / "README.md").data.eval_results is None


def test_exporting_a_folder_onto_itself_brings_code_and_card_up_to_date(run: Path, tmp_path: Path) -> None:
    folder = _export(run, tmp_path / "tiny")
    wanted = _contents(folder)
    for name in ("adavtp_code/modeling_adavtp.py", "adavtp_code/gone.py", "gone_adavtp.py"):
        (folder / name).write_text("outdated")
    (folder / "budget_curve.png").write_text("outdated")
    assert export_checkpoint(folder, folder) == folder
    assert _contents(folder) == wanted


def test_the_name_on_the_card_can_be_a_repository(run: Path, tmp_path: Path) -> None:
    folder = _export(run, tmp_path / "tiny", name="someone/tiny-digits")
    assert 'from_pretrained("someone/tiny-digits"' in snippet_of((folder / "README.md").read_text())
    assert ModelCard.load(folder / "README.md").data.model_name == "tiny-digits"


def test_a_folder_with_something_else_is_not_touched(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="`output_dir` is .* holds something else"):
        _export(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def _without(field: str) -> Callable[[dict[str, Any]], str]:
    return lambda record: json.dumps({key: value for key, value in record.items() if key != field})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is a list; expected is an object"),
        (_without("split")(EVALUATION), "has no 'split'"),
        (json.dumps(EVALUATION | {"rows": [{"reducer": "adaptive"}]}), "a row has no 'budget', 'num_keep'"),
    ],
)
def test_an_evaluation_file_that_is_not_whole_is_refused_by_name(
    content: str, message: str, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        _export(run, tmp_path / "tiny", evaluations=[tmp_path / "results.json"])
    assert not (tmp_path / "tiny").exists()


def test_weights_that_are_no_numbers_are_not_exported(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "checkpoint", tmp_path / "diverged")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="'.*diverged', which has 1 weight.*NaN or infinite, lm_head.weight:"):
        export_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_not_exist_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing.json"):
        _export(run, tmp_path / "tiny", training_logs=[tmp_path / "nothing.json"])


def family_evaluation() -> dict[str, Any]:
    """Of images that differ in how many tokens they have."""
    rows = [
        row | {"num_keep": None, "flops": None, "visual_tokens": 5.0 * row["num_keep"]} for row in EVALUATION["rows"]
    ]
    return EVALUATION | {"rows": rows}


def test_another_family_s_export_is_its_own_and_its_card_s_snippet_runs_without_the_package(tmp_path: Path) -> None:
    folder, evaluation = family_folder("llava_next", tmp_path / "model"), tmp_path / "evaluation.json"
    evaluation.write_text(json.dumps(family_evaluation()))
    base = "someone/llava-next"
    exported = export_checkpoint(
        folder, tmp_path / "exported", evaluations=[evaluation], base_model=base, license="apache-2.0"
    )
    shutil.copytree(exported, tmp_path / "again")
    export_checkpoint(exported, tmp_path / "again")
    text = (exported / "README.md").read_text()
    card = ModelCard(text)
    assert {"adavtp", "llava_next"} <= set(card.data.tags) and "llava" not in card.data.tags
    assert (card.data.base_model, card.data.license) == (base, "apache-2.0")
    assert "a `llava_next` for which" in text and "a LLaVA" not in text and "scaled and cropped" not in text
    # What was measured, in place of K: 5 * 6 of 5 * 16 tokens.
    assert "decoder sees 30 of 80 visual tokens" in text and "| random | 0.4 | 30 |" in text
    draw_scene("test", 0).image.save(tmp_path / "image.png")
    code = snippet_of(text).replace("max_new_tokens=64", "max_new_tokens=2")
    run_without_package(code, tmp_path)
    weights = [load_file(place / "model.safetensors") for place in (folder, exported, tmp_path / "again")]
    assert all(torch.equal(weights[0][name], own[name]) for own in weights[1:] for name in weights[0])
