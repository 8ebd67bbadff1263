"""Heads that read the question word by word: what they are given of it, and what they can say."""

import pytest
import torch
from torch import nn

from adavtp import AdaVTPConfig, AdaVTPForConditionalGeneration, VisionFeatures
from adavtp.modeling.reducers.adaptive import QUESTION_HEADS, VisionTokenController
from tiny_families import batch_of, ragged_prompts, with_budget
from tiny_features import features_of
from tiny_models import (
    BOS_TOKEN_ID,
    IMAGE_TOKEN_ID,
    NUM_PATCHES,
    PAD_TOKEN_ID,
    padded_on_the_right,
    targets,
    tiny_batch,
    tiny_config,
    tiny_model,
)

every_head = pytest.mark.parametrize("head", list(QUESTION_HEADS))
Batch = dict[str, torch.Tensor]


@torch.no_grad()
def seen_by_the_controller(
    model: AdaVTPForConditionalGeneration, batch: Batch, **asked: object
) -> tuple[VisionFeatures, torch.Tensor]:
    """What the controller is shown of a batch, and the scores that it gives."""
    seen, controller = [], model.model.controller
    handle = controller.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch, **({"token_budget": 0.4} | asked))
    handle.remove()
    return seen[0], controller.scores(seen[0])


def embeddings_of_questions(model: AdaVTPForConditionalGeneration, batch: Batch) -> list[torch.Tensor]:
    """The embeddings of each prompt's text, in order: no padding, no placeholders."""
    table = model.get_input_embeddings().weight
    texts = [[i for i in row if i not in (PAD_TOKEN_ID, IMAGE_TOKEN_ID)] for row in batch["input_ids"].tolist()]
    return [table[torch.tensor(text)] for text in texts]


# What they are given


@pytest.mark.parametrize("side", ["left", "right"])
@every_head
def test_every_image_comes_with_the_tokens_of_its_own_prompt(head: str, side: str) -> None:
    model = tiny_model(controller_head=head)
    # Prompts with one, two and no images.
    batch = tiny_batch(model.config, [1, 2, 0], lengths=[5, 9, 19])
    batch = batch if side == "left" else padded_on_the_right(batch)
    features, _ = seen_by_the_controller(model, batch)
    questions = embeddings_of_questions(model, batch)
    assert len(features.question_tokens) == 3
    for image, prompt in enumerate([0, 1, 1]):
        tokens = features.question_tokens[image, features.is_question_token[image]]
        assert torch.equal(tokens, questions[prompt])


