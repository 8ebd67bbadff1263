"""What a stack of reducers promises: each gets what the one before left, and the budget of the whole is exact.

Counts in this file are worked out by hand for 16 patches and a decoder of four layers.
"""

import math
import random
from functools import cache
from typing import Any

import pytest
import torch

from adavtp import AdaVTPForConditionalGeneration
from adavtp.modeling.reducers.base import REDUCERS, ScoringReducer
from layered_reader import LayeredReader, as_conversation
from tiny_models import NUM_PATCHES, OF_LLAVA, WITH_WEIGHTS, alone, targets, tiny_batch, tiny_model, tiny_text_config

NUM_LAYERS = 4
DECODER_STAGE = sorted(name for name, reducer in REDUCERS.items() if reducer.stage == "decoder")
BEFORE_DECODER = sorted(OF_LLAVA - {*DECODER_STAGE, "aim"})
SCORING = sorted(name for name in OF_LLAVA if issubclass(REDUCERS[name], ScoringReducer))

Model = AdaVTPForConditionalGeneration


def own_model(**fields: Any) -> Model:
    return as_conversation(
        tiny_model(
            text_config=tiny_text_config(num_layers=NUM_LAYERS), **({"trained_reducers": WITH_WEIGHTS} | fields)
        )
    )


@cache
def model_of(**fields: Any) -> Model:
    """A model whose stack no test changes."""
    return own_model(**fields)


def tokens_entering(model: Model, name: str, batch: dict[str, torch.Tensor], **how: Any) -> list[int]:
    """How many tokens of each image a reducer in a stack is given, in the order of its calls."""
    entering = []
    reducer = model.model.controller if name == "adaptive" else model.model.reducers[name]
    handle = reducer.register_forward_pre_hook(
        lambda _, args: entering.extend((args[0].positions >= 0).sum(dim=-1).tolist())
    )
    with torch.no_grad():
        model(**batch, **how)
    handle.remove()
    return entering


# ---------------------------------------------------------------------------------------------------------- budgets


@torch.no_grad()
def test_a_dictionary_gives_every_reducer_a_share_of_what_it_gets() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1))
    budget = {"tome": 0.5, "fastv": 0.6}
    selection = model.select_tokens(**batch, reducer=["tome", "fastv"], token_budget=budget)
    assert selection.num_keep.tolist() == [8, 8]
    # 60 % of 8 are 4 a layer, 16 in all; layer 0 sees 8, so that 8 are left for three layers: 3, 3 and 2.
    for depth in selection.depth.tolist():
        assert sorted(depth) == [0] * 8 + [1] * 5 + [3] + [4] * 2


@torch.no_grad()
def test_one_budget_is_divided_into_equal_shares_and_kept_exactly() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1))
    stack = ["tome", "adaptive", "fastv"]
    selection = model.select_tokens(**batch, reducer=stack, token_budget=0.5)
    # 16 * 0.5^(1/3) = 12.7 and 16 * 0.5^(2/3) = 10.1; then 8 a layer are 32 in all: 10, 8, 7 and 7.
    assert tokens_entering(model, "adaptive", batch, reducer=stack, token_budget=0.5) == [13, 13]
    assert selection.num_keep.tolist() == [10, 10]
    for depth in selection.depth.tolist():
        assert sorted(depth) == [0] * 6 + [1] * 2 + [2] + [4] * 7


@torch.no_grad()
def test_counts_lists_and_missing_names_in_a_dictionary() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2, 0))
    stack = ["tome", "adaptive", "divprune"]
    budget = {"tome": [12, 8, 8], "divprune": [0.5, 0.25, 1.0]}
    assert tokens_entering(model, "adaptive", batch, reducer=stack, token_budget=budget) == []
    selection = model.select_tokens(**batch, reducer=stack, token_budget=budget)
    assert selection.num_keep.tolist() == [6, 2, 2]
    everything = model.select_tokens(**batch, reducer=stack, token_budget={})
    assert everything.keep.all()


STACKS = {
    "encoder, vision": ["tome", "adaptive"],
    "vision, projector": ["prumerge", "divprune"],
    "projector twice": ["query", "dart"],
    "vision twice, decoder": ["pool", "random", "fastv"],
    "learned": ["adaptive", "divprune", "vtw"],
    "tiles, decoder": [{"name": "hired", "tile_grid": [2, 2]}, "pyramiddrop"],
    "composite": ["aim"],
}


