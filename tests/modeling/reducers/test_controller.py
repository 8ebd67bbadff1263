"""What the controller promises: exactly K patches, chosen for image, budget and question, by scores that learn."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn

from adavtp import AdaVTPForConditionalGeneration, VisionFeatures
from adavtp.modeling.budget import top_k
from adavtp.modeling.budget.top_k import top_k_mask
from adavtp.modeling.reducers.adaptive import VisionTokenController, mmr_choice, spread_choice
from adavtp.modeling.vision.reduction import reduce_tokens
from layers_by_hand import gelu, linear, normalised
from tiny_features import tiny_features
from tiny_models import (
    GATE_IDS,
    GATES,
    IMAGE_TOKEN_ID,
    NUM_PATCHES,
    alone,
    padded_on_the_right,
    targets,
    tiny_batch,
    tiny_model,
)

HEADS = ["budget_token", "patch", "patch_budget", "dot", "late_interaction", "cross_attention"]
FUSIONS = {
    "read_only": {"budget_fusion": "encoder", "budget_attention": "read_only"},
    "mutual": {"budget_fusion": "encoder", "budget_attention": "mutual"},
    "post": {"budget_fusion": "post"},
}

# Every head and every fusion, and the head that hears the budget in one fusion only in that one and in another.
PAIRS = [("budget_token", "read_only"), ("patch", "post"), ("patch", "mutual"), ("patch_budget", "post")]
PAIRS += [("dot", "mutual"), ("dot", "read_only"), ("late_interaction", "post"), ("cross_attention", "read_only")]
every_pair = pytest.mark.parametrize(("head", "fusion"), [(h, FUSIONS[f]) for h, f in PAIRS], ids=map(str, PAIRS))

# Every head with every kind of gates, every kind of gates with every fusion, every fusion with every head; every
# other model hears no question.
COMBINATIONS = [
    (head, [*FUSIONS.values()][(number + of_gates) % 3], gates, (number + of_gates) % 2 == 0)
    for number, head in enumerate(HEADS)
    for of_gates, gates in enumerate(GATES)
]

# What adds the same to every score of a softmax or of a choice changes neither.
WITHOUT_GRADIENT = {
    "patch": ("controller.score.bias", "controller.patch_norm.bias"),
    "patch_budget": ("controller.score.bias",),
    "dot": ("controller.patch_proj.bias", "controller.patch_norm.bias"),
    "budget_token": (),
    "late_interaction": ("controller.score.bias",),
    "cross_attention": ("controller.score.bias",),
}


def scores_of(
    model: AdaVTPForConditionalGeneration, batch: dict[str, torch.Tensor], token_budget: Any = 0.4
) -> torch.Tensor:
    """The scores by which the controller chooses in this batch."""
    seen = []
    handle = model.model.controller.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch, token_budget=token_budget)
        handle.remove()
        return model.model.controller.scores(seen[0])


def hears_the_budget(head: str, fusion: dict[str, str]) -> bool:
    """A patch alone says nothing of budget and question, unless the patches have seen the budget token."""
    return head != "patch" or fusion.get("budget_attention") == "mutual"


def matches_by_hand(
    module: nn.Module, patch: torch.Tensor, tokens: torch.Tensor, query: nn.Linear, key: nn.Linear
) -> torch.Tensor:
    """Scaled dot products of one patch with every token in each of four heads, `[4, 1 + tokens]`; 0 with nothing."""
    patch, rows = linear(patch, query), [linear(normalised(token, module.question_norm), key) for token in tokens]
    parts = [slice(8 * head, 8 * head + 8) for head in range(4)]
    return torch.stack(
        [torch.stack([torch.zeros(()), *(patch[p].dot(row[p]) / 8**0.5 for row in rows)]) for p in parts]
    )


def scores_by_hand(
    head: str,
    controller: VisionTokenController,
    patches: torch.Tensor,
    budget: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """The scores of one image's patches, written out; the question is `tokens` `[num_tokens, width]`."""
    if head == "budget_token":
        return linear(normalised(budget, controller.budget_norm), controller.score)
    patches = normalised(patches, controller.patch_norm)
    if head == "patch":
        return linear(patches, controller.score)[:, 0]
    normal, patches = patches, linear(patches, controller.patch_proj)
    budget = linear(normalised(budget, controller.budget_norm), controller.budget_proj)
    if head == "patch_budget":
        return linear(gelu(patches + budget), controller.score)[:, 0]
    if head == "late_interaction":
        module, base = controller.question_head, linear(gelu(patches + budget), controller.score)[:, 0]
        matches = [matches_by_hand(module, p, tokens, module.patch_proj, module.question_proj) for p in normal]
        return torch.stack([b + match.exp().sum(dim=-1).log().sum() for b, match in zip(base, matches, strict=True)])
    if head == "cross_attention":
        module = controller.question_head
        values = [linear(normalised(token, module.question_norm), module.v_proj) for token in tokens]
        values = torch.stack([torch.zeros(32), *values]).unflatten(-1, (4, 8))
        weights = [matches_by_hand(module, p, tokens, module.q_proj, module.k_proj).softmax(dim=-1) for p in normal]
        read = torch.stack([torch.einsum("ht,thw->hw", weight, values).flatten() for weight in weights])
        return linear(gelu(patches + budget + linear(read, module.out_proj)), controller.score)[:, 0]
    return torch.stack([patch.dot(budget) / 32**0.5 for patch in patches])


