"""What a run says of each setting, in the form that `evaluation.json` has and model cards read; and of its metric.

A run's answers have a score each, and its tables the mean of them. Papers often cite another figure of the same
metric, F1 beside POPE's accuracy or MME's score, which only all answers together have; where examples have
categories, also the figures of each.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from .data.examples import Example
from .metric_modules import CITED_BY_OTHER_FIGURES, load_metric
from .runs import Answer, Run, setting_of
from .statistics import bootstrap_means, mean_interval


def evaluation_record(run: Run) -> dict[str, Any]:
    """
    The results of a run, finished or interrupted (see [`unfinished`]), as a JSON-ready record: `rows`, one for each
    setting that has answered all examples, with every number; `unreachable`, what could not be run and why; the
    metric's `figures`; and what was measured with what. Of scores that are not only 0 and 1, "accuracy" is their mean,
    and its interval that of the bootstrap.
    """
    header, answers = run.header, run.answers_of_settings()
    whole = [entry for entry in header["settings"] if len(answers[setting_of(entry)]) == header["num_examples"]]
    scores = np.array([[answer.score for answer in answers[setting_of(entry)]] for entry in whole], dtype=np.float64)
    is_binary = bool(np.isin(scores, (0, 1)).all())
    draws = np.zeros((1, len(whole))) if is_binary else bootstrap_means(scores)
    return {
        **{name: header.get(name) for name in ("command", "versions", "machine", "split")},
        "num_questions": header["num_examples"],
        "rows": [
            _row(entry, answers[setting_of(entry)], mean_interval(own, column))
            for entry, own, column in zip(whole, scores, draws.T, strict=True)
        ],
        "unreachable": header["unreachable"],
        # A card calls them by their usual name.
        "dataset": str(header.get("data")).replace("digit-scenes", "digit scenes"),
        "metric": header["metric"],
        "figures": header.get("figures"),
    }


def unfinished(run: Run) -> list[tuple[dict[str, Any], int]]:
    """Settings that an earlier, interrupted command asked for and nobody since, and how many answers each has."""
    answers = run.answers_of_settings()
    counts = [(entry, len(answers[setting_of(entry)])) for entry in run.header["settings"]]
    return [(entry, number) for entry, number in counts if number != run.header["num_examples"]]


def _row(entry: dict[str, Any], answers: Sequence[Answer], interval: tuple[float, float]) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [getattr(answer, name) for answer in answers]
        return None if None in values else statistics.fmean(values)

    kinds = sorted({answer.category for answer in answers if answer.category is not None})
    return {
        **{name: entry[name] for name in ("reducer", "budget", "num_keep")},
        "accuracy": mean("score"),
        "accuracy_low": interval[0],
        "accuracy_high": interval[1],
        "accuracy_by_kind": {
            kind: statistics.fmean(answer.score for answer in answers if answer.category == kind) for kind in kinds
        },
        "visual_tokens": mean("visual_tokens"),
        "decoder_tokens": mean("visual_tokens") + mean("text_tokens"),
        "milliseconds": statistics.median(answer.ms for answer in answers),
        "flops": mean("flops"),
    }


def metric_figures(run: Run, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """
    The figures of a run's metric: for each setting that has answered all examples `reducer`, `budget` and `figures`,
    by their names in the metric; `by_category`, the figures of each category where there are several; and in place of
    these, where the metric cannot be worked out, `reason`. Nothing for metrics that are cited by the mean of their
    scores.
    """
    metric, rows = run.header["metric"], []
    if metric not in CITED_BY_OTHER_FIGURES:
        return []
    for (reducer, budget), answers in run.answers_of_settings().items():
        if len(answers) < run.header["num_examples"]:
            continue
        row = {"reducer": reducer, "budget": budget}
        try:
            row["figures"] = _figures(metric, answers, examples)
            row["by_category"] = _by_category(metric, answers, examples)
        except ValueError as error:
            row["reason"] = str(error)
        rows.append(row)
    return rows


def _figures(metric: str, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
    module = load_metric(metric)
    own = [examples[answer.index] for answer in answers]
    columns = {
        "predictions": [answer.prediction for answer in answers],
        "references": [example.answers for example in own],
        "choices": [example.choices for example in own],
        # The two questions that MME asks about an image have its name as their id.
        "images": [example.id for example in own],
        "categories": [example.category for example in own],
    }
    figures = module.compute(**{name: column for name, column in columns.items() if name in module.features})
    return {name: float(figure) for name, figure in figures.items()}


def _by_category(metric: str, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    categories = sorted({answer.category for answer in answers if answer.category is not None})
    if len(categories) < 2:
        return {}
    of_category = {name: [answer for answer in answers if answer.category == name] for name in categories}
    return {name: _figures(metric, own, examples) for name, own in of_category.items()}
