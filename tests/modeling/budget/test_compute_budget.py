"""What a compute budget promises: never more than it says, hardly less, however the dials share it."""

from pathlib import Path

import pytest
import torch

from adavtp import AdaVTPConfig
from adavtp.modeling.budget.compute_budget import PrefillPrice
from adavtp.modeling.budget.unit_budget import num_layers_to_run, width_shares
from adavtp.modeling.costs.decoder import UnitShares
from adavtp.modeling.costs.model_costs import ModelCosts
from adavtp.modeling.decoder.compute_scheduler import ComputeScheduler
from adavtp.modeling.decoder.dials import DecoderDials, dials_of_compute
from adavtp.modeling.decoder.pruned_cache import pruned_cache
from tiny_models import TEXT_CONFIGS, alone, answers, tiny_batch, tiny_config, tiny_model, tiny_text_config

PAGES, NUM_OTHERS = Path(__file__).parents[3] / "hub_cards" / "adavtp-pages", 40
IMAGES = (1, 2, 0)


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_the_price_of_a_prefill_is_what_torch_counts(text: str) -> None:
    config = tiny_config(text_config=tiny_text_config(text, 4))
    price = PrefillPrice.of_config(config.text_config, 2, 8)
    decoder = ModelCosts(config).decoder
    assert price.of_prompt([37] * 4, 1, 3 * 2, 3 * 8) == decoder.prefill([37] * 4)
    half = UnitShares((1.0, 1.0, 0.5, 0.0), (1.0, 0.25, 0.5, 0.0))
    assert price.of_prompt([29] * 4, 1, 2 + 1, 2 + 4) == decoder.prefill([29] * 4, half)


ALLOCATIONS = ["tokens", "width", "depth+width", "tokens+depth", "proportional", {"depth": 0.75}, {"depth": 0.8}]
ALLOCATIONS += [{"depth": 0.8, "width": 0.7}]


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
def test_200_random_budgets_are_never_exceeded_and_used_up(allocation: object) -> None:
    config = AdaVTPConfig.from_pretrained(PAGES, scheduler={"num_prefix_layers": 2})
    scheduler, costs = ComputeScheduler(config), ModelCosts(config)
    text, settings = config.text_config, scheduler.settings
    full = costs.decoder.prefill([NUM_OTHERS + 576] * text.num_hidden_layers)
    # The prefix is a quarter, and what is fixed ends at what is left.
    least, most = (0.3, 1.0) if isinstance(allocation, str) else (0.2, 0.5)
    budgets = (least + (most - least) * torch.rand(200, generator=torch.Generator().manual_seed(0))).double()
    has_tokens = allocation == "proportional" or isinstance(allocation, dict) or "tokens" in allocation
    dials = DecoderDials(compute_budget=budgets, allocation=allocation)
    tokens, dials = dials_of_compute(dials, config, scheduler, [NUM_OTHERS] * 200, [[576]] * 200, None)
    layers = num_layers_to_run(dials.depth_budget, text.num_hidden_layers, settings.num_prefix_layers, 200)
    counts = scheduler.counts(layers, width_shares(dials.width_budget, text.num_attention_heads, 200))
    for row, budget in enumerate(budgets.tolist()):
        columns = NUM_OTHERS + costs.visual_tokens("grid", tokens[row]).of_layers[0]
        behind = text.num_hidden_layers - settings.num_prefix_layers
        heads = int(counts.heads[row]) / (behind * text.num_key_value_heads)
        groups = int(counts.mlp_groups[row]) / (behind * settings.num_mlp_groups)
        plan = UnitShares((1.0, 1.0, *[heads] * behind), (1.0, 1.0, *[groups] * behind))
        achieved = costs.decoder.prefill([columns] * text.num_hidden_layers, plan) / full
        assert achieved <= budget
        # Without tokens the finest unit is a head with a group of channels, of 64 such in eight layers.
        assert achieved > (0.98 * budget if has_tokens else budget - 1 / 64 - 0.001)
    # What is not to be turned stays full, or where it is fixed.
    if isinstance(allocation, dict):
        assert set(layers.tolist()) == {6}
    elif allocation != "proportional":
        full = {"tokens": set(tokens) == {1.0}, "depth": set(layers.tolist()) == {8}}
        full["width"] = set(dials.width_budget) == {1.0}
        assert {dial for dial, is_full in full.items() if not is_full} == set(allocation.split("+"))