@torch.no_grad()
@pytest.mark.parametrize("feature_layer", [-2, [-2, -1]], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_scores_are_the_head_s_formula(head: str, feature_layer: int | list[int]) -> None:
    model = tiny_model(controller_head=head, vision_feature_layer=feature_layer)
    controller = model.model.controller
    generator = torch.Generator().manual_seed(0)
    for parameter in controller.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    width = 32 if feature_layer == -2 else 64
    features = VisionFeatures(
        patches=torch.randn(3, NUM_PATCHES, width, generator=generator),
        positions=torch.arange(NUM_PATCHES).expand(3, -1),
        budget=torch.randn(3, 32, generator=generator),
        question_tokens=torch.randn(3, 5, 32, generator=generator),
        is_question_token=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool(),
    )
    scores = controller.scores(features)
    assert scores.shape == (3, NUM_PATCHES)
    for image, is_token in enumerate(features.is_question_token):
        tokens = features.question_tokens[image, is_token]
        expected = scores_by_hand(head, controller, features.patches[image], features.budget[image], tokens)
        torch.testing.assert_close(scores[image], expected, atol=1e-5, rtol=0)


@torch.no_grad()
@every_pair
def test_exactly_k_patches_are_kept(head: str, fusion: dict[str, str]) -> None:
    model = tiny_model(controller_head=head, **fusion)
    batch = tiny_batch(model.config, [1, 2, 0, 1])
    batch["labels"] = targets(batch)
    for training in (True, False):
        selection = model.train(training)(**batch, token_budget=[0.0, 0.4, 0.7, 1.0]).selection
        assert selection.keep.sum(dim=-1).tolist() == [1, 6, 6, 16]
        assert (selection.gates is not None) == training
        for keep, positions in zip(selection.keep, selection.positions, strict=True):
            kept = keep.nonzero().flatten().tolist()
            assert positions.tolist() == kept + [-1] * (16 - len(kept))


@every_pair
def test_evaluation_keeps_the_best_scores_and_repeats_itself(head: str, fusion: dict[str, str]) -> None:
    model = tiny_model(controller_head=head, **fusion)
    batch = tiny_batch(model.config)
    scores = scores_of(model, batch)
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            outputs.append(model(**batch, token_budget=0.4))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].selection.positions, scores.topk(6).indices.sort(dim=-1).values)


def test_training_draws_anew_with_every_call() -> None:
    model = tiny_model().train()
    batch = tiny_batch(model.config)
    batch["labels"] = targets(batch)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = {tuple(model(**batch, token_budget=0.4).selection.keep.flatten().tolist()) for _ in range(6)}
    assert len(drawn) > 1


def spread_by_hand(scores: list[float], patches: torch.Tensor, count: int) -> set[int]:
    """The best of the sqrt(K N) best scores, then always the one of them that is farthest from all that are kept."""
    pool_size = math.ceil(math.sqrt(count * len(scores)))
    pool = sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:pool_size]
    unit = [patch / patch.norm() for patch in patches]
    kept = [pool[0]]
    while len(kept) < count:
        rest = sorted(set(pool) - set(kept))
        nearest = [min(1 - float(unit[token] @ unit[other]) for other in kept) for token in rest]
        kept.append(rest[nearest.index(max(nearest))])
    return set(kept)


