"""A run that is killed and resumed ends as one that never stopped, and half a checkpoint is no checkpoint."""

import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adavtp import AdaVTPTrainer
from adavtp.trainer import whole_checkpoints
from adavtp.trainer.whole_checkpoints import begin_checkpoint, last_whole_checkpoint, require_whole, what_is_missing
from forked_processes import Forks, as_launched
from repository import FIXTURES
from tiny_conversations import conversation_rows, digit_model, digit_processor
from tiny_trainers import EVERY_PART, SAVED, tiny_trainer

MAX_STEPS, SAVE_STEPS = 4, 2
# As accelerate launch says it for trainer/launch/fsdp2.yaml.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
# Without shards two processes write as one does, but for their random states: see test_several_processes.py.
WAYS = {"one": 1, "fsdp2": 2}


# Killing


class Run:
    """One run in a folder, of one process or of two, that can be begun, killed and begun again."""

    def __init__(self, forks: Forks, way: str, folder: Path, start: Path) -> None:
        self.forks, self.folder, self.num_processes = forks, folder, WAYS[way]
        self.environment = FSDP2 if way == "fsdp2" else {}
        arguments = {
            "max_steps": MAX_STEPS,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "save_total_limit": 1,
            "per_device_train_batch_size": 2,
            "train_sampling_strategy": "random",
            "train_parts": EVERY_PART,
            "learning_rate": 0.005,
        }
        run = {"folder": str(folder), "start_from": str(start), "model": {}, "arguments": arguments}
        folder.mkdir()
        (folder.parent / f"{folder.name}.json").write_text(json.dumps([run | {"resume": "last", "own_noise": True}]))

    def begin(self) -> list[int]:
        environments = as_launched(self.num_processes) if self.num_processes > 1 else [{}]
        environments = [environment | self.environment for environment in environments]
        spec = self.folder.parent / f"{self.folder.name}.json"
        call = [str(FIXTURES / "training_process.py"), "train_all", str(spec)]
        return self.forks.begin(call, self.folder.parent / "output", environments)

    def finish(self) -> dict[str, torch.Tensor]:
        self.begin()
        codes = self.forks.exit_codes(120)
        assert codes == [0] * self.num_processes, (self.folder.parent / "output").read_text()[-5000:]
        return load_file(self.folder / "model.safetensors")

    def steps_done(self) -> int:
        steps = self.folder / "steps"
        return steps.stat().st_size if steps.is_file() else 0

    def kill(self, processes: list[int]) -> None:
        for process in processes:
            os.kill(process, signal.SIGKILL)
        assert self.forks.exit_codes(60) == [-signal.SIGKILL] * self.num_processes

    def begin_and_kill_after(self, steps: int, seconds: float) -> None:
        """Kills so many seconds after so many more steps."""
        steps += self.steps_done()
        processes = self.begin()
        wait_until(lambda: self.steps_done() >= steps or self.forks.are_over(0), self)
        time.sleep(seconds)
        self.kill(processes)

    def begin_and_kill_while_writing(self) -> Path:
        """Kills as soon as the folder of a new checkpoint is there, and returns it."""
        before = set(self.folder.glob("checkpoint-*"))
        processes = self.begin()
        wait_until(lambda: set(self.folder.glob("checkpoint-*")) - before or self.forks.are_over(0), self)
        self.kill(processes)
        return max(set(self.folder.glob("checkpoint-*")) - before)