@every_head
def test_embeddings_in_place_of_ids_are_read_as_they_are(head: str) -> None:
    model = tiny_model(controller_head=head)
    batch = tiny_batch(model.config, [1, 2])
    _, expected = seen_by_the_controller(model, batch)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    asked = {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": embeds}
    assert torch.equal(seen_by_the_controller(model, asked)[1], expected)
    # And where they are no word's.
    changed = embeds.clone()
    changed[:, -1] += 1.0
    features, scores = seen_by_the_controller(model, asked | {"inputs_embeds": changed})
    assert torch.equal(features.question_tokens[:, -1], changed[[0, 1, 1], -1])
    assert not torch.allclose(scores, expected, atol=1e-4)


@every_head
def test_in_packed_questions_what_stands_before_the_first_target_asks(head: str) -> None:
    model = tiny_model(controller_head=head)
    image = tiny_batch(model.config, [1])["pixel_values"]
    text = [BOS_TOKEN_ID, 9] + [IMAGE_TOKEN_ID] * NUM_PATCHES + [11, 20, 21]
    blocks, padding = [[22, 23], [30, 31, 32]], [PAD_TOKEN_ID] * 3
    ids = text + blocks[0] + blocks[1] + padding
    block = torch.tensor([0] * len(text) + [1] * 2 + [2] * 3 + [-1] * 3)
    sees = (block[None] == 0) | (block[None] == block[:, None])
    sees = sees & (block >= 0)[None] & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    packed = {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([[-100] * len(text) + blocks[0] + [-100, 31, 32] + [-100] * 3]),
        "attention_mask": (sees | torch.eye(len(ids), dtype=torch.bool))[None, None],
        "position_ids": torch.arange(len(ids))[None],
        "pixel_values": image,
    }
    plain = {"input_ids": torch.tensor([text]), "pixel_values": image}
    features, scores = seen_by_the_controller(model, packed)
    expected, own_scores = seen_by_the_controller(model, plain)
    assert torch.equal(features.question_tokens[features.is_question_token], expected.question_tokens[0])
    torch.testing.assert_close(scores, own_scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@every_head
def test_a_prompt_without_text_has_finite_scores_and_gradients(head: str, training: bool) -> None:
    model = tiny_model(controller_head=head).train(training)
    batch = tiny_batch(model.config, [1, 1])
    # Beside a prompt with text, and all alone: nothing but placeholders and what is answered.
    silent = batch["attention_mask"].clone()
    silent[0] = (batch["input_ids"][0] == IMAGE_TOKEN_ID).long()
    silent[0, -3:] = 1
    batch["attention_mask"], batch["labels"] = silent, targets(batch)
    for own in (batch, {name: value[:1] for name, value in batch.items()}):
        features, scores = seen_by_the_controller(model, own)
        assert not features.is_question_token[0].any() and scores.isfinite().all()
        model.zero_grad()
        output = model(**own, token_budget=0.4)
        output.loss.backward()
        assert output.loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.model.controller.parameters() if p.grad is not None)


@torch.no_grad()
@every_head
def test_images_that_nobody_asks_about_are_chosen_from(head: str) -> None:
    model = tiny_model(controller_head=head)
    pixels = tiny_batch(model.config, [1, 1])["pixel_values"]
    features = model.model.features_of_images(pixels, model.model.resolve_budget(0.4, None, 2))
    assert [len(image) for image in features] == [6, 6]
    assert all(image.isfinite().all() for image in features)


@torch.no_grad()
@every_head
def test_a_later_turn_is_chosen_for_by_what_it_asks(head: str) -> None:
    model = tiny_model(controller_head=head)
    first, second = tiny_batch(model.config, [1], [6]), tiny_batch(model.config, [1], [5], seed=7)
    said = model.generate(**first, token_budget=0.4, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([said.sequences, second["input_ids"]], dim=1)
    seen, controller = [], model.model.controller
    controller.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mask, cache = torch.ones_like(ids), said.past_key_values
    later = {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
    model.generate(**later, token_budget=0.4, past_key_values=cache, max_new_tokens=1, do_sample=False)
    # The last token of an answer is in no cache yet; it is read with the next turn.
    asked = model.get_input_embeddings().weight[said.sequences[:, -1:]]
    expected = torch.cat([asked[0], *embeddings_of_questions(model, second)])
    (features,) = seen
    assert torch.equal(features.question_tokens[features.is_question_token], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "gemma3"])
@every_head
def test_a_batch_of_another_family_gives_what_its_prompts_give_alone(name: str, head: str) -> None:
    model, prompts = with_budget(name, controller_head=head), ragged_prompts(name)
    keep = model(**batch_of(name, prompts), token_budget=0.4).selection.keep
    assert torch.equal(model(**batch_of(name, prompts, "right"), token_budget=0.4).selection.keep, keep)
    number = 0
    for prompt in prompts[:2]:
        own = model(**batch_of(name, [prompt]), token_budget=0.4).selection.keep
        together = keep[number : number + len(own)]
        assert torch.equal(own, together[:, : own.shape[1]]) and not together[:, own.shape[1] :].any()
        number += len(own)
    assert number == len(keep)


@every_head
def test_word_embeddings_learn_from_the_choice_where_they_train(head: str) -> None:
    # As they do through the question's mean.
    torch.manual_seed(0)
    model, seen = tiny_model(controller_head=head, question_aware=False).train(), []
    batch = tiny_batch(model.config, [1])
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    model.model.controller.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    asked = {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": embeds}
    model(**asked, labels=targets(batch), token_budget=0.4)
    scores = model.model.controller.scores(seen[0])
    (gradient,) = torch.autograd.grad((scores * torch.randn_like(scores)).sum(), embeds)
    is_question = (batch["input_ids"] != IMAGE_TOKEN_ID) & (targets(batch) == -100)
    assert torch.equal((gradient != 0).any(dim=-1), is_question)


# What they can say

# Keys of two glyphs, each of four, as one-hot parts of a patch and as words of their own; and words that mean nothing.
KEYS = [(first, second) for first in range(4) for second in range(4)]
FIRST, SECOND, NOTHING = range(4), range(4, 8), range(8, 16)


def words(*numbers: int) -> torch.Tensor:
    """A question `[1, number of words, 32]` of one-hot embeddings."""
    return torch.eye(32)[list(numbers)][None]


def page() -> torch.Tensor:
    """One patch for each key, `[1, 16, 32]`."""
    codes = torch.eye(32)
    return torch.stack([codes[FIRST[first]] + codes[SECOND[second]] for first, second in KEYS])[None]


def controller_by_hand(head: str, of_patch: str, of_token: str) -> VisionTokenController:
    """
    A controller of four heads of width 8, silent but for two aspects. In head 0 patches and words have their first
    glyph, in head 1 their second.
    """
    controller = VisionTokenController(tiny_config(controller_head=head)).eval()
    for parameter in controller.parameters():
        nn.init.zeros_(parameter)
    for norm in (controller.patch_norm, controller.budget_norm, controller.question_head.question_norm):
        nn.init.ones_(norm.weight)
    with torch.no_grad():
        for projection in (getattr(controller.question_head, name) for name in (of_patch, of_token)):
            for head_number, glyphs in enumerate((FIRST, SECOND)):
                for place, glyph in enumerate(glyphs):
                    projection.weight[8 * head_number + place, glyph] = 2.0
    return controller


def best_of(controller: VisionTokenController, question: torch.Tensor) -> tuple[int, int]:
    is_token = torch.ones(question.shape[:2], dtype=torch.bool)
    features = features_of(page(), budget=torch.zeros(1, 32), question_tokens=question, is_question_token=is_token)
    scores = controller.scores(features)[0]
    best = int(scores.argmax())
    assert (scores == scores[best]).sum() == 1
    return KEYS[best]


@torch.no_grad()
@pytest.mark.parametrize("key", KEYS)
def test_late_interaction_can_ask_for_a_patch_that_matches_both_words(key: tuple[int, int]) -> None:
    controller = controller_by_hand("late_interaction", "patch_proj", "question_proj")
    first, second = FIRST[key[0]], SECOND[key[1]]
    # In whatever order, among whatever words, however many.
    for question in (words(first, second), words(8, second, 9, first), words(10, first, second, 11, 12, 13)):
        assert best_of(controller, question) == key


@torch.no_grad()
@pytest.mark.parametrize("key", KEYS)
def test_cross_attention_can_ask_for_a_patch_that_matches_both_words(key: tuple[int, int]) -> None:
    controller = controller_by_hand("cross_attention", "q_proj", "k_proj")
    head = controller.question_head
    # A patch that finds its glyph reads 1 in the head's first place, in both heads the more.
    head.v_proj.bias[[0, 8]] = 1.0
    head.out_proj.weight[0, [0, 8]] = 1.0
    controller.score.weight[0, 0] = 1.0
    # Words that are no glyph are further from a patch than nothing is.
    head.k_proj.weight[:, list(NOTHING)] = -2.0
    first, second = FIRST[key[0]], SECOND[key[1]]
    for question in (words(first, second), words(8, second, 9, first), words(10, first, second, 11, 12, 13)):
        assert best_of(controller, question) == key


@torch.no_grad()
@every_head
def test_the_budget_can_still_change_the_choice(head: str) -> None:
    torch.manual_seed(0)
    controller = tiny_model(controller_head=head).model.controller
    question, is_token = torch.randn(1, 4, 32), torch.ones(1, 4, dtype=torch.bool)
    patches, of_question = (
        torch.randn(1, NUM_PATCHES, 32),
        {"question_tokens": question, "is_question_token": is_token},
    )
    scores = [
        controller.scores(features_of(patches, budget=budget, **of_question)) for budget in torch.randn(2, 1, 32)
    ]
    change = scores[0] - scores[1]
    assert (change - change.mean()).abs().max() > 1e-3


def test_a_question_head_knows_the_text_model_s_width_and_not_the_tower_s() -> None:
    config: AdaVTPConfig = tiny_config(controller_head="late_interaction")
    config.text_config.hidden_size = 40
    controller = VisionTokenController(config)
    features = features_of(
        torch.randn(2, NUM_PATCHES, 32),
        budget=torch.randn(2, 32),
        question_tokens=torch.randn(2, 3, 40),
        is_question_token=torch.ones(2, 3, dtype=torch.bool),
    )
    assert controller.scores(features).shape == (2, NUM_PATCHES)