def test_a_spread_choice_keeps_good_tokens_that_differ() -> None:
    torch.manual_seed(0)
    scores, patches = torch.randn(17, NUM_PATCHES), torch.randn(17, NUM_PATCHES, 8)
    num_keep = torch.arange(17).clamp(1, NUM_PATCHES)
    keep = spread_choice(scores, patches, num_keep, torch.full((17,), NUM_PATCHES))
    assert keep.sum(dim=-1).tolist() == num_keep.tolist()
    for image, count in enumerate(num_keep.tolist()):
        expected = spread_by_hand(scores[image].tolist(), patches[image], count)
        assert set(keep[image].nonzero()[:, 0].tolist()) == expected


def mmr_by_hand(scores: list[float], patches: torch.Tensor, count: int, mmr_lambda: float) -> set[int]:
    """Every candidate's worth anew at every step; of equal ones the first."""
    low, high = min(scores), max(scores)
    relevance = [(score - low) / (high - low + 1e-6) for score in scores]
    unit = [patch / patch.norm() for patch in patches]
    kept = [relevance.index(max(relevance))]
    while len(kept) < count:
        rest = [token for token in range(len(scores)) if token not in kept]
        worth = [
            mmr_lambda * relevance[token] - (1 - mmr_lambda) * max(float(unit[token] @ unit[other]) for other in kept)
            for token in rest
        ]
        kept.append(rest[worth.index(max(worth))])
    return set(kept)


@pytest.mark.parametrize("mmr_lambda", [0.0, 0.3, 0.5, 1.0])
def test_maximal_marginal_relevance_weighs_scores_against_what_is_kept(mmr_lambda: float) -> None:
    torch.manual_seed(0)
    scores, patches = 5 * torch.randn(17, NUM_PATCHES), torch.randn(17, NUM_PATCHES, 8)
    num_keep, num_tokens = torch.arange(17).clamp(1, NUM_PATCHES), torch.full((17,), NUM_PATCHES)
    # A smaller image, behind whose tokens there are none.
    num_keep[-1], num_tokens[-1], scores[-1, 9:] = 4, 9, torch.finfo(scores.dtype).min
    keep = mmr_choice(scores, patches, num_keep, num_tokens, mmr_lambda)
    assert keep.sum(dim=-1).tolist() == num_keep.tolist()
    for image, (count, size) in enumerate(zip(num_keep.tolist(), num_tokens.tolist(), strict=True)):
        expected = mmr_by_hand(scores[image, :size].tolist(), patches[image, :size], count, mmr_lambda)
        assert set(keep[image].nonzero()[:, 0].tolist()) == expected
    if mmr_lambda == 1.0:
        assert torch.equal(keep, top_k_mask(scores, num_keep))


@torch.no_grad()
def test_the_configuration_says_how_the_choice_is_made() -> None:
    model = tiny_model(controller_choice="spread")
    batch = tiny_batch(model.config)
    chosen = []
    for settings in ({}, {"controller_choice": "best"}, {"controller_choice": "mmr", "controller_mmr_lambda": 0.1}):
        for name, value in settings.items():
            setattr(model.config, name, value)
        chosen.append(model.select_tokens(**batch, token_budget=[0.2, 0.7]).keep)
    assert all(keep.sum(dim=-1).tolist() == [3, 11] for keep in chosen)
    assert not any(torch.equal(one, other) for one, other in combinations(chosen, 2))
    # With lambda 1 only the scores count.
    model.config.controller_mmr_lambda = 1.0
    assert torch.equal(model.select_tokens(**batch, token_budget=[0.2, 0.7]).keep, chosen[1])


@torch.no_grad()
@pytest.mark.parametrize("choice", ["spread", "mmr"])
def test_a_choice_among_tokens_does_not_depend_on_the_batch(choice: str) -> None:
    model = tiny_model(controller_choice=choice)
    counts, budgets = [1, 0, 2], [0.2, 1.0, 0.7]
    batch = tiny_batch(model.config, counts, lengths=[5, 19, 9])
    together = model.select_tokens(**batch, token_budget=budgets).keep
    for number, rows in ((0, slice(0, 1)), (2, slice(1, 3))):
        own = model.select_tokens(**alone(batch, number, counts), token_budget=budgets[number]).keep
        assert torch.equal(own, together[rows])


