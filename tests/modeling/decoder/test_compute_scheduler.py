"""What the scheduler promises: exactly as many units as the budgets say, chosen by what the prompt shows, and a prompt
that is read as if nobody had chosen.

The references are the stock decoder that reads one embedding more behind the prompt, the plan that was chosen when a
caller gives it, and counts that the test works out.
"""

import math
from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache

from adavtp import AdaVTPForConditionalGeneration
from adavtp.evaluation.flops_conventions import latency_plan
from adavtp.modeling.costs.model_costs import ModelCosts
from adavtp.modeling.decoder.compute_scheduler import choose_blocks
from tiny_models import (
    DECODERS,
    alone,
    answers,
    padded_on_the_right,
    targets,
    tiny_batch,
    tiny_model,
    tiny_text_config,
)

NUM_LAYERS, NUM_PREFIX, IMAGES = 6, 2, (1, 2, 0)
HOW = {"depth_budget": [0.5, 1.0, 0.7], "width_budget": [0.9, 0.75, 1.0]}

Model = AdaVTPForConditionalGeneration


def model_of(text: str = "llama", sets: int = 2, attention: str | None = None, **scheduler: object) -> Model:
    """A model with a scheduler of random weights, whose decoder has six layers, of four heads each in so many sets."""
    name, window = text.partition(" ")[0], {"sliding_window": 7} if "window" in text else {}
    fields = ({"sliding_window": None} if name == "mistral" else {}) | window | {"num_key_value_heads": sets}
    config = tiny_text_config(name, NUM_LAYERS, **fields)
    settings = {"num_prefix_layers": NUM_PREFIX, "num_mlp_groups": 8} | scheduler
    return tiny_model(text_config=config, eos_token_id=None, scheduler=settings, attn_implementation=attention)


def chosen(outputs: object) -> object:
    """The plan under which a cache was filled."""
    return outputs.past_key_values.pruned.planned.plan


def own(how: dict[str, object], number: int) -> dict[str, object]:
    return {name: value[number] if isinstance(value, list) else value for name, value in how.items()}


@pytest.mark.parametrize("text", DECODERS)
def test_full_budgets_give_the_stock_model_to_the_bit(text: str) -> None:
    model = model_of(text)
    batch, full = tiny_batch(model.config, IMAGES), {"depth_budget": 1.0, "width_budget": [1.0] * 3}
    assert torch.equal(model(**batch, **full).logits, model(**batch).logits)
    assert answers(model, batch, **full) == answers(model, batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("reducer", ["grid", "fastv"])
def test_the_choice_is_made_of_one_embedding_more_behind_the_prompt(text: str, reducer: str, attention: str) -> None:
    model = model_of(text, attention=attention)
    sample, how = alone(tiny_batch(model.config, IMAGES), 1, IMAGES), {"token_budget": 0.5, "reducer": "grid"}
    scheduler, decoder = model.model.scheduler, model.model.language_model
    seen = []
    scheduler.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output.plan)))
    outputs = model(**sample, **how, depth_budget=0.7, width_budget=0.75, output_hidden_states=True)
    read = outputs.hidden_states[0]
    (token, counts, plan) = seen[0]
    statistics = torch.tensor([[0.5, math.log(17) / 10, 0.0]])
    joined = torch.cat([read, scheduler.token(counts, statistics)], dim=1)
    # Kept tokens keep their positions, which have gaps.
    positions = torch.arange(sample["input_ids"].shape[1])
    kept = outputs.selection.keep.flatten()
    stays = torch.ones_like(positions, dtype=torch.bool).masked_scatter(sample["input_ids"][0] == 63, kept)
    positions = torch.cat([positions[stays], positions[-1:] + 1])[None]
    mask = torch.ones_like(positions)
    stock = decoder(
        inputs_embeds=joined, position_ids=positions, attention_mask=mask, output_hidden_states=True, use_cache=False
    )
    torch.testing.assert_close(token, stock.hidden_states[NUM_PREFIX][:, -1], atol=1e-5, rtol=1e-4)
    expected = scheduler(stock.hidden_states[NUM_PREFIX][:, -1], counts).plan
    assert plan == expected