def test_layers_alone_use_a_budget_up_to_the_next_layer() -> None:
    config = AdaVTPConfig.from_pretrained(PAGES, scheduler={"num_prefix_layers": 2})
    scheduler, decoder = ComputeScheduler(config), ModelCosts(config).decoder
    columns = [NUM_OTHERS + 576] * 8
    # The compute token costs two layers a column more.
    token = 2 * (decoder.prefill([617] * 8) - decoder.prefill(columns)) / 8 / decoder.prefill(columns)
    for number in range(3, 9):
        alone = UnitShares((1.0,) * number + (0.0,) * (8 - number), (1.0,) * number + (0.0,) * (8 - number))
        share = decoder.prefill(columns, alone) / decoder.prefill(columns)
        for more, layers in ((0.001, number), (-0.001, number - 1)):
            dials = DecoderDials(compute_budget=min(share + token + more, 0.999), allocation="depth")
            tokens, dials = dials_of_compute(dials, config, scheduler, [NUM_OTHERS], [[576]], None)
            ran = num_layers_to_run(dials.depth_budget, 8, 2, 1).tolist()
            assert tokens == [1.0] and ran == [min(layers, 7)]


@pytest.mark.parametrize("how", [{}, {"allocation": "tokens"}, {"scheduler": "even"}, {"reducer": "pyramiddrop"}])
def test_what_runs_under_a_compute_budget_costs_no_more(how: dict[str, object]) -> None:
    text = tiny_text_config("llama", 6)
    model = tiny_model(text_config=text, eos_token_id=None, scheduler={"num_prefix_layers": 2})
    batch, how = tiny_batch(model.config, IMAGES), {"reducer": "grid", **how}
    costs = ModelCosts(model.config)
    # Of a prompt without images nothing but units can be left out.
    budgets = [0.7, 0.8, 1.0 if "allocation" in how else 0.9]
    together = answers(model, batch, compute_budget=budgets, **how)
    for number, budget in enumerate(budgets):
        sample = alone(batch, number, IMAGES)
        asked = {"compute_budget": budget} | how
        outputs = model(**sample, **asked)
        planned = pruned_cache(outputs.past_key_values).planned
        length, visual = sample["input_ids"].shape[1], IMAGES[number] * 16
        if number < 2:
            tokens = outputs.selection.depth if outputs.selection.depth is not None else outputs.selection.keep * 6
            columns = [length - visual + int((tokens > layer).sum()) for layer in range(6)]
        else:
            columns = [length] * 6
        achieved = costs.decoder.prefill(columns, None if planned is None else planned.plan)
        assert achieved <= budget * costs.decoder.prefill([length] * 6)
        assert answers(model, sample, **asked) == [together[number]]


def test_a_full_compute_budget_is_the_stock_model_to_the_bit() -> None:
    model = tiny_model(text_config=tiny_text_config("llama", 6), eos_token_id=None, scheduler={"num_prefix_layers": 2})
    batch = tiny_batch(model.config, IMAGES)
    stock = model(**batch, token_budget=1.0).logits
    assert torch.equal(model(**batch, compute_budget=1.0).logits, stock)
    assert torch.equal(model(**batch, compute_budget=1.0, allocation="tokens").logits, stock)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"compute_budget": 1.2}, "`compute_budget` has the value 1.2; .*what the full model computes"),
        ({"compute_budget": 4}, "`compute_budget` is 4; allowed are floats"),
        ({"compute_budget": 0.01}, "this prompt takes at least 0.* of the full model"),
        ({"compute_budget": 0.5, "token_budget": 0.5}, "`compute_budget` and `token_budget` were both given"),
        ({"compute_budget": 0.5, "width_budget": 0.5}, "`compute_budget` and `width_budget` were both given"),
        ({"compute_budget": 0.5, "allocation": "fair"}, "`allocation` is 'fair'; allowed are 'proportional'"),
        ({"compute_budget": 0.5, "allocation": {"depth": 2}}, "`allocation` is .'depth': 2."),
        (
            {"compute_budget": 0.5, "allocation": {"width": 0.5}},
            "nothing here chooses what runs under a budget of width",
        ),
        ({"allocation": "tokens"}, "`allocation` is 'tokens' without a `compute_budget`"),
    ],
)
def test_compute_budgets_that_cannot_be_are_refused(asked: dict[str, object], message: str) -> None:
    text = tiny_text_config("llama", 6)
    model = tiny_model(text_config=text, scheduler={"num_prefix_layers": 2, "dials": ["depth"]})
    batch = tiny_batch(model.config, IMAGES)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**batch, reducer="grid", **asked)
