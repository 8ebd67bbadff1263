"""Counted FLOPs of generation are torch's, token by token, and the cache holds the bytes that are counted."""

import pytest
import torch

from adavtp.evaluation.flops import count_batch_flops, count_flops
from adavtp.modeling.budget.schedule import StackBudget
from adavtp.modeling.modeling_adavtp import ReducerSpec
from counted_flops import all_that_torch_counts, uneven_model
from tiny_models import tiny_batch

GENERATED = [
    ("llama", {}, "grid"),
    ("llama", {}, ["tome", "adaptive", "fastv"]),
    ("llama", {}, "vtw"),
    ("mistral", {"sliding_window": 20}, "pyramiddrop"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3}, "grid"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3}, "fastv"),
    ("qwen3", {}, "aim"),
]


@pytest.mark.parametrize(("text", "fields", "reducer"), GENERATED, ids=str)
def test_generation_costs_what_torch_counts(text: str, fields: dict, reducer: ReducerSpec) -> None:
    model = uneven_model(text=text, text_fields=fields)
    for images, lengths, budget in (((1,), (4,), 0.5), ((1,), (4,), 0.25), ((1, 1), (4, 9), [0.5, 0.7])):
        if budget == 0.25 and reducer == "aim":
            continue
        batch = tiny_batch(model.config, images, lengths)

        def generate(number: int, batch: dict = batch, budget: StackBudget = budget) -> None:
            model.generate(
                **batch,
                token_budget=budget,
                reducer=reducer,
                max_new_tokens=number,
                do_sample=False,
                eos_token_id=None,
            )

        counted = count_batch_flops(model.config, lengths, token_budget=budget, reducer=reducer)
        seen = {number: all_that_torch_counts(lambda: generate(number)) for number in (1, 2, 4)}  # noqa: B023
        assert {number: counted.with_new_tokens(number) for number in seen} == pytest.approx(seen, rel=1e-6)
        assert counted.decode_per_token == pytest.approx(seen[2] - seen[1], rel=1e-6)


@pytest.mark.parametrize(("text", "fields", "reducer"), GENERATED, ids=str)
def test_the_cache_holds_as_many_bytes_as_are_counted(text: str, fields: dict, reducer: ReducerSpec) -> None:
    model = uneven_model(text=text, text_fields=fields)
    batch = tiny_batch(model.config, (1,), (4,))
    output = model.generate(**batch, token_budget=0.5, reducer=reducer, max_new_tokens=1, return_dict_in_generate=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    counted = count_flops(model.config, 4, token_budget=0.5, reducer=reducer, dtype=torch.float32)
    assert counted.kv_bytes == held
    assert 2 * count_flops(model.config, 4, token_budget=0.5, reducer=reducer, dtype="bfloat16").kv_bytes == held
