"""Reducers and the budget inside the vision tower of families that open it, and what others say."""

from typing import Any

import pytest
import torch

from adavtp.modeling.reducers.base import build_reducer
from adavtp.modeling.vision.encode import TowerPass
from pruned_by_hand import HandPruned
from tiny_families import FAMILIES, Writer, batch_of, stock_model, with_budget

OPENED = ("paligemma", "paligemma2")
OTHERS = [name for name in FAMILIES if name not in OPENED]
INSIDE = [
    *({"reducers": [name]} for name in ("tome", "token_fusion", "dynamicvit", "downsample")),
    {"budget_fusion": "encoder"},
]


def prompts(name: str) -> list:
    writer = Writer(name)
    return [writer.prompt(), writer.prompt(images=((1, 1), (1, 1))), writer.prompt(images=())]


@torch.no_grad()
@pytest.mark.parametrize("fields", INSIDE, ids=str)
@pytest.mark.parametrize("name", OPENED)
def test_at_full_budget_logits_are_the_stock_class_s_to_the_bit(name: str, fields: dict[str, Any]) -> None:
    batch = batch_of(name, prompts(name)[1:2])
    assert torch.equal(
        with_budget(name, **fields)(**batch, token_budget=1.0).logits, stock_model(name)(**batch).logits
    )


def tokens_of_stock(name: str, states: torch.Tensor) -> torch.Tensor:
    """What the stock model makes of the last hidden states of its tower."""
    base = stock_model(name).base_model
    return base.multi_modal_projector(base.vision_tower.post_layernorm(states))


@torch.no_grad()
@pytest.mark.parametrize("name", OPENED)
def test_a_smaller_image_is_what_the_stock_tower_makes_of_it(name: str) -> None:
    prompt = prompts(name)[0]
    model, batch = with_budget(name, reducers=["downsample"]), batch_of(name, [prompt])
    outputs = model(**batch, token_budget=9)
    small = torch.nn.functional.interpolate(
        batch["pixel_values"].float(), size=(18, 18), mode="bicubic", antialias=True
    ).double()
    tower = stock_model(name).base_model.vision_tower
    made = tower(small, interpolate_pos_encoding=True).last_hidden_state
    merged = stock_model(name).base_model.multi_modal_projector(made)[0]
    torch.testing.assert_close(outputs.selection.features[0], merged)
    by_hand = HandPruned(name, prompt, outputs.selection.keep[0], merged)
    torch.testing.assert_close(outputs.logits[0, -1:], by_hand.head(by_hand.hidden()[-1:]))


@torch.no_grad()
@pytest.mark.parametrize("name", OPENED)
def test_tokens_that_merge_inside_the_tower_are_projected_as_the_family_projects(name: str) -> None:
    prompt = prompts(name)[0]
    model, batch = with_budget(name, reducers=["tome"]), batch_of(name, [prompt])
    selection = model.select_tokens(**batch, token_budget=0.5)
    tower = TowerPass(stock_model(name).base_model.vision_tower, model.config)
    encoded = build_reducer("tome", model.config).eval()(tower, batch["pixel_values"], torch.tensor([8]))
    order = encoded.positions.argsort(dim=-1)
    expected = tokens_of_stock(name, encoded.sequence.gather(1, order[..., None].expand_as(encoded.sequence)))
    torch.testing.assert_close(selection.features, expected)
    by_hand = HandPruned(name, prompt, selection.keep[0], selection.features[0])
    written = model.generate(**batch, token_budget=0.5, max_new_tokens=4, do_sample=False)
    assert written[0, -4:].tolist() == by_hand.greedy()


@torch.no_grad()
@pytest.mark.parametrize("fields", INSIDE, ids=str)
@pytest.mark.parametrize("name", OPENED)
def test_a_batch_gives_what_its_prompts_give_alone(name: str, fields: dict[str, Any]) -> None:
    model, call = with_budget(name, **fields), {"max_new_tokens": 4, "do_sample": False}
    budgets = [0.4, 0.6, 1.0]
    together = model.generate(**batch_of(name, prompts(name)), token_budget=budgets, **call)[:, -4:].tolist()
    for prompt, budget, answer in zip(prompts(name), budgets, together, strict=True):
        alone = model.generate(**batch_of(name, [prompt]), token_budget=budget, **call)
        assert alone[0, -4:].tolist() == answer


@pytest.mark.parametrize("name", OPENED)
def test_a_budget_token_in_the_tower_leaves_patches_as_they_are_and_learns(name: str) -> None:
    prompt = prompts(name)[0]
    model, batch = with_budget(name, budget_fusion="encoder"), batch_of(name, [prompt])
    selection = model.select_tokens(**batch, token_budget=0.4)
    by_hand = HandPruned(name, prompt, selection.keep[0])
    written = model.generate(**batch, token_budget=0.4, max_new_tokens=4, do_sample=False)
    assert selection.num_keep.tolist() == [6] and written[0, -4:].tolist() == by_hand.greedy()
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    model.train()(**batch, labels=labels, token_budget=0.4).loss.backward()
    for key, parameter in model.named_parameters():
        if key.startswith(("budget_token", "controller")):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert model.budget_token.budget_embedding.linear_1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", OTHERS)
def test_a_family_that_does_not_open_its_tower_says_so(name: str) -> None:
    with pytest.raises(ValueError, match="`budget_fusion` is 'encoder'; a .* model takes 'post'"):
        with_budget(name, budget_fusion="encoder")
    with pytest.raises(ValueError, match="'tome' acts inside a vision tower, and a .* encoder runs as a whole"):
        with_budget(name, reducers=["tome"])


def test_what_the_whole_tower_would_have_to_give_is_refused_where_something_acts_inside() -> None:
    batch = batch_of("paligemma", prompts("paligemma")[:1])
    stack = {"tome": 0.5, "cls_attention": 0.5}
    with pytest.raises(ValueError, match="acts inside the tower and something reads the attention of the whole tower"):
        with_budget("paligemma")(**batch, token_budget=stack, reducer=list(stack))
    stack = {"tome": 0.5, "adaptive": 0.5}
    with pytest.raises(ValueError, match="reads the budget behind it; .* budget_fusion='encoder'"):
        with_budget("paligemma")(**batch, token_budget=stack, reducer=list(stack))
    model = with_budget("paligemma", budget_fusion="encoder")
    assert model.select_tokens(**batch, token_budget=stack, reducer=list(stack)).num_keep.tolist() == [4]