@pytest.mark.parametrize("text", DECODERS)
@pytest.mark.parametrize("reducer", ["grid", "fastv", "pyramiddrop"])
def test_a_choice_gives_what_its_plan_gives_and_each_sample_alone(text: str, reducer: str) -> None:
    model = model_of(text)
    batch, how = tiny_batch(model.config, IMAGES), {"token_budget": 0.7, "reducer": reducer}
    outputs = model(**batch, **how, **HOW)
    plan = chosen(outputs)
    torch.testing.assert_close(outputs.logits, model(**batch, **how, plan=plan).logits, atol=2e-5, rtol=1e-4)
    together = answers(model, batch, **how, **HOW)
    assert together == answers(model, batch, **how, plan=plan)
    assert answers(model, padded_on_the_right(batch), **how, **HOW) == together
    for number in range(3):
        sample = alone(batch, number, IMAGES)
        assert chosen(model(**sample, **how, **own(HOW, number))) == plan.row(number)
        assert answers(model, sample, **how, **own(HOW, number)) == [together[number]]


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}],
)
@pytest.mark.parametrize("text", ["llama", "mistral with a window"])
def test_every_way_to_generate_gives_what_the_plan_gives(text: str, how: dict[str, object]) -> None:
    model = model_of(text)
    batch = tiny_batch(model.config, IMAGES)
    for number in range(3):
        sample, budgets = alone(batch, number, IMAGES), own(HOW, number)
        plan = chosen(model(**sample, **budgets))
        assert answers(model, sample, **budgets, **how) == answers(model, sample, plan=plan, **how)


