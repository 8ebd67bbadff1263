"""What the answers of a run say of each setting: mean score with its interval, and mean cost."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from .accuracy import BudgetResult
from .runs import Run, setting_of
from .settings import num_keep_of
from .statistics import bootstrap_means, mean_interval


@dataclass
class SettingResult(BudgetResult):
    """
    A row of a run's table: all examples in one setting. Of scores that are not only 0 and 1, "accuracy" is their mean,
    and its interval that of the bootstrap.

    Attributes:
        flops: mean over examples.
    """

    flops: float | None = None


def results(run: Run) -> list[SettingResult]:
    """
    What a run says of each setting that has answered all examples, those that could not be reached at the end.

    Args:
        run: finished, or interrupted; see [`unfinished`].
    """
    answers = answers_of_settings(run)
    whole = [asked for asked in run.header["settings"] if _is_whole(run, answers, asked)]
    settings = [(asked["reducer"], asked["budget"], asked["num_keep"]) for asked in whole]
    scores = np.array([[line["score"] for line in answers[label, budget]] for label, budget, _ in settings])
    is_binary = bool(np.isin(scores, (0, 1)).all())
    draws = np.zeros((1, len(settings))) if is_binary else bootstrap_means(scores)
    rows = [
        _result(label, budget, num_keep, answers[label, budget], mean_interval(own, column))
        for (label, budget, num_keep), own, column in zip(settings, scores, draws.T, strict=True)
    ]
    for entry in run.header["unreachable"]:
        count = num_keep_of(entry["budget"], run.header["num_patches"])
        rows.append(SettingResult(entry["reducer"], entry["budget"], count, entry["reason"]))
    return rows


def answers_of_settings(run: Run) -> dict[tuple[str, float | int], list[dict[str, Any]]]:
    """The answers of every setting of the header, in the order of the examples."""
    answers = {setting_of(asked): [] for asked in run.header["settings"]}
    for line in run.answers():
        answers[setting_of(line)].append(line)
    return answers


def unfinished(run: Run) -> list[tuple[dict[str, Any], int]]:
    """Settings that an earlier, interrupted command asked for and nobody since, and how many answers each has."""
    answers = answers_of_settings(run)
    return [
        (asked, len(answers[setting_of(asked)]))
        for asked in run.header["settings"]
        if not _is_whole(run, answers, asked)
    ]


def _is_whole(run: Run, answers: dict[tuple[str, float | int], list[dict[str, Any]]], asked: dict[str, Any]) -> bool:
    return len(answers[setting_of(asked)]) == run.header["num_examples"]


def _result(
    label: str, budget: float | int, num_keep: int, lines: list[dict[str, Any]], interval: tuple[float, float]
) -> SettingResult:
    def mean(name: str) -> float:
        return statistics.fmean(line[name] for line in lines)

    categories = sorted({line["category"] for line in lines if line["category"] is not None})
    by_category = {
        name: statistics.fmean(line["score"] for line in lines if line["category"] == name) for name in categories
    }
    return SettingResult(
        *(label, budget, num_keep, None, mean("score"), *interval, by_category),
        visual_tokens=mean("visual_tokens"),
        decoder_tokens=mean("visual_tokens") + mean("text_tokens"),
        milliseconds=statistics.median(line["ms"] for line in lines),
        flops=mean("flops"),
    )
