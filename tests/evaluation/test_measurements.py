"""Measured cost: what the clock sees and what memory holds, checked by hand. How fast anything is, no test says."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from typer.testing import CliRunner

import latency
from adavtp import AdaVTPForConditionalGeneration
from adavtp.command_line import app
from adavtp.evaluation.measurements import (
    Measurement,
    Timing,
    as_rows,
    cache_bytes,
    generate_exactly,
    measure,
    measure_memory,
    peak_memory,
    summary_of_repeats,
    time_generation,
)
from adavtp.evaluation.settings import Setting
from adavtp.modeling.costs.model_costs import ModelCosts
from adavtp.modeling.reducers.fastv import FastVReducer
from repository import DIGITS
from tiny_models import EOS_TOKEN_ID, tiny_batch, tiny_model, tiny_text_config
from tiny_processors import family_folder

# Tiny models: keys and values, 2 heads of 8 numbers.
NUMBERS_PER_TOKEN = 2 * 2 * 8
# The prompts of `tiny_batch` have 6 and 8 words around one image of 16 patches.
LONGEST_TEXT, NUM_PATCHES, BATCH_SIZE = 8, 16, 2

SETTINGS = [("full", 1.0), ("adaptive", 0.5), ("tome", 0.5), ({"name": "fastv", "layer": 1}, 0.75)]


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> Iterator[None]:
    """Measuring collects garbage again and again, among everything that the test process has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def model() -> AdaVTPForConditionalGeneration:
    return tiny_model()


def deep_model(num_layers: int = 3) -> AdaVTPForConditionalGeneration:
    return tiny_model(text_config=tiny_text_config(num_layers=num_layers))


def bytes_of(visual_tokens: list[int], new_tokens: int = 0) -> list[int]:
    """Keys and values of each layer, from how many visual tokens it sees of each image."""
    columns = [LONGEST_TEXT + number + new_tokens for number in visual_tokens]
    return [BATCH_SIZE * number * NUMBERS_PER_TOKEN * 4 for number in columns]


@pytest.mark.parametrize(
    ("setting", "visual_tokens"),
    [
        (("full", 1.0), [16, 16, 16]),
        (("adaptive", 0.5), [8, 8, 8]),
        (("tome", 0.25), [4, 4, 4]),
        (("prumerge", 5), [5, 5, 5]),
        # 8 on average over three layers are 24, of which the first layer takes 16.
        (({"name": "fastv", "layer": 1}, 0.5), [16, 4, 4]),
        (({"name": "fastv", "layer": 2}, 0.75), [16, 16, 4]),
        # Half comes to the decoder; there 6 on average over three layers are 18, of which the first layer takes 8.
        ((["grid", {"name": "fastv", "layer": 1}], {"grid": 0.5, "fastv": 6}), [8, 5, 5]),
    ],
)
def test_keys_and_values_are_those_of_the_tokens_that_each_layer_sees(
    setting: tuple, visual_tokens: list[int]
) -> None:
    model = deep_model()
    memory = measure_memory(model, tiny_batch(model.config), Setting(*setting), new_tokens=5)
    assert memory["kv_bytes_per_layer"] == bytes_of(visual_tokens)
    assert memory["kv_bytes"] == sum(bytes_of(visual_tokens))
    # Of the fifth token there are none: nothing comes after it.
    assert memory["kv_bytes_at_end"] == sum(bytes_of(visual_tokens, new_tokens=4))


@pytest.mark.parametrize("setting", [("full", 1.0), ("tome", 0.25), ({"name": "fastv", "layer": 1}, 0.5)])
def test_counted_keys_and_values_are_those_in_the_cache(setting: tuple) -> None:
    model = deep_model()
    batch = tiny_batch(model.config, images_per_sample=(1,), lengths=(9,))
    counted = ModelCosts.of(model.config).of_prompt(9, reducer=setting[0], token_budget=setting[1], dtype=model.dtype)
    assert counted.kv_bytes == measure_memory(model, batch, Setting(*setting), new_tokens=2)["kv_bytes"]