@pytest.mark.parametrize("sets", [2, 4])
def test_exactly_as_many_units_run_as_the_budgets_say(sets: int) -> None:
    model = model_of(sets=sets)
    sample = tiny_batch(model.config, (1,))
    generator = torch.Generator().manual_seed(0)
    for depth, width in torch.rand(40, 2, generator=generator).double().tolist():
        plan = chosen(model(**sample, depth_budget=depth, width_budget=width))
        plan.check(model.config)
        layers = max(NUM_PREFIX, math.floor(depth * NUM_LAYERS))
        assert int(plan.layers.sum()) == layers and bool(plan.layers[:, :NUM_PREFIX].all())
        for table, per_layer, size in ((plan.heads, sets, 4 // sets), (plan.mlp_groups, 8, 1)):
            ran = table & plan.layers[..., None]
            assert bool(ran[:, :NUM_PREFIX].all())
            assert int(ran.sum()) == size * max(NUM_PREFIX * per_layer, math.floor(width * layers * per_layer))
    # Four layers, with three heads each on average.
    plan = chosen(model(**sample, depth_budget=4, width_budget=3))
    assert int(plan.layers.sum()) == 4 and int((plan.heads & plan.layers[..., None]).sum()) == 12


@pytest.mark.parametrize("preset", ["adallava-l", "adallava-h"])
def test_adallava_s_presets_run_as_many_units_as_published_at_its_cost(preset: str) -> None:
    text = tiny_text_config("llama", 32, num_attention_heads=32, num_key_value_heads=32, head_dim=2)
    model = tiny_model(text_config=text, scheduler=preset)
    dial, unit = ("depth_budget", "layer") if preset == "adallava-l" else ("width_budget", "head")
    assert model.model.scheduler.settings.temperature == 5.0
    budgets = [1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3]
    published = {
        "adallava-l": [16, 14, 12, 11, 9, 6, 3, 0, 0],
        "adallava-h": [64, 57, 51, 44, 38, 25, 12, 0, 0],
    }[preset]
    batch, costs = tiny_batch(model.config, [1] * len(budgets)), ModelCosts(model.config)
    plan = chosen(model(**batch, **{dial: budgets}))
    for number, (budget, units) in enumerate(zip(budgets, published, strict=True)):
        row = plan.row(number)
        heads = (row.heads & row.layers[..., None])[0, 16:].sum(dim=-1)
        groups = (row.mlp_groups & row.layers[..., None])[0, 16:].sum(dim=-1)
        assert torch.equal(heads, groups) and int(heads.sum()) == units * (32 if unit == "layer" else 8)
        assert set(heads.tolist()) <= ({0, 32} if unit == "layer" else {0, 8, 16, 24, 32})
        counted = costs.of_prompt(20, token_budget=1.0, plan=row).prefill
        expected = costs.of_prompt(20, token_budget=1.0, plan=latency_plan(budget, text, unit)).prefill
        assert counted == pytest.approx(expected, rel=1e-9)


def test_blocks_are_chosen_one_after_another() -> None:
    generator = torch.Generator().manual_seed(0)
    heads, groups = torch.randn(2, 5, 3, 4, generator=generator).unbind(0)
    layers = torch.tensor([[True] * 3, [True, False, True], [True] * 3, [True] * 3, [True] * 3])
    counts = torch.tensor([0, 3, 2, 6, 5])
    (of_heads, of_groups), _ = choose_blocks(heads, groups, layers, counts, 2, 5.0, learns=False)
    for row in range(5):
        left = {(layer, unit) for layer in range(3) for unit in range(8) if layers[row, layer]}
        logits = torch.cat([heads[row], groups[row]], dim=-1)
        taken = set()
        for _ in range(int(counts[row])):
            layer = max(left, key=lambda entry: float(logits[entry]))[0]
            for units in (range(4), range(4, 8)):
                here = [(layer, unit) for unit in units if (layer, unit) in left]
                taken |= set(sorted(here, key=lambda entry: -float(logits[entry]))[:2])
            left -= taken
        ours = torch.cat([of_heads[row], of_groups[row]], dim=-1).nonzero().tolist()
        assert set(map(tuple, ours)) == taken


@pytest.mark.parametrize(
    ("settings", "is_changed_by"),
    [
        ({}, {"images", "budget"}),
        ({"hears_selection": False}, {"images", "budget"}),
        ({"sees_visual_tokens": False}, {"budget"}),
        ({"sees_visual_tokens": False, "hears_selection": False}, set()),
    ],
)
def test_the_compute_token_sees_nothing_that_it_shall_not(settings: dict[str, bool], is_changed_by: set[str]) -> None:
    # One layer, before which no text has read an image.
    model, seen = model_of(num_prefix_layers=1, **settings), []
    model.model.scheduler.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    batch, budgets = tiny_batch(model.config, (1, 1)), {"depth_budget": 0.5, "reducer": "grid"}
    batch["labels"] = targets(batch)
    answer = batch["input_ids"].clone()
    answer[:, -3:] = 5
    changes = {
        "nothing": {},
        "answer": {"input_ids": answer},
        "images": {"pixel_values": batch["pixel_values"].flip(0)},
        "budget": {"token_budget": 0.5},
    }
    for change in changes.values():
        model(**batch | change, **budgets)
    assert {
        name for name, token in zip(changes, seen, strict=True) if not torch.equal(token, seen[0])
    } == is_changed_by


def test_training_draws_and_learns_what_its_units_would_have_changed() -> None:
    model = model_of()
    batch, drawn = tiny_batch(model.config, IMAGES), set()
    batch["labels"] = targets(batch)
    how = {"reducer": "grid", "token_budget": 1.0, "depth_budget": 0.7, "width_budget": 0.8}
    # At this width logits would be so far apart that no noise changes their order.
    for layer in model.model.scheduler.logits.values():
        torch.nn.init.normal_(layer.weight, std=0.01)
    model.train()
    for seed in range(8):
        torch.manual_seed(seed)
        outputs = model(**batch, **how, use_cache=True)
        plan = chosen(outputs)
        drawn.add(str(plan.layers.tolist()))
        model.eval()
        executed = model(**batch, **how | {"depth_budget": None, "width_budget": None}, plan=plan)
        model.train()
        torch.testing.assert_close(outputs.loss, executed.loss, atol=1e-5, rtol=1e-5)
    assert len(drawn) > 4
    outputs.loss.backward()
    for name, parameter in model.model.scheduler.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name


@pytest.mark.parametrize("preset", [{}, {"sets": 4, "preset": "adallava-h", "block_size": 2, "num_mlp_groups": 4}])
def test_checkpointing_gives_the_same_gradients(preset: dict[str, object]) -> None:
    grads = []
    for checkpoints in (False, True):
        model = model_of(**preset)
        batch = tiny_batch(model.config, IMAGES)
        how = {"reducer": "grid", "width_budget": 0.7} | ({} if preset else {"depth_budget": 0.7})
        model.train()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        model(**batch, labels=targets(batch), **how).loss.backward()
        grads.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("scheduler" in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-6, rtol=1e-4)


def test_what_is_recorded_of_the_first_layers_is_the_prompt_s() -> None:
    model = model_of(attention="eager")
    batch = tiny_batch(model.config, IMAGES)
    is_real = batch["attention_mask"].bool()
    recorded = model(**batch, depth_budget=0.7, output_hidden_states=True, output_attentions=True)
    stock = model(**batch, output_hidden_states=True, output_attentions=True)
    for number in range(NUM_PREFIX + 1):
        ours, expected = (outputs.hidden_states[number][is_real] for outputs in (recorded, stock))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    for number in range(NUM_PREFIX):
        ours, expected = (outputs.attentions[number].transpose(1, 2)[is_real] for outputs in (recorded, stock))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_configuration_s_budgets_hold_where_a_call_names_none() -> None:
    model = model_of()
    batch = tiny_batch(model.config, IMAGES)
    stock, asked = answers(model, batch), answers(model, batch, depth_budget=0.5, width_budget=0.7)
    model.config.depth_budget, model.config.width_budget = 0.5, 0.7
    assert answers(model, batch) == asked and asked != stock
    assert answers(model, batch, depth_budget=1.0, width_budget=1.0) == stock
    words = {name: value for name, value in alone(batch, 2, IMAGES).items() if name != "pixel_values"}
    model.config.depth_budget = model.config.width_budget = 1.0
    stock = answers(model, words)
    model.config.depth_budget = 0.5
    assert answers(model, words, depth_budget=1.0) == stock


def test_a_conversation_goes_on_under_the_units_that_it_began_with() -> None:
    model, budgets = model_of(), {"depth_budget": 0.5, "width_budget": 0.75}
    first, cache = tiny_batch(model.config, (1,)), DynamicCache()
    said = torch.cat([first["input_ids"], torch.tensor(answers(model, first, past_key_values=cache, **budgets))], 1)
    second = tiny_batch(model.config, (1,), seed=5)
    ids = torch.cat([said, second["input_ids"]], dim=1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": second["pixel_values"]}
    plan = cache.pruned.planned.plan
    again = DynamicCache()
    answers(model, first, past_key_values=again, plan=plan)
    with pytest.raises(ValueError, match="was filled with .3. layers and .8. attention heads"):
        model.generate(**more, past_key_values=deepcopy(cache), depth_budget=0.7, width_budget=0.75)
    with pytest.raises(ValueError, match="begin with a new cache"):
        model.generate(**more, past_key_values=deepcopy(cache), depth_budget=0.5, width_budget=1.0)
    assert answers(model, more, past_key_values=cache, **budgets) == answers(model, more, past_key_values=again)


@pytest.mark.parametrize("rule", ["even", "first", "random"])
def test_rules_choose_without_a_scheduler(rule: str) -> None:
    model = tiny_model(text_config=tiny_text_config("llama", NUM_LAYERS), eos_token_id=None)
    batch = tiny_batch(model.config, IMAGES)
    how = {"depth_budget": 0.7, "width_budget": 0.5, "scheduler": rule, "reducer": "grid"}
    plan = chosen(model(**batch, **how))
    assert plan.layers.sum(dim=-1).tolist() == [4, 4, 4] and bool(plan.layers[:, 0].all())
    # Of 4 layers with 2 sets of heads that share keys, 4 run; of 16 groups of channels, 8.
    assert (plan.heads & plan.layers[..., None]).sum(dim=(1, 2)).tolist() == [8] * 3
    assert (plan.mlp_groups & plan.layers[..., None]).sum(dim=(1, 2)).tolist() == [8] * 3
    if rule == "even":
        assert plan.layers[0].tolist() == [True, True, False, True, False, True]
    if rule == "first":
        assert plan.layers[0].tolist() == [True] * 4 + [False] * 2
        assert plan.heads[0, 1:4].tolist() == [[True, True, False, False]] * 2 + [[False] * 4]
    together = answers(model, batch, **how)
    for number in range(3):
        assert answers(model, alone(batch, number, IMAGES), **how) == [together[number]]
    assert together == answers(model, batch, plan=plan, reducer="grid")


def test_a_scheduler_is_saved_and_read_back_and_starts_anew_on_a_checkpoint_without(tmp_path: object) -> None:
    model = model_of()
    batch, how = tiny_batch(model.config, IMAGES), {"depth_budget": 0.5, "width_budget": 0.7}
    model.save_pretrained(tmp_path / "with")
    loaded = Model.from_pretrained(tmp_path / "with")
    assert torch.equal(loaded(**batch, **how).logits, model(**batch, **how).logits)
    without = Model.from_pretrained(tmp_path / "with", scheduler=None)
    assert torch.equal(without(**batch).logits, model(**batch).logits)
    without.save_pretrained(tmp_path / "without")
    warm = Model.from_pretrained(tmp_path / "without", scheduler={"num_prefix_layers": 3})
    assert torch.equal(warm(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="random weights and would choose at random"):
        warm(**batch, depth_budget=0.7)
    warm.train()(**batch, labels=targets(batch), reducer="grid", depth_budget=0.7)
    assert not warm.config.untrained_scheduler
    chosen(warm.eval()(**batch, depth_budget=0.7))


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"depth_budget": 1.5}, "`depth_budget` has the value 1.5.*fraction of the decoder's layers.*int >= 2"),
        ({"depth_budget": 1}, "`depth_budget` has the value 1;.*1.0 for all layers"),
        ({"width_budget": -0.1}, "`width_budget` has the value -0.1"),
        ({"width_budget": True}, "`width_budget` is True"),
        ({"depth_budget": [0.5, 0.5]}, "`depth_budget` has shape .2,. for a batch of 3"),
        ({"depth_budget": "half"}, "`depth_budget` is 'half'"),
        ({"depth_budget": 0.5, "scheduler": "best"}, "`scheduler` is 'best'; allowed are 'even'"),
    ],
)
def test_budgets_that_cannot_be_are_refused(budgets: dict[str, object], message: str) -> None:
    model = model_of()
    batch = tiny_batch(model.config, IMAGES)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**batch, **budgets)


