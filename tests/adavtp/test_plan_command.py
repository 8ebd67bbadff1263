"""`adavtp plan` adds up, names its assumptions, and writes the scale plan."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adavtp.command_line import app
from adavtp.evaluation.training_costs import PUBLISHED_RUNS, MeasuredStep
from adavtp.evaluation.training_plan_page import SETTINGS

GIB = 2**30
SEVEN_B = ("plan", "--preset", "llava-1.5-7b")
# One budget, so that the mean over budgets is one count.
ONE_BUDGET = ("--budget-range", 0.5, 0.5)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def planned(*arguments: Any) -> dict[str, Any]:
    result = run(*SEVEN_B, *ONE_BUDGET, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def measured_file(folder: Path, **changes: Any) -> Path:
    """As benchmarks/training.py writes it."""
    spread = {"median": 1.5, "lower_quartile": 1.4, "upper_quartile": 1.6, "repeats": [1.4, 1.5, 1.6]}
    row = {"per": "batch", "gates": "features", "speed_up": spread, "expected_speed_up": 1.65}
    waiting = {"median": 0.01, "lower_quartile": 0.01, "upper_quartile": 0.01, "repeats": [0.01]}
    result = {
        "command": "python benchmarks/training.py",
        "machine": {"processor": "Processor", "threads": 2, "gpu": None},
        "steps": [{"per": "sample", "gates": "features"}, row],
        "data": {"waiting_share": waiting},
    }
    path = folder / "training.json"
    path.write_text(json.dumps(result | changes))
    return path


@pytest.fixture(autouse=True)
def without_the_repositorys_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def test_hours_are_flops_over_what_the_gpus_do(tmp_path: Path) -> None:
    file = measured_file(tmp_path)
    plan = planned("--gpus", 4, "--samples", 1000, "--peak", 100, "--utilisation", 0.5, "--measured", file)
    (row,) = plan["hours"]
    seconds = 1000 * plan["flops_per_sample"]["total"] / (4 * 100e12 * 0.5)
    assert row["counted"] == pytest.approx(seconds / 3600)
    # 1.65 times by count and 1.5 times by the clock.
    assert row["with_overhead"] == pytest.approx(1.1 * seconds / 3600)
    assert row["plain"] == pytest.approx(1000 * plan["plain_flops_per_sample"] / (4 * 100e12 * 0.5) / 3600)
    assert row["plain"] > row["counted"]


def test_without_a_measurement_no_hours_are_called_measured() -> None:
    (row,) = planned("--utilisation", 0.5)["hours"]
    assert row["with_overhead"] is None and row["counted"] > 0


def test_a_step_of_seven_billion_costs_what_anybody_would_estimate() -> None:
    plan = planned("--text-tokens", 100, "--micro-batch", 1)
    # Two FLOPs for each of 6.74e9 parameters less the embedding's and each of 388 columns; three times for forward
    # and backward and once more for checkpointing. The square of attention and the tower come on top.
    estimate = 4 * 2 * (6.738e9 - 0.131e9) * (100 + 288)
    assert estimate < plan["flops_per_sample"]["total"] < 1.1 * estimate


def test_adapters_and_four_bits_need_less() -> None:
    adapters = ["--lora", 16]
    totals = [
        planned("--micro-batch", 1, "--strategy", "ddp", *options)["memory"]["total"] / GIB
        for options in ([], adapters, [*adapters, "--nf4"])
    ]
    # Twenty bytes and copies for each parameter; two; about half a byte.
    assert totals[0] > 100 and 13 < totals[1] < 24 and 4 < totals[2] < 14


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    for memory in (40, 80):
        plan = planned("--gpu-memory", memory)
        assert plan["memory"]["total"] <= memory * GIB
        double = planned("--gpu-memory", memory, "--micro-batch", 2 * plan["micro_batch"])
        assert plan["micro_batch"] == 32 or double["memory"]["total"] > memory * GIB


def test_tables_say_what_is_assumed_and_what_does_not_fit() -> None:
    result = run(*SEVEN_B, *ONE_BUDGET, "--strategy", "ddp", "--gpu-memory", 40)
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "DOES NOT FIT" in text
    assert "utilisation is an assumption" in text and "no measured overhead" in text
    for part in ("weights", "gradients", "optimizer", "decoder", "reserve", "vision", "plain model"):
        assert part in text


def test_a_controller_alone_has_no_plain_counterpart() -> None:
    plan = planned("--train-parts", "controller", "--strategy", "ddp")
    assert plan["plain_flops_per_sample"] is None and plan["hours"][0]["plain"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-parts", "head"], "`train_parts` is"),
        (["--strategy", "zero1"], "`strategy` is 'zero1'"),
        (["--utilisation", 1.5], "`utilisation` is 1.5"),
        (["--peak", 0], "`peak` is 0"),
        (["--document", "page.md"], "`--document` has its own models"),
        (["--budget-range", 0.5], "`budget_range` is"),
        (["--budget-range", 0.5, 1.5], "`budget_range` is"),
        (["--lora", 8, "--nf4"], "`strategy` is 'zero3'"),
        (["--nf4"], "`quantize` is True"),
        (["--longest", 100], "`longest` is 100"),
        (["--loss", "guess"], "`losses` is"),
        (["--measured", "nowhere.json"], "`measured` is 'nowhere.json'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: list[Any], message: str) -> None:
    result = run(*SEVEN_B, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_the_overhead_is_never_a_gain(tmp_path: Path) -> None:
    file = measured_file(tmp_path)
    assert MeasuredStep.of_file(file).overhead == pytest.approx(1.1)
    spread = {"median": 2.0, "lower_quartile": 2.0, "upper_quartile": 2.0, "repeats": [2.0]}
    row = {"per": "batch", "gates": "features", "speed_up": spread, "expected_speed_up": 1.65}
    assert MeasuredStep.of_file(measured_file(tmp_path, steps=[row])).overhead == 1.0


def test_published_runs_are_possible() -> None:
    assert all(0.1 < published.utilisation(200) < 0.6 for published in PUBLISHED_RUNS)


def test_the_page_says_its_command_and_gives_every_setting(tmp_path: Path) -> None:
    page = tmp_path / "scale.md"
    rows = [{"budget": 0.1, "ratio": {"median": 1.04}}]
    prefill = {"command": "python benchmarks/overhead.py", "pruned_prefill": rows}
    (tmp_path / "overhead.json").write_text(json.dumps(prefill))
    result = run("plan", "--document", page, "--measured", measured_file(tmp_path), "--utilisation", 0.3)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert re.search(r"`.+` wrote this page", " ".join(text.split()))
    for model in ("llava-1.5-7b", "llava-1.5-13b"):
        for setting in SETTINGS:
            assert text.count(f"| {model}, {setting.name} |") == 2
    assert "`python benchmarks/overhead.py`" in text and "1.040 at budget 0.1" in " ".join(text.split())
    text = " ".join(text.split())
    assert "python benchmarks/training.py" in text and "overhead is their quotient, 1.100" in text
    assert "github.com/haotian-liu/LLaVA" in text
    assert " nan " not in text and " inf " not in text
