"""The whole way of docs/training.md with a tiny model: from LLaVA's folder to a model that is loaded by its id."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, TrainerCallback
from typer.testing import CliRunner

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.command_line import app
from forked_processes import Forks
from llava_folders import Folder, stock_llava, transformers_folder
from local_hub import LocalHub, local_hub
from tiny_conversations import (
    ANSWERS,
    BROKEN,
    QUESTIONS,
    TOO_LONG,
    assistant,
    picture,
    user,
    write_conversations,
)
from tiny_trainers import differing, weights_in

BATCH_SIZE, MAX_LENGTH = 2, 100
# Both stages go through all rows once.
NUM_STEPS, SAVE_STEPS = 6, 2
# Stage and step behind which a process is killed: one step behind a checkpoint. Then all goes on to the end.
BREAKS = [("1-choose", 3), ("1-choose", 5), ("2-tune", 3)]
TRAINING = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": BATCH_SIZE,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "save_steps": SAVE_STEPS,
    "use_cpu": True,
    "disable_tqdm": True,
}


def adavtp(*arguments: Any) -> str:
    """What the command line prints, in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def write_recipe(folder: Path, checkpoint: Path, conversations: Path) -> Path:
    data = {
        "sources": [{"path": str(conversations), "images": str(conversations.parent / "images")}],
        "max_length": MAX_LENGTH,
    }
    stage = {"kind": "conversations", "data": data, "budgets": {"budget_range": [0.2, 1.0], "per": "sample"}}
    parts = ["controller", "projector", "decoder"]
    stages = [
        stage | {"name": "1-choose", "training": TRAINING | {"train_parts": ["controller"]}},
        stage | {"name": "2-tune", "training": TRAINING | {"train_parts": parts}, "adapters": {"r": 2}},
    ]
    recipe = {"seed": 0, "model": {"checkpoint": str(checkpoint), "gradient_gates": "features"}, "stages": stages}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Killed(TrainerCallback):
    """Ends the process in a stage, behind a step."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (Path(args.output_dir).name, state.global_step) == (self.stage, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def train(recipe: str, output: str, killed_in: str = "", killed_behind: str = "") -> None:
    if killed_in:
        # Every trainer begins with these.
        transformers.trainer.DEFAULT_CALLBACKS.append(Killed(killed_in, int(killed_behind)))
    adavtp("train", recipe, "--output", output)


def test_from_llava_s_folder_to_a_published_model_with_a_budget(forks: Forks, tmp_path: Path) -> None:
    converted, run, hub = tmp_path / "converted", tmp_path / "run", tmp_path / "home"
    source = transformers_folder(tmp_path / "llava")
    assert "controller" in adavtp("convert", source.path, converted)
    answers_as_llava_does(converted, source)

    recipe = write_recipe(tmp_path, converted, write_conversations(tmp_path))
    said = tmp_path / "said"
    for stage, step in BREAKS:
        forks.begin([__file__, "train", str(recipe), str(run), stage, str(step)], said)
        assert forks.exit_codes(120) == [-signal.SIGKILL], said.read_text()[-3000:]
        assert (run / stage / f"checkpoint-{step - 1}").is_dir() and not (run / stage / "finished.json").exists()
    for output in (run, tmp_path / "without a break"):
        forks.begin([__file__, "train", str(recipe), str(output)], said)
        assert forks.exit_codes(120) == [0], said.read_text()[-3000:]
    trained_as_without_a_break(run, tmp_path / "without a break")

    adavtp("merge", run / "2-tune", tmp_path / "merged")
    evaluated(tmp_path / "merged", tmp_path)
    with local_hub(hub) as local:
        published(tmp_path / "merged", tmp_path / "evaluation" / "evaluation.json", recipe, local)


def answers_as_llava_does(converted: Path, source: Folder) -> None:
    processor = AdaVTPProcessor.from_pretrained(converted)
    inputs = processor.of_questions(picture(3), QUESTIONS[0])
    with torch.no_grad():
        expected = stock_llava(source.tensors, source.image_token_id)(**inputs).logits
        logits = AdaVTPForConditionalGeneration.from_pretrained(converted)(**inputs, token_budget=1.0).logits
    assert torch.allclose(logits, expected, atol=1e-5)


def trained_as_without_a_break(run: Path, whole: Path) -> None:
    for stage, file in (("1-choose", "model.safetensors"), ("2-tune", "adapter_model.safetensors")):
        expected, trained = load_file(whole / stage / file), load_file(run / stage / file)
        assert differing(trained, expected) == []
        logs = [json.loads((folder / stage / "training_log.json").read_text())["log"] for folder in (run, whole)]
        losses = [[(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs]
        assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, NUM_STEPS + 1))
        assert [entry["rejected_samples"] for entry in logs[0]][-1] == 2
        lines = [
            [json.loads(line) for line in (folder / stage / "rejected_samples.jsonl").read_text().splitlines()]
            for folder in (run, whole)
        ]
        assert lines[0] == lines[1]
        assert sorted((line["id"], line["kind"]) for line in lines[0]) == [(TOO_LONG, "length"), (BROKEN, "image")]
    before, after = weights_in(run.parent / "converted"), weights_in(run / "1-choose")
    changed = {name.split(".")[1] for name in differing(after, before)}
    assert changed == {"budget_token", "controller"}


def evaluated(checkpoint: Path, folder: Path) -> None:
    rows = [
        {
            "id": str(number),
            "images": [f"images/{number}.png"],
            "messages": [user(QUESTIONS[number], 1), assistant(ANSWERS[number])],
        }
        for number in range(3)
    ]
    (folder / "questions.json").write_text(json.dumps(rows))
    asked = ("--budgets", "1.0", "0.4", "--reducers", "full", "adaptive", "random", "--max-new-tokens", "4")
    output = folder / "evaluation"
    printed = adavtp("evaluate", checkpoint, "--data", folder / "questions.json", *asked, "--output", output)
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len({(line["reducer"], line["budget"], line["index"]) for line in lines}) == len(lines) == 5 * len(rows) - 6
    assert "adaptive" in printed


def published(checkpoint: Path, evaluation: Path, recipe: Path, hub: LocalHub) -> None:
    asked = ("publish", checkpoint, "somebody/tiny", "--license", "llama2", "--recipe", recipe)
    asked = (*asked, "--evaluation", evaluation)
    adavtp(*asked, "--dry-run")
    assert not hub.repositories
    adavtp(*asked)
    card = hub.files("somebody/tiny")["README.md"].decode()
    assert "llama2" in card and "adaptive" in card
    model = AutoModel.from_pretrained("somebody/tiny", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("somebody/tiny", trust_remote_code=True)
    here = AdaVTPForConditionalGeneration.from_pretrained(checkpoint)
    inputs = processor.of_questions(picture(5), QUESTIONS[1])
    kept = model.select_tokens(**inputs, token_budget=0.4).keep
    assert kept.sum() == int(0.4 * 16)
    for budget in (1.0, 0.4):
        answers = [each.generate(**inputs, token_budget=budget, max_new_tokens=6).tolist() for each in (model, here)]
        assert answers[0] == answers[1]
