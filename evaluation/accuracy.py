"""Accuracy and cost of answering questions at each token budget.

Every budget and reducer answers the same questions, interleaved batch by batch, so that times compare what was asked
and not what else the machine was doing. A budget that a reducer cannot reach is a result too, with the reason.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import transformers
from scipy.stats import binomtest
from transformers import BatchFeature

from ..modeling.budget.token_budget import num_tokens_to_keep
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration, ReducerSpec
from ..modeling.processing_adavtp import AdaVTPProcessor
from .prompt_costs import visual_tokens_seen
from .settings import reducer_label

if TYPE_CHECKING:
    from datasets import Dataset

# Questions whose selections are looked at for how many visual tokens there were; budgets are exact, so few will do.
NUM_LOOKED_AT = 12


@dataclass
class Answer:
    """
    One question, answered at one budget.

    Attributes:
        question, kind, expected, given: the question, its kind, its answer, and the model's.
        reducer, budget: label of what chose the tokens, and the fraction kept.
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
        return is_right(self.given, self.expected)


def is_right(given: str, expected: str) -> bool:
    """Exact match, but for case and surrounding space."""
    return given.strip().lower() == expected.strip().lower()


@dataclass
class BudgetResult:
    """
    A table's row: all questions at one budget.

    Attributes:
        reducer, budget, num_keep: label of what chose the tokens, the fraction kept, and the number K that it means.
        unreachable: why the reducer cannot meet this budget; everything below is then `None`.
        accuracy, accuracy_low, accuracy_high: share of right answers and its 95% confidence interval (Wilson).
        accuracy_by_kind: the share for each kind of question.
        visual_tokens: mean number of visual tokens that a decoder layer sees in prefill, over layers and images, as
            the selections of the first questions say (`NUM_LOOKED_AT` of them).
        decoder_tokens: mean length of the prompt in the decoder.
        milliseconds: per answer, median over batches.
    """

    reducer: str
    budget: float
    num_keep: int
    unreachable: str | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    accuracy_by_kind: dict[str, float] | None = None
    visual_tokens: float | None = None
    decoder_tokens: float | None = None
    milliseconds: float | None = None


def refusal(
    model: AdaVTPForConditionalGeneration, inputs: Mapping[str, torch.Tensor], reducer: ReducerSpec, budget: float
) -> str | None:
    """
    Why a reducer cannot meet a budget, or `None` if it can.

    Args:
        model: in evaluation mode.
        inputs: of one question; images all have as many patches, so one is enough.
        reducer: see [`AdaVTPForConditionalGeneration.forward`].
        budget: fraction in [0, 1].

    Raises:
        ValueError: if there is no such reducer, or the budget is none.
    """
    model.model.steps(reducer)
    num_tokens_to_keep(budget, model.config.num_patches, 1)
    try:
        model.select_tokens(**inputs, token_budget=budget, reducer=reducer)
    except ValueError as error:
        return str(error)
    return None