def test_padding_of_ragged_batches_counts(model: AdaVTPForConditionalGeneration) -> None:
    # 6 words and 12 tokens, 8 words and 4: both rows have 18 columns in the cache.
    memory = measure_memory(model, tiny_batch(model.config), Setting("grid", [0.75, 0.25]), new_tokens=2)
    assert memory["kv_bytes_per_layer"] == [2 * 18 * NUMBERS_PER_TOKEN * 4] * 2


def test_a_static_cache_counts_the_room_that_it_has(model: AdaVTPForConditionalGeneration) -> None:
    output = generate_exactly(
        model, tiny_batch(model.config), Setting("grid", 0.5), new_tokens=3, cache_implementation="static"
    )
    room = output.past_key_values.layers[0].keys.shape[-2]
    assert room >= LONGEST_TEXT + 8 + 2
    assert cache_bytes(output.past_key_values) == [BATCH_SIZE * room * NUMBERS_PER_TOKEN * 4] * 2


def test_exactly_as_many_steps_as_were_asked_for(model: AdaVTPForConditionalGeneration) -> None:
    batch, steps = tiny_batch(model.config), []
    # A final norm that says the same whatever it is given, and a head that hears the end of the answer in that.
    model.model.language_model.norm.register_forward_hook(lambda *arguments: torch.ones_like(arguments[-1]))
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.weight[EOS_TOKEN_ID] = 1.0
    assert model.generate(**batch, max_new_tokens=7).shape[1] == batch["input_ids"].shape[1] + 1
    model.lm_head.register_forward_hook(lambda *arguments: steps.append(1))
    output = generate_exactly(model, batch, Setting("grid", 0.5), 7)
    assert (len(steps), output.sequences.shape[1]) == (7, batch["input_ids"].shape[1] + 7)
    steps.clear()
    time_generation(model, batch, Setting("grid", 0.5), 7)
    assert len(steps) == 7


def test_what_stops_generation_early_is_refused(model: AdaVTPForConditionalGeneration) -> None:
    model.generation_config.max_time = 1e-9
    with pytest.raises(ValueError, match="`new_tokens` is 3, but generation stopped after 1"):
        measure(model, tiny_batch(model.config), [("full", 1.0)], new_tokens=3)


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass on a clock on which nothing else takes any time."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend_seconds(seconds: float) -> None:
        now[0] += seconds

    return spend_seconds


def test_the_first_token_has_tower_reducer_and_projector_before_it(
    model: AdaVTPForConditionalGeneration, spend: Callable[[float], None]
) -> None:
    own = model.model
    parts = {
        own.vision_tower.embeddings: 30.0,
        own.controller: 5.0,
        own.multi_modal_projector: 1.0,
        model.lm_head: 0.5,
    }
    for module, seconds in parts.items():
        module.register_forward_hook(lambda *_, seconds=seconds: spend(seconds))
    timing = time_generation(model, tiny_batch(model.config), Setting("adaptive", 0.5), new_tokens=5)
    # The head makes the first token as well; then come four for each of two rows, every half a second.
    assert timing == Timing(first_token=36.5, speed=2 / 0.5)


