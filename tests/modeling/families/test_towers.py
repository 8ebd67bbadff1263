"""Reducers and the budget inside the vision tower of families that open it, and what others say."""

from typing import Any

import pytest
import torch

from adavtp.modeling.reducers.base import build_reducer
from adavtp.modeling.vision.encode import TowerPass
from pruned_by_hand import HandPruned, visual_tokens
from tiny_families import ANY_RES, FAMILIES, IMAGE, Batch, Prompt, Writer, batch_of, stock_model, with_budget

WHOLE = ("paligemma", "paligemma2")
OPENED = (*WHOLE, *ANY_RES)
REDUCERS = dict.fromkeys(OPENED, ("tome", "token_fusion", "dynamicvit"))
REDUCERS |= {name: (*REDUCERS[name], "downsample") for name in WHOLE}
# The budget meets the image in Gemma 3's tower too, behind which squares of patches are joined.
IN_TOWER = [
    *((name, {"reducers": [reducer]}) for name in OPENED for reducer in REDUCERS[name]),
    *((name, {"budget_fusion": "encoder"}) for name in (*OPENED, "gemma3")),
]
in_tower = pytest.mark.parametrize(("name", "fields"), IN_TOWER, ids=str)
# The picture has 48 x 67 pixels, and its tiles make a grid of 8 x 8 patches, of which it fills 48 * 8 / 67 = 5.7 rows:
# the first and the last are padding. So the upper tiles' first row is, and the lower tiles' last.
REAL = {name: [range(16)] + 2 * [range(4, 16)] + 2 * [range(12)] for name in ANY_RES}
REAL |= dict.fromkeys(WHOLE, [range(16)])


def prompts(name: str) -> list[Prompt]:
    writer = Writer(name)
    return [writer.prompt(), writer.prompt(images=((1, 1), (1, 1))), writer.prompt(images=())]