@torch.no_grad()
@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_keeps_exactly_what_one_budget_says(stack: str) -> None:
    model, entries = model_of(), STACKS[stack]
    images = (5, 1) if stack.startswith("tiles") else (1, 2)
    batch = tiny_batch(model.config, images)
    numbers = random.Random(stack)
    for _ in range(6):
        budget = numbers.choice([numbers.uniform(0.45, 1.0), numbers.randint(7, NUM_PATCHES)])
        num_keep = math.floor(budget * NUM_PATCHES) if isinstance(budget, float) else budget
        selection = model.select_tokens(**batch, reducer=entries, token_budget=budget)
        if selection.depth is None:
            assert selection.num_keep.tolist() == [num_keep] * sum(images), budget
        else:
            of_prompts = [int(part.sum()) for part in selection.depth.split(images)]
            assert of_prompts == [num_keep * NUM_LAYERS * count for count in images], budget


@torch.no_grad()
@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_a_reducer_that_leaves_everything_is_as_good_as_absent(name: str) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2))
    is_last = REDUCERS[name].stage == "projector"
    other = "grid" if is_last else "query"
    stack = [other, name] if is_last else [name, other]
    expected = model(**batch, reducer=name, token_budget=0.6)
    output = model(**batch, reducer=stack, token_budget={name: 0.6})
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.selection.positions, expected.selection.positions)
    assert torch.equal(
        model(**batch, reducer=stack, token_budget={other: 0.6}).logits,
        model(**batch, reducer=other, token_budget=0.6).logits,
    )


@torch.no_grad()
@pytest.mark.parametrize("name", DECODER_STAGE)
def test_a_reducer_before_the_decoder_and_one_inside_it_work_on_the_same_tokens(name: str) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2))
    expected = model(**batch, reducer=name, token_budget=0.7)
    output = model(**batch, reducer=["tome", "query", name], token_budget={name: 0.7})
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.selection.depth, expected.selection.depth)
    both = model.select_tokens(**batch, reducer=["grid", name], token_budget={"grid": 0.5, name: 0.75})
    first = model.select_tokens(**batch, reducer="grid", token_budget=0.5)
    assert torch.equal(both.keep, first.keep)
    assert torch.equal(both.depth > 0, first.keep)
    assert [int(part.sum()) for part in both.depth.split((1, 2))] == [6 * NUM_LAYERS, 12 * NUM_LAYERS]


@torch.no_grad()
def test_a_later_reducer_chooses_among_the_tokens_that_the_earlier_left() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1))
    stack, budget = ["grid", "cls_attention"], {"grid": 0.5, "cls_attention": 0.5}
    grid = model.select_tokens(**batch, reducer="grid", token_budget=0.5).keep
    # The scores of all patches are in the order in which larger and larger budgets let them in.
    order = torch.stack(
        [model.select_tokens(**batch, reducer="cls_attention", token_budget=k).keep for k in range(2, NUM_PATCHES + 1)]
    ).sum(dim=0)
    expected = [
        set(sorted(row.nonzero()[:, 0].tolist(), key=lambda patch, first=first: -first[patch])[:4])
        for row, first in zip(grid, order.tolist(), strict=True)
    ]
    chosen = model.select_tokens(**batch, reducer=stack, token_budget=budget)
    assert [set(row.tolist()) for row in chosen.positions] == expected