def test_making_a_reducer_is_no_part_of_its_time(
    model: AdaVTPForConditionalGeneration, spend: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = FastVReducer.__init__

    def make_slowly(self: FastVReducer, config: object, layer: int | None = None) -> None:
        spend(30.0)
        make(self, config, layer)

    monkeypatch.setattr(FastVReducer, "__init__", make_slowly)
    model.lm_head.register_forward_hook(lambda *_: spend(0.5))
    timing = time_generation(model, tiny_batch(model.config), Setting({"name": "fastv", "layer": 1}, 0.75), 2)
    assert timing.first_token == 0.5


def test_less_budget_needs_less_memory() -> None:
    model = deep_model()
    settings = [("grid", 0.25), ("full", 1.0), ("grid", 0.5)]
    least, most, middle = measure(model, tiny_batch(model.config), settings, new_tokens=3, repeats=1, warmup=0)
    assert least.kv_bytes < middle.kv_bytes < most.kv_bytes
    assert least.peak_memory_bytes < middle.peak_memory_bytes < most.peak_memory_bytes
    # What lives at the end is part of what lived at most.
    assert most.peak_memory_bytes > most.kv_bytes_at_end


def test_peak_memory_is_the_most_that_lives_at_one_time() -> None:
    def call() -> torch.Tensor:
        first, second = torch.empty(10_000), torch.empty(30_000)
        del first
        third = torch.empty(5_000)
        del second, third
        return torch.empty(2_000)

    before = torch.empty(1_000_000)
    peak, result = peak_memory(call, torch.device("cpu"))
    assert (peak, len(result)) == (4 * 40_000, 2_000)
    del before


def test_another_order_of_settings_measures_the_same(model: AdaVTPForConditionalGeneration) -> None:
    batch = tiny_batch(model.config)
    one, other = (
        measure(model, batch, settings, new_tokens=2, repeats=1, warmup=0) for settings in (SETTINGS, SETTINGS[::-1])
    )
    assert [row.reducer for row in one] == ["full", "adaptive", "tome", "fastv:layer=1"]
    for first, second in zip(one, other[::-1], strict=True):
        for name in ("reducer", "budget", "kv_bytes_per_layer", "peak_memory_bytes"):
            assert getattr(first, name) == getattr(second, name)


@pytest.mark.parametrize("budget", [0.75, 0.1])
def test_the_model_is_left_as_it_was(budget: float) -> None:
    model = tiny_model(reducers=["adaptive"])
    model.set_reducer("fastv", layer=1)
    model.train()
    model.model.vision_tower.eval()
    reducers, modules = model.config.to_dict(), dict(model.model.reducers.items())
    modes = {name: module.training for name, module in model.named_modules()}
    weights = list(model.state_dict())
    settings = [("full", 1.0), ("visionzip", 0.5), ({"name": "fastv", "layer": None}, budget)]
    batch = tiny_batch(model.config)
    if budget == 0.1:
        with pytest.raises(ValueError, match="'fastv' cannot go below"):
            measure(model, batch, settings, new_tokens=2, repeats=1)
        assert "'fastv' cannot go below" in Setting(*settings[-1]).unreachable(model, batch)
    else:
        measure(model, batch, settings, new_tokens=2, repeats=1)
        assert Setting(*settings[-1]).unreachable(model, batch) is None
    assert model.config.to_dict() == reducers
    assert dict(model.model.reducers.items()) == modules
    assert list(model.state_dict()) == weights
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert gc.isenabled()


def test_settings_take_turns_in_an_order_that_the_seed_shuffles(model: AdaVTPForConditionalGeneration) -> None:
    budgets = [4, 8, 10, 12]
    orders = []
    for seed in (0, 0, 1):
        seen = []
        hook = model.model.multi_modal_projector.register_forward_hook(
            lambda *arguments, seen=seen: seen.append((arguments[-1].shape[1], gc.isenabled()))
        )
        settings = [("grid", budget) for budget in budgets]
        measure(model, tiny_batch(model.config), settings, new_tokens=2, repeats=3, warmup=1, seed=seed)
        hook.remove()
        # Twice each for memory, then one warm-up round and three that count, in which no garbage is collected.
        rounds = [seen[8 + 4 * number : 12 + 4 * number] for number in range(4)]
        assert len(seen) == 8 + 4 * 4
        assert all(sorted(turns) == [(budget, False) for budget in budgets] for turns in rounds)
        orders.append(rounds)
    assert len({tuple(turns) for turns in orders[0]}) > 1
    assert orders[0] == orders[1] != orders[2]


def test_ratios_are_of_each_repeat() -> None:
    own = [Timing(1.0, 10.0), Timing(4.0, 30.0), Timing(90.0, 2.0)]
    full = [Timing(2.0, 5.0), Timing(8.0, 10.0), Timing(100.0, 2.0)]
    summary = summary_of_repeats(own, full)
    # 0.5, 0.5, 0.9 and 2, 3, 1: medians, and quartiles halfway to the neighbours.
    assert summary["time_to_first_token_ratio"] == pytest.approx(0.5)
    assert summary["time_to_first_token_ratio_high"] == pytest.approx(0.7)
    assert summary["tokens_per_second_ratio"] == pytest.approx(2.0)
    assert summary["tokens_per_second_ratio_low"] == pytest.approx(1.5)
    assert summary["time_to_first_token_ms"] == pytest.approx(4000.0)
    assert summary["tokens_per_second_high"] == pytest.approx(20.0)


def test_a_row_has_what_readers_of_runs_expect(model: AdaVTPForConditionalGeneration) -> None:
    measurements = measure(model, tiny_batch(model.config), SETTINGS[:2], new_tokens=3, repeats=2, warmup=0)
    full, adaptive = json.loads(json.dumps(as_rows(measurements)))
    assert list(full) == [field.name for field in fields(Measurement)]
    assert (adaptive["reducer"], adaptive["budget"], adaptive["batch_size"]) == ("adaptive", 0.5, 2)
    assert (adaptive["new_tokens"], adaptive["repeats"]) == (3, 2)
    assert (adaptive["device"], adaptive["dtype"]) == ("cpu", "float32")
    assert adaptive["weight_bytes"] == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    for name in ("time_to_first_token_ms", "tokens_per_second", "time_to_first_token_ratio"):
        assert 0 < adaptive[f"{name}_low"] <= adaptive[name] <= adaptive[f"{name}_high"]
    assert (full["time_to_first_token_ratio"], full["tokens_per_second_ratio_high"]) == (1.0, 1.0)


def test_without_full_there_is_nothing_to_compare_with(model: AdaVTPForConditionalGeneration) -> None:
    (only,) = measure(model, tiny_batch(model.config), [("grid", 0.5)], new_tokens=2, repeats=1, warmup=0)
    assert only.time_to_first_token_ratio is only.tokens_per_second_ratio_low is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_tokens": 1}, "`new_tokens` is 1; it must be 2 or more"),
        ({"repeats": 0}, "`repeats` is 0; it must be 1 or more"),
        ({"warmup": -1}, "`warmup` is -1; it must be 0 or more"),
        ({"settings": []}, "`settings` is empty"),
        ({"settings": [("full", 0.5)]}, "`budget` of 'full' is 0.5; allowed is 1.0"),
        ({"settings": [("magic", 0.5)]}, "magic"),
    ],
)
def test_wrong_arguments_are_named(model: AdaVTPForConditionalGeneration, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(model, tiny_batch(model.config), **({"settings": SETTINGS} | arguments))


def test_full_is_plain_llava() -> None:
    # Here a budget of 1.0 would still change what patches look like, if a reducer that knows budgets were asked.
    model, asked = tiny_model(budget_attention="mutual"), []
    config, batch = model.config, tiny_batch(model.config)
    stock = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_index=config.image_token_id,
            image_seq_length=NUM_PATCHES,
            tie_word_embeddings=False,
        )
    ).eval()
    stock.load_state_dict(model.state_dict(), strict=False)
    for module in (model.model.controller, model.model.budget_token):
        module.register_forward_hook(lambda *_: asked.append(1))
    output = generate_exactly(model, batch, Setting("full"), 2, output_logits=True)
    assert not asked
    assert torch.allclose(output.logits[0], stock(**batch).logits[:, -1], atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_by_its_own_events_and_allocator(model: AdaVTPForConditionalGeneration) -> None:
    model = model.cuda()
    batch = {name: tensor.cuda() for name, tensor in tiny_batch(model.config).items()}
    model.model.vision_tower.embeddings.register_forward_pre_hook(lambda *_: torch.cuda._sleep(200_000_000))
    full, half = measure(model, batch, [("full", 1.0), ("grid", 0.5)], new_tokens=3, repeats=2)
    # 200 million cycles of a GPU's clock, which none runs at more than 4 GHz.
    assert half.time_to_first_token_ms > 50
    assert half.kv_bytes == sum(bytes_of([8, 8]))
    assert 0 < half.peak_memory_bytes <= full.peak_memory_bytes
    assert half.device == torch.cuda.get_device_name()


def run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["measure", *arguments])
    assert result.exit_code == exit_code, result.output
    return result.stdout


