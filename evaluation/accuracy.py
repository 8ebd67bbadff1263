"""Accuracy and cost of answering questions at each token budget.

Every budget and reducer answers the same questions, interleaved batch by batch, so that times compare what was asked
and not what else the machine was doing.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import transformers
from datasets import Dataset
from scipy.stats import binomtest

from ..modeling.budget_adavtp import num_tokens_to_keep
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor

FULL_BUDGET = 1.0


@dataclass
class Answer:
    """
    One question, answered at one budget.

    Attributes:
        question, kind, expected, given: the question, its kind, its answer, and the model's.
        reducer, budget: what chose the tokens, and the fraction kept.
    """

    question: str
    kind: str
    expected: str
    given: str
    reducer: str
    budget: float

    @property
    def is_right(self) -> bool:
        """Exact match, but for case and surrounding space."""
        return self.given.strip().lower() == self.expected.strip().lower()


@dataclass
class BudgetResult:
    """
    A table's row: all questions at one budget.

    Attributes:
        reducer, budget, num_keep: what chose the tokens, the fraction kept, and the number K.
        accuracy, accuracy_low, accuracy_high: share of right answers and its 95% confidence interval (Wilson).
        accuracy_by_kind: the share for each kind of question.
        decoder_tokens: mean length of the prompt in the decoder.
        milliseconds: per answer, median over batches.
    """

    reducer: str
    budget: float
    num_keep: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    accuracy_by_kind: dict[str, float]
    decoder_tokens: float
    milliseconds: float


def answer_questions(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    questions: Dataset,
    budgets: Sequence[float],
    reducers: Sequence[str] = ("adaptive",),
    batch_size: int = 50,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[list[BudgetResult], list[Answer]]:
    """
    Answers every question at every budget with every reducer.

    Args:
        model: in evaluation mode.
        processor: the model's.
        questions: with the columns `images`, `question`, `answer` and `kind`, one image per question.
        budgets: fractions in [0, 1]. The full budget keeps everything, so only the first reducer runs it.
        reducers: registered names.
        batch_size: questions answered together.
        progress: wraps the loop over batches, for a progress bar.

    Returns:
        A result for each reducer and budget, and all answers.
    """
    settings = [
        (reducer, budget) for reducer, budget in product(reducers, budgets) if reducer == reducers[0] or budget != 1.0
    ]
    answers, milliseconds = [], {setting: [] for setting in settings}
    prompt_lengths = []
    before = model.config.reducer
    for start in progress(range(0, len(questions), batch_size)):
        batch = questions[start : start + batch_size]
        inputs = processor.of_questions([images[0] for images in batch["images"]], batch["question"]).to(model.device)
        prompt_lengths += inputs["attention_mask"].sum(dim=-1).tolist()
        for reducer, budget in settings:
            model.set_reducer(reducer)
            started = time.perf_counter()
            given = _generate(model, processor, inputs, budget)
            milliseconds[reducer, budget].append(1000 * (time.perf_counter() - started) / len(given))
            answers += [
                Answer(question, kind, expected, answer, reducer, budget)
                for question, kind, expected, answer in zip(
                    batch["question"], batch["kind"], batch["answer"], given, strict=True
                )
            ]
    model.set_reducer(before)
    full_length = statistics.fmean(prompt_lengths)
    num_patches = model.config.num_patches
    results = [
        _result(answers, setting, num_patches, full_length, statistics.median(milliseconds[setting]))
        for setting in settings
    ]
    return results, answers


def _generate(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, inputs: dict[str, torch.Tensor], budget: float
) -> list[str]:
    generated = model.generate(**inputs, token_budget=budget, max_new_tokens=4, do_sample=False)
    if generated.is_cuda:
        torch.cuda.synchronize()
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _result(
    answers: list[Answer], setting: tuple[str, float], num_patches: int, full_length: float, milliseconds: float
) -> BudgetResult:
    reducer, budget = setting
    own = [answer for answer in answers if (answer.reducer, answer.budget) == setting]
    num_right = sum(answer.is_right for answer in own)
    interval = binomtest(num_right, len(own)).proportion_ci(confidence_level=0.95, method="wilson")
    kinds = sorted({answer.kind for answer in own})
    num_keep = int(num_tokens_to_keep(budget, num_patches, 1))
    return BudgetResult(
        reducer=reducer,
        budget=budget,
        num_keep=num_keep,
        accuracy=num_right / len(own),
        accuracy_low=float(interval.low),
        accuracy_high=float(interval.high),
        accuracy_by_kind={kind: statistics.fmean(a.is_right for a in own if a.kind == kind) for kind in kinds},
        decoder_tokens=full_length - num_patches + num_keep,
        milliseconds=milliseconds,
    )


def as_report(results: list[BudgetResult], command: str, split: str, num_questions: int) -> dict[str, Any]:
    """Results as a JSON-ready record: what was measured, by which command, with which versions, on what."""
    return {
        "command": command,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "split": split,
        "num_questions": num_questions,
        "rows": [asdict(result) for result in results],
    }
