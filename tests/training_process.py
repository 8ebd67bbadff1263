"""
Training runs for tests, on one process or on as many as a launcher starts:

    torchrun --nproc_per_node 2 tests/training_process.py RUNS.json

The file is a list of runs. Each has `folder`, `start_from` (a checkpoint), `model` (fields of its configuration) and
`arguments` (of training), and, if wanted, `resume` (a checkpoint, or `"last"`) and `own_noise`. It leaves in its
folder the final checkpoint, `log.json`, and for each process `process_<rank>.json`: which modules ran, in their order,
and what the process held of the model. While it trains, `steps` gets a letter for each step.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from tiny_conversations import assistant, conversation_rows, digit_processor, user
from torch import nn
from transformers import TrainerCallback

from adavtp import AdaVTPForConditionalGeneration, AdaVTPTrainer, AdaVTPTrainingArguments, BudgetCollator
from adavtp.trainer.whole_checkpoints import last_whole_checkpoint

RAND = torch.rand
TEXT = {"messages": [user("is there a 3 ?"), assistant("yes")]}


def rows_with_text_on_one_process(num_rows: int = 24) -> list[dict[str, Any]]:
    """Rows with one image, with two and with none. Read in their order by two processes, two rows at a time, every
    other batch of the second process is text alone, and none of the first."""
    rows = conversation_rows(num_rows, (1, 2, 0))
    return [TEXT if number % 8 in (2, 3) else row for number, row in enumerate(rows)]


def draw_noise_for_each_image(model: nn.Module) -> None:
    """
    Makes the noise in an image's choice a function of the image. As it is, a process draws numbers in the order of its
    images, so that other numbers belong to an image if other processes have some of them.
    """
    seeds = []

    def note(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        images = inputs.get("pixel_values")
        seeds[:] = [0] if images is None else [int(image.double().sum().abs() * 1e6) for image in images]

    def rand_by_image(*size: Any, generator: torch.Generator | None = None, **kwargs: Any) -> torch.Tensor:
        shape = tuple(size[0]) if isinstance(size[0], torch.Size) else size
        if generator is not None or len(shape) != 2 or shape[0] != len(seeds):
            return RAND(*size, generator=generator, **kwargs)
        return torch.stack([RAND(shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    model.register_forward_pre_hook(note, with_kwargs=True)
    torch.rand = rand_by_image


def modules_run_by(model: nn.Module) -> list[str]:
    """A list that gets the names of all modules without children, as they run in training."""
    called = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda module, _, name=name: called.extend([name] * module.training))
    return called


def numbers_held(model: nn.Module) -> int:
    """How many numbers of the model's parameters are with this process, outside of forward and backward."""
    held = 0
    for parameter in model.parameters():
        # As FSDP2 and ZeRO-3 keep a process's part; or all of it.
        held += getattr(parameter, "_local_tensor", getattr(parameter, "ds_tensor", parameter)).numel()
    return held


class CountSteps(TrainerCallback):
    """Writes a letter for each step, at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with self.path.open("a") as file:
            file.write(".")


def train(run: dict[str, Any]) -> None:
    folder = Path(run["folder"])
    fixed = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "per_device_eval_batch_size": 1,
        "save_strategy": "no",
    }
    # Before the model: under ZeRO-3 they say that its parameters are to be spread while they are loaded.
    args = AdaVTPTrainingArguments(str(folder), **fixed | run["arguments"])
    if "FSDP_VERSION" in os.environ:
        # accelerate shards on GPUs and their like alone, and this is where it looks whether it has some.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    processor = digit_processor()
    model = AdaVTPForConditionalGeneration.from_pretrained(run["start_from"], **run["model"])
    if not run.get("own_noise"):
        draw_noise_for_each_image(model)
    called = modules_run_by(model)
    trainer = AdaVTPTrainer(
        model=model,
        args=args,
        data_collator=BudgetCollator(processor, per="sample", seed=5),
        processing_class=processor,
        train_dataset=rows_with_text_on_one_process(),
        # Two processes, one row at a time: each has an image while the other has text.
        eval_dataset=[TEXT, *conversation_rows(2), TEXT],
    )
    if args.process_index == 0:
        trainer.add_callback(CountSteps(folder / "steps"))
    resume = last_whole_checkpoint(folder) if run.get("resume") == "last" else run.get("resume")
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_model()
    told = {"modules": called, "numbers_held": numbers_held(trainer.model)}
    (folder / f"process_{args.process_index}.json").write_text(json.dumps(told))
    if args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        evaluated = {name: value for name, value in metrics.items() if name.startswith("eval_loss")}
        (folder / "log.json").write_text(json.dumps({"losses": losses, "evaluated": evaluated}))


def train_all(runs: str | Path) -> None:
    torch.set_num_threads(1)
    for run in json.loads(Path(runs).read_text()):
        train(run)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    train_all(sys.argv[1])


if __name__ == "__main__":
    main()