@torch.no_grad()
@pytest.mark.parametrize("stack", STACKS)
def test_a_batch_through_a_stack_gives_what_its_samples_give_alone(stack: str) -> None:
    model, entries = model_of(), STACKS[stack]
    images, budgets = (5, 1, 0) if stack.startswith("tiles") else (1, 2, 0), [0.6, 0.8, 0.5]
    batch = tiny_batch(model.config, images, (12, 9, 5))
    output = model(**batch, reducer=entries, token_budget=budgets)
    for row in range(len(images)):
        own = model(**alone(batch, row, images), reducer=entries, token_budget=budgets[row])
        length = min(own.logits.shape[1], 4)
        torch.testing.assert_close(output.logits[row, -length:], own.logits[0, -length:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("positions", "budget"),
    [("original", [0.5, 0.7, 1.0]), ("compact", {"tome": 0.75, "adaptive": 8, "fastv": 0.5})],
    ids=["original", "compact"],
)
def test_greedy_generation_is_the_stock_layers_on_what_the_stack_leaves(positions: str, budget: Any) -> None:
    model = model_of(visual_position_ids=positions)
    images, stack = (1, 2, 0), ["tome", "adaptive", "fastv"]
    batch = tiny_batch(model.config, images, (6, 9, 5))
    sequences = model.generate(**batch, token_budget=budget, reducer=stack, do_sample=False, max_new_tokens=5)
    for row, answer in enumerate(sequences[:, -5:].tolist()):
        sample, reader = alone(batch, row, images), LayeredReader(model)
        own = budget[row] if isinstance(budget, list) else budget
        ids = sample["input_ids"][0].tolist()
        reader.show(ids, sample.get("pixel_values"), token_budget=own, reducer=stack)
        assert answer == reader.greedy(5)


# -------------------------------------------------------------------------------------------------------- composites


def test_aim_is_taken_apart() -> None:
    model = model_of()
    steps = model.model.steps("aim")
    assert [(step.name, step.reducer.stage) for step in steps] == [("aim", "vision"), ("aim", "decoder")]
    assert [type(step.reducer).__name__ for step in steps] == ["AimMerge", "AimPrune"]
    assert steps[0].divides is not None and steps[1].divides is None


@torch.no_grad()
@pytest.mark.parametrize("budget", [None, 0.3, 0.5, 14])
def test_aim_is_its_parts_one_after_the_other(budget: Any) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 2))
    aim = model(**batch, reducer="aim", token_budget=budget)
    merged = int(aim.selection.num_keep[0])
    if budget is None:
        assert merged == 7, "43.75 % of 16"
        parts = {"aim_merge": None, "aim_prune": None}
    else:
        num_keep = math.floor(budget * NUM_PATCHES) if isinstance(budget, float) else budget
        assert int(aim.selection.depth.sum()) == num_keep * NUM_LAYERS * 3
        parts = {"aim_merge": merged, "aim_prune": num_keep}
    output = model(**batch, reducer=["aim_merge", "aim_prune"], token_budget=parts)
    assert torch.equal(output.selection.depth, aim.selection.depth)
    assert torch.equal(output.logits, aim.logits)


# ----------------------------------------------------------------------------------------------- what is not allowed