def wait_until(condition: Any, run: Run) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, (run.folder.parent / "output").read_text()[-5000:]
        time.sleep(0.001)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    digit_model(digit_processor()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_and_resumed_run_ends_with_the_weights_of_one_that_never_stopped(
    forks: Forks, way: str, start: Path, tmp_path: Path
) -> None:
    expected = Run(forks, way, tmp_path / "whole", start).finish()
    run, draw = Run(forks, way, tmp_path / "killed", start), random.Random(way)
    # At a random step, somewhere between its end and that of the next one.
    run.begin_and_kill_after(steps=draw.randrange(1, 3), seconds=draw.uniform(0, 0.05))
    # Then while a checkpoint is being written. A slow observer may come too late; every run has some checkpoints.
    half = run.begin_and_kill_while_writing()
    was_half = what_is_missing(half) is not None
    before = last_whole_checkpoint(run.folder)
    assert before is None or what_is_missing(before) is None
    for name, value in run.finish().items():
        assert torch.equal(value, expected[name]), name
    assert was_half, "the checkpoint was whole before the run could be killed"
    assert [path.name for path in run.folder.glob("checkpoint-*")] == [f"checkpoint-{MAX_STEPS}"]
    require_whole(run.folder / f"checkpoint-{MAX_STEPS}")


# What is whole


def saving_trainer(folder: Path, trainer_class: type = AdaVTPTrainer, **arguments: Any) -> AdaVTPTrainer:
    """Three steps of a row each, with a checkpoint behind each."""
    defaults = SAVED | {"per_device_train_batch_size": 1, "max_steps": 3}
    return tiny_trainer(folder, conversation_rows(4), trainer_class=trainer_class, **defaults | arguments)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    saving_trainer(folder).train()
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A folder with three checkpoints."""
    return Path(shutil.copytree(trained_once, tmp_path / "trained"))


class DiesInTheMiddle(AdaVTPTrainer):
    """Ends while it writes its second checkpoint, when weights and optimizer are written."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        super()._save_rng_state(output_dir)


class DiesAtTheEnd(AdaVTPTrainer):
    """Ends when this process has written all of its second checkpoint, and others may not have."""

    def _save_checkpoint(self, *args: Any) -> None:
        wait = self.accelerator.wait_for_everyone

        def wait_and_die() -> None:
            wait()
            if (Path(self.args.output_dir) / "checkpoint-2" / "trainer_state.json").is_file():
                raise KeyboardInterrupt

        self.accelerator.wait_for_everyone = wait_and_die
        super()._save_checkpoint(*args)


@pytest.mark.parametrize("trainer_class", [DiesInTheMiddle, DiesAtTheEnd])
def test_the_last_whole_checkpoint_stays_until_the_next_is_whole(tmp_path: Path, trainer_class: type) -> None:
    with pytest.raises(KeyboardInterrupt):
        saving_trainer(tmp_path, trainer_class, save_total_limit=1).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    trainer = saving_trainer(tmp_path, save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    require_whole(tmp_path / "checkpoint-3")


def test_a_half_written_checkpoint_is_passed_over_with_a_warning_and_refused_if_named(
    trained: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_checkpoints.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    begin_checkpoint(trained / "checkpoint-3")
    assert last_whole_checkpoint(trained) == str(trained / "checkpoint-2")
    assert "checkpoint-3" in caplog.text and "being written" in caplog.text
    with pytest.raises(ValueError, match="checkpoint-3.*being written"):
        saving_trainer(trained).train(resume_from_checkpoint=str(trained / "checkpoint-3"))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
@pytest.mark.parametrize("harm", ["removed", "cut off"])
def test_a_checkpoint_that_lost_something_later_is_not_whole(trained: Path, file: str, harm: str) -> None:
    path = trained / "checkpoint-3" / file
    require_whole(path.parent)
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=file):
        require_whole(path.parent)
    assert last_whole_checkpoint(trained) == str(trained / "checkpoint-2")


def test_a_checkpoint_without_marks_is_taken_if_it_has_the_state_that_is_written_last(trained: Path) -> None:
    """As older versions left them."""
    for step in (2, 3):
        (trained / f"checkpoint-{step}" / "whole_checkpoint.json").unlink()
    (trained / "checkpoint-3" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(trained) == str(trained / "checkpoint-2")


def test_without_a_whole_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    assert last_whole_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="resume_from_checkpoint.*no whole checkpoint"):
        saving_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no such folder"):
        require_whole(tmp_path / "checkpoint-6")


def test_checkpoints_without_the_optimizer_s_state_are_not_gone_on_from(trained: Path) -> None:
    with pytest.raises(ValueError, match="save_only_model"):
        saving_trainer(trained, save_only_model=True).train(resume_from_checkpoint=True)


def test_a_run_that_was_killed_behind_its_last_checkpoint_takes_no_step_more(trained: Path) -> None:
    """Three steps were asked for, and an epoch has four."""
    trainer = saving_trainer(trained)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    expected = load_file(trained / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


def test_the_highest_step_is_the_last(tmp_path: Path) -> None:
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_run_that_is_begun_anew_keeps_its_own_checkpoint_and_not_an_older_one_of_a_higher_step(
    trained: Path,
) -> None:
    saving_trainer(trained, max_steps=1, save_total_limit=1).train()
    assert [path.name for path in trained.glob("checkpoint-*")] == ["checkpoint-1"]
    saved = torch.load(trained / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 1, "the checkpoint says the arguments that were given"


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    trainer = saving_trainer(
        tmp_path,
        data={"eval_dataset": conversation_rows(2)},
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_budgets=[0.5],
        load_best_model_at_end=True,
        # The loss falls; as if that were bad, the first is the best.
        greater_is_better=True,
        learning_rate=0.005,
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
