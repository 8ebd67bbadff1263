"""What a training run costs: memory on each GPU, FLOPs of a sample, hours.

    hours = samples x FLOPs of a sample x overhead / (GPUs x peak x utilisation) / 3600

Torch counts the FLOPs, and the memory of activations (`training_memory.py`). The overhead is what a
benchmark measured beyond the count. The utilisation is nobody's to count: it is an input, a range, and what published
runs reached by this very formula stands beside it.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..modeling.costs.model_costs import FULL, ModelCosts
from ..modeling.costs.presets import preset_config
from ..modeling.costs.training_step import Step, TrainingFlops, plain_training_flops
from .training_budgets import longest_counts, mean_training_flops, unit_sizes
from .training_memory import Layout, Weights, activations, kept_by_weights

GIB = 2**30
# Dense bfloat16 products of an A100 (NVIDIA's data sheet), in FLOPs a second.
A100_PEAK = 312e12


@dataclass(frozen=True)
class Run:
    """
    A training run, every sample with one image.

    Attributes:
        config: the model's, of any family.
        step: how a step is carried out.
        layout: where what is kept.
        budget_range: low and high of b ~ U[low, high].
        per: `"batch"` or `"sample"`, see `BudgetCollator`. In batches whose rows were grouped by their length behind
            the reduction, `"sample"` costs what "batch" does.
        samples: of an epoch.
        text_tokens: of a sample, on average.
        longest: columns of the longest row at full budget, for which there has to be memory.
        micro_batch: rows on each GPU.
        quantize: whether the frozen maps of the decoder are in four bits.
        image_size: of every image, height and width in pixels, see [`ModelCosts`].
    """

    config: PreTrainedConfig
    step: Step
    layout: Layout
    budget_range: tuple[float, float] = (0.2, 1.0)
    per: str = "batch"
    samples: int = 665_000
    text_tokens: int = 200
    longest: int = 2048
    micro_batch: int = 1
    quantize: bool = False
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "text_tokens", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; allowed are whole numbers from 1.")
        if self.longest < self.image_columns:
            raise ValueError(f"`longest` is {self.longest}; an image alone has {self.image_columns} columns.")

    @property
    def image_columns(self) -> int:
        """That an image takes at full budget."""
        costs = ModelCosts.of(self.config, self.image_size)
        return costs.columns(0, costs.visual_tokens(FULL))[0]

    @property
    def visual_tokens(self) -> int:
        """Of an image at full budget, in all its units."""
        return sum(unit_sizes(self.config, self.image_size))

    @cached_property
    def flops(self) -> TrainingFlops:
        """Of a sample, the mean over budgets."""
        asked = (self.text_tokens, self.step, self.budget_range)
        others = {"per": self.per, "rows": self.micro_batch, "image_size": self.image_size}
        return mean_training_flops(self.config, *asked, **others)

    @cached_property
    def plain_flops(self) -> TrainingFlops | None:
        """
        Of a sample in the plain model with all visual tokens and the same parts trained, but for the controller;
        `None` if nothing is left that trains.
        """
        if set(self.step.parts) == {"controller"}:
            return None
        return plain_training_flops(self.config, [self.text_tokens], self.step, self.image_size)

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes on each GPU by what they are for, at the longest batch: at the highest budget."""
        *_, highest = longest_counts(self.budget_range, unit_sizes(self.config, self.image_size))
        saved = activations(
            self.config,
            self.step,
            rows=self.micro_batch,
            text_tokens=self.longest - self.image_columns,
            token_budget=highest.budget,
            image_size=self.image_size,
            # DDP makes half precision of float32 weights step by step; DeepSpeed and FSDP2 run the model in it.
            autocast=self.layout.strategy == "ddp",
        )
        weights = Weights.of(self.config, self.step, self.quantize)
        return kept_by_weights(weights, self.layout) | saved | {"reserve": self.layout.reserve}

    def largest_micro_batch(self, gpu_memory: float) -> int | None:
        """The largest of 1, 2, 4 ... 32 rows that fits into `gpu_memory` bytes, or `None` if none does."""
        needed = {rows: sum(replace(self, micro_batch=rows).memory.values()) for rows in (1, 2, 4, 8, 16, 32)}
        return max((rows for rows, size in needed.items() if size <= gpu_memory), default=None)

    def hours(self, peak: float, utilisation: float, overhead: float | None = None) -> dict[str, float | None]:
        """
        Hours of an epoch at a utilisation: counted, with the measured overhead if there is one, and the plain model's.

        Args:
            peak, utilisation: see [`hours`].
            overhead: time beyond the count, 1 or more times.
        """
        # What cannot be is refused before anything is counted.
        of_a_flop = hours(1.0, self.samples, self.layout.gpus, peak, utilisation)
        ours = of_a_flop * self.flops.total
        return {
            "utilisation": utilisation,
            "counted": ours,
            "with_overhead": None if overhead is None else overhead * ours,
            "plain": None if self.plain_flops is None else of_a_flop * self.plain_flops.total,
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything counted, as JSON can hold it: bytes, and FLOPs of a sample."""
        flops, plain = self.flops, self.plain_flops
        return {
            "memory": self.memory | {"total": sum(self.memory.values())},
            "flops_per_sample": {name: part.total for name, part in flops.parts.items()} | {"total": flops.total},
            "plain_flops_per_sample": None if plain is None else plain.total,
        }


def hours(flops_per_sample: float, samples: int, gpus: int, peak: float, utilisation: float) -> float:
    """
    Hours of an epoch.

    Args:
        flops_per_sample: counted.
        samples, gpus: how many.
        peak: FLOPs a second of a GPU.
        utilisation: share of the peak that is reached, above 0 and at most 1.

    Raises:
        ValueError: if the utilisation is not one, or the peak not above 0.
    """
    if not peak > 0:
        raise ValueError(f"`peak` is {peak}; allowed are FLOPs a second above 0.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"`utilisation` is {utilisation}; allowed are shares above 0 and up to 1.")
    return flops_per_sample * samples / (gpus * peak * utilisation) / 3600


# ---------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class MeasuredStep:
    """
    What the training benchmark measured.

    Attributes:
        file, command: where it stands, and how it was made.
        machine: on which.
        speed_up, expected: samples a second over plain LLaVA's, measured and by counted FLOPs.
        lower, upper: quartiles of the measured one.
        waiting: share of the time in which the trainer waits for the next batch, or `None`.
    """

    file: str
    command: str
    machine: str
    speed_up: float
    expected: float
    lower: float
    upper: float
    waiting: float | None

    @property
    def overhead(self) -> float:
        """How much longer a step takes than its FLOPs say, against plain LLaVA's; below 1 counts as 1."""
        return max(1.0, self.expected / self.speed_up)

    @classmethod
    def of_file(cls, path: Path) -> "MeasuredStep":
        """
        Reads the result of `benchmarks/training.py`: one budget a batch, gates on features.

        Raises:
            ValueError: if the file is no such result.
        """
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            row = next(row for row in result["steps"] if (row["per"], row["gates"]) == ("batch", "features"))
            speed_up = row["speed_up"]
            return cls(
                file=path.name,
                command=result["command"],
                machine=result["machine"]["gpu"] or result["machine"]["processor"],
                speed_up=speed_up["median"],
                expected=row["expected_speed_up"],
                lower=speed_up["lower_quartile"],
                upper=speed_up["upper_quartile"],
                waiting=None if result.get("data") is None else result["data"]["waiting_share"]["median"],
            )
        except (OSError, KeyError, TypeError, ValueError, StopIteration, RecursionError) as error:
            raise ValueError(f"`measured` is '{path}', which is no result of benchmarks/training.py.") from error


# ---------------------------------------------------------------- what was published


class PublishedRun(NamedTuple):
    """A run over 665K samples on 8 A100s whose hours its authors state, "around"."""

    name: str
    preset: str
    hours: float
    gpu: str

    def utilisation(self, text_tokens: int) -> float:
        """
        The share of the peak that the stated hours mean by our count, all recomputation counted as work.

        The authors' script trains projector and decoder with gradient checkpointing, the tower without a gradient.

        Args:
            text_tokens: of a sample, on average; the authors do not state it.
        """
        step = Step(["projector", "decoder"], checkpointing=True)
        parts = plain_training_flops(preset_config(self.preset), [text_tokens], step).parts
        executed = parts["vision"].forward + sum(part.total for name, part in parts.items() if name != "vision")
        return hours(executed, PUBLISHED_SAMPLES, PUBLISHED_GPUS, A100_PEAK, 1.0) / self.hours


PUBLISHED_SAMPLES, PUBLISHED_GPUS = 665_000, 8
PUBLISHED_SOURCE = "github.com/haotian-liu/LLaVA, README.md, 'Visual Instruction Tuning'; scripts/v1_5/finetune.sh"
PUBLISHED_RUNS = (
    PublishedRun("LLaVA-1.5-7B", "llava-1.5-7b", 10, "A100 40 GB"),
    PublishedRun("LLaVA-1.5-13B", "llava-1.5-13b", 20, "A100 80 GB"),
)
