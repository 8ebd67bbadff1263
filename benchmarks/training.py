"""What a token budget saves in training, and whether data keeps up: full training steps against plain LLaVA.

Three questions, asked of a LLaVA-shaped model with random weights whose decoder dominates:

- Steps: how many samples a second does forward, backward and AdamW do at budgets ~ U[0.2, 1] in `gather` form, over
  stock LLaVA with all visual tokens, on the same weights with the same trained parts? Beside it what counted FLOPs
  say. In each sweep every slice of the range gives one budget, so that a sweep's mean is that of the range.
- Gates inside attention keep every token in the sequence while the controller trains. No speed-up is to be expected of
  them, and a third row says so.
- Data: which share of the time does [`AdaVTPTrainer`] wait for its next batch, with JPEG decoding, CLIP preprocessing
  and tokens made in worker processes? And what does a sample cost there, beside a 7B model's step?

    python benchmarks/training.py
    python benchmarks/training.py --preset llava-1.5-7b --device cuda --dtype bfloat16 --checkpointing --batch-size 4
"""

import argparse
import gc
import io
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlavaForConditionalGeneration, PrinterCallback

from adavtp import (
    AdaVTPConfig,
    AdaVTPForConditionalGeneration,
    AdaVTPProcessor,
    AdaVTPTrainer,
    AdaVTPTrainingArguments,
    BudgetCollator,
)
from adavtp.commands.console import reference_checkpoint
from adavtp.evaluation.training_costs import A100_PEAK
from adavtp.modeling.costs.presets import preset_config
from adavtp.modeling.costs.training_step import Step, TrainingFlops, count_training_flops, plain_training_flops
from adavtp.trainer.data.reader import ConversationReader
from adavtp.trainer.data.stream import ConversationStream
from adavtp.trainer.trained_parts import choose_trained_parts
from circumstances import circumstances, console, write_json
from interleaved import CLOCKS, Spread, interleaved_medians
from overhead import Shape, configuration, stock_configuration, with_weights_of

TARGET_SPEED_UP, TARGET_WAITING = 1.25, 0.05
TRAIN_PARTS = ["controller", "projector", "decoder"]
BUDGET_RANGE = (0.2, 1.0)
# The share of an A100's peak at which a 7B step is estimated; the faster the step, the harder for the data.
FAST_UTILISATION = 0.45

QUESTION, ANSWER = "what is in the picture beside the red car ?", "a dog that looks out of a window"

SHAPES = {
    "tiny": Shape(3, 32, 4, 32, 8, 2, 32, 4, 2, 64, 64, text_before=3, text_after=5),
    "small": Shape(3, 128, 4, 336, 14, 6, 384, 6, 6, 1032, 2048),
}
PRESETS = ("llava-1.5-7b", "llava-1.5-13b")


@dataclass(frozen=True)
class Way:
    """
    A way to train AdaVTP that is measured.

    Attributes:
        per: `"batch"` or `"sample"`: who gets a budget of its own.
        gates: `"features"` or `"attention"`, see [`AdaVTPConfig`].
    """

    per: str
    gates: str

    @property
    def name(self) -> str:
        """In a word."""
        return f"a budget for each {self.per}, gates on {self.gates}"


WAYS = (Way("batch", "features"), Way("sample", "features"), Way("batch", "attention"))


# ---------------------------------------------------------------- models


@dataclass
class Models:
    """
    One set of weights in two models, and one optimizer for all of them.

    Attributes:
        ours: AdaVTP.
        plain: stock LLaVA, with the same parameters.
        optimizer: AdamW over what trains.
    """

    ours: AdaVTPForConditionalGeneration
    plain: LlavaForConditionalGeneration
    optimizer: torch.optim.Optimizer

    def step_of(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Forward, backward, optimizer."""
        model(**inputs, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def model_config(preset: str) -> AdaVTPConfig:
    """The configuration of a shape of `SHAPES`, or of a well-known checkpoint."""
    config = configuration(SHAPES[preset]) if preset in SHAPES else preset_config(preset)
    # In well-known checkpoints the placeholder's id lies behind the vocabulary that LLaVA-1.5 starts from.
    config.image_token_index = config.text_config.vocab_size - 1
    return config


def build_models(config: AdaVTPConfig, device: torch.device, dtype: torch.dtype, checkpointing: bool) -> Models:
    """Random weights, made where and as they are used."""
    with device:
        ours = AdaVTPForConditionalGeneration._from_config(config, dtype=dtype).train()
    plain = with_weights_of(ours, stock_configuration(config)).train()
    # Not before: taking parameters over makes them train.
    choose_trained_parts(ours, TRAIN_PARTS)
    if checkpointing:
        for model in (ours, plain):
            model.gradient_checkpointing_enable()
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    return Models(ours, plain, torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda"))


def make_inputs(config: AdaVTPConfig, text_tokens: int, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts of random text around an image of noise, with the second half of the text as targets."""
    before = text_tokens // 2
    text = torch.randint(3, config.text_config.vocab_size - 1, (rows, text_tokens))
    image = torch.full((rows, config.num_patches), config.image_token_id)
    input_ids = torch.cat([text[:, :before], image, text[:, before:]], dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, -(text_tokens - before) :] = text[:, before:]
    size = config.vision_config.image_size
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(rows, 3, size, size),
    }
    return {name: value.to(device) for name, value in batch.items()}


