"""Everything that a metric says of a run: F1 beside POPE's accuracy, MME's score, unreadable answers.

A run's answers have a score each, and its tables the mean of them. Papers often cite another figure of the same
metric, which only all answers together have; where examples have categories, also the figures of each.
"""

from collections.abc import Sequence
from typing import Any

from .data.examples import Example
from .metric_modules import CITED_BY_OTHER_FIGURES, load_metric
from .runs import Answer, Run


def metric_figures(run: Run, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """
    The figures of a run's metric.

    Args:
        run: finished.
        examples: all of its examples.

    Returns:
        For each setting that has answered all examples `reducer`, `budget` and `figures`, by their names in the
        metric; `by_category`, the figures of each category where there are several; and in place of these, where the
        metric cannot be worked out, `reason`. Nothing for metrics that are cited by the mean of their scores.
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
