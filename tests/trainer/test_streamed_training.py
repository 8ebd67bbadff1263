"""What training on a stream promises: its samples and budgets and no others, exact resumption, and no silent loss."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adavtp import AdaVTPTrainer, BudgetCollator
from adavtp.tasks.digit_scenes.processor import build_digit_processor
from adavtp.trainer.data.reader import ConversationReader
from adavtp.trainer.data.sources import load_conversations
from adavtp.trainer.data.stream import ConversationStream
from adavtp.trainer.recipes.recipe import Stage
from adavtp.trainer.recipes.stages import stage_arguments, stage_trainer
from forked_processes import Forks, as_launched
from tiny_conversations import conversation_rows, digit_model, digit_processor
from tiny_models import tiny_text_config, tiny_vision_config
from tiny_streams import source, stored_rows, tiny_stream
from tiny_trainers import EVERY_PART, FULL, batches_seen_by, budgets_of, differing, losses_of, tiny_trainer, weights_of


def stream_trainer(
    folder: Path, data: Any, seed: int = 0, stream: dict[str, Any] | None = None, **arguments: Any
) -> AdaVTPTrainer:
    """A trainer of all parts on a stream of batches of four, two to a step; `seed` is that of the weights."""
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "train_parts": EVERY_PART,
    }
    model, arguments = digit_model(digit_processor(), seed=seed), defaults | arguments
    rows = tiny_stream(data, **{"batch_size": arguments["per_device_train_batch_size"]} | (stream or {}))
    return tiny_trainer(folder, rows, model, FULL, **arguments)


@pytest.mark.parametrize(("kind", "num_workers"), [("indexed", 2), ("streamed", 0)])
def test_a_resumed_run_ends_where_one_without_a_break_ends(tmp_path: Path, kind: str, num_workers: int) -> None:
    # Five batches an epoch and two a step: the third step has the end of the first epoch in it, the fifth ends with
    # the end of the second one.
    data, fields = source(kind, stored_rows(22)), {"dataloader_num_workers": num_workers, "max_steps": 6}
    saving = {"save_strategy": "steps", "save_steps": 3 if num_workers else 1}
    whole = stream_trainer(tmp_path / "whole", data, **saving, **fields)
    batches = batches_seen_by(whole.model)
    whole.train()
    random_state = torch.get_rng_state()
    for step in (3,) if num_workers else (2, 5):
        torch.manual_seed(99)
        resumed = stream_trainer(tmp_path / "resumed", data, seed=99, **fields)
        again = batches_seen_by(resumed.model)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert len(batches) == 12 and budgets_of(again) == budgets_of(batches[2 * step :])
        assert differing(weights_of(resumed.model), weights_of(whole.model)) == []
        assert losses_of(resumed) == losses_of(whole)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert resumed.state.epoch == whole.state.epoch


@pytest.mark.parametrize("kind", ["indexed", "streamed"])
def test_the_model_sees_the_stream_s_batches_with_their_budgets(tmp_path: Path, kind: str) -> None:
    data = source(kind, stored_rows(22))
    stream = tiny_stream(data)
    expected = [sample for _ in range(2) for sample in stream]
    trainer = stream_trainer(tmp_path, data, max_steps=5, dataloader_num_workers=2)
    batches = batches_seen_by(trainer.model)
    trainer.train()
    assert sum(budgets_of(batches), []) == [sample["token_budget"] for sample in expected]
    rows = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert rows == [sample["input_ids"] for sample in expected]
    assert all("rejected" not in batch and "stream_position" not in batch for batch in batches)


def test_epochs_of_the_data_are_counted(tmp_path: Path) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch", "logging_strategy": "epoch"}
    trainer = stream_trainer(tmp_path, source("indexed", stored_rows(22)), **epochs)
    trainer.train()
    # Fifteen batches are seven steps and one batch over; epochs end after 2.5, 5 and 7.5 steps.
    assert trainer.state.global_step == 7
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (3, 5, 7)}
    logged = [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([1.2, 2.0, 2.8])


def test_the_epochs_of_a_streamed_data_set_are_counted_when_they_end(tmp_path: Path) -> None:
    trainer = stream_trainer(tmp_path, source("streamed", stored_rows(22)), max_steps=5)
    trainer.train()
    assert [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry] == [0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="max_steps"):
        stream_trainer(tmp_path, source("streamed", stored_rows(22)), max_steps=-1)


# Rejected rows


def with_broken_rows() -> list[dict[str, Any]]:
    rows = stored_rows(22)
    rows[3]["images"][0]["bytes"] = b"no image"
    rows[9]["images"][0]["bytes"] = b"nor this"
    rows[13]["messages"] = []
    return rows


def written(folder: Path, name: str = "rejected_samples.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_rejected_rows_are_counted_logged_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, expected = source("indexed", with_broken_rows()), []
    stream = tiny_stream(data)
    for number, sample in enumerate([sample for _ in range(2) for sample in stream]):
        expected += [(number // 8 + 1, rejected["id"]) for rejected in sample["rejected"]]
    trainer = stream_trainer(tmp_path, data, max_steps=5, dataloader_num_workers=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    lines = written(tmp_path)
    assert [(line["step"], line["id"]) for line in lines] == expected and len(expected) >= 5
    assert all(line["reason"] and line["kind"] in ("image", "conversation") for line in lines)
    logged = [entry["rejected_samples"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [sum(step <= now for step, _ in expected) for now in range(1, 6)]
    warned = [record.getMessage() for record in caplog.records if "row " in record.getMessage()]
    assert len(warned) == 2 and all("rejected_samples.jsonl" in message for message in warned)


def test_a_resumed_run_goes_on_counting_and_lists_no_row_twice(tmp_path: Path) -> None:
    data = source("streamed", with_broken_rows())
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = stream_trainer(tmp_path / "whole", data, **fields)
    whole.train()
    # As if it had been killed while it wrote of a step behind the checkpoint.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    with (tmp_path / "killed" / "rejected_samples.jsonl").open("a") as file:
        file.write('{"step": 4, "id"')
    resumed = stream_trainer(tmp_path / "killed", data, seed=99, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-2"))
    lines = [[(line["step"], line["id"]) for line in written(tmp_path / name)] for name in ("whole", "killed")]
    assert lines[0] == lines[1] and len(lines[0]) >= 5
    counts = [[entry["rejected_samples"] for entry in run.state.log_history] for run in (whole, resumed)]
    assert counts[0] == counts[1] and counts[0][-1] == len(lines[0])


def test_a_run_that_goes_on_with_fewer_processes_lists_no_row_twice(tmp_path: Path) -> None:
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    stream_trainer(tmp_path, source("indexed", with_broken_rows()), **fields).train()
    whole = written(tmp_path)
    # As two processes leave it that are killed behind the last step.
    for rank in range(2):
        lines = [json.dumps(line) for line in whole[rank::2]]
        (tmp_path / f"rejected_samples_{rank}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "rejected_samples.jsonl").unlink()
    resumed = stream_trainer(tmp_path, source("indexed", with_broken_rows()), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    listed = [line for path in tmp_path.glob("rejected_samples*.jsonl") for line in written(tmp_path, path.name)]
    assert sorted(listed, key=str) == sorted(whole, key=str)
    assert min(line["step"] for line in whole) <= 2 < max(line["step"] for line in whole)


# In a recipe


def of_digit_scenes(folder: Path, split: str, num_questions: int) -> list[dict[str, Any]]:
    place = {"path": "digit-scenes", "cache_dir": str(folder / "cache")}
    return [place | {"split": split, "num_questions": num_questions}]


def test_a_stage_with_sources_trains_on_their_stream(tmp_path: Path) -> None:
    processor = build_digit_processor()
    vision = tiny_vision_config(num_layers=2)
    vision.image_size = 96
    text = tiny_text_config(vocab_size=len(processor.tokenizer), num_layers=1)
    model = digit_model(processor, vision_config=vision, text_config=text)
    training = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    stage = Stage(
        name="choose",
        kind="conversations",
        data={"sources": of_digit_scenes(tmp_path, "train", 9), "max_length": 300, "block_size": 4},
        eval_data={"sources": of_digit_scenes(tmp_path, "validation", 3)},
        budgets={"budget_range": [0.3, 0.6], "per": "sample"},
        training=training | {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 2},
    )
    trainer = stage_trainer(model, processor, stage, stage_arguments(stage, tmp_path / "run", 4), seed=4)
    batches = batches_seen_by(trainer.model)
    trainer.train()
    assert trainer.state.global_step == len(batches) == 4
    rows = load_conversations(of_digit_scenes(tmp_path, "train", 9))
    stream = ConversationStream(
        rows, ConversationReader(processor, 300), 2, (0.3, 0.6), "sample", seed=4, block_size=4
    )
    assert sum(budgets_of(batches), []) == [sample["token_budget"] for sample in stream]
    batches.clear()
    assert trainer.evaluate()["eval_loss_b1.0"] > 0 and len(batches[0]["input_ids"]) == 3


@pytest.mark.parametrize(("group", "name"), [("data", "max_lenght"), ("eval_data", "block_size")])
def test_unknown_fields_beside_sources_are_errors(tmp_path: Path, group: str, name: str) -> None:
    data = {"sources": of_digit_scenes(tmp_path, "train", 8)}
    sets = {"data": data, "eval_data": data}
    with pytest.raises(ValueError, match=f"stage 'choose', {group}: unknown field.* {name}"):
        Stage(name="choose", kind="conversations", **sets | {group: data | {name: 3}})


# What cannot be


def test_a_stream_that_does_not_fit_the_arguments_is_an_error(tmp_path: Path) -> None:
    data = source("indexed", stored_rows(22))
    with pytest.raises(ValueError, match="batches of 2 and `args` asks for 4"):
        stream_trainer(tmp_path, data, stream={"batch_size": 2}).train()
    few = {"gradient_accumulation_steps": 6, "max_steps": -1, "num_train_epochs": 1}
    with pytest.raises(ValueError, match="less than a step"):
        stream_trainer(tmp_path, data, **few).train()


def test_a_checkpoint_of_another_stream_or_of_none_is_not_resumed(tmp_path: Path) -> None:
    data, saving = source("indexed", stored_rows(22)), {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    stream_trainer(tmp_path / "stream", data, **saving).train()
    plain = stream_trainer(tmp_path / "plain", data, **saving)
    plain = AdaVTPTrainer(
        plain.model, plain.args, data_collator=plain.data_collator, train_dataset=conversation_rows(16)
    )
    plain.train()
    with pytest.raises(ValueError, match="`seed` was 1 and is 5"):
        other = stream_trainer(tmp_path, data, stream={"seed": 5}, max_steps=2)
        other.train(resume_from_checkpoint=str(tmp_path / "stream" / "checkpoint-1"))
    with pytest.raises(ValueError, match="plain data set"):
        stream_trainer(tmp_path, data, max_steps=2).train(
            resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1")
        )


# Plain data sets


def test_budgets_of_plain_data_sets_are_numbered_over_batches_and_samples(tmp_path: Path) -> None:
    seen = {}
    for batch_size, accumulation in [(4, 1), (2, 2)]:
        trainer = stream_trainer(
            tmp_path,
            source("indexed", stored_rows(8)),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        collator = BudgetCollator(digit_processor(), (0.2, 1.0), "sample")
        plain = AdaVTPTrainer(trainer.model, trainer.args, data_collator=collator, train_dataset=conversation_rows(12))
        batches = batches_seen_by(plain.model)
        plain.train()
        seen[batch_size] = sum(budgets_of(batches), [])
    # Four samples a step, in one batch or two: the same budgets in the same order, each of its own.
    assert seen[4] == seen[2] and len(set(seen[4])) == len(seen[4]) == 32


# Several processes


def one_of_two_processes(folder: str) -> None:
    told = run_of_a_process(Path(folder) / "run", 2, ddp_backend="gloo")
    torch.save(told, Path(folder) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def run_of_a_process(folder: Path, batch_size: int, **arguments: Any) -> dict[str, Any]:
    step = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 4}
    trainer = stream_trainer(
        folder,
        source("streamed", with_broken_rows()),
        per_device_train_batch_size=batch_size,
        **step | arguments,
    )
    batches = batches_seen_by(trainer.model)
    trainer.train()
    counted = [entry["rejected_samples"] for entry in trainer.state.log_history if "loss" in entry]
    rows = [batch["input_ids"].tolist() for batch in batches]
    return {"budgets": budgets_of(batches), "rows": rows, "counted": counted}


def test_two_processes_train_on_the_batches_of_one(forks: Forks, tmp_path: Path) -> None:
    forks.begin([__file__, "one_of_two_processes", str(tmp_path)], tmp_path / "said", as_launched(2))
    assert forks.exit_codes(300) == [0, 0], (tmp_path / "said").read_text()[-5000:]
    both, alone = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)], run_of_a_process(tmp_path / "alone", 4)

    def without_padding(rows: list[list[int]]) -> list[list[int]]:
        return [[token for token in row if token != 0] for row in rows]

    for step, (first, second) in enumerate(zip(both[0]["rows"], both[1]["rows"], strict=True)):
        assert without_padding(first + second) == without_padding(alone["rows"][step])
        assert both[0]["budgets"][step] + both[1]["budgets"][step] == alone["budgets"][step]
    assert both[0]["counted"] == both[1]["counted"] == alone["counted"] and alone["counted"][-1] >= 4
    listed = [written(tmp_path / "run", f"rejected_samples_{rank}.jsonl") for rank in range(2)]
    together = sorted((line["step"], line["id"]) for lines in listed for line in lines)
    assert together == sorted((line["step"], line["id"]) for line in written(tmp_path / "alone"))
