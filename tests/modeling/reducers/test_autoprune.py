"""What AutoPrune promises: a schedule for each prompt, as steep as its question tells nothing of its image."""

import math

import pytest
import torch

from adavtp.modeling.costs.model_costs import ModelCosts
from adavtp.modeling.reducers.autoprune import AutoPruneReducer, mutual_information
from tiny_decoder_views import deep_config, tiny_view
from tiny_models import alone, tiny_batch, tiny_model, tiny_text_config


def information_by_definition(attention: torch.Tensor, text: list[int], visual: list[int]) -> float:
    """Of one head after another, one pair of columns after another."""
    bits = 0.0
    for head in attention.double():
        joint = [[float(head[t, v]) / len(text) for v in visual] for t in text]
        of_token = [sum(row[v] for row in joint) for v in range(len(visual))]
        for row in joint:
            for p, of_v in zip(row, of_token, strict=True):
                bits += p * math.log2(max(p / (of_v / len(text) + 1e-6), 1e-6))
    return bits


def steepness_by_definition(information: float) -> float:
    return max(0.4 - 0.2 * information, 0.0)


def curve_by_definition(steepness: float, layer: float) -> float:
    return 0.75 / (1 + math.exp(steepness * (layer - (14.9 + steepness))))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_information_is_that_of_the_question_s_attention_in_all_heads(side: str) -> None:
    view, attentions = tiny_view(cut=2, side=side)
    information = mutual_information(view)
    for row in range(2):
        visual, real = (marked[row].nonzero()[:, 0].tolist() for marked in (view.is_visual, view.is_real))
        text = [column for column in real if column > visual[-1]]
        expected = information_by_definition(attentions[1][row], text, visual)
        assert float(information[row]) == pytest.approx(expected, abs=1e-5)
    assert information[0] != information[1]


def test_without_a_budget_each_prompt_follows_its_own_curve() -> None:
    view, _ = tiny_view(cut=2)
    reducer = AutoPruneReducer(deep_config(32))
    counts = reducer.adapted_counts(view, [576, 100], [None, None], 32)
    for own, number, information in zip(counts, (576, 100), mutual_information(view).tolist(), strict=True):
        steepness = steepness_by_definition(information)
        # Layer l sees what the code leaves behind layer l - 1; layers 0 and 1 see all.
        expected = [math.ceil((number - 1) * curve_by_definition(steepness, layer)) for layer in range(1, 31)]
        assert own == [number, number, *expected]


def test_information_flattens_the_curve_and_a_budget_keeps_its_mean() -> None:
    reducer = AutoPruneReducer(deep_config(32))
    for num_keep in (36, 64, 192, 400, 576):
        steep, flat = (reducer.counts_of(steepness, 576, num_keep, 32) for steepness in (0.4, 0.05))
        assert sum(steep) == sum(flat) == 32 * num_keep
        assert steep[2] >= flat[2] and steep[-1] <= flat[-1]
        shares = [curve_by_definition(0.05, layer) for layer in range(1, 31)]
        if num_keep == 64:
            # A common factor of the curve, up to the token that the exact mean gives to some layers.
            scale = (32 * 64 - 2 * 576) / sum(shares)
            assert all(abs(own - scale * share) < 1 for own, share in zip(flat[2:], shares, strict=True))
    assert AutoPruneReducer(deep_config(32)).layer_counts(576, 64, 32) == reducer.counts_of(0.4, 576, 64, 32)


@torch.no_grad()
def test_in_the_model_prompts_differ_and_do_not_depend_on_the_batch() -> None:
    model = tiny_model(
        text_config=tiny_text_config(num_layers=6), reducer={"name": "autoprune", "k0": 1.0, "gamma": 0.5}
    )
    images, lengths, budgets = (1, 2, 1, 1), (5, 9, 12, 20), [0.4, 0.6, 1.0, 0.4]
    batch = tiny_batch(model.config, images, lengths)
    for asked in ([None] * 4, budgets):
        whole = None if asked[0] is None else asked
        outputs = model(**batch, reducer={"name": "autoprune", "k0": 1.0, "gamma": 0.5}, token_budget=whole)
        depths = outputs.selection.depth.split(images)
        for row, number in enumerate(images):
            own = model(**alone(batch, row, images), token_budget=asked[row])
            assert torch.equal(own.selection.depth, depths[row])
            torch.testing.assert_close(outputs.logits[row, -1], own.logits[0, -1], atol=1e-4, rtol=1e-4)
            if whole is not None:
                assert int(depths[row].sum()) == 6 * math.floor(asked[row] * 16) * number
        # Two prompts with one image and one budget see as many tokens, and not in the same layers.
        seen = [[int((depths[row] > layer).sum()) for layer in range(6)] for row in (0, 3)]
        assert seen[0] != seen[1]
    beams = {"num_beams": 2, "do_sample": False, "max_new_tokens": 3, "token_budget": budgets}
    together = model.generate(**batch, **beams)[:, -3:]
    for row in range(4):
        own = model.generate(**alone(batch, row, images), **(beams | {"token_budget": budgets[row]}))
        assert torch.equal(own[0, -3:], together[row])


@torch.no_grad()
def test_what_it_costs_is_known_of_a_prompt_that_it_has_read() -> None:
    model = tiny_model(text_config=tiny_text_config(num_layers=6), reducer="autoprune")
    costs = ModelCosts.of(model.config)
    with pytest.raises(ValueError, match="'autoprune' keeps is not known before it has run: each prompt has a sched"):
        costs.of_prompt(6, token_budget=0.5)
    selection = model(**tiny_batch(model.config, [1], [6]), token_budget=0.5).selection
    counted = costs.of_selection(selection, 6, token_budget=0.5)
    assert counted.mean_visual_tokens == 8.0
    assert counted.layer_tokens == tuple(6 + int((selection.depth > layer).sum()) for layer in range(6))
    assert counted.reducer > 0
