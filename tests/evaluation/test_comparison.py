"""Comparing reducers: what is measured, what is said of it, and that an interruption costs nothing."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.commands.console import reference_checkpoint
from adavtp.evaluation import comparison
from adavtp.evaluation.accuracy import (
    answer_batch,
    answer_questions,
    as_report,
    reducer_label,
    refusal,
    visual_tokens_seen,
)
from adavtp.evaluation.comparison import (
    as_trained,
    checkpoint_hash,
    compare_reducers,
    paired_bootstrap,
    reducer_table,
    reducers_to_compare,
    remembering_tower,
    with_statistics,
)
from adavtp.evaluation.comparison_page import comparison_page
from adavtp.evaluation.pictures import (
    draw_kept_patches,
    image_as_seen,
    patch_shares,
    save_comparison_curves,
    save_gallery,
)
from adavtp.modeling.reducers.base import REDUCERS
from adavtp.tasks.digit_scenes import load_digit_questions


@pytest.fixture(scope="module")
def model() -> AdaVTPForConditionalGeneration:
    """The reference, with weights for no reducer but the controller."""
    model = AdaVTPForConditionalGeneration.from_pretrained(reference_checkpoint()).eval()
    model.config.trained_reducers = []
    return model


@pytest.fixture(scope="module")
def processor() -> AdaVTPProcessor:
    return AdaVTPProcessor.from_pretrained(reference_checkpoint())


@pytest.fixture(scope="module")
def questions() -> Dataset:
    return load_digit_questions("test", 12)


def inputs_of(processor: AdaVTPProcessor, questions: Dataset, num_questions: int) -> Any:
    rows = questions[:num_questions]
    return processor.of_questions([images[0] for images in rows["images"]], rows["question"])


# Answers at budgets.


def test_names_parameters_and_stacks_are_reducers_with_a_label(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, questions: Dataset
) -> None:
    reducers = ["adaptive", {"name": "fastv", "layer": 2}, ["grid", {"name": "vtw", "layer": 2}]]
    results, answers = answer_questions(model, processor, questions, (0.6,), reducers)
    assert [result.reducer for result in results] == ["adaptive", "fastv:layer=2", "grid, vtw:layer=2"]
    assert len(answers) == 3 * len(questions)
    assert model.config.reducers == ["adaptive"]
    for result in results:
        assert result.visual_tokens == result.num_keep == 86
        own = [answer.is_right for answer in answers if answer.reducer == result.reducer]
        assert result.accuracy == pytest.approx(np.mean(own))


def test_a_budget_out_of_reach_is_a_result_with_its_reason(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, questions: Dataset
) -> None:
    results, _ = answer_questions(model, processor, questions, (0.6, 0.1), ("fastv",))
    reached, out_of_reach = results
    assert reached.unreachable is None and reached.accuracy is not None
    assert "14 of 144" in out_of_reach.unreachable and out_of_reach.accuracy is None
    report = as_report(results, "command", "test", len(questions))
    assert [row["budget"] for row in report["rows"]] == [0.6]
    assert report["unreachable"] == [{"reducer": "fastv", "budget": 0.1, "reason": out_of_reach.unreachable}]


@pytest.mark.parametrize(("reducer", "budget"), [("fastvv", 0.4), ("random", 1.5)])
def test_a_wrong_name_or_budget_is_an_error_and_no_result(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, questions: Dataset, reducer: str, budget: float
) -> None:
    with pytest.raises(ValueError, match="fastvv|1.5"):
        refusal(model, inputs_of(processor, questions, 1), reducer, budget)


def test_visual_tokens_are_counted_over_decoder_layers(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, questions: Dataset
) -> None:
    inputs = inputs_of(processor, questions, 2)
    selection = model.select_tokens(**inputs, token_budget=0.5, reducer={"name": "fastv", "layer": 1})
    assert selection.num_keep.tolist() == [144, 144]
    assert visual_tokens_seen(selection, 4).tolist() == [72.0, 72.0]


# One pass of the tower for many reducers.


@pytest.mark.parametrize("reducer", ["adaptive", "cls_attention", "tome", "fastv"])
def test_sharing_the_tower_changes_no_answer(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, questions: Dataset, reducer: str
) -> None:
    inputs, others = inputs_of(processor, questions, 4), inputs_of(processor, questions.select(range(4, 8)), 4)
    budget = {"token_budget": 0.5, "reducer": reducer}
    expected = [model(**batch, **budget).logits for batch in (inputs, others)]
    with remembering_tower(model.model.vision_tower):
        model(**others, token_budget=0.5, reducer="random")
        shared = [model(**batch, **budget).logits for batch in (inputs, others, inputs)]
    for logits, wanted in zip(shared, [*expected, expected[0]], strict=True):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=0)


def test_reducers_behind_the_tower_share_one_pass_and_afterwards_none_does(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, questions: Dataset
) -> None:
    inputs, tower = inputs_of(processor, questions, 2), model.model.vision_tower
    calls = []
    hook = tower.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with remembering_tower(tower):
        for reducer, budget in product(("random", "grid", "divprune"), (0.2, 0.6)):
            answer_batch(model, processor, inputs, reducer, budget)
    assert len(calls) == 1
    answer_batch(model, processor, inputs, "random", 0.2)
    hook.remove()
    assert len(calls) == 2


# What is compared.


def test_the_table_has_every_reducer_and_marks_parts() -> None:
    rows = {row["name"]: row for row in reducer_table()}
    assert set(rows) == set(REDUCERS)
    assert {name for name, row in rows.items() if row["part_of"] == "aim"} == {"aim_merge", "aim_prune"}
    assert rows["fastv"]["parameters"]["ratio"] == 0.5 and rows["fastv"]["own_rule"]
    assert "attention" in rows["aim"]["needs"] and rows["aim"]["stage"] == "vision + decoder"
    assert "budget" in rows["adaptive"]["needs"] and rows["resampler"]["trained"]


def test_by_default_all_but_parts_are_compared_with_the_parameters_they_were_trained_with(
    model: AdaVTPForConditionalGeneration,
) -> None:
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.trained_reducers = [{"name": "resampler", "num_layers": 1}]
    reducers = reducers_to_compare(config)
    assert reducers[0] == "adaptive" and {"name": "resampler", "num_layers": 1} in reducers
    assert as_trained(config, ["resampler", "vtw"]) == [{"name": "resampler", "num_layers": 1}, "vtw"]
    assert as_trained(config, {"name": "resampler", "num_layers": 2}) == {"name": "resampler", "num_layers": 2}
    labels = {reducer_label(reducer).partition(":")[0] for reducer in reducers}
    assert labels == set(REDUCERS) - {"aim_merge", "aim_prune"}


def compared(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    questions: Dataset,
    path: Path,
    reducers: list[Any],
    checkpoint: str = "one",
    **options: Any,
) -> dict[str, Any]:
    about = {"command": "adavtp compare", "checkpoint": "reference", "split": "test", "file": path.name}
    return compare_reducers(model, processor, questions, [0.1, 0.5], reducers, path, checkpoint, about, **options)


def test_a_comparison_says_what_was_right_what_was_refused_and_how_it_compares(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, questions: Dataset, tmp_path: Path
) -> None:
    reducers = ["adaptive", "random", "fastv", "resampler"]
    record = compared(model, processor, questions, tmp_path / "reducers.json", reducers)
    rows = {(row["reducer"], row["budget"]): row for row in record["settings"]}
    _, answers = answer_questions(model, processor, questions, (0.5,), ("adaptive", "random"))
    for name in ("adaptive", "random"):
        expected = "".join("01"[answer.is_right] for answer in answers if answer.reducer == name)
        assert rows[name, 0.5]["right"] == expected
    assert "14 of 144" in rows["fastv", 0.1]["refused"] and rows["fastv", 0.1]["right"] == ""
    assert "no weights" in rows["resampler", 0.5]["refused"]
    random, adaptive = rows["random", 0.5], rows["adaptive", 0.5]
    assert random["difference"] == pytest.approx(random["accuracy"] - adaptive["accuracy"])
    assert "difference" not in adaptive and rows["everything", 1.0]["visual_tokens"] == 144
    assert json.loads((tmp_path / "reducers.json").read_text()) == record


def test_an_interrupted_comparison_goes_on_where_it_stopped(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    questions: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = compared(model, processor, questions, tmp_path / "whole.json", ["adaptive", "grid"], batch_size=4)

    def stopping(batches: range) -> Any:
        yield batches[0]
        yield batches[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(model, processor, questions, tmp_path / "part.json", ["adaptive"], batch_size=4, progress=stopping)
    sizes, answering = [], comparison.answer_batch

    def counted(*arguments: Any) -> list[str]:
        given = answering(*arguments)
        sizes.append((arguments[-2], len(given)))
        return given

    monkeypatch.setattr(comparison, "answer_batch", counted)
    record = compared(model, processor, questions, tmp_path / "part.json", ["adaptive", "grid"], batch_size=4)
    # Two adaptive budgets and the full one lack the last batch; grid, which is new, lacks all three at two budgets.
    assert sizes == [("grid", 4)] * 4 + [("adaptive", 4)] * 3 + [("grid", 4)] * 2
    assert [row["right"] for row in record["settings"]] == [row["right"] for row in whole["settings"]]
    sizes.clear()
    compared(model, processor, questions, tmp_path / "part.json", ["adaptive", "grid"])
    assert sizes == []
    compared(model, processor, questions, tmp_path / "part.json", ["grid"], checkpoint="another")
    assert len(sizes) == 3


def test_the_hash_is_of_configuration_and_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = checkpoint_hash(tmp_path)
    (tmp_path / "README.md").write_text("card")
    assert checkpoint_hash(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    second = checkpoint_hash(tmp_path)
    (tmp_path / "config.json").write_text('{"token_budget": 0.5}')
    assert len({first, second, checkpoint_hash(tmp_path)}) == 3


# What is said.


def test_the_bootstrap_interval_is_that_of_drawing_questions_anew() -> None:
    generator = np.random.default_rng(5)
    own, other = generator.random(400) < 0.8, generator.random(400) < 0.7
    index = generator.integers(0, 400, size=(4000, 400))
    drawn = own[index].mean(axis=1) - other[index].mean(axis=1)
    assert paired_bootstrap(own, other) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.006)
    assert paired_bootstrap(own, other) == paired_bootstrap(own, other)
    assert paired_bootstrap(own, own) == (0.0, 0.0)


def test_the_page_says_what_the_record_says(tmp_path: Path) -> None:
    half, most = "01" * 20, "1" * 36 + "0" * 4
    settings = [
        {"reducer": "everything", "budget": 1.0, "num_keep": 144, "visual_tokens": 144.0, "right": most},
        {"reducer": "adaptive", "budget": 0.4, "num_keep": 57, "visual_tokens": 57.0, "right": half},
        {"reducer": "grid", "budget": 0.4, "num_keep": 57, "visual_tokens": 57.5, "right": most},
        {"reducer": "fastv", "budget": 0.4, "num_keep": 57, "visual_tokens": None, "right": "", "refused": "too low"},
    ]
    record = {"num_questions": 40, "settings": [{"refused": None} | row for row in settings]}
    record = with_statistics(record, ["colour", "count"] * 20) | {
        "budgets": [0.4],
        "reducers": ["adaptive", "grid", "fastv"],
        "stages": {"adaptive": "vision", "grid": "vision", "fastv": "decoder"},
        "papers": {"adaptive": "", "grid": "", "fastv": "FastV"},
        **{"split": "test", "num_patches": 144, "num_layers": 4, "checkpoint": "digits", "checkpoint_hash": "ab" * 32},
        **{"versions": {"torch": "2.x"}, "machine": "m", "seconds": 60.0, "file": "reducers.json"},
    }
    assert record["settings"][1]["accuracy_by_kind"] == {"colour": 0.0, "count": 1.0}
    page = comparison_page(record, "adavtp compare --questions 40", "gallery.png", "curves.png")
    assert "| `grid` | vision |  | 90.0 (76.9 to 96.0) |" in page
    assert "| *all tokens, budget 1* | | | 90.0" in page
    assert "| `grid` | vision |  | **+40.0** (" in page
    assert "`grid` with 90.0%; 1 clearly above `adaptive`, 0 clearly below, 0 not told apart" in page
    assert "| `fastv` | 0.4 | too low |" in page
    assert "differ by at most 0.5 tokens (`grid` at 0.4)" in page
    assert page.count("adavtp compare --questions 40") == 2 and "](gallery.png)" in page
    save_comparison_curves(record, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


# Pictures.


def test_a_patch_that_more_layers_see_is_brighter(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, questions: Dataset
) -> None:
    inputs = inputs_of(processor, questions, 1)
    selection = model.select_tokens(**inputs, token_budget=0.6, reducer={"name": "fastv", "layer": 2})
    shares = patch_shares(selection, 4)[0]
    assert sorted(shares.unique().tolist()) == [0.5, 1.0]
    white = image_as_seen(processor, torch.full_like(inputs["pixel_values"][0], 10.0))
    drawn = np.asarray(draw_kept_patches(white, shares, scale=1))[4::8, 4::8, 0].reshape(-1)
    assert drawn[shares == 1.0].min() == 255 and drawn[shares == 0.5].max() < 160
    assert drawn[shares == 0.5].min() > np.asarray(draw_kept_patches(white, torch.zeros(144), scale=1)).max()


def test_shares_of_merged_tokens_are_the_patches_in_whose_place_they_stand(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, questions: Dataset
) -> None:
    selection = model.select_tokens(**inputs_of(processor, questions, 1), token_budget=0.25, reducer="tome")
    assert patch_shares(selection, 4).sum() == 36
    assert torch.equal(patch_shares(selection, 4) == 1, selection.keep)


def test_a_share_above_one_cannot_be_drawn(processor: AdaVTPProcessor, questions: Dataset) -> None:
    image = image_as_seen(processor, inputs_of(processor, questions, 1)["pixel_values"][0])
    with pytest.raises(ValueError, match="0 to 1"):
        draw_kept_patches(image, torch.full((144,), 2.0))


def test_the_gallery_draws_also_what_is_out_of_reach(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, questions: Dataset, tmp_path: Path
) -> None:
    row = questions[0]
    reducers = ["adaptive", "fastv", "resampler"]
    save_gallery(
        model, processor, row["images"][0], row["question"], row["answer"], {}, reducers, 0.1, tmp_path / "all.png"
    )
    assert (tmp_path / "all.png").stat().st_size > 5000