def test_what_cannot_choose_says_so() -> None:
    batch = tiny_batch(model_of().config, IMAGES)
    text = tiny_text_config("llama", NUM_LAYERS)
    bare = tiny_model(text_config=text)
    with pytest.raises(ValueError, match="no scheduler that could choose what runs.*scheduler='even'"):
        bare(**batch, depth_budget=0.5)
    of_depth = model_of(dials=["depth"])
    with pytest.raises(ValueError, match="`width_budget` is 0.5, and this model's scheduler chooses depth only"):
        of_depth(**batch, width_budget=0.5)
    with pytest.raises(ValueError, match="`depth_budget` is 3 layers, and the first 4 of this decoder always run"):
        model_of(num_prefix_layers=4)(**batch, depth_budget=3)
    with pytest.raises(ValueError, match="`plan` and `depth_budget` were both given"):
        bare(**batch, plan=bare.whole_plan(), depth_budget=0.5)
    gated = model_of().train()
    with pytest.raises(ValueError, match="use gradient_gates='features'"):
        gated(**batch, labels=targets(batch), token_budget=0.5)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("adallava", "preset 'adallava'; allowed are 'adallava-l', 'adallava-h'"),
        (["depth"], "`scheduler` is .'depth'."),
        ({"layers": 2}, "the field 'layers'; allowed are preset, dials"),
        ({"dials": ["tokens"]}, "dials=.'tokens'."),
        ({"num_prefix_layers": 0}, "num_prefix_layers=0; allowed are whole numbers from 1 to 5"),
        ({"num_prefix_layers": 6}, "num_prefix_layers=6"),
        ({"num_mlp_groups": 7}, "num_mlp_groups=7; allowed are numbers that divide the 64 channels"),
        ({"head": "deep"}, "head='deep'"),
        ({"temperature": 0}, "temperature=0; allowed are finite numbers above 0"),
        ({"block_size": 2}, "block_size=2; allowed are 0; .* where heads share no keys"),
    ],
)
def test_settings_that_cannot_be_are_refused(scheduler: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(text_config=tiny_text_config("llama", NUM_LAYERS), scheduler=scheduler)
