"""The benchmarks run and say what they should; how fast anything is, no test says."""

import json
from pathlib import Path

import pytest

import decoding
import family_overhead
import gumbel_top_k
import interleaved
import overhead
import scheduler

SPREAD = {"median", "lower_quartile", "upper_quartile", "repeats"}
CIRCUMSTANCES = {"command", "versions", "machine", "seed", "settings"}


def test_overhead(tmp_path: Path) -> None:
    file = tmp_path / "overhead.json"
    arguments = "--preset tiny --repeats 1 --batch-size 2 --budgets 0.0 0.3 --seed 3"
    overhead.main([*arguments.split(), "--json", str(file)])
    result = json.loads(file.read_text())
    assert set(result) == CIRCUMSTANCES | {"pruned_prefill", "full_prefill"}
    assert set(result["versions"]) == {"python", "torch", "transformers"}
    assert set(result["machine"]) == {"processor", "threads", "gpu"}
    assert result["command"].startswith(f"python benchmarks/overhead.py {arguments}")
    assert [row["num_keep"] for row in result["pruned_prefill"]] == [1, 4]
    for row in result["pruned_prefill"]:
        # 2 layers, 8 words, keys and values of 2 heads of 8 numbers of 4 bytes, in 2 prompts.
        assert row["cache_bytes"] == row["predicted_cache_bytes"] == 2 * (8 + row["num_keep"]) * 2 * 2 * 2 * 8 * 4
    assert set(result["full_prefill"]) == {"stock", "stock_cut"}
    for row in [*result["pruned_prefill"], *result["full_prefill"].values()]:
        # A comparison is fair only if both sides compute the same thing.
        assert row["largest_logit_difference"] < 1e-5
        assert set(row["ratio"]) == SPREAD
        assert all(set(spread) == SPREAD for spread in row["seconds"].values())


def test_family_overhead(tmp_path: Path) -> None:
    file = tmp_path / "family_overhead.json"
    arguments = "--size tiny --repeats 1 --steps 2 --text-tokens 5 --budgets 0.3"
    family_overhead.main([*arguments.split(), "--json", str(file)])
    result = json.loads(file.read_text())
    assert set(result) == CIRCUMSTANCES | {"shapes"} and set(result["shapes"]) == {"qwen2_5_vl", "llava_next"}
    assert {name: shape["visual_tokens"] for name, shape in result["shapes"].items()} == {
        "qwen2_5_vl": 2 * 3,
        "llava_next": 16 + 4 * 8,
    }
    for shape in result["shapes"].values():
        assert list(shape["rows"]) == ["prefill, budget 1.0", "decode, budget 1.0", "prefill, budget 0.3"]
        for row in shape["rows"].values():
            assert row["largest_logit_difference"] < 1e-5
            assert set(row["ratio"]) == SPREAD and set(row["seconds"]) == {"ours", "stock"}


def test_gumbel_top_k(tmp_path: Path) -> None:
    file = tmp_path / "gumbel_top_k.json"
    arguments = "--num-tokens 12 --num-keep 5 --batch-sizes 1 3 --repeats 2 --clock process"
    gumbel_top_k.main([*arguments.split(), "--json", str(file)])
    result = json.loads(file.read_text())
    assert set(result) == CIRCUMSTANCES | {"batches"}
    assert [row["batch_size"] for row in result["batches"]] == [1, 3]
    for row in result["batches"]:
        assert row["num_chosen"] == {"at_once": [5.0], "one_by_one": [5.0]}
        for part in ("forward", "forward_backward"):
            assert set(row[part]["speed_up"]) == SPREAD
            assert set(row[part]["seconds"]) == {"at_once", "one_by_one"}


def test_decoding(tmp_path: Path) -> None:
    file = tmp_path / "decoding.json"
    arguments = "--sizes tiny --reducers vtw fastv --new-tokens 3 --repeats 1 --warmup 0"
    decoding.main([*arguments.split(), "--json", str(file)])
    result = json.loads(file.read_text())
    assert set(result) == CIRCUMSTANCES | {"sizes"}
    assert {"fastv", "pyramiddrop", "sparsevlm", "aim", "depth", "vtw"} <= set(decoding.decoder_stage_reducers())
    batches = result["sizes"]["tiny"]["tokens_per_second"]
    assert set(batches) == set(result["settings"]["batches"]) == {"one prompt", "ragged batch"}
    for rows in batches.values():
        assert [row["reducer"] for row in rows] == ["full", "vtw", "fastv"]
        full = rows[0]["tokens_per_second"]
        for row in rows:
            assert row["tokens_per_second_ratio"] == pytest.approx(row["tokens_per_second"] / full)


def test_callables_take_turns() -> None:
    calls = []
    names = ["a", "b", "c"]
    spreads = interleaved.interleaved_medians({name: lambda name=name: calls.append(name) for name in names}, 5)
    rounds = {tuple(calls[start : start + 3]) for start in range(0, 18, 3)}
    assert {tuple(sorted(order)) for order in rounds} == {("a", "b", "c")}
    # In every round, but not in the same order: nobody always follows the same other one.
    assert len(rounds) > 2
    assert [len(spread.repeats) for spread in spreads.values()] == [5, 5, 5]


def test_ratio_is_of_each_round() -> None:
    twice = interleaved.paired_ratio(
        interleaved.Spread.of([2.0, 8.0, 200.0]), interleaved.Spread.of([1.0, 4.0, 100.0])
    )
    assert (twice.lower_quartile, twice.median, twice.upper_quartile) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(("setting", "value"), [("repeats", 0), ("clock", "sundial")])
def test_wrong_setting_is_named(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{setting}` is {value!r}"):
        interleaved.interleaved_medians({"nothing": lambda: None}, **({"repeats": 1} | {setting: value}))


def test_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    arguments = "--preset tiny --repeats 1 --new-tokens 4 --seed 3"
    scheduler.main([*arguments.split(), "--json", str(file)])
    result = json.loads(file.read_text())
    assert set(result) == CIRCUMSTANCES | {"shape", "speed"}
    rows = {row["setting"]: row for row in result["speed"]}
    assert next(iter(rows)) == "everything" and rows["everything"]["counted_prefill_ratio"] == 1.0
    for row in rows.values():
        assert all(
            set(row[f"{part}_{what}"]) == SPREAD for part in ("prefill", "decoding") for what in ("seconds", "ratio")
        )
    # One of two layers, or half of each of both; the head on the last position stays.
    for name in ("depth 0.5", "width 0.5"):
        assert 1.8 < rows[name]["counted_prefill_ratio"] < 2.0 and rows[name]["targets"]
    assert rows["depth 0.5, tokens 0.4"]["visual_tokens"] == rows["tokens 0.4"]["visual_tokens"] == 6
