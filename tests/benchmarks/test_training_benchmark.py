"""The training benchmark compares like with like and says what it should; how fast anything is, no test says."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import training
from adavtp.evaluation.training_costs import MeasuredStep
from interleaved import Spread

SPREAD = {"median", "lower_quartile", "upper_quartile", "repeats"}


def test_the_result_has_every_row_and_is_what_the_plan_reads(tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    arguments = "--preset tiny --text-tokens 8 --strata 2 --sweeps 1 --data-steps 1 --workers 0"
    training.main([*arguments.split(), "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["command"].startswith(f"python benchmarks/training.py {arguments}")
    assert [(row["per"], row["gates"]) for row in result["steps"]] == [
        ("batch", "features"),
        ("sample", "features"),
        ("batch", "attention"),
    ]
    for row in result["steps"]:
        assert set(row["speed_up"]) == SPREAD
        assert row["mean_budget"] == pytest.approx(0.6)
    by_batch, by_sample, in_attention = (row["expected_speed_up"] for row in result["steps"])
    # Fewer tokens, a longest row, all tokens.
    assert by_batch > by_sample > in_attention
    assert 0.0 <= result["data"]["waiting_share"]["median"] <= 1.0
    assert result["data"]["sample_seconds"]["median"] > 0.0
    assert MeasuredStep.of_file(file).expected == by_batch


def models(device: str = "cpu") -> training.Models:
    torch.manual_seed(0)
    return training.build_models(training.model_config("tiny"), torch.device(device), torch.float32, False)


def test_both_models_are_one_set_of_weights_and_compute_the_same_at_full_budget() -> None:
    both = models()
    inputs = training.make_inputs(both.ours.config, 8, 2, torch.device("cpu"))
    both.ours.config.gradient_gates = "features"
    ours = both.ours(**inputs, token_budget=1.0)
    plain = both.plain(**inputs)
    torch.testing.assert_close(ours.logits, plain.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, plain.loss)
    shared = dict(both.ours.named_parameters())
    assert all(parameter is shared[name] for name, parameter in both.plain.named_parameters())


def test_a_step_trains_the_same_parts_in_both() -> None:
    both = models()
    inputs = training.make_inputs(both.ours.config, 8, 2, torch.device("cpu"))
    both.ours.config.gradient_gates = "features"

    def moved_by(model: torch.nn.Module, **asked: Any) -> set[str]:
        before = {name: parameter.detach().clone() for name, parameter in both.ours.named_parameters()}
        both.step_of(model, inputs | asked)
        return {name for name, parameter in both.ours.named_parameters() if not parameter.equal(before[name])}

    plain, ours = moved_by(both.plain), moved_by(both.ours, token_budget=0.5)
    own = {name for name in ours if "controller" in name or "budget_token" in name}
    assert own and ours - own == plain
    assert not any("vision_tower" in name for name in ours)


def test_a_sweep_has_every_slice_of_the_range_once() -> None:
    middles = [0.3, 0.5, 0.7, 0.9]
    by_batch = training.sweep_budgets(4, 2, 3, "batch", seed=0)
    assert len(by_batch) == 8 and all(len(set(budgets)) == 1 for budgets in by_batch)
    by_sample = training.sweep_budgets(4, 2, 3, "sample", seed=0)
    assert any(len(set(budgets)) > 1 for budgets in by_sample)
    for sweep in (by_batch[:4], by_batch[4:], by_sample[:4], by_sample[4:]):
        for row in range(3):
            assert sorted(budgets[row] for budgets in sweep) == pytest.approx(middles)


def test_a_speed_up_is_a_ratio_of_whole_sweeps() -> None:
    ours, plain = Spread.of([1.0, 3.0, 2.0, 2.0]), Spread.of([4.0, 4.0, 6.0, 6.0])
    assert training.speed_up(ours, plain, strata=2).repeats == [2.0, 3.0]


def test_waiting_is_what_the_data_takes() -> None:
    def slow() -> Any:
        for number in range(2):
            time.sleep(0.05)
            yield number

    watched = training.Watched(slow())
    assert list(watched) == [0, 1]
    assert 0.1 <= watched.seconds < 0.5
