"""What a controller learns from its model at full budget: what is relevant, and what would have been answered."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

from adavtp import AdaVTPForConditionalGeneration, AdaVTPTrainingArguments
from adavtp.modeling.vision.encode import VisionFeatures, encode_image
from adavtp.trainer.losses import (
    distillation_loss,
    full_budget_logits,
    recorded_scores,
    relevance_loss,
    target_logits,
    visual_relevance,
)
from adavtp.trainer.trained_parts import choose_trained_parts
from tiny_conversations import conversation_rows, digit_model, digit_processor
from tiny_models import IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE, targets, tiny_batch, tiny_model
from tiny_trainers import EVERY_PART, FULL, PLAIN_STEP, differing, losses_of, tiny_trainer, weights_of

TOWERS: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip with CLS": {"vision_feature_select_strategy": "full"},
    "siglip": {"vision": "siglip"},
}
ALL_LOSSES = {"lm": 0.5, "distillation": 2.0, "relevance": 0.25}


def labelled_batch(
    model: AdaVTPForConditionalGeneration, images_per_sample: tuple[int, ...] = (1, 1)
) -> dict[str, torch.Tensor]:
    batch = tiny_batch(model.config, images_per_sample)
    return batch | {"labels": targets(batch)}


# Relevance


@pytest.mark.parametrize("name", TOWERS)
def test_relevance_is_what_replacing_a_patch_by_the_mean_changes_to_first_order(name: str) -> None:
    model = tiny_model(**TOWERS[name]).double()
    inner, placeholder_id = model.model, model.config.image_token_id
    batch = labelled_batch(model)
    visual_features = encode_image(inner.vision_tower, batch["pixel_values"].double(), model.config)
    tokens = [visual_features.patches]
    if model.config.keep_cls:
        tokens.insert(0, visual_features.cls)
    visual = inner.multi_modal_projector(torch.cat(tokens, dim=1)).detach()
    first = visual.shape[1] - NUM_PATCHES

    @torch.no_grad()
    def log_probability(visual: torch.Tensor) -> torch.Tensor:
        """Of the targets of each sample, from embeddings put together by hand."""
        embeds = inner.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == placeholder_id] = visual.flatten(0, 1)
        positions = (batch["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)
        hidden = inner.language_model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=positions
        ).last_hidden_state
        chosen = model.lm_head(hidden)[:, :-1].log_softmax(dim=-1)
        labels = batch["labels"][:, 1:]
        return (chosen.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(dim=-1)

    expected, step = torch.zeros(2, NUM_PATCHES, dtype=torch.float64), 3e-3
    mean = visual[:, first:].mean(dim=1)
    for patch in range(NUM_PATCHES):
        change = torch.zeros_like(visual)
        change[:, first + patch] = visual[:, first + patch] - mean
        difference = log_probability(visual + step * change) - log_probability(visual - step * change)
        expected[:, patch] = (difference / (2 * step)).square()
    expected /= expected.sum(dim=-1, keepdim=True)
    # Norms inside decoders compute in float32, so that a smaller step would measure their rounding.
    torch.testing.assert_close(visual_relevance(model, batch).of_patches.double(), expected, atol=2e-4, rtol=1e-2)


def test_relevance_depends_on_neither_the_budget_nor_what_shares_the_batch() -> None:
    model = tiny_model()
    batch = labelled_batch(model, (2, 1))
    relevance, num_targets = visual_relevance(model, batch)
    assert num_targets.tolist() == [3, 3, 3]
    torch.testing.assert_close(visual_relevance(model, batch | {"token_budget": [0.1, 0.6]}).of_patches, relevance)
    alone = {name: value[1:] for name, value in batch.items()} | {"pixel_values": batch["pixel_values"][2:]}
    torch.testing.assert_close(visual_relevance(model, alone).of_patches, relevance[2:], atol=1e-6, rtol=1e-4)
    assert relevance.shape == (3, NUM_PATCHES) and (relevance >= 0).all()
    torch.testing.assert_close(relevance.sum(dim=-1), torch.ones(3))


def test_nothing_is_relevant_where_nothing_is_asked() -> None:
    model = tiny_model()
    batch = labelled_batch(model)
    batch["labels"][0] = -100
    relevance, num_targets = visual_relevance(model, batch)
    assert (relevance[0] == 0).all() and relevance[1].sum() > 0.99
    assert num_targets.tolist() == [0, 3]


def test_a_pass_at_full_budget_leaves_no_trace() -> None:
    model = tiny_model().train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    batch = labelled_batch(model)
    random_state = torch.get_rng_state()
    visual_relevance(model, batch)
    logits = full_budget_logits(model, batch)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "prepare_inputs" not in vars(model.model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not logits.requires_grad


def test_relevance_loss_is_a_cross_entropy_weighted_by_targets() -> None:
    relevance = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    scores = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, -1.0]], requires_grad=True)
    normaliser = torch.log(torch.exp(torch.tensor([0.0, 1.0, 2.0])).sum())
    # The second row's scores are the first's in another order, less 1, and so is their normaliser.
    expected = (3 * (normaliser - 0.5) + 1 * (normaliser - 1.0 - 0.75 * -1.0)) / 4
    num_targets = torch.tensor([3, 1])
    torch.testing.assert_close(relevance_loss(scores, relevance, num_targets), expected)
    torch.testing.assert_close(relevance_loss(scores, relevance, num_targets, 8), expected / 2)


def test_relevance_loss_is_least_where_scores_are_log_relevance() -> None:
    relevance = torch.rand(2, 5).softmax(dim=-1)
    scores = (relevance.log() + 3.0).requires_grad_()
    relevance_loss(scores, relevance, torch.ones(2)).backward()
    torch.testing.assert_close(scores.grad, torch.zeros(2, 5), atol=1e-6, rtol=0)


# Distillation


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    expected = kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).sum()
    torch.testing.assert_close(distillation_loss(student, teacher), expected / 4)
    torch.testing.assert_close(distillation_loss(student, teacher, 10), expected / 10)
    assert distillation_loss(teacher, teacher).abs() < 1e-6
    assert distillation_loss(student[:0], teacher[:0]) == 0


@pytest.mark.parametrize("selection_output", ["gather", "mask"])
def test_logits_of_the_same_targets_meet_whatever_was_dropped(selection_output: str) -> None:
    model = tiny_model()
    batch = labelled_batch(model, (2, 1))
    outputs = model(**batch, token_budget=[0.2, 0.7], selection_output=selection_output)
    expected = [
        model(**{name: value[row : row + 1] for name, value in batch.items() if name != "pixel_values"},
              pixel_values=batch["pixel_values"][images], token_budget=budget).logits[0, -4:-1]
        for row, images, budget in [(0, slice(0, 2), 0.2), (1, slice(2, 3), 0.7)]
    ]  # fmt: skip
    torch.testing.assert_close(target_logits(outputs), torch.cat(expected), atol=1e-5, rtol=1e-4)
    everything = model(**batch).logits[:, -4:-1].flatten(0, 1)
    torch.testing.assert_close(full_budget_logits(model, batch | {"token_budget": 0.1}), everything)


# The controller


def test_scores_are_recorded_with_their_gradient() -> None:
    model = tiny_model().train()
    choose_trained_parts(model, EVERY_PART)
    batch = tiny_batch(model.config, (2, 1))
    batch["labels"] = targets(batch)
    with recorded_scores(model.model.controller) as recorded:
        model(**batch, token_budget=0.5)
    ((_, scores),) = recorded
    assert scores.shape == (3, NUM_PATCHES) and scores.requires_grad
    model(**batch, token_budget=0.5)
    assert len(recorded) == 1


@pytest.mark.parametrize("head", ["patch_budget", "dot"])
def test_a_controller_learns_to_choose_what_the_question_is_about(head: str) -> None:
    # Patches have one of four colours, and the question names one: a choice that no score of patches alone makes.
    torch.manual_seed(0)
    controller = tiny_model(controller_head=head).model.controller.train()
    colours = torch.randn(4, 32)
    optimizer = torch.optim.AdamW(controller.parameters(), lr=0.01)

    def scenes() -> tuple[VisionFeatures, torch.Tensor]:
        colour, asked = torch.randint(4, (64, NUM_PATCHES)), torch.randint(4, (64,))
        positions = torch.arange(NUM_PATCHES).expand(64, -1)
        patches = colours[colour] + 0.1 * torch.randn(64, NUM_PATCHES, 32)
        return VisionFeatures(patches, positions, budget=colours[asked]), (colour == asked[:, None]).float()

    for _ in range(300):
        features, is_relevant = scenes()
        relevance = is_relevant / is_relevant.sum(dim=-1, keepdim=True).clamp(min=1)
        optimizer.zero_grad()
        relevance_loss(controller.scores(features), relevance, torch.ones(64)).backward()
        optimizer.step()
    features, is_relevant = scenes()
    best = controller.eval()(features, torch.full((64,), 1)).keep
    has_any = is_relevant.any(dim=-1)
    assert (best & is_relevant.bool()).any(dim=-1)[has_any].float().mean() > 0.95


@pytest.mark.parametrize("head", ["late_interaction", "cross_attention", "patch_budget"])
def test_a_controller_learns_to_choose_the_patch_that_two_words_name_together_if_it_reads_words(head: str) -> None:
    # Patches are pairs of glyphs, and share their first or their second with others of their page. Two of fourteen
    # words of the question say which pair is asked for; the budget token hears the mean of all.
    torch.manual_seed(0)
    controller = tiny_model(controller_head=head).model.controller.train()
    first, second, words = torch.randn(20, 32), torch.randn(20, 32), 0.02 * torch.randn(100, 32)
    positions, all_are_words = torch.arange(NUM_PATCHES).expand(64, -1), torch.ones(64, 14, dtype=torch.bool)
    optimizer = torch.optim.AdamW(controller.parameters(), lr=0.005)

    def pages() -> tuple[VisionFeatures, torch.Tensor]:
        firsts, seconds = (part.flatten(1) for part in torch.randint(20, (2, 64, 4, 1)).expand(-1, -1, -1, 4))
        seconds = seconds.unflatten(1, (4, 4)).transpose(1, 2).flatten(1)
        asked = torch.randint(NUM_PATCHES, (64, 1))
        key = firsts.gather(1, asked), seconds.gather(1, asked)
        question = words[torch.cat([key[0], 20 + key[1], torch.randint(40, 100, (64, 12))], dim=1)]
        heard = nn.functional.layer_norm(question.mean(dim=1), (32,))
        of_question = {"budget": heard, "question_tokens": question, "is_question_token": all_are_words}
        patches = first[firsts] + second[seconds] + 0.1 * torch.randn(64, NUM_PATCHES, 32)
        return VisionFeatures(patches, positions, **of_question), (firsts == key[0]) & (seconds == key[1])

    for _ in range(300):
        features, is_asked = pages()
        optimizer.zero_grad()
        relevance = is_asked / is_asked.sum(dim=-1, keepdim=True)
        relevance_loss(controller.scores(features), relevance, torch.ones(64)).backward()
        optimizer.step()
    features, is_asked = pages()
    best = controller.eval()(features, torch.full((64,), 1)).keep
    share_found = (best & is_asked).any(dim=-1).float().mean()
    assert (share_found > 0.9) == (head != "patch_budget")
    assert share_found > 0.9 or share_found < 0.7


def test_a_trained_controller_keeps_the_patch_that_the_answer_depends_on(tmp_path: Path) -> None:
    # One patch of a grey picture is noise; positions are the same everywhere, so only it can tell anything.
    processor = digit_processor()
    model = digit_model(processor)
    nn.init.zeros_(model.model.vision_tower.embeddings.position_embedding.weight)
    rows, generator = conversation_rows(64), torch.Generator().manual_seed(0)
    places = torch.randint(NUM_PATCHES, (64,), generator=generator)
    for row, place in zip(rows, places.tolist(), strict=True):
        noise, across = row["images"][0], IMAGE_SIZE // PATCH_SIZE
        left, top = PATCH_SIZE * (place % across), PATCH_SIZE * (place // across)
        grey = noise.copy()
        grey.paste((128, 128, 128), (0, 0, IMAGE_SIZE, IMAGE_SIZE))
        grey.paste(noise.crop((0, 0, PATCH_SIZE, PATCH_SIZE)), (left, top))
        row["images"] = [grey]
    trainer = tiny_trainer(
        tmp_path,
        rows,
        model,
        budgets=(0.0, 0.5),
        max_steps=60,
        per_device_train_batch_size=16,
        train_parts=["controller"],
        loss_weights={"relevance": 1.0},
    )
    batch = {name: value for name, value in trainer.data_collator(rows).items() if name != "token_budget"}

    def share_kept() -> float:
        keep = model.eval().select_tokens(**batch, token_budget=0.0).keep
        return keep[torch.arange(64), places].float().mean().item()

    # A neighbour is now and then as relevant, because a decoder's tokens see those before them.
    assert (visual_relevance(model, batch).of_patches.argmax(dim=-1) == places).float().mean() > 0.8
    # Random weights happen to like what stands out; turned round, they have to unlearn it.
    model.model.controller.score.weight.data.neg_()
    before = share_kept()
    trainer.train()
    assert before < 0.2 and share_kept() > 0.9


# Training


def test_the_loss_is_the_weighted_sum(tmp_path: Path) -> None:
    rows = conversation_rows(2)

    def first_loss(weights: dict[str, float]) -> float:
        torch.manual_seed(5)
        trainer = tiny_trainer(
            tmp_path, rows, max_steps=1, loss_weights=weights, train_parts=["controller"], dataloader_num_workers=0
        )
        trainer.train()
        return losses_of(trainer)[0]

    parts = {name: first_loss({name: 1.0}) for name in ALL_LOSSES}
    assert first_loss(ALL_LOSSES) == pytest.approx(sum(ALL_LOSSES[name] * parts[name] for name in parts), rel=1e-4)
    assert all(value > 0 for value in parts.values())


def test_micro_batches_do_together_what_one_batch_does(tmp_path: Path) -> None:
    # At full budget nothing is drawn by chance that would change the losses.
    arguments = PLAIN_STEP | {"loss_weights": ALL_LOSSES, "train_parts": ["controller"], "max_steps": 2}
    budgets = {"budgets": FULL, "max_grad_norm": 0.0}
    whole = tiny_trainer(tmp_path, conversation_rows(8), per_device_train_batch_size=4, **budgets | arguments)
    whole.train()
    parts = tiny_trainer(
        tmp_path,
        conversation_rows(8),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **budgets | arguments,
    )
    parts.train()
    expected = weights_of(whole.model)
    assert differing(expected, weights_of(digit_model(digit_processor())))
    for name, value in weights_of(parts.model).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_relevance_trains_the_controller_and_what_it_reads(tmp_path: Path) -> None:
    model = digit_model(digit_processor())
    before = weights_of(model)
    tiny_trainer(
        tmp_path, conversation_rows(2), model, max_steps=1, train_parts=["controller"], loss_weights={"relevance": 1.0}
    ).train()
    changed = {name.split(".")[1] for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert changed == {"controller", "budget_token"}


@pytest.mark.parametrize("selection_output", ["gather", "mask"])
def test_text_alone_has_the_loss_of_text(tmp_path: Path, selection_output: str) -> None:
    rows = conversation_rows(2, (0,))

    def loss(**weights: float) -> float:
        model = digit_model(digit_processor(), selection_output=selection_output)
        trainer = tiny_trainer(tmp_path, rows, model, max_steps=1, train_parts=EVERY_PART, loss_weights=weights)
        trainer.train()
        return losses_of(trainer)[0]

    assert loss(lm=1.0, relevance=1.0, distillation=1.0) == pytest.approx(loss(lm=1.0))


def test_losses_that_are_not_allowed_are_errors(tmp_path: Path) -> None:
    for weights in ({}, {"relevence": 1.0}, {"lm": 0.0}, {"lm": -1.0}, {"lm": float("inf")}):
        with pytest.raises(ValueError, match="loss_weights"):
            AdaVTPTrainingArguments(str(tmp_path), report_to=[], loss_weights=weights)
    with pytest.raises(ValueError, match=r"train_parts=\['controller'\]"):
        AdaVTPTrainingArguments(str(tmp_path), report_to=[], loss_weights={"relevance": 1.0}, train_parts=["decoder"])
    model = digit_model(digit_processor(), reducer="random")
    with pytest.raises(ValueError, match="'random'"):
        tiny_trainer(tmp_path, [], model, loss_weights={"lm": 1.0, "relevance": 1.0})
