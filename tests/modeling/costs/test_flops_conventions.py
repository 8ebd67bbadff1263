"""The papers' ways of counting: worked figures for LLaVA-1.5-7B, the published tables, and the command."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adavtp.commands.console import Command
from adavtp.commands.flops import flops
from adavtp.evaluation.flops_conventions import count_flops, latency_plan, published_rows
from adavtp.modeling.costs.model_costs import ModelCosts
from adavtp.modeling.costs.presets import preset_config

LLAVA = preset_config("llava-1.5-7b")
COSTS = ModelCosts.of(LLAVA)
KEYS = {"vision", "reducer", "projector", "prefill", "decode_per_token", "kv_bytes", "mean_visual_tokens"}

# Visual tokens; prefill in T by FastV's formula and by LLM-Viewer's; the cache in MB. 60 text tokens.
WORKED = [
    (576, 3.307, 8.453, 333.4),
    (345, 2.081, 5.333, 212.3),
    (288, 1.783, 4.572, 182.5),
    (144, 1.038, 2.665, 107.0),
    (64, 0.628, 1.615, 65.0),
    (32, 0.465, 1.196, 48.2),
]

# A schedule; visual tokens, mean over layers; prefill in T by FastV's formula and by ours; the cache in MB.
SCHEDULES = [
    ({"name": "fastv", "layer": 2, "ratio": 0.5}, 306, 1.879, 4.815, 191.9),
    ({"name": "fastv", "layer": 2, "ratio": 0.75}, 171, 1.180, 3.027, 121.1),
    ({"name": "fastv", "layer": 2, "ratio": 0.9}, 90.4, 0.767, 1.968, 78.8),
    ({"name": "fastv", "layer": 3, "ratio": 0.5}, 315, 1.926, 4.936, 196.6),
    ({"name": "vtw", "layer": 15}, 270, 1.711, 4.376, 173.0),
    ({"name": "vtw", "layer": 16}, 288, 1.805, 4.616, 182.5),
    ({"name": "pyramiddrop"}, 270, 1.699, 4.352, 173.0),
    ({"name": "sparsevlm", "version": "v1", "tokens": 192}, 206.5, 1.365, 3.500, 139.7),
    ({"name": "sparsevlm", "version": "v1", "tokens": 128}, 145.4, 1.052, 2.698, 107.7),
    ({"name": "sparsevlm", "version": "v1", "tokens": 64}, 82.2, 0.728, 1.867, 74.6),
    ({"name": "dart_layer", "layer": 2, "keep": 132}, 159.8, 1.122, 2.879, 115.2),
    ({"name": "aim"}, 137.8, 1.009, 2.590, 103.7),
]


@pytest.mark.parametrize(("visual", "fastv", "viewer", "megabytes"), WORKED)
def test_worked_figures_of_llava(visual: int, fastv: float, viewer: float, megabytes: float) -> None:
    asked = {"layer_tokens": [visual] * 32}
    assert count_flops(COSTS, 60, convention="fastv", **asked).prefill / 1e12 == pytest.approx(fastv, abs=6e-4)
    assert count_flops(COSTS, 60, convention="prumerge", **asked).prefill / 1e12 == pytest.approx(viewer, abs=6e-4)
    columns = [60 + visual] * 32
    assert 2 * COSTS.decoder.kv_numbers(columns) / 1e6 == pytest.approx(megabytes, abs=0.06)
    # Without softmax, norms and additions, and with the head's additions counted: the products of LLM-Viewer.
    assert COSTS.decoder.prefill(columns) / 1e12 == pytest.approx(viewer, rel=1e-3)


def test_worked_figures_of_the_vision_side() -> None:
    counted = count_flops(COSTS, 60, reducer="full")
    embedding = 2 * 576 * 3 * 14 * 14 * 1024
    assert (counted.vision - embedding) / 1e9 == pytest.approx(2 * 183.0 - embedding / 1e9, rel=3e-3)
    assert counted.projector / 2e9 == pytest.approx(12.08, abs=0.006)


@pytest.mark.parametrize(("reducer", "tokens", "fastv", "viewer", "megabytes"), SCHEDULES, ids=str)
def test_worked_figures_of_schedules_inside_the_decoder(
    reducer: dict, tokens: float, fastv: float, viewer: float, megabytes: float
) -> None:
    theirs = count_flops(COSTS, 60, "fastv", reducer=reducer)
    assert theirs.mean_visual_tokens == pytest.approx(tokens, rel=2e-3)
    assert theirs.prefill / 1e12 == pytest.approx(fastv, rel=3e-3)
    assert COSTS.decoder.prefill(theirs.layer_tokens) / 1e12 == pytest.approx(viewer, rel=3e-3)
    assert 2 * COSTS.decoder.kv_numbers(theirs.layer_tokens) / 1e6 == pytest.approx(megabytes, rel=3e-3)


@pytest.mark.parametrize(
    ("latency", "layers", "heads"),
    [(1.0, 16, 64), (0.95, 14, 57), (0.85, 11, 44), (0.7, 6, 25), (0.6, 3, 12), (0.3, 0, 0)],
)
def test_a_latency_budget_runs_as_many_units_as_the_paper(latency: float, layers: int, heads: int) -> None:
    decoder = LLAVA.text_config
    assert sum(latency_plan(latency, decoder).heads) == 16 + layers
    assert sum(latency_plan(latency, decoder, "head").mlp) == pytest.approx(16 + heads / 4)


@pytest.mark.parametrize(("latency", "published"), [(0.85, 7.132), (0.6, 5.019), (0.5, 4.227)])
def test_worked_figures_of_skipped_layers(latency: float, published: float) -> None:
    plan = latency_plan(latency, LLAVA.text_config)
    counted = count_flops(COSTS, 60, reducer="full", convention="prumerge", plan=plan)
    assert counted.prefill / 1e12 == pytest.approx(published, abs=6e-4)
    longer = count_flops(COSTS, 62, reducer="full", convention="prumerge", plan=plan)
    assert count_flops(COSTS, 60, reducer="full", convention="adallava", plan=plan).prefill == longer.prefill


@pytest.mark.parametrize("convention", ["fastv", "prumerge", "adallava"])
def test_papers_count_the_decoder_only(convention: str) -> None:
    counted = count_flops(COSTS, 60, reducer="fastv", token_budget=0.5, convention=convention, new_tokens=3)
    assert (counted.vision, counted.reducer, counted.projector) == (0, 0, 0)
    assert counted.total == pytest.approx(counted.prefill + 2 * counted.decode_per_token, rel=1e-4)


def test_a_decode_step_in_the_papers_conventions_by_hand() -> None:
    d, m, n = 4096, 11008, 637
    step = count_flops(COSTS, 60, reducer="full", convention="fastv").decode_per_token
    assert step == 32 * (4 * d**2 + 2 * n * d + 2 * d * m)
    step = count_flops(COSTS, 60, reducer="full", convention="prumerge").decode_per_token
    assert step == 32 * (2 * (4 * d**2 + 3 * d * m) + 4 * n * d + 5 * 32 * n + 18 * d) + d * 32000


def test_published_figures_come_out_or_the_row_says_why_not() -> None:
    rows = published_rows()
    assert {row.paper for row in rows} == {"FastV", "PruMerge", "AdaLLaVA", "DyRate"}
    assert all(row.reason for row in rows)
    missed = [(row.paper, row.published) for row in rows if not row.is_reproduced]
    assert missed == [("PruMerge", 9.3), ("PruMerge", 0.91), ("AdaLLaVA", 57.0), ("DyRate", 33.33)]
    assert all(abs(row.ratio - 1) <= 0.03 for row in rows if row.paper == "FastV")


# ---------------------------------------------------------------- the command


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command(cls=Command)(flops)
    result = CliRunner().invoke(app, [*arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("convention", ["adavtp", "fastv", "prumerge", "adallava"])
def test_the_command_prints_every_convention(convention: str) -> None:
    shape = ["--preset", "llava-1.5-7b", "--visual-tokens", "576", "--text-tokens", "60"]
    arguments = [*shape, "--budget", "0.5", "--reducer", "fastv"]
    code, output = run(*arguments, "--convention", convention, "--json")
    assert code == 0
    printed = json.loads(output)
    counted = count_flops(COSTS, 60, token_budget=0.5, reducer="fastv", convention=convention)
    assert {key: printed[key] for key in KEYS} == {key: getattr(counted, key) for key in KEYS}
    code, output = run(*arguments, "--convention", convention)
    assert code == 0
    assert ("does not count" in output) == (convention != "adavtp")


def test_the_command_reads_a_folder_with_nothing_but_a_configuration(tmp_path: Path) -> None:
    LLAVA.save_pretrained(tmp_path)
    code, output = run("--checkpoint", str(tmp_path), "--budget", "144", "--reducer", "tome,adaptive", "--json")
    assert code == 0
    expected = count_flops(COSTS, 60, token_budget=144, reducer=["tome", "adaptive"]).as_dict()
    printed = json.loads(output)
    assert {key: printed[key] for key in expected} == expected


@pytest.mark.parametrize(("typed", "tokens"), [("115/576", 115), ("0.2", 115), ("230", 230)])
def test_the_command_takes_fractions_counts_and_exact_fractions(typed: str, tokens: int) -> None:
    code, output = run("--preset", "llava-1.5-7b", "--budget", typed, "--reducer", "grid", "--json")
    assert code == 0
    assert json.loads(output)["mean_visual_tokens"] == tokens


def test_an_exact_fraction_keeps_the_same_share_of_other_images() -> None:
    shape = ("--preset", "llava-1.5-7b", "--visual-tokens", "144", "--reducer", "grid")
    assert json.loads(run(*shape, "--budget", "230/576", "--json")[1])["mean_visual_tokens"] == 57
    code, output = run(*shape, "--budget", "577/576", "--json")
    assert code == 2 and "577/576" in output


def test_the_command_prints_published_figures() -> None:
    code, output = run("--published", "--json")
    assert code == 0
    assert json.loads(output) == [row.as_dict() for row in published_rows()]
    code, output = run("--published")
    assert code == 0
    assert "DyRate" in output


def test_other_numbers_of_visual_tokens_are_other_image_sizes() -> None:
    code, output = run("--preset", "llava-1.5-13b", "--visual-tokens", "144", "--json", "--latency", "0.5")
    assert code == 0
    assert json.loads(output)["mean_visual_tokens"] == 144
    assert preset_config("llava-1.5-13b", 144).vision_config.image_size == 168


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "llava-9"],
        ["--preset", "llava-1.5-7b", "--visual-tokens", "577"],
        ["--preset", "llava-1.5-7b", "--checkpoint", "."],
        [],
        ["--checkpoint", "no-such-folder"],
        ["--preset", "llava-1.5-7b", "--budget", "1.5", "--reducer", "grid"],
        ["--preset", "llava-1.5-7b", "--convention", "other"],
        ["--preset", "llava-1.5-7b", "--latency", "1.5"],
        ["--preset", "llava-1.5-7b", "--latency", "0.5", "--latency-unit", "neuron"],
    ],
    ids=str,
)
def test_the_command_refuses_with_a_reason(arguments: list[str]) -> None:
    code, output = run(*arguments)
    assert code == 2
    assert (
        "allowed" in output or "Give one" in output or "needed" in output or "square" in output or "from 0.0" in output
    )