def tiles_of(name: str, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each unit of the first prompt the pixels, `[1, 3, 24, 24]`, and which patches are tokens, `[1, 16]`."""
    is_token = [torch.isin(torch.arange(16), torch.tensor(real))[None] for real in REAL[name]]
    return list(zip(batch["pixel_values"].flatten(0, -4).split(1), is_token, strict=True))


def tokens_of_stock(name: str, states: torch.Tensor) -> torch.Tensor:
    """What the stock model makes of hidden states of its tower's feature layer."""
    base = stock_model(name).base_model
    return base.multi_modal_projector(base.vision_tower.post_layernorm(states) if name in WHOLE else states)


@torch.no_grad()
@in_tower
def test_at_full_budget_logits_are_the_stock_class_s_to_the_bit(name: str, fields: dict[str, Any]) -> None:
    for prompt in prompts(name)[:2]:
        batch = batch_of(name, [prompt])
        assert torch.equal(
            with_budget(name, **fields)(**batch, token_budget=1.0).logits, stock_model(name)(**batch).logits
        )


@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
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
    selection, merged = model.select_tokens(**batch, token_budget=0.5), []
    for unit, (pixels, is_token) in enumerate(tiles_of(name, batch)):
        tower = TowerPass(stock_model(name).base_model.vision_tower, model.config, is_token=is_token)
        count = int(is_token.sum()) // 2
        encoded = build_reducer("tome", model.config).eval()(tower, pixels, torch.tensor([count]))
        order = encoded.positions.argsort(dim=-1)
        assert selection.keep[unit].nonzero()[:, 0].tolist() == encoded.positions[0, order[0]].tolist()
        merged.append(tokens_of_stock(name, tower.patches(encoded.sequence)[0, order[0]]))
        torch.testing.assert_close(selection.features[unit, :count], merged[-1])
    keep = selection.keep[selection.is_token]
    assert len(keep) == len(visual_tokens(name, prompt))
    by_hand = HandPruned(name, prompt, keep, torch.cat(merged))
    written = model.generate(**batch, token_budget=0.5, max_new_tokens=4, do_sample=False)
    assert written[0, -4:].tolist() == by_hand.greedy()


@torch.no_grad()
@pytest.mark.parametrize("name", OPENED)
def test_where_tokens_leave_a_layer_the_stock_s_own_layers_see_the_others_and_the_padding(name: str) -> None:
    prompt = prompts(name)[0]
    model = with_budget(name, reducers=[{"name": "dynamicvit", "cuts": [1]}]).eval()
    batch, tower = batch_of(name, [prompt]), stock_model(name).base_model.vision_tower
    outputs, left = model(**batch, token_budget=0.5), []
    selection, num_cls = outputs.selection, int(name == "llava_next")
    for unit, (pixels, is_token) in enumerate(tiles_of(name, batch)):
        states = tower.embeddings(pixels)
        if name == "llava_next":
            states = tower.pre_layrnorm(states)
        stays = ~is_token[0]
        kept = is_token[0].nonzero()[:, 0][selection.keep[unit][: int(is_token.sum())]]
        stays[kept] = True
        at = torch.cat([torch.arange(num_cls), num_cls + stays.nonzero()[:, 0]])
        layers = tower.encoder.layers[: 2 if name == "llava_next" else 3]
        for number, layer in enumerate(layers):
            states = layer(states[:, at] if number == 1 else states, attention_mask=None)
        left.append(tokens_of_stock(name, states[0, num_cls:])[torch.isin(stays.nonzero()[:, 0], kept)])
    assert selection.num_keep.tolist() == [len(real) // 2 for real in REAL[name]]
    by_hand = HandPruned(name, prompt, selection.keep[selection.is_token], torch.cat(left))
    torch.testing.assert_close(outputs.logits[0, -1:], by_hand.head(by_hand.hidden()[-1:]))


@torch.no_grad()
@in_tower
def test_a_batch_gives_what_its_prompts_give_alone(name: str, fields: dict[str, Any]) -> None:
    model, call = with_budget(name, **fields), {"max_new_tokens": 4, "do_sample": False}
    budgets = [0.4, 0.6, 1.0]
    together = model.generate(**batch_of(name, prompts(name)), token_budget=budgets, **call)[:, -4:].tolist()
    for prompt, budget, answer in zip(prompts(name), budgets, together, strict=True):
        alone = model.generate(**batch_of(name, [prompt]), token_budget=budget, **call)
        assert alone[0, -4:].tolist() == answer


@torch.no_grad()
@in_tower
def test_a_blank_picture_keeps_exactly_what_the_budget_says(name: str, fields: dict[str, Any]) -> None:
    batch = batch_of(name, prompts(name)[:1])
    for value in (0.0, 1.0):
        batch["pixel_values"] = torch.full_like(batch["pixel_values"], value)
        outputs = with_budget(name, **fields)(**batch, token_budget=0.5)
        selection = outputs.selection
        assert selection.num_keep.tolist() == (selection.sizes // 2).tolist()
        assert outputs.logits.isfinite().all()


@pytest.mark.parametrize("name", [*OPENED, "gemma3"])
def test_a_budget_token_in_the_tower_leaves_patches_as_they_are_and_learns(name: str) -> None:
    prompt = prompts(name)[0]
    model, batch = with_budget(name, budget_fusion="encoder"), batch_of(name, [prompt])
    selection = model.select_tokens(**batch, token_budget=0.4)
    by_hand = HandPruned(name, prompt, selection.keep[selection.is_token])
    written = model.generate(**batch, token_budget=0.4, max_new_tokens=4, do_sample=False)
    assert selection.num_keep.tolist() == [len(real) * 4 // 10 for real in REAL.get(name, [range(16)])]
    assert written[0, -4:].tolist() == by_hand.greedy()
    require_gradients(model, batch, ("budget_token", "controller"))
    assert model.budget_token.budget_embedding.linear_1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reducer", ["dynamicvit", "token_fusion"])
@pytest.mark.parametrize("name", OPENED)
def test_what_learns_inside_the_tower_gets_a_gradient(name: str, reducer: str) -> None:
    model, batch = with_budget(name, reducers=[reducer]), batch_of(name, prompts(name)[:2])
    torch.manual_seed(0)
    require_gradients(model, batch, ("reducers",))
    assert any(bool((parameter.grad != 0).any()) for parameter in model.reducers.parameters())


def require_gradients(model: Any, batch: Batch, names: tuple[str, ...]) -> None:
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    model.train()(**batch, labels=labels, token_budget=0.4).loss.backward()
    for key, parameter in model.named_parameters():
        if key.startswith(names):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@torch.no_grad()
def test_where_tiles_are_made_smaller_behind_the_tower_the_budget_may_act_inside_and_reducers_may_not() -> None:
    # Of 6 x 8 patches 3 x 4 tokens are made, and newlines; in front stands the whole view.
    ids = torch.tensor([[1, *[IMAGE] * (16 + 3 * 5), 7, 8]])
    batch = batch_of("llava_onevision", prompts("llava_onevision")[:1]) | {"input_ids": ids}
    batch["attention_mask"] = torch.ones_like(ids)
    small = {"vision_aspect_ratio": "anyres_max_1"}
    with pytest.raises(ValueError, match=r"`image_sizes` is \[\[48, 67\]\], and .* made smaller behind the tower"):
        with_budget("llava_onevision", **small)(**batch, token_budget=0.5, reducer="tome")
    plain = with_budget("llava_onevision", **small)(**batch, token_budget=1.0).logits
    inside = with_budget("llava_onevision", **small, budget_fusion="encoder")
    assert torch.equal(inside(**batch, token_budget=1.0).logits, plain)
    outputs = inside(**batch, token_budget=0.5)
    assert int(outputs.selection.num_keep.sum()) == int((outputs.selection.sizes // 2).sum())


@in_tower
def test_text_alone_trains_as_in_evaluation_and_runs_what_a_batch_with_images_runs(
    name: str, fields: dict[str, Any]
) -> None:
    model, losses, learned = with_budget(name, **fields), [], []
    for prompt in prompts(name)[1:]:
        batch = batch_of(name, [prompt])
        call = {**batch, "labels": batch["input_ids"].clone()}
        call["labels"][:, :-4] = -100
        losses = [model.eval()(**call).loss]
        model.zero_grad()
        losses.append(model.train()(**call, token_budget=0.5).loss)
        losses[1].backward()
        learned.append({key for key, parameter in model.named_parameters() if parameter.grad is not None})
    assert torch.equal(*losses) and learned[0] == learned[1]
    of_tower = [model.get_parameter(key).grad for key in learned[1] if ".vision_tower." in key]
    assert of_tower and not any(gradient.any() for gradient in of_tower)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OPENED])
def test_a_family_that_does_not_open_its_tower_says_so(name: str) -> None:
    if name != "gemma3":
        with pytest.raises(ValueError, match="`budget_fusion` is 'encoder'; a .* model takes 'post'"):
            with_budget(name, budget_fusion="encoder")
    with pytest.raises(ValueError, match="'tome' cannot act on a .* model: .* one token of all patches of a square"):
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
    batch = batch_of("llava_next", prompts("llava_next")[:1])
    shared = {"prompt": 20, "unit_weights": "novelty"}
    with pytest.raises(ValueError, match="inside the tower and `unit_weights` is 'novelty', .* use 'size'"):
        with_budget("llava_next")(**batch, token_budget=shared, reducer="tome")
    with pytest.raises(ValueError, match="`vision_feature_layer` is -1, and this model reads -2"):
        with_budget("llava_next")(**batch, token_budget=0.5, reducer="tome", vision_feature_layer=-1)
    batch = batch_of("llava_onevision", [Writer("llava_onevision").prompt(images=(), videos=((2, 2, 2),))])
    with pytest.raises(ValueError, match="`pixel_values_videos` was given and `reducer` is .* makes frames smaller"):
        with_budget("llava_onevision")(**batch, token_budget=0.5, reducer="tome")
