"""What training promises: exactly the named parts, exact resumption, and evaluation at every budget."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments

from adavtp import (
    AdaVTPForConditionalGeneration,
    AdaVTPProcessor,
    AdaVTPTrainingArguments,
    BudgetCollator,
)
from adavtp.tasks.digit_scenes import load_digit_questions
from adavtp.tasks.digit_scenes.processor import build_digit_processor
from adavtp.trainer.trained_parts import choose_trained_parts
from tiny_conversations import conversation_rows, digit_model, digit_processor
from tiny_models import tiny_text_config, tiny_vision_config
from tiny_trainers import (
    EVERY_PART,
    FULL,
    PLAIN_STEP,
    batches_seen_by,
    budgets_of,
    differing,
    losses_of,
    tiny_trainer,
    weights_of,
)
from training_process import modules_run_by

MIXED = (1, 0, 2)
# What the names of parameters of each part start with.
OF_PARTS = {
    "controller": ("model.budget_token.", "model.controller.", "model.reducers."),
    "scheduler": ("model.scheduler.",),
    "projector": ("model.multi_modal_projector.",),
    "vision": ("model.vision_tower.",),
    "decoder": ("model.language_model.", "lm_head."),
}


def are_equal(first: Any, second: Any) -> bool:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(are_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(are_equal, first, second))
    return first == second


# Resuming


@pytest.mark.parametrize("dials", [{}, {"depth_range": [0.5, 1.0], "width_range": [0.4, 0.9]}], ids=["", "dials"])
def test_a_resumed_run_ends_where_one_without_a_break_ends(tmp_path: Path, dials: dict[str, list[float]]) -> None:
    text = tiny_text_config(num_layers=4, vocab_size=len(digit_processor().tokenizer))
    with_scheduler = {"scheduler": {"num_prefix_layers": 1}, "gradient_gates": "features", "text_config": text}
    scheduler = with_scheduler if dials else {}
    # Seven batches, so four steps, an epoch: the break at step 3 is inside an epoch, and an epoch's end follows it.
    fields = {
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "dataloader_num_workers": 2,
        "train_parts": EVERY_PART,
        "save_strategy": "steps",
        "save_steps": 3,
        **dials,
    }
    begun = digit_model(digit_processor(), **scheduler)
    before = weights_of(begun)
    whole = tiny_trainer(tmp_path / "whole", conversation_rows(14, MIXED), model=begun, **fields)
    whole.data_collator.budgets.per = "sample"
    seen = batches_seen_by(whole.model)
    whole.train()
    random_state = torch.get_rng_state()

    torch.manual_seed(99)
    random.seed(99)
    new_model = digit_model(digit_processor(), seed=99, **scheduler)
    resumed = tiny_trainer(tmp_path / "resumed", conversation_rows(14, MIXED), model=new_model, **fields)
    resumed.data_collator.budgets.per = "sample"
    seen_again = batches_seen_by(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))

    assert len(seen) == 11 and budgets_of(seen_again) == budgets_of(seen[-5:])
    for name, (low, high) in dials.items():
        dial = f"{name.removesuffix('range')}budget"
        drawn = [batch[dial].tolist() for batch in seen]
        assert [batch[dial].tolist() for batch in seen_again] == drawn[-5:]
        values = sum(drawn, [])
        assert len(set(values)) == len(values) and low <= min(values) and max(values) <= high
    learned = [name for name in differing(before, weights_of(whole.model)) if "scheduler" in name]
    assert len(learned) == (len([name for name in before if "scheduler" in name]))
    assert differing(weights_of(resumed.model), weights_of(whole.model)) == []
    assert are_equal(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert losses_of(resumed) == losses_of(whole)


def test_budgets_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    seen = []
    for num_workers in (0, 2):
        trainer = tiny_trainer(tmp_path, conversation_rows(8), max_steps=3, dataloader_num_workers=num_workers)
        seen.append(batches_seen_by(trainer.model))
        trainer.train()
    drawn = [budgets_of(batches) for batches in seen]
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn[0]))) == 3


def test_a_controller_is_evaluated_once_it_was_trained(tmp_path: Path) -> None:
    model = digit_model(digit_processor())
    # As it is where a checkpoint has no weights for it.
    model.config.untrained_controller = True
    evaluated = {"eval_budgets": [0.4], "max_steps": 1, "train_parts": ["controller"]}
    rows = conversation_rows(4)
    trainer = tiny_trainer(tmp_path, rows, model=model, data={"eval_dataset": rows[:2]}, **evaluated)
    with pytest.raises(ValueError, match="no weights for the reducer 'adaptive'"):
        trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_loss_b0.4"] > 0
    trainer.save_model()
    assert not AdaVTPForConditionalGeneration.from_pretrained(tmp_path).config.untrained_controller


# What trains


def test_only_a_model_with_a_scheduler_can_train_one(tmp_path: Path) -> None:
    how = {"train_parts": ["scheduler"], "max_steps": 1, "depth_range": [0.75, 0.75], "width_range": [0.5, 0.7]}
    with pytest.raises(ValueError, match="nothing of that which could train.*if its configuration names one"):
        tiny_trainer(tmp_path, conversation_rows(2), **how)
    text = tiny_text_config(num_layers=4, vocab_size=len(digit_processor().tokenizer))
    fields = {"text_config": text, "scheduler": {"num_prefix_layers": 1}, "gradient_gates": "features"}
    model = digit_model(digit_processor(), **fields)
    before = weights_of(model)
    tiny_trainer(tmp_path, conversation_rows(2), model, **how).train()
    changed = differing(before, weights_of(model))
    assert changed == [name for name in before if name.startswith(OF_PARTS["scheduler"])]


@pytest.mark.parametrize(
    ("vision", "train_parts"),
    [
        *(("clip", [part]) for part in EVERY_PART if part != "scheduler"),
        ("clip", ["controller", "projector"]),
        *((vision, EVERY_PART) for vision in ("clip", "siglip", "dinov2")),
    ],
)
def test_a_step_changes_the_named_parts_and_no_others(tmp_path: Path, vision: str, train_parts: list[str]) -> None:
    model = digit_model(digit_processor(), vision=vision)
    before = weights_of(model)
    trainer = tiny_trainer(
        tmp_path, conversation_rows(2), model, budgets=(0.5, 0.5), max_steps=1, train_parts=train_parts
    )
    if vision == "siglip":
        trainer.data_collator.processor.vision_feature_select_strategy = "full"
        trainer.data_collator.processor.num_additional_image_tokens = 0
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    prefixes = tuple(prefix for part in train_parts for prefix in OF_PARTS[part])
    named = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    # Three layers, of which the last is above the feature layer, -2; and what stands behind all layers, or is never
    # called. A key's bias adds the same to all scores of a query, the controller's to those of all patches: neither
    # does anything, and their gradients are zero up to rounding.
    unused = ("post_layernorm", "layernorm", "head", "encoder.layers.2", "encoder.layer.2", "embeddings.mask_token")
    unused = tuple(f"model.vision_tower.{name}" for name in unused)
    without_effect = {name for name in named if name.endswith(("k_proj.bias", "key.bias", "score.bias"))}
    assert changed <= named
    assert not any(name.startswith(unused) for name in changed)
    assert {name for name in named - without_effect if not name.startswith(unused)} == changed - without_effect


MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "last layer": {"vision_feature_layer": -1},
    "two layers": {"vision_feature_layer": [-2, 1]},
    "dinov2": {"vision": "dinov2"},
    "post": {"budget_fusion": "post"},
    "mutual": {"budget_attention": "mutual"},
    "last patch": {"budget_position": "last_patch"},
    "not question-aware": {"question_aware": False},
    "question norm": {"question_norm": True},
    "head budget_token": {"controller_head": "budget_token"},
    "head patch": {"controller_head": "patch"},
    "head dot": {"controller_head": "dot"},
    "head late_interaction": {"controller_head": "late_interaction"},
    "head cross_attention": {"controller_head": "cross_attention", "question_aware": False},
    "soft choice": {"controller_estimator": "differentiable_top_k"},
    "soft choice on features": {"controller_estimator": "differentiable_top_k", "gradient_gates": "features"},
    "random": {"reducer": "random"},
    "divprune": {"reducer": "divprune"},
    "gates on features": {"gradient_gates": "features"},
}


@pytest.mark.parametrize("images_per_row", [(1,), (0,)], ids=["images", "text alone"])
@pytest.mark.parametrize("name", MODELS)
def test_every_trained_parameter_gets_a_gradient_whatever_the_batch(
    name: str, images_per_row: tuple[int, ...]
) -> None:
    processor = digit_processor()
    model = digit_model(processor, selection_output="mask", **MODELS[name]).train()
    choose_trained_parts(model, EVERY_PART)
    model(**BudgetCollator(processor, (0.5, 0.5))(conversation_rows(2, images_per_row))).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert any(p.requires_grad for p in model.model.vision_tower.parameters())


@pytest.mark.parametrize("output", ["gather", "mask"])
@pytest.mark.parametrize("name", MODELS)
def test_a_training_batch_runs_the_same_modules_in_the_same_order_whatever_its_budgets_and_images(
    name: str, output: str
) -> None:
    processor = digit_processor()
    model = digit_model(processor, selection_output=output, **MODELS[name]).train()
    called = modules_run_by(model)

    def order(images_per_row: tuple[int, ...], budgets: list[float]) -> list[str]:
        called.clear()
        batch = BudgetCollator(processor)(conversation_rows(2, images_per_row))
        model(**batch | {"token_budget": budgets})
        return list(called)

    expected = order((1,), [0.2, 0.7])
    assert any(name.startswith("model.vision_tower") for name in expected)
    for images_per_row, budgets in [((1,), [1.0, 1.0]), ((2, 0), [0.2, 0.2]), ((0,), [1.0, 0.0]), ((0,), [0.2, 0.2])]:
        assert order(images_per_row, budgets) == expected


def test_arguments_that_are_not_allowed_are_errors(tmp_path: Path) -> None:
    for field, value in [
        ("train_parts", ["head"]),
        ("train_parts", []),
        ("eval_budgets", []),
        ("eval_budgets", [1]),
        ("eval_budgets", [0.4, 1.5]),
    ]:
        name = "token_budget|eval_budgets" if field == "eval_budgets" else field
        with pytest.raises(ValueError, match=name):
            AdaVTPTrainingArguments(str(tmp_path), report_to=[], **{field: value})
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        tiny_trainer(tmp_path, [], label_smoothing_factor=0.1)


# How it trains


def test_the_controller_hears_how_much_of_training_is_over(tmp_path: Path) -> None:
    model = digit_model(digit_processor(), controller_estimator="differentiable_top_k")
    trainer, heard = tiny_trainer(tmp_path, conversation_rows(8), model, max_steps=4), []
    controller = model.model.controller
    controller.register_forward_pre_hook(lambda *_: heard.append(controller.training_progress))
    trainer.train()
    assert heard == [0.0, 0.25, 0.5, 0.75]


def test_four_batches_of_one_are_one_batch_of_four(tmp_path: Path) -> None:
    weights, losses = [], []
    for batch_size, accumulation in [(4, 1), (1, 4)]:
        trainer = tiny_trainer(
            tmp_path,
            conversation_rows(8, MIXED),
            budgets=FULL,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **PLAIN_STEP,
        )
        trainer.train()
        weights.append(weights_of(trainer.model))
        losses.append(losses_of(trainer))
    # Float32 sums in another order: a few millionths of a loss of five.
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-5), name


@pytest.mark.parametrize("output", ["gather", "mask"])
def test_gradient_checkpointing_gives_the_same_step(tmp_path: Path, output: str) -> None:
    weights = []
    for checkpointing in (False, True):
        model = digit_model(digit_processor(), selection_output=output)
        rows = conversation_rows(2, (1, 2))
        step = PLAIN_STEP | {"learning_rate": 1.0, "max_steps": 1, "gradient_checkpointing": checkpointing}
        tiny_trainer(tmp_path, rows, model, budgets=(0.4, 0.4), **step).train()
        weights.append(weights_of(model))
    assert not are_equal(weights[0], weights_of(digit_model(digit_processor(), selection_output=output)))
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-5), name


def test_dropped_tokens_may_leave_or_hide_and_training_is_the_same(tmp_path: Path) -> None:
    losses = []
    for output in ("gather", "mask"):
        model = digit_model(digit_processor(), selection_output=output)
        trainer = tiny_trainer(tmp_path, conversation_rows(6, (1, 2)), model, max_steps=4, **PLAIN_STEP)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(set(losses[0])) == 4


def test_bfloat16_trains_weights_that_stay_float32(tmp_path: Path) -> None:
    losses = []
    for bf16 in (False, True):
        trainer = tiny_trainer(tmp_path, conversation_rows(4), bf16=bf16, train_parts=EVERY_PART)
        before = weights_of(trainer.model)
        trainer.train()
        losses.append(losses_of(trainer))
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        assert not are_equal(weights_of(trainer.model), before)
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] != losses[1]


def test_eight_digit_scenes_are_learnt_by_heart(tmp_path: Path) -> None:
    processor = build_digit_processor()
    vision = tiny_vision_config(num_layers=1)
    vision.image_size = 96
    text = tiny_text_config(vocab_size=len(processor.tokenizer), num_layers=1)
    model = digit_model(processor, vision_config=vision, text_config=text, vision_feature_layer=-1)
    trainer = tiny_trainer(
        tmp_path,
        load_digit_questions("train", 8, cache_dir=tmp_path / "cache"),
        model,
        per_device_train_batch_size=8,
        max_steps=60,
        train_parts=EVERY_PART,
    )
    trainer.data_collator.processor = processor
    trainer.train()
    losses = losses_of(trainer)
    assert sum(losses[-5:]) / 5 < 0.3 * losses[0]


# Evaluating


def loss_by_hand(
    model: nn.Module, rows: list[dict[str, Any]], budget: float, processor: AdaVTPProcessor | None = None
) -> float:
    """In batches of two, as `tiny_trainer` evaluates, the mean over rows."""
    collator, total = BudgetCollator(processor or digit_processor()), 0.0
    for start in range(0, len(rows), 2):
        batch = collator(rows[start : start + 2]) | {"token_budget": budget}
        with torch.no_grad():
            total += float(model.eval()(**batch).loss) * len(batch["input_ids"])
    return total / len(rows)


def test_evaluation_measures_at_every_budget(tmp_path: Path) -> None:
    rows, budgets = conversation_rows(5, MIXED), [1.0, 0.6, 0.2]
    trainer = tiny_trainer(tmp_path, [], data={"eval_dataset": rows}, eval_budgets=budgets)
    metrics = trainer.evaluate()
    by_hand = [loss_by_hand(trainer.model, rows, budget) for budget in budgets]
    assert [metrics[f"eval_loss_b{budget}"] for budget in budgets] == pytest.approx(by_hand, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(sum(by_hand) / 3, abs=1e-5)
    assert len(set(by_hand)) == 3
    assert {"eval_runtime_b0.2", "eval_samples_per_second_b0.2"} <= metrics.keys()


def test_prediction_runs_at_the_configuration_s_budget(tmp_path: Path) -> None:
    rows = conversation_rows(3)
    trainer = tiny_trainer(tmp_path, [])
    trainer.model.config.token_budget = 0.4
    metrics = trainer.predict(rows).metrics
    assert metrics["test_loss"] == pytest.approx(loss_by_hand(trainer.model, rows, 0.4), abs=1e-5)


def test_several_data_sets_have_metrics_of_their_own(tmp_path: Path) -> None:
    sets = {"few": conversation_rows(2), "more": conversation_rows(4)[2:]}
    trainer = tiny_trainer(tmp_path, [], data={"eval_dataset": sets}, eval_budgets=[0.4])
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        expected = loss_by_hand(trainer.model, rows, 0.4)
        assert metrics[f"eval_{name}_loss_b0.4"] == pytest.approx(expected, abs=1e-5)
    assert metrics == pytest.approx(trainer.evaluate(sets), rel=10)


def test_an_evaluation_is_one_entry_of_the_log_with_the_budgets_in_its_names(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path,
        conversation_rows(4),
        data={"eval_dataset": conversation_rows(2)},
        eval_budgets=[1.0, 0.2],
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if any("eval" in name for name in entry)]
    assert [entry["step"] for entry in evaluations] == [1, 2]
    for entry in evaluations:
        assert entry["eval_loss"] == pytest.approx((entry["eval_loss_b1.0"] + entry["eval_loss_b0.2"]) / 2)
    assert evaluations[1]["eval_loss_b0.2"] == pytest.approx(
        loss_by_hand(trainer.model, conversation_rows(2), 0.2), abs=1e-5
    )


def loss_per_row(prediction: EvalPrediction) -> dict[str, float]:
    """The mean over rows of the loss that logits and labels have if they line up."""
    logits, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
    assert logits.shape[:2] == labels.shape
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    per_row = losses.sum(dim=-1) / (labels[:, 1:] != -100).sum(dim=-1)
    return {"recomputed": float(per_row.mean()), "right_class": "no number"}


def test_metrics_get_logits_and_labels_that_line_up(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path,
        [],
        data={"eval_dataset": conversation_rows(5, MIXED), "compute_metrics": loss_per_row},
        eval_budgets=[1.0, 0.3],
        per_device_eval_batch_size=1,
    )
    metrics = trainer.evaluate()
    for name in ("_b1.0", "_b0.3", ""):
        assert metrics[f"eval_recomputed{name}"] == pytest.approx(metrics[f"eval_loss{name}"], abs=1e-5)
    # A metric that is no number has no mean, and is kept for every budget.
    assert metrics["eval_right_class_b0.3"] == "no number" and "eval_right_class" not in metrics


@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_transformers_own_trainer_trains_predicts_and_measures_in_the_mask_form(tmp_path: Path, budget: float) -> None:
    ours = tiny_trainer(tmp_path, conversation_rows(4))
    ours.model.config.update({"selection_output": "mask", "token_budget": budget})
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_eval_batch_size=2,
        label_smoothing_factor=0.1,
        remove_unused_columns=False,
    )
    collator = BudgetCollator(digit_processor())

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collator(rows)
        # To smooth labels, Trainer takes them out of the batch.
        return batch | {"token_budget": None, "caller_targets": batch["labels"]}

    trainer = Trainer(
        ours.model,
        arguments,
        train_dataset=conversation_rows(4),
        data_collator=collate,
        compute_metrics=loss_per_row,
    )
    trainer.train()
    prediction = trainer.predict(conversation_rows(4))
    assert prediction.predictions.shape[:2] == prediction.label_ids.shape
    assert np.isfinite(prediction.metrics["test_recomputed"])


@pytest.mark.parametrize("metric", ["eval_loss", "eval_loss_b0.2"])
def test_early_stopping_counts_evaluations_and_not_budgets(tmp_path: Path, metric: str) -> None:
    trainer = tiny_trainer(
        tmp_path,
        conversation_rows(2),
        data={
            "eval_dataset": conversation_rows(2),
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=2)],
        },
        eval_budgets=[1.0, 0.2],
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model=metric,
        greater_is_better=False,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        # Nothing gets better: the first evaluation stays the best, and two more use the patience up.
        learning_rate=0.0,
        max_steps=6,
    )
    trainer.train()
    assert trainer.state.global_step == 3


# Saving


def test_the_best_model_at_a_budget_is_restored(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path,
        conversation_rows(4),
        data={"eval_dataset": conversation_rows(4, (1,))[1:]},
        eval_budgets=[1.0, 0.4],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss_b0.4",
        greater_is_better=False,
        # Steps so large that each makes it worse, sooner or later.
        learning_rate=0.3,
        lr_scheduler_type="constant",
        max_steps=4,
        train_parts=EVERY_PART,
    )
    trainer.train()
    measured = {e["step"]: e["eval_loss_b0.4"] for e in trainer.state.log_history if "eval_loss_b0.4" in e}
    best = min(measured, key=measured.get)
    assert best < 4 and trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_loss_b0.4"] == measured[best]
    saved = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert are_equal(weights_of(trainer.model), weights_of(saved))