def test_a_frozen_controller_chooses_in_training_as_in_evaluation() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config)
    expected = model.select_tokens(**batch, token_budget=0.4)
    model.train().model.controller.requires_grad_(False)
    for _ in range(3):
        selection = model.select_tokens(**batch, token_budget=0.4)
        assert torch.equal(selection.keep, expected.keep) and selection.gates is None


@every_pair
def test_budget_and_question_change_the_order_of_patches_where_the_head_hears_them(
    head: str, fusion: dict[str, str]
) -> None:
    model = tiny_model(controller_head=head, **fusion)
    batch = tiny_batch(model.config, [1])
    other_question = batch["input_ids"].clone()
    other_question[:, -3:] = 3 + (other_question[:, -3:] + 17) % 50
    scores = scores_of(model, batch)
    for changed in (
        scores_of(model, batch | {"input_ids": other_question}),
        scores_of(model, batch, token_budget=0.9),
    ):
        # The same number added to every score would change nothing.
        change = (changed - changed.mean()) - (scores - scores.mean())
        assert (change.abs().max() > 1e-4) == hears_the_budget(head, fusion)


def test_a_normalised_question_sounds_the_same_at_any_volume() -> None:
    token = tiny_model(question_norm=True).model.budget_token
    budget, question = torch.tensor([0.3, 0.3]), torch.randn(2, 32)
    heard = token(budget, question) - token.budget_embedding(budget)
    # Zero mean, variance one, and then the same linear map as without it.
    centred = question - question.mean(dim=-1, keepdim=True)
    normal = centred / centred.square().mean(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(heard, token.question_proj(normal), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(token(budget, 5 * question + 3), token(budget, question), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ["budget_token", "dot"])
def test_a_model_that_does_not_hear_the_question_chooses_the_same_for_all(head: str) -> None:
    model = tiny_model(controller_head=head, question_aware=False)
    batch = tiny_batch(model.config, [1])
    other_question = batch["input_ids"].clone()
    other_question[:, -3:] = 7
    assert torch.equal(scores_of(model, batch), scores_of(model, batch | {"input_ids": other_question}))


@every_pair
def test_answers_do_not_leak_into_the_choice(head: str, fusion: dict[str, str]) -> None:
    model = tiny_model(controller_head=head, **fusion)
    batch = tiny_batch(model.config)
    labels = targets(batch)
    other_answer = batch["input_ids"].clone()
    other_answer[:, -3:] = 3 + (other_answer[:, -3:] + 17) % 50
    scores = scores_of(model, batch | {"labels": labels})
    other_labels = targets(batch | {"input_ids": other_answer})
    torch.testing.assert_close(
        scores_of(model, batch | {"input_ids": other_answer, "labels": other_labels}), scores, atol=0, rtol=0
    )

    # Nor does a later turn: what follows the first answer is as unknown as the answer when it is given.
    two_turns = labels.clone()
    two_turns[:, -2] = -100
    torch.testing.assert_close(scores_of(model, batch | {"labels": two_turns}), scores, atol=0, rtol=0)

    # Training chooses as generation will, which sees the prompt and no answer.
    prompt = {name: batch[name][:, :-3] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(
        scores_of(model, prompt | {"pixel_values": batch["pixel_values"]}), scores, atol=1e-5, rtol=0
    )


@every_pair
def test_padding_and_neighbours_do_not_change_the_choice(head: str, fusion: dict[str, str]) -> None:
    model = tiny_model(controller_head=head, **fusion)
    counts = [1, 0, 2]
    batch = tiny_batch(model.config, counts, lengths=[5, 19, 9])
    scores = scores_of(model, batch)
    torch.testing.assert_close(scores_of(model, padded_on_the_right(batch)), scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores_of(model, alone(batch, 0, counts)), scores[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores_of(model, alone(batch, 2, counts)), scores[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("head", "fusion", "gates", "question_aware"), COMBINATIONS)
def test_every_trained_part_gets_a_gradient(
    head: str, fusion: dict[str, str], gates: dict[str, str], question_aware: bool
) -> None:
    torch.manual_seed(0)
    model = tiny_model(controller_head=head, question_aware=question_aware, **fusion, **gates).train()
    batch = tiny_batch(model.config, [1, 2, 1])
    model(**batch, labels=targets(batch), token_budget=[0.4, 0.6, 0.2]).loss.backward()
    trained = ["model.controller.", "model.multi_modal_projector.", "model.language_model.", "lm_head."]
    if hears_the_budget(head, fusion):
        trained.append("model.budget_token.")
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(trained)):
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith(("k_proj.bias", *WITHOUT_GRADIENT[head])):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("gates", GATES, ids=GATE_IDS)
def test_keeping_everything_trains_the_decoder_and_gives_the_controller_zeros(gates: dict[str, str]) -> None:
    model = tiny_model(**gates).train()
    batch = tiny_batch(model.config)
    model(**batch, labels=targets(batch), token_budget=1.0).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("model.controller.", "model.budget_token.")):
            assert (parameter.grad == 0).all(), name
        elif name.startswith(("model.multi_modal_projector.", "model.language_model.")):
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


@every_pair
def test_bfloat16_keeps_exactly_k_and_learns(head: str, fusion: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = tiny_model(controller_head=head, **fusion).to(torch.bfloat16).train()
    batch = tiny_batch(model.config)
    output = model(**batch, labels=targets(batch), token_budget=[0.4, 0.7])
    assert output.logits.dtype == torch.bfloat16
    assert output.selection.num_keep.tolist() == [6, 11]
    assert torch.equal(output.selection.gates, output.selection.keep.float())
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert any(parameter.grad.abs().max() > 0 for parameter in model.model.controller.parameters())


def test_placeholders_are_no_part_of_the_question() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config, [1])
    scores = scores_of(model, batch)
    with torch.no_grad():
        model.get_input_embeddings().weight[IMAGE_TOKEN_ID] += 1.0
    assert torch.equal(scores_of(model, batch), scores)


@pytest.mark.parametrize("choice", ["best", "spread", "sampled"])
@pytest.mark.parametrize("head", HEADS)
def test_images_of_several_sizes_come_in_one_call_and_each_is_chosen_from_as_alone(
    head: str, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without noise, which differs from call to call.
    monkeypatch.setattr(top_k, "gumbel_noise", torch.zeros_like)
    own = {"controller_choice": choice} if choice != "sampled" else {}
    controller = tiny_model(controller_head=head, **FUSIONS["post"], **own).model.controller
    controller.train(choice == "sampled")
    calls = []
    controller.register_forward_pre_hook(lambda _, args: calls.append(len(args[0].patches)))
    sizes, num_keep = torch.tensor([5, NUM_PATCHES, 9, 1]), torch.tensor([5, 6, 2, 1])
    features, weights = tiny_features(4), torch.randn(4, NUM_PATCHES, 32)
    is_token = torch.arange(NUM_PATCHES) < sizes[:, None]
    features.positions = features.positions.masked_fill(~is_token, -1)
    features.patches = features.patches * is_token[..., None]

    def chosen(rows: torch.Tensor, size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What is kept of these images, and the gradients of a loss of what is left of them."""
        own = features.images(rows, size)
        left, selection = reduce_tokens("adaptive", controller, own, num_keep[rows], runs_everything=True)
        weight = weights[rows].gather(1, left.positions.clamp(min=0)[..., None].expand(-1, -1, 32))
        # Evaluation has no gradient of the choice.
        loss = (left.patches * weight)[left.positions >= 0].sum() + 0.0 * next(controller.parameters()).sum()
        found = torch.autograd.grad(loss, list(controller.parameters()), allow_unused=True)
        return selection.keep, [torch.zeros(()) if gradient is None else gradient for gradient in found]

    keep, gradients = chosen(torch.arange(4), NUM_PATCHES)
    assert calls == [4] and keep.sum(dim=-1).tolist() == num_keep.tolist()
    of_each = [chosen(torch.tensor([row]), size) for row, size in enumerate(sizes.tolist())]
    for row, (alone_keep, _) in enumerate(of_each):
        assert torch.equal(keep[row, : sizes[row]], alone_keep[0, : sizes[row]])
    for number, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, sum(found[number] for _, found in of_each), atol=1e-6, rtol=1e-4)
    assert choice != "sampled" or any(gradient.abs().max() > 1e-4 for gradient in gradients)