OF_DIGITS = (str(DIGITS), "--data", "digit-scenes")


def test_the_command_measures_a_checkpoint_of_the_package() -> None:
    reducers = [part for name in ("full", "grid", "fastv") for part in ("--reducers", name)]
    result = json.loads(
        run(*OF_DIGITS, *reducers, "--budgets", "0.2", "72", "--new-tokens", "2", "--repeats", "1", "--json")
    )
    rows = {(row["reducer"], row["budget"]): row for row in result["measurements"]}
    assert list(rows) == [("full", 1.0), ("grid", 0.2), ("grid", 72), ("fastv", 72)]
    assert rows["grid", 72]["kv_bytes"] == rows["fastv", 72]["kv_bytes"] < rows["full", 1.0]["kv_bytes"]
    assert [(row["reducer"], row["budget"]) for row in result["unreachable"]] == [("fastv", 0.2)]
    assert "cannot go below" in result["unreachable"][0]["reason"]
    assert {"command", "versions", "machine"} <= set(result)


def test_the_command_measures_a_folder_of_another_family(tmp_path: Path) -> None:
    folder, settings = family_folder("idefics3", tmp_path / "model"), ["--reducers", "full", "random"]
    command = [str(folder), *settings, "--budgets", "0.25", "--repeats", "1", "--new-tokens", "2", "--json"]
    full, reduced = json.loads(run(*command))["measurements"]
    # Of five tiles of 16 tokens, 4 of each stay; a token's keys and values are alike in all columns.
    config = json.loads((folder / "config.json").read_text())["text_config"]
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    assert full["kv_bytes"] - reduced["kv_bytes"] == 5 * 12 * numbers * 4


