"""A plan of layers, heads and channels on every family: the stock class without what it leaves out."""

from copy import deepcopy

import pytest
import torch
from transformers import PreTrainedModel

from adavtp import ExecutionPlan
from tiny_families import FAMILIES, IN_DECODER, batch_of, budgeted, close_to, ragged_prompts, stock_model

How = dict[str, object]


def plan_of(name: str) -> ExecutionPlan:
    """A plan without the last layer's first heads and half of its channels, and without its middle layer."""
    plan = ExecutionPlan.whole(budgeted(name).config, num_mlp_groups=4)
    text = budgeted(name).config.get_text_config()
    num_layers, num_shared = text.num_hidden_layers, text.num_attention_heads // text.num_key_value_heads
    if num_layers > 2:
        plan.layers[0, num_layers // 2] = False
    if text.num_key_value_heads > 1:
        plan.heads[0, -1, :num_shared] = False
    plan.mlp_groups[0, -1, ::2] = False
    return plan


def without(name: str, plan: ExecutionPlan) -> PreTrainedModel:
    """The stock model in which layers pass by what they get, and output projections have zeros."""
    stock = deepcopy(stock_model(name))
    for number, layer in enumerate(stock.get_decoder().layers):
        output, down = layer.self_attn.o_proj, layer.mlp.down_proj
        runs = plan.layers[0, number]
        with torch.no_grad():
            for projection, table in ((output, plan.heads), (down, plan.mlp_groups)):
                left_out = ~(table[0, number] & runs)
                projection.weight[:, left_out.repeat_interleave(projection.in_features // len(left_out))] = 0
                if projection.bias is not None:
                    projection.bias *= runs
    return stock


@torch.no_grad()
@pytest.mark.parametrize("name", IN_DECODER)
def test_a_family_under_a_plan_is_its_stock_class_without_what_is_left_out(name: str) -> None:
    plan, batch = plan_of(name), batch_of(name, ragged_prompts(name)[1:2])
    expected = without(name, plan)(**batch).logits
    ours = budgeted(name)(**batch, token_budget=1.0, plan=plan).logits
    torch.testing.assert_close(ours, expected, **close_to(name))
    assert not torch.allclose(ours, budgeted(name)(**batch, token_budget=1.0).logits, **close_to(name))


@torch.no_grad()
@pytest.mark.parametrize("name", IN_DECODER)
def test_prompts_of_a_family_have_plans_of_their_own(name: str) -> None:
    prompts, plan = ragged_prompts(name), plan_of(name)
    whole = ExecutionPlan.whole(budgeted(name).config, num_mlp_groups=4)
    mixed = [plan if number % 2 else whole for number in range(len(prompts))]
    tables = zip(*(vars(one).values() for one in mixed), strict=True)
    together = ExecutionPlan(*(torch.cat(rows) for rows in tables))
    how = {"token_budget": 0.4, "reducer": "divprune", "max_new_tokens": 4, "do_sample": False}

    def answers(own: list, of_own: ExecutionPlan) -> list[list[int]]:
        batch = batch_of(name, own)
        return budgeted(name).generate(**batch, **how, plan=of_own)[:, batch["input_ids"].shape[1] :].tolist()

    alone = [answers([prompt], own)[0] for prompt, own in zip(prompts, mixed, strict=True)]
    assert answers(prompts, together) == alone


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(IN_DECODER)))
def test_a_decoder_of_another_kind_refuses_a_plan(name: str) -> None:
    batch = batch_of(name, ragged_prompts(name)[1:2])
    plan = ExecutionPlan.whole(budgeted(name).config)
    plan.layers[:, -1] = False
    with pytest.raises(ValueError, match="'plan' acts inside the decoder, which works with decoders of the kinds"):
        budgeted(name)(**batch, plan=plan)
