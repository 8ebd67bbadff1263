"""PaliGemma's prompts: images and a question, seen in both directions, and behind them an answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adavtp import AdaVTPTrainer, AdaVTPTrainingArguments, BudgetCollator
from adavtp.modeling.processing_adavtp import inputs_of_questions
from adavtp.trainer.data.reader import ConversationReader, RejectedSample
from tiny_conversations import assistant, picture, target_texts, user
from tiny_processors import family_model, family_processor, stock_of
from tiny_trainers import EVERY_PART, losses_of, weights_of

NAMES = ("paligemma", "paligemma2")


def rows() -> list[dict[str, Any]]:
    return [
        {
            "id": "one",
            "images": [picture(0, (40, 30))],
            "messages": [user("which digit is red ?", 1), assistant("7")],
        },
        {
            "id": "two",
            "images": [picture(1), picture(2)],
            "messages": [user("what ?", 2), assistant("4 , the largest")],
        },
    ]


def test_a_batch_is_what_the_processor_makes_of_prefix_and_suffix() -> None:
    processor = family_processor("paligemma")
    batch = BudgetCollator(processor)(rows())
    stock = processor(
        images=[row["images"] for row in rows()],
        text=["<image>which digit is red ?", "<image><image>what ?"],
        suffix=["7", "4 , the largest"],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert batch.keys() - {"token_budget"} == stock.keys()
    for key, value in stock.items():
        assert torch.equal(batch[key], value), key
    said = [target_texts(processor, batch["input_ids"][n].tolist(), batch["labels"][n].tolist()) for n in range(2)]
    assert said == [["7<eos>"], ["4 , the largest<eos>"]]
    assert torch.equal(batch["labels"] >= 0, batch["token_type_ids"] == 1)


def test_a_row_has_the_length_that_it_has_in_a_batch() -> None:
    processor = family_processor("paligemma")
    reader, collator = ConversationReader(processor), BudgetCollator(processor)
    for row in rows():
        batch, others, visual = collator([row]), *reader.lengths(row)
        assert (others + visual, visual) == (batch["input_ids"].shape[1], 16 * len(row["images"]))
        for key, value in collator([reader.read(row)]).items():
            assert key == "token_budget" or torch.equal(batch[key], value), key


TURNS = [user("what ?", 1), assistant("7")]
REFUSED = {
    "several turns": [*TURNS, user("and now ?"), assistant("4")],
    "a system prompt": [{"role": "system", "content": "Be brief."}, *TURNS],
    "no image": [user("what ?"), assistant("7")],
    "an image behind its question": [
        {"role": "user", "content": [{"type": "text", "text": "what ?"}, {"type": "image"}]},
        assistant("7"),
    ],
    "a placeholder in its text": [user("what is <image> ?", 1), assistant("7")],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_conversation_that_is_no_question_about_images_is_refused_with_the_reason(kind: str) -> None:
    processor, messages = family_processor("paligemma"), REFUSED[kind]
    row = {"id": "a", "images": [picture()] * (kind != "no image"), "messages": messages}
    reason = "a PaliGemmaProcessor writes prompts of one turn of the user's: images, one or more, and behind them"
    with pytest.raises(ValueError, match=reason):
        BudgetCollator(processor)([row])
    with pytest.raises(RejectedSample, match=reason):
        ConversationReader(processor).read(row)
    with pytest.raises(ValueError, match=reason):
        inputs_of_questions(processor, [row["images"]], [messages[:-1]])


def test_a_conversation_without_an_answer_is_nothing_to_learn_from() -> None:
    row = rows()[0] | {"messages": [user("what ?", 1)]}
    with pytest.raises(ValueError, match="expected is the assistant's answer"):
        BudgetCollator(family_processor("paligemma"))([row])


@pytest.mark.parametrize("name", NAMES)
def test_at_full_budget_loss_and_answers_are_the_stock_class_s(name: str) -> None:
    processor = family_processor(name)
    model = family_model(name, processor).eval()
    stock, batch = stock_of(name, model), BudgetCollator(processor, (1.0, 1.0))(rows())
    given = {key: value for key, value in batch.items() if key != "token_budget"}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, stock(**given).loss)
    image, model.processor = Image.new("RGB", (30, 50), "red"), processor
    inputs = processor(images=[[image]], text=["<image>which digit is red ?"], return_tensors="pt")
    written = stock.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answer = model.generate(image, "which digit is red ?", max_new_tokens=4, do_sample=False)
    assert answer == processor.batch_decode(written, skip_special_tokens=True)[0].strip()


def test_dropped_tokens_may_leave_or_hide_and_training_is_the_same(tmp_path: Path) -> None:
    losses, processor = {}, family_processor("paligemma")
    for form in ("gather", "mask"):
        model = family_model("paligemma", processor, selection_output=form)
        before = weights_of(model)
        arguments = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 0.01, "logging_steps": 1}
        arguments |= {"optim": "sgd", "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
        trainer = AdaVTPTrainer(
            model=model,
            args=AdaVTPTrainingArguments(str(tmp_path), train_parts=EVERY_PART, **arguments),
            data_collator=BudgetCollator(processor, (0.3, 0.8), per="sample"),
            processing_class=processor,
            train_dataset=rows() * 4,
        )
        torch.manual_seed(0)
        trainer.train()
        losses[form] = losses_of(trainer)
        assert any(not torch.equal(value, before[key]) for key, value in weights_of(model).items())
    assert losses["gather"] == pytest.approx(losses["mask"], rel=1e-4) and losses["gather"][0] > 1