# ---------------------------------------------------------------- steps


def sweep_budgets(strata: int, sweeps: int, rows: int, per: str, seed: int) -> list[list[float]]:
    """
    Budgets of every step: in a sweep, the middle of each of `strata` equal slices of the range once, in random order;
    for each sample in an order of its own if it has a budget of its own.

    Returns:
        For each step, the budgets of its rows.
    """
    low, high = BUDGET_RANGE
    middles = [low + (high - low) * (number + 0.5) / strata for number in range(strata)]
    draw, steps = random.Random(seed), []
    for _ in range(sweeps):
        orders = [draw.sample(middles, strata) for _ in range(1 if per == "batch" else rows)]
        for number in range(strata):
            drawn = [round(order[number], 4) for order in orders]
            steps.append(drawn * rows if per == "batch" else drawn)
    return steps


def measure_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Times every way's steps and plain LLaVA's, taking turns."""
    torch.manual_seed(arguments.seed)
    device, config = arguments.device, model_config(arguments.preset)
    models = build_models(config, device, getattr(torch, arguments.dtype), arguments.checkpointing)
    config = models.ours.config
    inputs = make_inputs(config, arguments.text_tokens, arguments.batch_size, device)
    budgets = {
        way: sweep_budgets(arguments.strata, arguments.sweeps, arguments.batch_size, way.per, arguments.seed)
        for way in WAYS
    }

    def steps_of(way: Way) -> Callable[[], None]:
        # The step before the first that is measured warms up; it takes the highest budget.
        coming = itertools.chain([[BUDGET_RANGE[1]] * arguments.batch_size], budgets[way])

        def step() -> None:
            models.ours.config.gradient_gates = way.gates
            models.step_of(models.ours, inputs | {"token_budget": next(coming)})

        return step

    plain = "plain"
    callables = {way.name: steps_of(way) for way in WAYS} | {plain: lambda: models.step_of(models.plain, inputs)}
    repeats = arguments.strata * arguments.sweeps
    seconds = interleaved_medians(callables, repeats, clock=arguments.clock, device=device)
    rows = []
    for way in WAYS:
        expected = expected_speed_up(config, arguments, way, budgets[way])
        rows.append(
            asdict(way)
            | {
                "speed_up": asdict(speed_up(seconds[way.name], seconds[plain], arguments.strata)),
                "expected_speed_up": expected,
                "target_speed_up": TARGET_SPEED_UP if way.gates == "features" else None,
                "samples_per_second": arguments.batch_size * repeats / sum(seconds[way.name].repeats),
                "plain_samples_per_second": arguments.batch_size * repeats / sum(seconds[plain].repeats),
                "mean_budget": sum(map(sum, budgets[way])) / (repeats * arguments.batch_size),
                "mean_longest_budget": sum(map(max, budgets[way])) / repeats,
                "seconds": {"ours": asdict(seconds[way.name]), "plain": asdict(seconds[plain])},
            }
        )
    return rows


def speed_up(ours: Spread, plain: Spread, strata: int) -> Spread:
    """Samples a second over plain LLaVA's: in each sweep the ratio of all seconds."""
    sweeps = range(0, len(ours.repeats), strata)
    return Spread.of([sum(plain.repeats[at : at + strata]) / sum(ours.repeats[at : at + strata]) for at in sweeps])


def expected_speed_up(
    config: AdaVTPConfig, arguments: argparse.Namespace, way: Way, budgets: list[list[float]]
) -> float:
    """What counted FLOPs say of the same budgets."""
    text = [arguments.text_tokens] * arguments.batch_size
    step = Step(
        TRAIN_PARTS,
        checkpointing=arguments.checkpointing,
        gates=way.gates,
        gates_fused=arguments.device.type == "cuda",
    )
    counted = [count_training_flops(config, text, step, token_budget=of_step) for of_step in budgets]
    mean = TrainingFlops.weighted([(1 / len(counted), one) for one in counted])
    return plain_training_flops(config, text, step).total / mean.total


