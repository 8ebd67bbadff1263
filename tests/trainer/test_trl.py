"""What TRL's trainers do with a model whose prompts get shorter: nothing that they would not do with LLaVA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn

from adavtp import AdaVTPForConditionalGeneration, Selection
from tiny_conversations import ANSWERS, QUESTIONS, assistant, digit_model, digit_processor, picture, user

trl = pytest.importorskip("trl")

BUDGET, NUM_KEPT = 0.5, 8
ARGUMENTS = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
# A frozen controller chooses in training as in evaluation, so that the loss of a step can be computed again.
FORMS = {
    "gather": {},
    "mask": {"selection_output": "mask"},
    "in the decoder": {"reducers": [{"name": "fastv", "layer": 1}]},
}
WAYS = [("gather", None), ("gather", LORA), ("in the decoder", None)]
every_way = pytest.mark.parametrize(("form", "adapter"), WAYS, ids=["whole model", "LoRA", "in the decoder"])


def rows(**columns: Any) -> Dataset:
    """Four questions about four images, and columns made of the number of each."""
    return Dataset.from_list(
        [
            {"images": [picture(number)], "prompt": [user(QUESTIONS[number], 1)]}
            | {name: make(number) for name, make in columns.items()}
            for number in range(4)
        ]
    )


def answered(answers: list[str] = ANSWERS) -> Dataset:
    return rows(completion=lambda number: [assistant(answers[number])])


def tiny(**fields: Any) -> AdaVTPForConditionalGeneration:
    model = digit_model(digit_processor(), token_budget=BUDGET, **fields)
    model.model.controller.requires_grad_(False)
    return model


def selections_of(model: AdaVTPForConditionalGeneration) -> list[Selection]:
    """What every call of the model keeps, in a list that fills as it is called."""
    selections = []
    model.model.register_forward_hook(lambda *call: selections.append(call[-1].selection))
    return selections


def sft_trainer(folder: Path, model: nn.Module, dataset: Dataset, **options: Any) -> Any:
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(str(folder), max_length=None, **ARGUMENTS),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=digit_processor(),
        **options,
    )


def logged(trainer: Any, name: str) -> float:
    """Of the only step."""
    (value,) = [entry[name] for entry in trainer.state.log_history if name in entry]
    return value


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole model", "LoRA"])
@pytest.mark.parametrize("form", FORMS)
def test_sft_has_the_models_own_loss_in_training_and_evaluation(
    form: str, adapter: dict[str, Any] | None, tmp_path: Path
) -> None:
    model, dataset = tiny(**FORMS[form]), answered()
    batch = trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(
        digit_processor(), completion_only_loss=True
    )(list(dataset))
    with torch.no_grad():
        expected = float(model(**batch).loss)
    selections = selections_of(model)
    peft_config = None if adapter is None else LoraConfig(**adapter)
    trainer = sft_trainer(tmp_path, model, dataset, peft_config=peft_config)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(expected, abs=1e-4)
    assert 0 < logged(trainer, "grad_norm") < float("inf")
    assert len(selections) == 2
    if form != "in the decoder":
        assert all(selection.num_keep.tolist() == [NUM_KEPT] * 4 for selection in selections)


def test_sft_chooses_without_a_look_at_the_answer(tmp_path: Path) -> None:
    model = tiny()
    selections = selections_of(model)
    for answers in (ANSWERS, ANSWERS[::-1]):
        sft_trainer(tmp_path, model, answered(answers)).evaluate()
    inputs = digit_processor().of_questions([picture(number) for number in range(4)], QUESTIONS)
    asked = model.select_tokens(**inputs).keep
    assert all(torch.equal(selection.keep, asked) for selection in selections)


def test_sft_trains_the_controller(tmp_path: Path) -> None:
    model = tiny()
    model.model.controller.requires_grad_(True)
    before = {name: value.clone() for name, value in model.model.controller.named_parameters()}
    sft_trainer(tmp_path, model, answered()).train()
    assert all((value != before[name]).any() for name, value in model.model.controller.named_parameters())


@every_way
def test_dpo_sees_the_same_tokens_for_both_answers_and_for_the_reference(
    form: str, adapter: dict[str, Any] | None, tmp_path: Path
) -> None:
    model = tiny(**FORMS[form])
    selections = selections_of(model)
    # An adapter that has learnt nothing, or a model beside itself: no answer is preferred to the reference's.
    trainer = trl.DPOTrainer(
        model,
        None if adapter else tiny(**FORMS[form]),
        trl.DPOConfig(str(tmp_path), max_length=None, **ARGUMENTS),
        train_dataset=rows(
            chosen=lambda number: [assistant(ANSWERS[number])], rejected=lambda _: [assistant("no digits here")]
        ),
        processing_class=digit_processor(),
        peft_config=None if adapter is None else LoraConfig(**adapter),
    )
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(0.6931, abs=1e-3)
    assert logged(trainer, "rewards/margins") == pytest.approx(0.0, abs=1e-5)
    assert 0 < logged(trainer, "grad_norm") < float("inf")
    for selection in selections:
        of_chosen, of_rejected = selection.keep.chunk(2)
        assert torch.equal(of_chosen, of_rejected)
        assert form == "in the decoder" or selection.num_keep.tolist() == [NUM_KEPT] * 8


@every_way
def test_grpo_learns_from_the_tokens_that_it_answered_with(
    form: str, adapter: dict[str, Any] | None, tmp_path: Path
) -> None:
    model, kept = tiny(**FORMS[form]), []
    # Sorted, because TRL shuffles what it generated.
    reducer = model.model.steps()[-1].reducer
    reducer.register_forward_hook(lambda *call: kept.append(sorted(call[-1].keep.tolist())))
    rewards = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        rewards.extend(float(len(str(completion))) for completion in completions)
        return rewards[-len(completions) :]

    trainer = trl.GRPOTrainer(
        model,
        reward,
        # A reference model is loaded by its name, or is the model without its adapter.
        args=trl.GRPOConfig(
            str(tmp_path), num_generations=2, max_completion_length=4, beta=0.1 if adapter else 0.0, **ARGUMENTS
        ),
        train_dataset=rows(),
        processing_class=digit_processor(),
        peft_config=None if adapter is None else LoraConfig(**adapter),
    )
    trainer.train()
    assert abs(logged(trainer, "loss")) < 1 and len(rewards) == 4
    assert 0 <= logged(trainer, "grad_norm") < float("inf")
    if form != "in the decoder":
        assert len(kept) > 1 and all(keep == kept[0] for keep in kept)
        assert [sum(keep) for keep in kept[0]] == [NUM_KEPT] * 4
