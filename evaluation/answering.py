"""Every question, answered in every setting, and what each answer cost.

Settings take turns batch by batch, so that their times compare what was asked and not what else the machine was doing.
The clock runs around `generate` alone: images are decoded before it, and answers scored, counted and written after it.
What an answer cost is counted from the selection that was really made for its images.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from transformers import BatchFeature, ProcessorMixin

from ..modeling.budget.selection import Selection
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import inputs_of_questions
from ..modeling.vision.shown_image import shown_images
from .continuations import Generated, continued
from .data.examples import Example
from .metric_modules import SCORED_TOGETHER, needs_choices, score_examples
from .prompt_costs import CountedFlops
from .runs import Answer, Run
from .settings import Setting

# Pixels, of pictures that a run keeps of images of any size.
_PICTURE_SIZE = (480, 480)


def inputs_of(processor: ProcessorMixin, examples: Sequence[Example]) -> BatchFeature:
    """
    Model inputs of questions with any number of images each, padded on the left.

    Raises:
        ValueError: if an image cannot be decoded; the message names the example.
    """
    prompts = [_prompt(example) for example in examples]
    try:
        return inputs_of_questions(processor, [example.images for example in examples], prompts)
    except ValueError as error:
        # One by one, to say whose image it is.
        for example, prompt in zip(examples, prompts, strict=True):
            try:
                inputs_of_questions(processor, [example.images], [prompt])
            except ValueError as own_error:
                raise ValueError(f"Example {example.id!r}: {own_error}") from own_error
        raise error


def _prompt(example: Example) -> str | list[dict[str, Any]]:
    return example.question if example.messages is None else example.messages


@dataclass
class Batch:
    """Examples that are answered together, from the index of the first on, and their inputs, on the CPU."""

    start: int
    examples: list[Example]
    inputs: BatchFeature


@dataclass
class Batches:
    """Batches by the index of their first example, as a map-style data set."""

    processor: ProcessorMixin
    examples: Sequence[Example]
    batch_size: int

    def __getitem__(self, start: int) -> Batch:
        examples = self.examples[start : start + self.batch_size]
        return Batch(start, examples, inputs_of(self.processor, examples))

    def in_order(self, starts: Sequence[int], device: torch.device) -> Iterator[Batch]:
        """
        Batches one after another. Beside a GPU the next ones are made by another process while this one waits; on a
        CPU that process would take the time of the model, whose clock is running.
        """
        workers = 1 if device.type == "cuda" and starts else 0
        return iter(DataLoader(self, batch_size=None, sampler=starts, num_workers=workers))


def answer_examples(
    model: AdaVTPForConditionalGeneration,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    run: Run,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    shown: int = 12,
    process: PartialState | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[float, float]:
    """
    Greedily answers what a run has no answer to, and writes every batch's answers as soon as they are there. Batches
    begin at multiples of `batch_size` whatever is done, so that answers do not depend on interruptions.

    Args:
        model, processor: in evaluation mode.
        examples: all of the run's.
        settings: that can be measured.
        run: where answers are written; its metric scores them.
        max_new_tokens: of an answer.
        batch_size: examples answered together.
        shown: number of examples whose picture and kept patches are written too.
        process: which of several processes this is; each answers its share of the batches.
        progress: wraps the loop over batches and settings, for a progress bar.

    Returns:
        The seconds that this process spent in `generate`, and in everything else.

    Raises:
        ValueError: if the metric needs choices and an example has none, or an image cannot be decoded.
    """
    started, model_seconds = time.perf_counter(), 0.0
    rank, num_processes = (process.process_index, process.num_processes) if process else (0, 1)
    done = run.done()
    todo = [
        (start, asked)
        for start in range(0, len(examples), batch_size)
        for asked in settings
        if any((*asked.key, index) not in done for index in range(start, min(start + batch_size, len(examples))))
    ]
    starts = list(dict.fromkeys(start for start, _ in todo))[rank::num_processes]
    own, flops = set(starts), {asked.key: CountedFlops(model.config, asked) for asked in settings}
    batches, batch = Batches(processor, examples, batch_size).in_order(starts, model.device), None
    for start, asked in progress([pair for pair in todo if pair[0] in own]):
        if batch is None or batch.start != start:
            batch = next(batches)
            inputs = batch.inputs.to(model.device)
        generated = continued(
            *(model, processor, inputs, flops[asked.key]),
            **{"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1},
        )
        _save_pictures(model, processor, batch, generated, run, shown)
        model_seconds += sum(one.cost.milliseconds for one in generated) / 1000
        answers = _answers(batch, asked, generated, run, flops[asked.key].num_layers, shown)
        run.append([answer for answer in answers if answer.key not in done], rank)
    return model_seconds, time.perf_counter() - started - model_seconds


def _save_pictures(
    model: AdaVTPForConditionalGeneration,
    processor: ProcessorMixin,
    batch: Batch,
    generated: Sequence[Generated],
    run: Run,
    shown: int,
) -> None:
    """The first image of each of the first examples, and where on it its units lie."""
    for index, (example, one) in enumerate(zip(batch.examples, generated, strict=True), start=batch.start):
        if index < shown and example.images and not run.picture(index).exists():
            first = shown_images(model, processor, example.images, _prompt(example))[0]
            first.image.thumbnail(_PICTURE_SIZE)
            run.save_shown_image(index, first, one.selection.grids[: len(first.places)])


def _answers(
    batch: Batch, asked: Setting, generated: Sequence[Generated], run: Run, num_layers: int, shown: int
) -> list[Answer]:
    """What is written of a batch; for the examples that are shown, with how many layers saw each patch."""
    texts, (label, budget), answers = [one.text.strip() for one in generated], asked.key, []
    metric = run.header["metric"]
    scores = [None] * len(texts) if metric in SCORED_TOGETHER else _scores(metric, texts, batch.examples)
    columns = zip(batch.examples, texts, scores, generated, strict=True)
    for index, (example, text, score, one) in enumerate(columns, start=batch.start):
        answers.append(
            Answer(
                *(index, example.id, label, budget, example.question, example.answers, text, score, example.category),
                num_keep=asked.num_keep,
                visual_tokens=one.cost.visual_tokens,
                text_tokens=one.cost.text_tokens,
                new_tokens=one.cost.new_tokens,
                flops=one.cost.flops,
                ms=round(one.cost.milliseconds, 3),
                layers_seen=_layers_seen(run, index, one.selection, num_layers) if index < shown else None,
            )
        )
    return answers


def _layers_seen(run: Run, index: int, selection: Selection | None, num_layers: int) -> list[int] | None:
    """Of the image that a run shows of an example, how many layers saw each patch, unit by unit."""
    if selection is None:
        return None
    seen = selection.keep * num_layers if selection.depth is None else selection.depth
    units = len(run.shown_image(index)[1])
    return seen[:units][selection.is_token[:units]].tolist()


def _scores(metric: str, predictions: Sequence[str], examples: Sequence[Example]) -> list[float]:
    lacking = [example.id for example in examples if example.choices is None]
    if lacking and needs_choices(metric):
        raise ValueError(f"`metric` is {metric!r}, and example {lacking[0]!r} has no choices.")
    answers, choices = [example.answers for example in examples], [example.choices for example in examples]
    return score_examples(metric, predictions, answers, choices)


def score_together(run: Run, examples: Sequence[Example]) -> None:
    """
    Scores the answers of each setting that has answered all of the run's examples at once, for a metric whose scores
    depend on each other. Does nothing for other metrics, whose answers are scored batch by batch.
    """
    metric = run.header["metric"]
    if metric not in SCORED_TOGETHER:
        return
    answers = run.answers_of_settings()
    for own in (own for own in answers.values() if len(own) == len(examples)):
        for one, score in zip(own, _scores(metric, [one.prediction for one in own], examples), strict=True):
            one.score = score
    run.write([one for own in answers.values() for one in own])
