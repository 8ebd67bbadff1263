"""Relevance that is computed once, beside the rows, trains a controller as relevance in every step does."""

from pathlib import Path

import datasets
import pytest
import torch
from datasets import List, Value

from adavtp import AdaVTPTrainingArguments, BudgetCollator
from adavtp.tasks.rows import encoded_image
from adavtp.trainer.data.collator import RELEVANCE
from adavtp.trainer.losses import visual_relevance
from adavtp.trainer.noted_relevance import with_relevance
from tiny_conversations import conversation_rows, digit_model, digit_processor
from tiny_models import NUM_PATCHES
from tiny_trainers import batches_seen_by, losses_of, tiny_trainer, weights_of

TEXT = Value("string")
FEATURES = datasets.Features(
    {
        "images": List(datasets.Image()),
        "messages": List({"role": TEXT, "content": List({"type": TEXT, "text": TEXT})}),
    }
)
CONTROLLER = {"optim": "sgd", "train_parts": ["controller"], "loss_weights": {"relevance": 1.0}}


def conversations(images_per_row: tuple[int, ...]) -> datasets.Dataset:
    rows = conversation_rows(6, images_per_row)
    stored = [row | {"images": [encoded_image(image) for image in row["images"]]} for row in rows]
    return datasets.Dataset.from_list(stored, features=FEATURES)


def test_relevance_noted_once_trains_what_relevance_in_every_step_trains(tmp_path: Path) -> None:
    rows, weights, losses, num_batches = conversations((1, 2, 0)), {}, {}, {}
    for once in (False, True):
        trainer = tiny_trainer(
            tmp_path, rows, digit_model(digit_processor()), max_steps=6, relevance_once=once, **CONTROLLER
        )
        seen = batches_seen_by(trainer.model)
        trainer.train()
        weights[once], losses[once] = weights_of(trainer.model), losses_of(trainer)
        num_batches[once] = len(seen)
    torch.testing.assert_close(losses[True], losses[False], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(weights[True], weights[False], atol=1e-4, rtol=1e-3)
    assert num_batches[True] == 6 < num_batches[False]


def test_it_is_computed_anew_for_other_weights_that_it_depends_on_and_for_no_others(tmp_path: Path) -> None:
    conversations((1,)).save_to_disk(tmp_path)
    processor, rows = digit_processor(), datasets.load_from_disk(str(tmp_path))
    collator = BudgetCollator(processor)

    def is_computed(part: str, **fields: str) -> bool:
        model = digit_model(processor, **fields)
        with_relevance(rows, model, collator)
        seen = batches_seen_by(model)
        with_relevance(rows, model, collator)
        assert not seen
        next(model.get_submodule(part).parameters()).data.add_(0.1)
        noted = with_relevance(rows, model, collator)
        expected = visual_relevance(model, collator([rows[4]])).of_patches
        torch.testing.assert_close(torch.as_tensor(noted[4][RELEVANCE]).float(), expected, atol=1e-4, rtol=1e-3)
        return len(seen) > 1

    assert is_computed("model.language_model")
    assert not is_computed("model.controller")
    # Patches that hear the budget token are other patches.
    assert is_computed("model.budget_token", budget_attention="mutual")


def test_rows_may_say_themselves_which_patch_is_worth_keeping(tmp_path: Path) -> None:
    rows = [row | {RELEVANCE: [torch.eye(NUM_PATCHES)[7]]} for row in conversation_rows(4)]
    how = {"max_steps": 30, "train_parts": ["controller"], "loss_weights": {"relevance": 1.0}}
    trainer = tiny_trainer(tmp_path, rows, budgets=(0.0, 0.5), data={"eval_dataset": rows}, **how)
    seen = batches_seen_by(trainer.model)
    trainer.train()
    assert len(seen) == 30 and losses_of(trainer)[-1] < 0.5 * losses_of(trainer)[0]
    # Neither an evaluation nor training by the language model's loss alone takes any notice of it.
    assert trainer.evaluate()["eval_loss"] > 0
    tiny_trainer(tmp_path, rows).train()


def test_what_relevance_cannot_be_noted_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`relevance_once` is True and `train_dataset` is a list"):
        tiny_trainer(tmp_path, conversation_rows(4), relevance_once=True, **CONTROLLER)
    with pytest.raises(ValueError, match="`relevance_once` is True and `loss_weights` is {'lm': 1.0}"):
        AdaVTPTrainingArguments(str(tmp_path), relevance_once=True)
