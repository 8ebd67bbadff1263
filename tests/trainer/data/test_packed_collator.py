"""Many questions in one sequence: every block is the conversation that it would be alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor, BudgetCollator
from adavtp.tasks.digit_scenes import load_digit_scenes
from adavtp.trainer.data.budget_stream import BudgetStream
from adavtp.trainer.data.packed_collator import PackedQuestionCollator
from tiny_conversations import (
    PROCESSORS,
    assistant,
    digit_model,
    digit_processor,
    scene_rows,
    target_texts,
    user,
)
from tiny_models import NUM_PATCHES

FULL = (1.0, 1.0)

# A packed sequence asks for the patches that its first block, the caption, asks for. So for every block to be its own
# conversation at a budget below 1, the choice must not depend on the question.
NOT_QUESTION_AWARE = {"question_aware": False}


def conversations_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The caption and every question of a row, each as a row of its own."""
    caption = {"role": "user", "content": [{"type": "image"}]}
    asked = [user(question, 1) for question in row["questions"]]
    said = [row["caption"], *row["answers"]]
    return [
        {"images": [row["image"]], "messages": [prompt, assistant(answer)]}
        for prompt, answer in zip([caption, *asked], said, strict=True)
    ]


def target_logits(
    model: AdaVTPForConditionalGeneration, batch: dict[str, torch.Tensor], seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Log-probabilities from which each row's targets are predicted, in order, and the batch's loss."""
    torch.manual_seed(seed)
    with torch.no_grad():
        outputs = model(**batch)
    is_target = outputs.labels[:, 1:] != -100
    logits = outputs.logits[:, :-1].log_softmax(dim=-1)
    return [row[mask] for row, mask in zip(logits, is_target, strict=True)], outputs.loss


@pytest.fixture(params=PROCESSORS, scope="module")
def processor(request: pytest.FixtureRequest) -> AdaVTPProcessor:
    return PROCESSORS[request.param]()


@pytest.mark.parametrize("output", ["gather", "mask"])
@pytest.mark.parametrize(("budget", "training"), [(1.0, False), (1.0, True), (0.4, False), (0.4, True)])
def test_every_block_is_the_conversation_alone(
    processor: AdaVTPProcessor, budget: float, training: bool, output: str
) -> None:
    model = digit_model(processor, **NOT_QUESTION_AWARE, selection_output=output).train(training)
    (row,) = scene_rows(1)
    budgets = {"budget_range": (budget, budget)}
    (packed,), loss = target_logits(model, PackedQuestionCollator(processor, BudgetStream(**budgets))([row]))
    # The same seed before every forward: one image, so the same noise, and the same patches.
    alone = [target_logits(model, BudgetCollator(processor, **budgets)([one])) for one in conversations_of(row)]
    assert torch.allclose(packed, torch.cat([logits for (logits,), _ in alone]), atol=1e-5)
    num_targets = torch.tensor([len(logits) for (logits,), _ in alone])
    losses = torch.stack([loss for _, loss in alone])
    assert torch.allclose(loss, (losses * num_targets).sum() / num_targets.sum(), atol=1e-5)


def test_patches_are_chosen_for_the_caption_which_comes_first() -> None:
    processor = digit_processor()
    model = digit_model(processor, question_aware=True)
    (row,) = scene_rows(1)
    (packed,), _ = target_logits(model, PackedQuestionCollator(processor, BudgetStream((0.3, 0.3)))([row]))
    caption = conversations_of(row)[0]
    (alone,), _ = target_logits(model, BudgetCollator(processor, (0.3, 0.3))([caption]))
    assert torch.allclose(packed[: len(alone)], alone, atol=1e-5)


def test_a_block_sees_the_head_and_itself() -> None:
    processor = digit_processor()
    (row,) = scene_rows(1)
    batch = PackedQuestionCollator(processor)([row])
    ids, sees = batch["input_ids"][0], batch["attention_mask"][0, 0]
    head_length = int((ids == processor.image_token_id).nonzero().max()) + 1
    starts = [*((ids == processor.tokenizer.eos_token_id).nonzero()[:, 0] + 1).tolist()]
    blocks = list(zip([head_length, *starts[:-1]], starts, strict=True))
    assert len(blocks) == 1 + len(row["questions"])
    expected = torch.zeros_like(sees)
    expected[:, :head_length] = True
    for begin, end in blocks:
        expected[begin:end, begin:end] = True
        assert batch["position_ids"][0, begin:end].tolist() == list(range(head_length, head_length + end - begin))
    assert torch.equal(sees, expected.tril())


@pytest.mark.parametrize("budget", [1.0, 0.4])
def test_padding_is_harmless(processor: AdaVTPProcessor, budget: float) -> None:
    model = digit_model(processor)
    collator = PackedQuestionCollator(processor, BudgetStream((budget, budget)))
    rows = scene_rows(3)
    together, loss = target_logits(model, collator(rows))
    alone = [target_logits(model, collator([row])) for row in rows]
    assert torch.isfinite(loss)
    for logits, ((expected,), _) in zip(together, alone, strict=True):
        assert torch.allclose(logits, expected, atol=1e-5)


def test_padding_is_harmless_to_gradients() -> None:
    processor = digit_processor()
    model = digit_model(processor).train()
    batch = PackedQuestionCollator(processor, BudgetStream((0.4, 0.4)))(scene_rows(3))
    model(**batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_a_batch_has_the_stream_s_budgets_or_none(per: str) -> None:
    processor, rows = digit_processor(), scene_rows(3)
    drawn = PackedQuestionCollator(processor, BudgetStream(per=per, seed=3))(rows)["token_budget"]
    assert torch.equal(drawn, BudgetStream(per=per, seed=3).next(3))
    assert "token_budget" not in PackedQuestionCollator(processor)(rows)


def test_rows_of_digit_scenes_pack(tmp_path: Path) -> None:
    processor = digit_processor()
    data = load_digit_scenes("train", 2, cache_dir=tmp_path)
    batch = PackedQuestionCollator(processor)(list(data))
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=-1).tolist() == [NUM_PATCHES] * 2
    assert (batch["input_ids"] != processor.tokenizer.unk_token_id).all()
    for row, ids, labels in zip(data, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        assert len(target_texts(processor, ids, labels)) == 1 + len(row["questions"])


def test_a_template_with_the_question_before_the_image_is_an_error() -> None:
    processor = digit_processor()
    processor.chat_template = (
        "{% for m in messages %}{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{% for part in m['content'] if part['type'] == 'image' %} <image> {% endfor %}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="before the image"):
        PackedQuestionCollator(processor)(scene_rows(1))