def answer_batch(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    inputs: Mapping[str, torch.Tensor],
    reducer: ReducerSpec,
    budget: float,
) -> list[str]:
    """
    The model's answers to a batch of questions, of at most four tokens.

    Args:
        model: in evaluation mode.
        processor: the model's.
        inputs: `input_ids`, `attention_mask` and `pixel_values`, from `processor.of_questions`.
        reducer, budget: what chooses the visual tokens, and the fraction kept.
    """
    generated = model.generate(**inputs, reducer=reducer, token_budget=budget, max_new_tokens=4, do_sample=False)
    if generated.is_cuda:
        torch.cuda.synchronize()
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_questions(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    questions: "Dataset",
    budgets: Sequence[float],
    reducers: Sequence[ReducerSpec] = ("adaptive",),
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
        reducers: each a registered name, a dictionary of `"name"` and parameters, or a list of these, a stack.
        batch_size: questions answered together.
        progress: wraps the loop over batches, for a progress bar.

    Returns:
        A result for each reducer and budget, and all answers.

    Raises:
        ValueError: if there is no such reducer, or a budget is none.
    """
    stacks = {reducer_label(reducer): reducer for reducer in reducers}
    asked = [
        (label, budget) for label, budget in product(stacks, budgets) if label == next(iter(stacks)) or budget < 1
    ]
    first = _inputs(processor, questions[:1]).to(model.device)
    reasons = {(label, budget): refusal(model, first, stacks[label], budget) for label, budget in asked}
    settings = [setting for setting in asked if reasons[setting] is None]
    answers = {setting: [] for setting in settings}
    milliseconds = {setting: [] for setting in settings}
    looked_at = _inputs(processor, questions[:NUM_LOOKED_AT]).to(model.device)
    visual_tokens = {
        (label, budget): mean_visual_tokens(model, looked_at, stacks[label], budget) for label, budget in settings
    }
    prompt_lengths = []
    for start in progress(range(0, len(questions), batch_size)):
        batch = questions[start : start + batch_size]
        inputs = _inputs(processor, batch).to(model.device)
        prompt_lengths += inputs["attention_mask"].sum(dim=-1).tolist()
        for label, budget in settings:
            started = time.perf_counter()
            given = answer_batch(model, processor, inputs, stacks[label], budget)
            milliseconds[label, budget].append(1000 * (time.perf_counter() - started) / len(given))
            columns = zip(batch["question"], batch["kind"], batch["answer"], given, strict=True)
            answers[label, budget] += [Answer(*row, label, budget) for row in columns]
    text_length = statistics.fmean(prompt_lengths) - model.config.num_patches
    results = []
    for label, budget in asked:
        result = BudgetResult(label, budget, int(num_tokens_to_keep(budget, model.config.num_patches, 1)))
        result.unreachable = reasons[label, budget]
        if result.unreachable is None:
            _fill_in(result, answers[label, budget], visual_tokens[label, budget], text_length)
            result.milliseconds = statistics.median(milliseconds[label, budget])
        results.append(result)
    return results, [answer for own in answers.values() for answer in own]


def _inputs(processor: AdaVTPProcessor, batch: dict[str, list[Any]]) -> BatchFeature:
    return processor.of_questions([images[0] for images in batch["images"]], batch["question"])


def mean_visual_tokens(
    model: AdaVTPForConditionalGeneration, inputs: Mapping[str, torch.Tensor], reducer: ReducerSpec, budget: float
) -> float:
    """Visual tokens that a decoder layer sees, mean over layers and over the images of a batch."""
    selection = model.select_tokens(**inputs, token_budget=budget, reducer=reducer)
    return float(visual_tokens_seen(selection, model.config.text_config.num_hidden_layers).mean())


def _fill_in(result: BudgetResult, answers: list[Answer], visual_tokens: float, text_length: float) -> None:
    num_right = sum(answer.is_right for answer in answers)
    kinds = sorted({answer.kind for answer in answers})
    result.accuracy = num_right / len(answers)
    result.accuracy_low, result.accuracy_high = wilson_interval(num_right, len(answers))
    result.accuracy_by_kind = {
        kind: statistics.fmean(answer.is_right for answer in answers if answer.kind == kind) for kind in kinds
    }
    result.visual_tokens = visual_tokens
    result.decoder_tokens = text_length + visual_tokens


def wilson_interval(num_right: int, num_questions: int) -> tuple[float, float]:
    """The 95% confidence interval (Wilson) of a share of right answers."""
    interval = binomtest(num_right, num_questions).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def circumstances() -> dict[str, Any]:
    """With which versions, and on what, this process measures."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "adavtp": version("adavtp"),
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def as_report(results: list[BudgetResult], command: str, split: str, num_questions: int) -> dict[str, Any]:
    """
    Results as a JSON-ready record: what was measured, by which command, with which versions, on what. Budgets that
    could not be reached stand beside the rows, under `"unreachable"`, so that every row has every number.
    """
    return {
        "command": command,
        **circumstances(),
        "split": split,
        "num_questions": num_questions,
        "rows": [
            {name: value for name, value in asdict(result).items() if name != "unreachable"}
            for result in results
            if result.unreachable is None
        ],
        "unreachable": [
            {"reducer": result.reducer, "budget": result.budget, "reason": result.unreachable}
            for result in results
            if result.unreachable is not None
        ],
    }
