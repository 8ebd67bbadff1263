"""Every question, answered in every setting, and what each answer cost.

Settings take turns batch by batch, so that their times compare what was asked and not what else the machine was doing.
The clock runs around `generate` alone: images are decoded before it, and answers scored, counted and written after it.
What an answer cost is counted from the selection that was really made for its images.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BatchFeature

from ..modeling.budget.selection import Selection
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from .data.examples import Example
from .metric_modules import SCORED_TOGETHER, needs_choices, score_examples
from .prompt_costs import CountedFlops, now, num_new_tokens, prompt_costs, selections_of_prompts
from .runs import Answer, Run, unanswered
from .settings import Setting


def inputs_of(processor: AdaVTPProcessor, examples: Sequence[Example]) -> BatchFeature:
    """
    Model inputs of questions, padded on the left.

    Args:
        processor: the model's.
        examples: with any number of images each.

    Raises:
        ValueError: if an image cannot be decoded; the message names the example.
    """
    prompts = [
        example.question
        if example.messages is None
        else processor.apply_chat_template(example.messages, add_generation_prompt=True)
        for example in examples
    ]
    try:
        return processor.of_questions([example.images for example in examples], prompts)
    except ValueError as error:
        # One by one, to say whose image it is.
        for example, prompt in zip(examples, prompts, strict=True):
            try:
                processor.of_questions([example.images], [prompt])
            except ValueError as own_error:
                raise ValueError(f"Example {example.id!r}: {own_error}") from own_error
        raise error


@dataclass
class Batch:
    """
    Examples that are answered together.

    Attributes:
        start: index of the first.
        examples: the examples.
        inputs: the model's inputs, on the CPU until they are needed.
    """

    start: int
    examples: list[Example]
    inputs: BatchFeature


class Batches:
    """Batches by the index of their first example, as a map-style data set."""

    def __init__(self, processor: AdaVTPProcessor, examples: Sequence[Example], batch_size: int) -> None:
        self.processor, self.examples, self.batch_size = processor, examples, batch_size

    def __getitem__(self, start: int) -> Batch:
        examples = self.examples[start : start + self.batch_size]
        return Batch(start, examples, inputs_of(self.processor, examples))


def _in_order(batches: Batches, starts: Sequence[int], device: torch.device) -> Iterator[Batch]:
    """
    The batches one after another. Beside a GPU the next ones are made by another process while this one waits; on a
    CPU that process would take the time of the model, whose clock is running.
    """
    workers = 1 if device.type == "cuda" and starts else 0
    return iter(DataLoader(batches, batch_size=None, sampler=starts, collate_fn=_as_it_is, num_workers=workers))


def _as_it_is(batch: Batch) -> Batch:
    return batch


@dataclass
class Given:
    """
    A batch's answers in one setting.

    Attributes:
        texts: the answers.
        new_tokens: how many tokens each has, with the one that ends it.
        selection: of all images of the batch, or `None` if there are none.
        seconds: that `generate` took.
    """

    texts: list[str]
    new_tokens: list[int]
    selection: Selection | None
    seconds: float


def answer(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    inputs: Mapping[str, torch.Tensor],
    setting: Setting,
    max_new_tokens: int,
) -> Given:
    """
    Greedy answers to a batch of questions.

    Args:
        model: in evaluation mode.
        processor: the model's.
        inputs: on the model's device.
        setting: what chooses the visual tokens.
        max_new_tokens: of each answer.
    """
    arguments = setting.arguments()
    # A reducer whose parameters differ from those of the last one of its name is made anew, which is no part of this.
    model.model.steps(arguments["reducer"])
    started = now(model.device)
    output = model.generate(
        **inputs,
        **arguments,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
    )
    seconds = now(model.device) - started
    new = output.sequences[:, inputs["input_ids"].shape[1] :].cpu()
    texts = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    new_tokens = num_new_tokens(new, model.generation_config.eos_token_id)
    return Given(texts, new_tokens, output["selection"], seconds)


class Scorer:
    """
    Scores of answers by one metric.

    Args:
        metric: its name.

    Raises:
        ValueError: if there is no such metric.
    """

    def __init__(self, metric: str) -> None:
        self.name, self.needs_choices = metric, needs_choices(metric)
        self.is_together = metric in SCORED_TOGETHER

    def scores(self, predictions: list[str], examples: Sequence[Example]) -> list[float]:
        """
        A score for each answer.

        Raises:
            ValueError: if the metric needs choices and an example has none.
        """
        lacking = [example.id for example in examples if example.choices is None]
        if self.needs_choices and lacking:
            raise ValueError(f"`metric` is {self.name!r}, and example {lacking[0]!r} has no choices.")
        answers, choices = [example.answers for example in examples], [example.choices for example in examples]
        return score_examples(self.name, predictions, answers, choices)


@dataclass
class Seconds:
    """
    Where the time of answering went.

    Attributes:
        model: in `generate`.
        evaluation: in everything else.
    """

    model: float
    evaluation: float


def answer_examples(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    run: Run,
    scorer: Scorer,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    shown: int = 12,
    process: PartialState | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Seconds:
    """
    Answers what a run has no answer to, and writes every batch's answers as soon as they are there.

    Args:
        model: in evaluation mode.
        processor: the model's.
        examples: all of the run's.
        settings: that can be measured.
        run: where answers are written.
        scorer: of the run's metric.
        max_new_tokens: of an answer.
        batch_size: examples answered together.
        shown: number of examples whose picture and kept patches are written too.
        process: which of several processes this is; each answers its share of the batches.
        progress: wraps the loop over batches and settings, for a progress bar.

    Returns:
        The time that this process took.
    """
    started, model_seconds = time.perf_counter(), 0.0
    rank, num_processes = (process.process_index, process.num_processes) if process else (0, 1)
    done = run.done()
    todo = unanswered(settings, len(examples), batch_size, lambda asked, index: (*asked.key, index) in done)
    starts = list(dict.fromkeys(start for start, _ in todo))[rank::num_processes]
    own, flops = set(starts), {asked.key: CountedFlops(model.config, asked) for asked in settings}
    batches, batch, inputs = _in_order(Batches(processor, examples, batch_size), starts, model.device), None, None
    for start, asked in progress([pair for pair in todo if pair[0] in own]):
        if batch is None or batch.start != start:
            batch = next(batches)
            inputs = batch.inputs.to(model.device)
            _save_pictures(processor, batch, run, shown)
        given = answer(model, processor, inputs, asked, max_new_tokens)
        model_seconds += given.seconds
        answers = _answers(batch, asked, given, scorer, flops[asked.key], shown)
        run.append([answer for answer in answers if answer.key not in done], rank)
    return Seconds(model_seconds, time.perf_counter() - started - model_seconds)


def _save_pictures(processor: AdaVTPProcessor, batch: Batch, run: Run, shown: int) -> None:
    """The first image of each of the first examples, as the model sees it."""
    first = 0
    for number, example in enumerate(batch.examples):
        path = run.picture(batch.start + number)
        if batch.start + number < shown and example.images and not path.exists():
            partial = path.with_suffix(f".part{path.suffix}")
            image_as_seen(processor, batch.inputs["pixel_values"][first]).save(partial)
            partial.replace(path)
        first += len(example.images)


def _answers(
    batch: Batch, asked: Setting, given: Given, scorer: Scorer, flops: CountedFlops, shown: int
) -> list[Answer]:
    """What is written of a batch; for the examples that are shown, with how many layers saw each patch."""
    together = [None] * len(given.texts)
    scores = together if scorer.is_together else scorer.scores(given.texts, batch.examples)
    selections = selections_of_prompts(given.selection, [len(example.images) for example in batch.examples])
    costs = prompt_costs(flops, batch.inputs["attention_mask"], selections, given.new_tokens, given.seconds)
    columns = zip(batch.examples, given.texts, scores, costs, selections, strict=True)
    (label, budget), answers = asked.key, []
    for index, (example, text, score, cost, selection) in enumerate(columns, start=batch.start):
        answers.append(
            Answer(
                *(index, example.id, label, budget, example.question, example.answers, text, score, example.category),
                num_keep=asked.num_keep,
                visual_tokens=cost.visual_tokens,
                text_tokens=cost.text_tokens,
                new_tokens=cost.new_tokens,
                flops=cost.flops,
                ms=round(cost.milliseconds, 3),
                layers_seen=_layers_seen(selection, flops.num_layers) if index < shown else None,
            )
        )
    return answers


def _layers_seen(selection: Selection | None, num_layers: int) -> list[int] | None:
    """Of the first image of a prompt, how many layers saw each patch."""
    if selection is None:
        return None
    seen = selection.keep[0] * num_layers if selection.depth is None else selection.depth[0]
    return seen.tolist()


def score_together(run: Run, scorer: Scorer, examples: Sequence[Example]) -> None:
    """
    Scores the answers of each setting all at once, for a metric whose scores depend on each other. Does nothing for
    other metrics, whose answers are scored batch by batch.

    Args:
        run: of its settings, those that have answered all examples are scored.
        scorer: of the run's metric.
        examples: all of the run's.
    """
    if not scorer.is_together:
        return
    answers = run.answers_of_settings()
    for own in (own for own in answers.values() if len(own) == len(examples)):
        for one, score in zip(own, scorer.scores([one.prediction for one in own], examples), strict=True):
            one.score = score
    run.write([one for own in answers.values() for one in own])


def image_as_seen(processor: AdaVTPProcessor, pixel_values: torch.Tensor) -> Image.Image:
    """
    The picture that a model was shown: resized and cropped, with normalisation undone.

    Args:
        processor: that made `pixel_values`.
        pixel_values: `[3, height, width]`.
    """
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    pixels = pixel_values.cpu().float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return Image.fromarray(pixels.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy())