REFUSED = {
    "wrong order": (["fastv", "tome"], 0.5, ["`reducers`", "fastv (decoder)", "tome (encoder)", "order"]),
    "projector before vision": (["divprune", "random"], 0.5, ["`reducers`", "divprune (projector)", "order"]),
    "two inside the decoder": (["fastv", "vtw"], 0.5, ["fastv (decoder), vtw (decoder)", "one of stage 'decoder'"]),
    "two inside the tower": (["tome", "downsample"], 0.5, ["one of stage 'encoder'"]),
    "aim and another": (["aim", "fastv"], 0.5, ["aim (vision), aim (decoder), fastv (decoder)"]),
    "twice": (["random", {"name": "random", "seed": 1}], 0.5, ["`reducers`", "once"]),
    "nothing": ([], 0.5, ["`reducer` is an empty list", "token_budget=1.0"]),
    "no reducer": (7, 0.5, ["`reducers` is 7"]),
    "unknown reducer": (["tome", "clairvoyant"], 0.5, ["'clairvoyant'", "fastv"]),
    "unknown parameter": ([{"name": "fastv", "depth": 2}], 0.5, ["'fastv'", "depth", "layer"]),
    "parameters of the controller": ([{"name": "adaptive", "head": "dot"}], 0.5, ["'adaptive'", "head"]),
    "unknown name in the budget": (["tome", "fastv"], {"tome": 0.5, "vtw": 0.5}, ["'vtw'", "tome, fastv"]),
    "a part's name": ("aim", {"aim_merge": 0.5}, ["'aim_merge'", "aim"]),
    "no own rule": (["tome", "fastv"], {"tome": None}, ["`token_budget` is None for 'tome'", "rule of its own"]),
    "a wrong share": (["tome", "fastv"], {"tome": 1.5}, ["`token_budget`", "1.5"]),
    "too few for the layers before": (["grid", "fastv"], {"grid": 1.0, "fastv": 2}, ["'fastv'"]),
    "attention of a changed tower": (["tome", "cls_attention"], 0.5, ["'tome'", "attention"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_allowed_is_named(case: str) -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1))
    reducer, budget, fragments = REFUSED[case]
    for call in (model, model.generate, model.select_tokens):
        with pytest.raises(ValueError) as refusal:
            call(**batch, reducer=reducer, token_budget=budget)
        for fragment in fragments:
            assert fragment in str(refusal.value)
    assert model.config.reducers == ["adaptive"]


def test_a_wrong_stack_cannot_be_set_or_configured() -> None:
    model = own_model()
    for reducers in (["fastv", "tome"], ["fastv", "vtw"]):
        with pytest.raises(ValueError, match="`reducers`"):
            model.set_reducer(reducers)
        assert model.config.reducers == ["adaptive"]
    with pytest.raises(ValueError, match=r"\['layer'\].*\['tome', 'fastv'\]"):
        model.set_reducer(["tome", "fastv"], layer=1)


def test_a_budget_processor_is_asked_about_one_budget() -> None:
    model = model_of()
    batch = tiny_batch(model.config, (1, 1))
    options = {"reducer": ["tome", "fastv"], "budget_processor": [lambda ids, budget, state: budget / 2]}
    with pytest.raises(ValueError, match="`token_budget` is {'tome': 0.5} and `budget_processor` was given"):
        model.generate(**batch, **options, token_budget={"tome": 0.5})
    halved = model.generate(**batch, **options, token_budget=1.0, max_new_tokens=4, do_sample=False)
    expected = model.generate(**batch, reducer=["tome", "fastv"], token_budget=0.5, max_new_tokens=4, do_sample=False)
    assert torch.equal(halved, expected)


# ----------------------------------------------------------------------------------------------------- entropy floor


def least_number(scores: list[float], num_keep: int, floor: float) -> int:
    """The least number of best scores, `num_keep` or more, whose softmax has that share of its largest entropy."""
    ranked = sorted(scores, reverse=True)
    for number in range(max(2, num_keep), len(ranked) + 1):
        weights = [math.exp(score - ranked[0]) for score in ranked[:number]]
        shares = [weight / sum(weights) for weight in weights]
        if -sum(share * math.log(share) for share in shares if share > 0) >= floor * math.log(number):
            return number
    return len(ranked)


@torch.no_grad()
@pytest.mark.parametrize("name", SCORING)
def test_an_entropy_floor_adds_as_many_tokens_as_it_asks_for(name: str) -> None:
    batch = tiny_batch(model_of().config, (1, 1, 1, 1), (6, 6, 6, 6))
    num_added = 0
    for floor in (0.5, 0.97, 0.999):
        model = own_model(min_token_entropy=floor, reducer=name)
        reducer = model.model.controller if name == "adaptive" else model.model.reducers[name]
        for budget in (0.0, 3, 0.5):
            scores = []
            handle = reducer.register_forward_pre_hook(
                lambda module, args, scores=scores: scores.append(module.scores(args[0]).float())
            )
            selection = model.select_tokens(**batch, token_budget=budget)
            handle.remove()
            num_keep = max(1, math.floor(budget * NUM_PATCHES)) if isinstance(budget, float) else budget
            expected = [least_number(row, num_keep, floor) for row in torch.cat(scores).tolist()]
            assert selection.num_keep.tolist() == expected
            num_added += sum(expected) - num_keep * len(expected)
            best = torch.cat(scores).argsort(dim=-1, descending=True)
            kept = [set(row[:count]) for row, count in zip(best.tolist(), expected, strict=True)]
            assert [set(row.nonzero()[:, 0].tolist()) for row in selection.keep] == kept
    assert num_added > 0


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("selection_output", ["gather", "mask"])
@pytest.mark.parametrize("stack", [["random", "adaptive"], ["dynamicvit", "resampler", "fastv"]], ids=str)
def test_a_stack_learns_with_gates_on_the_features(stack: list[str], selection_output: str) -> None:
    model = own_model(reducers=stack, gradient_gates="features").train()
    batch = tiny_batch(model.config, (1, 2))
    torch.manual_seed(0)
    output = model(**batch, labels=targets(batch), token_budget=[0.6, 0.8], selection_output=selection_output)
    output.loss.backward()
    assert output.loss.isfinite()
    assert (output.selection.loss is not None) == ("dynamicvit" in stack), "the loss of an earlier reducer counts"
    for name in stack:
        reducer = model.model.controller if name == "adaptive" else model.model.reducers[name]
        gradients = [parameter.grad for parameter in reducer.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert not gradients or any(gradient.abs().sum() > 0 for gradient in gradients)


def test_gates_inside_attention_belong_at_the_end_of_a_stack() -> None:
    model = own_model(gradient_gates="attention").train()
    batch = tiny_batch(model.config, (1, 1))
    for stack in (["adaptive", "divprune"], ["dynamicvit", "random"]):
        with pytest.raises(ValueError, match=rf"`gradient_gates` is 'attention' and {stack[1]!r} follows"):
            model(**batch, labels=targets(batch), token_budget=0.6, reducer=stack)
    with pytest.raises(ValueError, match="'fastv'.*gradient_gates='features'"):
        model(**batch, labels=targets(batch), token_budget=0.6, reducer=["adaptive", "fastv"])
    torch.manual_seed(0)
    output = model(**batch, labels=targets(batch), token_budget=0.6, reducer=["tome", "adaptive"])
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.model.controller.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.model.controller.parameters())
