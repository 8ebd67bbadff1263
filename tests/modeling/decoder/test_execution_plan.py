"""What a plan promises: the model without what it leaves out, for every prompt, at less cost.

The reference is the stock model from which layers were removed, or whose output projections have zeros for heads and
groups of channels, asked about one prompt at a time.
"""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from transformers import CompileConfig, DynamicCache, StaticCache

from adavtp import AdaVTPForConditionalGeneration, ExecutionPlan
from tiny_models import (
    DECODERS,
    IMAGE_TOKEN_ID,
    NUM_NEW_TOKENS,
    alone,
    answers,
    padded_on_the_right,
    targets,
    tiny_batch,
    tiny_model,
    tiny_text_config,
)

NUM_LAYERS, IMAGES = 5, (1, 2, 0)

Model = AdaVTPForConditionalGeneration
Batch = dict[str, torch.Tensor]


def model_of(text: str, **fields: object) -> Model:
    """A model whose decoder has five layers, of four heads that share two sets of keys."""
    name, window = text.partition(" ")[0], {"sliding_window": 7} if "window" in text else {}
    config = tiny_text_config(name, NUM_LAYERS, **({"sliding_window": None} if name == "mistral" else {}) | window)
    return tiny_model(text_config=config, eos_token_id=None, **fields)


def plans(model: Model) -> ExecutionPlan:
    """Three plans: without layers, without heads and channels, and without some of each."""
    plan = ExecutionPlan.whole(model.config, 3, num_mlp_groups=8)
    plan.layers[0, [1, 3]] = False
    plan.heads[1, 1:4, :2] = False
    plan.heads[1, 3, 2:] = False
    plan.mlp_groups[1, 2, 1:7] = False
    plan.mlp_groups[1, 4] = False
    plan.layers[2, 3] = False
    plan.heads[2, 2, 2:] = False
    plan.mlp_groups[2, 0, ::2] = False
    return plan


def without(model: Model, plan: ExecutionPlan, number: int = 0) -> Model:
    """The model without what a row of a plan leaves out."""
    left = deepcopy(model)
    decoder = left.model.language_model
    for index, layer in enumerate(decoder.layers):
        output, down = layer.self_attn.o_proj, layer.mlp.down_proj
        for projection, runs in ((output, plan.heads[number, index]), (down, plan.mlp_groups[number, index])):
            size = projection.in_features // len(runs)
            with torch.no_grad():
                projection.weight[:, ~runs.repeat_interleave(size)] = 0
    kept = [layer for index, layer in enumerate(decoder.layers) if plan.layers[number, index]]
    for place, layer in enumerate(kept):
        layer.self_attn.layer_idx = place
    decoder.layers = torch.nn.ModuleList(kept)
    decoder.config.num_hidden_layers = len(kept)
    if getattr(decoder.config, "layer_types", None):
        decoder.config.layer_types = [
            kind for index, kind in enumerate(decoder.config.layer_types) if plan.layers[number, index]
        ]
    return left


@pytest.mark.parametrize("text", DECODERS)
def test_a_whole_plan_is_no_plan_to_the_bit(text: str) -> None:
    model = model_of(text)
    batch, plan = tiny_batch(model.config, IMAGES), ExecutionPlan.whole(model.config)
    assert torch.equal(model(**batch, plan=plan).logits, model(**batch).logits)
    assert answers(model, batch, plan=plan) == answers(model, batch)


@pytest.mark.parametrize("text", DECODERS)
def test_a_plan_gives_what_the_model_gives_without_what_it_leaves_out(text: str) -> None:
    model = model_of(text)
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    for number in range(3):
        sample, left = alone(batch, number, IMAGES), without(model, plan, number)
        ours, reference = model(**sample, plan=plan.row(number)).logits, left(**sample).logits
        torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)
        assert answers(model, sample, plan=plan.row(number)) == answers(left, sample)


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("reducer", ["random", "fastv", "pyramiddrop"])
def test_different_plans_in_one_batch_give_what_each_sample_gives_alone(text: str, reducer: str) -> None:
    model = model_of(text)
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    how = {"token_budget": 0.7, "reducer": reducer}
    if reducer == "random":
        # Which tokens it keeps depends on the place of a sample in its batch.
        how = {"token_budget": 0.5, "reducer": "grid"}
    together = answers(model, batch, plan=plan, **how)
    logits = model(**batch, plan=plan, **how).logits[:, -1]
    for number in range(3):
        sample = alone(batch, number, IMAGES)
        assert answers(model, sample, plan=plan.row(number), **how) == [together[number]]
        own = model(**sample, plan=plan.row(number), **how).logits[0, -1]
        torch.testing.assert_close(logits[number], own, atol=2e-5, rtol=1e-4)
    assert answers(model, padded_on_the_right(batch), plan=plan, **how) == together