def test_the_command_prints_a_table_and_what_cannot_be_reached() -> None:
    asked = ("--reducers", "fastv", "--budgets", "0.5", "0.1", "--repeats", "1", "--new-tokens", "2")
    output = run(*OF_DIGITS, *asked)
    assert "tokens/s" in output
    assert "fastv at 0.1: `token_budget` asks for a mean of 14 of 144" in output


def test_the_command_refuses_a_type_that_is_none() -> None:
    assert "`dtype` is 'int8'" in run(*OF_DIGITS, "--dtype", "int8", exit_code=2)


def test_the_command_refuses_a_task_that_is_none() -> None:
    assert "allowed are digit-scenes, pages" in run(str(DIGITS), "--data", "photographs", exit_code=2)


def test_the_latency_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    arguments = "--preset tiny --reducers full grid fastv --budgets 0.25 0.75 --new-tokens 2 --repeats 1 --warmup 0"
    latency.main([*arguments.split(), "--batch-sizes", "1", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    assert set(result) == {"command", "versions", "machine", "seed", "settings", "batches"}
    assert result["command"].startswith(f"python benchmarks/latency.py {arguments}")
    assert [batch["batch_size"] for batch in result["batches"]] == [1, 2]
    for batch in result["batches"]:
        measured = {(row["reducer"], row["budget"]): row["kv_bytes"] for row in batch["measurements"]}
        # 2 layers, 8 words, and of 16 patches all, 4 and 12.
        per_token = 2 * batch["batch_size"] * NUMBERS_PER_TOKEN * 4
        expected = {("full", 1.0): 24, ("grid", 0.25): 12, ("grid", 0.75): 20, ("fastv", 0.75): 20}
        assert measured == {setting: tokens * per_token for setting, tokens in expected.items()}
        assert [row["reducer"] for row in batch["unreachable"]] == ["fastv"]