# ---------------------------------------------------------------- data


def jpeg(generator: torch.Generator, width: int = 640, height: int = 480) -> bytes:
    """A picture as smooth as a photograph is, compressed."""
    small = torch.rand(1, 3, height // 20, width // 20, generator=generator)
    pixels = nn.functional.interpolate(small, size=(height, width), mode="bicubic", antialias=False)
    pixels = pixels + 0.02 * torch.randn(pixels.shape, generator=generator)
    file = io.BytesIO()
    Image.fromarray((pixels[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()).save(file, "JPEG", quality=90)
    return file.getvalue()


def build_processor(image_size: int, patch_size: int) -> AdaVTPProcessor:
    """That of digit scenes, CLIP's preprocessing and a prompt in LLaVA's form, for images of another size."""
    processor = AdaVTPProcessor.from_pretrained(reference_checkpoint("digit-scenes"))
    processor.image_processor.size = {"shortest_edge": image_size}
    processor.image_processor.crop_size = {"height": image_size, "width": image_size}
    processor.patch_size = patch_size
    return processor


def conversation_rows(number: int, text_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Conversations about pictures, in the form that [`load_conversations`] gives."""
    generator = torch.Generator().manual_seed(seed)
    pictures = [jpeg(generator) for _ in range(min(number, 16))]
    # Two words for who speaks and one for the end.
    turns = max(1, text_tokens // len(f"{QUESTION} {ANSWER} USER: ASSISTANT: </s>".split()))
    rows = []
    for index in range(number):
        messages = []
        for turn in range(turns):
            asked = [{"type": "image"}] * (turn == 0) + [{"type": "text", "text": QUESTION}]
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
            ]
        images = [{"bytes": pictures[index % len(pictures)], "path": None}]
        rows.append({"id": str(index), "images": images, "messages": messages})
    return rows


class WaitingTrainer(AdaVTPTrainer):
    """
    An [`AdaVTPTrainer`] with a stopwatch at its data.

    Attributes:
        steps: for each step when it began, and the seconds that it waited for its batches before.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[tuple[float, float]] = []

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple:
        """See `Trainer`."""
        begin, watched = time.perf_counter(), Watched(epoch_iterator)
        batches = super().get_batch_samples(watched, num_batches, device)
        self.steps.append((begin, watched.seconds))
        return batches


class Watched:
    """An iterator that adds up the seconds in which it is waited for."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator, self.seconds = iterator, 0.0

    def __iter__(self) -> "Watched":
        return self

    def __next__(self) -> Any:
        begin = time.perf_counter()
        try:
            return next(self.iterator)
        finally:
            self.seconds += time.perf_counter() - begin


def measure_data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains for a few steps on JPEG files with workers; says how long the trainer waits, and what a sample costs."""
    torch.manual_seed(arguments.seed)
    config = model_config(arguments.preset)
    config.gradient_gates = "features"
    vision = config.vision_config
    processor = build_processor(vision.image_size, vision.patch_size)
    config.image_token_index = processor.image_token_id
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(processor.tokenizer))
    with arguments.device:
        model = AdaVTPForConditionalGeneration._from_config(config, dtype=getattr(torch, arguments.dtype))
    rows = conversation_rows(max(32, 2 * arguments.batch_size), arguments.text_tokens, arguments.seed)
    reader = ConversationReader(processor, max_length=2048)
    stream = ConversationStream(rows, reader, arguments.batch_size, BUDGET_RANGE, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = WaitingTrainer(
            model=model,
            args=AdaVTPTrainingArguments(
                folder,
                train_parts=TRAIN_PARTS,
                per_device_train_batch_size=arguments.batch_size,
                max_steps=arguments.data_steps + 1,
                dataloader_num_workers=arguments.workers,
                use_cpu=arguments.device.type == "cpu",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                seed=arguments.seed,
                **({"gradient_checkpointing": True} if arguments.checkpointing else {}),
            ),
            train_dataset=stream,
            data_collator=BudgetCollator(processor, BUDGET_RANGE),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        end = time.perf_counter()
    begins = [begin for begin, _ in trainer.steps] + [end]
    # The first step starts the workers.
    shares = [
        waited / (after - begin)
        for (begin, waited), after in list(zip(trainer.steps, begins[1:], strict=True))[1:]
        if after > begin
    ]
    waited = sum(waited for _, waited in trainer.steps[1:])
    return {
        "waiting_share": asdict(Spread.of(shares)),
        "waiting_share_of_all": waited / (end - begins[1]),
        "target_waiting_share": TARGET_WAITING,
        "steps": arguments.data_steps,
        "seconds_a_step": (end - begins[1]) / arguments.data_steps,
        "workers": arguments.workers,
        "image_pixels": "640 x 480 JPEG",
    } | sample_costs(reader, rows, arguments)


def sample_costs(reader: ConversationReader, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> dict:
    """Seconds of one process for one sample: decoding, tokens, preprocessing; beside a 7B model's on one GPU."""
    collator = BudgetCollator(reader.processor, BUDGET_RANGE)

    def one() -> None:
        collator([reader.read(rows[0])])

    spread = interleaved_medians({"sample": one}, 9)["sample"]
    step = Step(TRAIN_PARTS, checkpointing=True)
    mean = sum(BUDGET_RANGE) / 2
    config = preset_config("llava-1.5-7b")
    flops = count_training_flops(config, [arguments.text_tokens], step, token_budget=mean).total
    seven_b = flops / (A100_PEAK * FAST_UTILISATION)
    return {
        "sample_seconds": asdict(spread),
        "seconds_of_a_7b_sample": seven_b,
        "workers_per_gpu_that_7b_needs": spread.median / seven_b,
        "assumed_utilisation": FAST_UTILISATION,
    }


# ---------------------------------------------------------------- command line


def show(result: dict[str, Any], output: Console) -> None:
    """Prints the result as tables."""
    machine = result["machine"]
    output.print(f"Training on {machine['gpu'] or machine['processor']} ({result['command']})")
    if result["steps"]:
        output.print(_steps_table(result["steps"]))
        output.print("Gates inside attention keep every token while the controller trains: no speed-up is expected.")
    data = result["data"]
    if data is None:
        return
    share = Spread(**data["waiting_share"])
    output.print(
        f"Waiting for data: {share.shown(100, 2)} % of a step, {100 * data['waiting_share_of_all']:.2f} % of all "
        f"(target < {100 * TARGET_WAITING:g} %), {data['workers']} workers, {data['seconds_a_step']:.2f} s a step."
    )
    output.print(
        f"A sample takes {Spread(**data['sample_seconds']).shown(1000)} ms of one process; a 7B model on an A100 at "
        f"{FAST_UTILISATION:g} of its peak takes {1000 * data['seconds_of_a_7b_sample']:.0f} ms for one: "
        f"{data['workers_per_gpu_that_7b_needs']:.2f} workers a GPU."
    )


def _steps_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("a budget for each", "gates on", "mean budget", "of the longest", "samples/s", "plain LLaVA's")
    table.add_column("ratio")
    table.add_column("by counted FLOPs")
    table.add_column("target")
    for row in rows:
        target = row["target_speed_up"]
        table.add_row(
            *(row["per"], row["gates"], f"{row['mean_budget']:.2f}", f"{row['mean_longest_budget']:.2f}"),
            *(f"{row['samples_per_second']:.3f}", f"{row['plain_samples_per_second']:.3f}"),
            Spread(**row["speed_up"]).shown(digits=3),
            f"{row['expected_speed_up']:.3f}",
            "-" if target is None else f">= {target}",
        )
    return table


def parse(command_line: Sequence[str]) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=[*SHAPES, *PRESETS], default="small", help="the model's sizes")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in both models")
    parser.add_argument("--strata", type=int, default=4, help="budgets in a sweep")
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--data-steps", type=int, default=8, help="0 leaves data out")
    parser.add_argument("--workers", type=int, default=2, help="processes that load data")
    parser.add_argument("--only-data", action="store_true", help="leaves steps out")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: seconds of processor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark as the command line says; prints it, writes it, and returns it."""
    command_line = sys.argv[1:] if command_line is None else command_line
    arguments = parse(command_line)
    result = circumstances("training.py", command_line, arguments.seed, arguments.device)
    config = model_config(arguments.preset)
    names = ("preset", "dtype", "batch_size", "text_tokens", "checkpointing", "strata", "sweeps", "workers", "clock")
    result["settings"] = {name: getattr(arguments, name) for name in names} | {
        "budget_range": BUDGET_RANGE,
        "train_parts": TRAIN_PARTS,
        "visual_tokens": config.num_patches,
    }
    result["steps"] = [] if arguments.only_data else measure_steps(arguments)
    if arguments.device.type == "cuda":
        # The steps' models are gone; the data's needs their place.
        gc.collect()
        torch.cuda.empty_cache()
    result["data"] = measure_data(arguments) if arguments.data_steps else None
    show(result, console())
    write_json(arguments.json, result)
    return result


if __name__ == "__main__":
    main()