def test_mlp_channels_fall_into_as_many_groups_as_there_are_heads_or_the_next_fewer_that_can_be() -> None:
    for channels, groups in ((64, 4), (66, 3), (62, 2), (61, 1)):
        text = tiny_text_config("llama", NUM_LAYERS, intermediate_size=channels)
        ExecutionPlan.whole(text).check(text)
        assert ExecutionPlan.whole(text).mlp_groups.shape[-1] == groups


def test_a_plan_of_one_row_is_every_prompt_s() -> None:
    model = model_of("llama")
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    for number in range(3):
        own = plan.row(number)
        assert answers(model, batch, plan=own) == answers(model, batch, plan=own.of_batch(3))
        assert answers(model, batch, plan=own) == answers(without(model, own), batch)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda how: "-".join(map(str, how)),
)
@pytest.mark.parametrize("text", ["llama", "mistral with a window"])
def test_every_way_to_generate_gives_what_the_model_gives_without_what_is_left_out(text: str, how: dict) -> None:
    model = model_of(text)
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    numbers = range(3)
    if "prompt_lookup_num_tokens" not in how:
        together = answers(model, batch, plan=plan, **how)
    for number in numbers:
        sample, left = alone(batch, number, IMAGES), without(model, plan, number)
        expected = answers(left, sample, **how)
        assert answers(model, sample, plan=plan.row(number), **how) == expected
        if "prompt_lookup_num_tokens" not in how:
            size = len(expected)
            assert together[number * size : (number + 1) * size] == expected


def test_sampled_sequences_of_a_prompt_share_its_plan() -> None:
    model = model_of("qwen3")
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    outputs = model.generate(
        **batch,
        plan=plan,
        suppress_tokens=[IMAGE_TOKEN_ID],
        do_sample=True,
        num_return_sequences=2,
        max_new_tokens=NUM_NEW_TOKENS,
        min_new_tokens=NUM_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for number in range(3):
        left, sample = without(model, plan, number), alone(batch, number, IMAGES)
        for place in (2 * number, 2 * number + 1):
            answer = outputs.sequences[place, batch["input_ids"].shape[1] :]
            whole = {**sample, "input_ids": torch.cat([sample["input_ids"], answer[None]], dim=1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            expected = left(**whole).logits[0, -NUM_NEW_TOKENS - 1 : -1]
            ours = torch.stack(outputs.logits)[:, place]
            torch.testing.assert_close(ours, expected, atol=5e-5, rtol=1e-3)


def test_adapters_run_under_a_plan_as_what_they_are_merged_into() -> None:
    model = model_of("llama")
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    kind = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(deepcopy(model), kind).eval()
    ours = [adapted(**batch, plan=one, reducer="grid").logits for one in (plan, plan.row(1))]
    merged = adapted.merge_and_unload()
    for one, logits in zip((plan, plan.row(1)), ours, strict=True):
        torch.testing.assert_close(logits, merged(**batch, plan=one, reducer="grid").logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("number", range(3))
def test_a_conversation_goes_on_under_the_plan_that_it_began_with(number: int) -> None:
    model = model_of("llama")
    plan, caches = plans(model).row(number), (DynamicCache(), DynamicCache())
    left, first = without(model, plan), tiny_batch(model.config, (1,))
    turns = []
    for asked, cache, given in ((model, caches[0], {"plan": plan}), (left, caches[1], {})):
        turns.append(answers(asked, first, past_key_values=cache, **given)[0])
    assert turns[0] == turns[1]
    said = torch.cat([first["input_ids"], torch.tensor([turns[0]])], dim=1)
    second = tiny_batch(model.config, (1,), seed=5)
    ids = torch.cat([said, second["input_ids"]], dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": second["pixel_values"]}
    assert answers(model, more, past_key_values=caches[0]) == answers(left, more, past_key_values=caches[1])


def test_steps_under_a_plan_are_not_compiled_and_others_are() -> None:
    model = model_of("llama")
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    compilation = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compilation._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": compilation}
    torch._dynamo.reset()
    counters.clear()
    for one in (plan, plan.row(1)):
        assert answers(model, batch, plan=one, **compiled) == answers(model, batch, plan=one)
    assert counters["stats"]["unique_graphs"] == 0
    assert answers(model, batch, **compiled) == answers(model, batch)
    assert counters["stats"]["unique_graphs"] > 0


def test_what_is_left_out_is_not_in_the_cache() -> None:
    model = model_of("qwen2")
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    length = batch["input_ids"].shape[1]
    of_batch = model(**batch, plan=plan).past_key_values
    # Layer 1 runs for the second prompt and the third, layer 3 for the second alone, without any of its heads.
    assert [len(of_batch.layers[number].keys) for number in (0, 1, 2, 4)] == [3, 2, 3, 3]
    assert of_batch.get_seq_length(3) == 0
    for number, shared_heads in enumerate(([2, 0, 2, 0, 2], [2, 1, 1, 0, 2], [2, 2, 1, 0, 2])):
        cache = model(**alone(batch, number, IMAGES), plan=plan.row(number)).past_key_values
        held = [
            0 if cache.get_seq_length(layer) == 0 else layer_.keys.shape[1]
            for layer, layer_ in enumerate(cache.layers)
        ]
        assert held == shared_heads
    assert max(of_batch.get_seq_length(layer) for layer in range(NUM_LAYERS)) == length


def test_what_is_left_out_is_not_computed() -> None:
    model = model_of("llama")
    sample = alone(tiny_batch(model.config, IMAGES), 1, IMAGES)

    def flops(plan: ExecutionPlan) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**sample, plan=plan, logits_to_keep=1)
        return counter.get_total_flops()

    whole, plan = ExecutionPlan.whole(model.config), ExecutionPlan.whole(model.config)
    plan.layers[:, 1:] = False
    one_layer = ExecutionPlan.whole(model.config)
    one_layer.layers[:, 2:] = False
    around = flops(plan) - (of_layer := flops(one_layer) - flops(plan))
    assert flops(whole) == around + NUM_LAYERS * of_layer
    halved = ExecutionPlan.whole(model.config)
    halved.heads[:, 1:, 2:], halved.mlp_groups[:, 1:, ::2] = False, False
    assert flops(halved) == around + of_layer + (NUM_LAYERS - 1) * of_layer // 2


def test_a_plan_leaves_the_model_as_it_was() -> None:
    model = model_of("llama")
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    modules, config = dict(model.named_modules()), model.config.to_dict()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, tables = model(**batch).logits, [table.clone() for table in vars(plan).values()]
    answers(model, batch, plan=plan)
    model.train()
    model(**batch, labels=targets(batch), plan=plan, reducer="grid")
    model.eval()
    assert dict(model.named_modules()) == modules and model.config.to_dict() == config
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(**batch).logits, before)
    assert all(map(torch.equal, tables, vars(plan).values()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_under_a_plan_trains_what_runs(checkpointing: bool) -> None:
    model, together = model_of("llama"), {}
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    batch["labels"] = targets(batch)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for number in (None, *range(3)):
        model.zero_grad()
        if number is None:
            model(**batch, plan=plan, reducer="grid", token_budget=1.0).loss.backward()
            together = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
            continue
        sample = alone(batch, number, IMAGES)
        model(**sample, plan=plan.row(number), reducer="grid", token_budget=1.0).loss.backward()
        for name, one in model.named_parameters():
            if one.grad is not None:
                # All prompts have equally many targets.
                together[name] = together[name] - one.grad / 3
        layer = model.model.language_model.layers[4].mlp.down_proj.weight.grad
        assert (layer is None or not bool(layer.any())) == (number == 1)
    for name, rest in together.items():
        assert rest.abs().max() < 1e-5, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.layers.__setitem__((0, 0), False), "layer 0"),
        (lambda plan: plan.heads.__setitem__((0, 0), False), "layer 0, or all of its heads"),
        (lambda plan: plan.heads.__setitem__((0, 2, 1), False), "of each 2 that follow one another"),
        (lambda plan: setattr(plan, "layers", plan.layers.float()), "plan.layers.*torch.float32"),
        (lambda plan: setattr(plan, "heads", plan.heads[..., :3]), r"plan.heads.*allowed is torch.bool \[1, 5, 4\]"),
        (lambda plan: setattr(plan, "mlp_groups", plan.mlp_groups[..., :3]), "3 groups.*64 channels"),
        (lambda plan: setattr(plan, "layers", plan.layers.expand(2, -1)), r"plan.heads.*\[2, 5, 4\]"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: object, message: str) -> None:
    model = model_of("llama")
    batch, plan = tiny_batch(model.config, IMAGES), ExecutionPlan.whole(model.config)
    change(plan)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**batch, plan=plan)


def test_a_plan_has_to_fit_the_batch_and_the_cache() -> None:
    model = model_of("llama")
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    with pytest.raises(ValueError, match="2 rows for 3 prompts"):
        model(**batch, plan=ExecutionPlan(*(table[:2] for table in vars(plan).values())))
    with pytest.raises(ValueError, match="`plan` is a list; allowed is what `model.whole_plan"):
        model(**batch, plan=[1, 2])
    cache = model(**batch, plan=plan).past_key_values
    words = {"input_ids": torch.full((3, 1), 5), "past_key_values": cache}
    with pytest.raises(ValueError, match="filled by another plan"):
        model(**words, plan=plan.row(0))
    unplanned = model(**batch).past_key_values
    with pytest.raises(ValueError, match="filled by another plan, or by none"):
        model(**words | {"past_key_values": unplanned}, plan=plan)


def test_a_static_cache_serves_another_plan_once_it_is_reset() -> None:
    model = model_of("llama")
    batch, plan = tiny_batch(model.config, IMAGES), plans(model)
    cache = StaticCache(model.config.text_config, max_cache_len=80)
    # With fewer heads a layer makes less room for their keys.
    asked = (plan.row(1), plan, plan.row(2), None, plan.row(1))
    expected = [answers(model, batch, plan=one) for one in asked]
    for one, own in zip(asked, expected, strict=True):
        assert answers(model, batch, past_key_values=cache, plan=one) == own
        cache.reset()
