"""Runs of one checkpoint on the same data as one measurement.

However many commands it took, answers are joined example by example, and where two runs answered the same, they
have to agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..records import check_record
from ..runs import FINISHED_FIELDS, HEADER, Answer, Run, setting_of
from ..settings import FULL, FULL_BUDGET
from .paired import Key, Paired

# What runs that are joined have in common, beside checkpoint and data.
_IN_COMMON = ("metric", "max_new_tokens", "num_examples", "num_patches", "num_layers")
_AGREE_ON = ("prediction", "score", "visual_tokens", "flops")


def kept_label(num_keep: int | float) -> str:
    """What tables call that which was asked for: a number K of tokens, or a budget where images differ in theirs."""
    return f"budget {num_keep:g}" if isinstance(num_keep, float) else f"K = {num_keep}"


def everything_kept_by(header: dict[str, Any]) -> Key:
    """The setting in which a run keeps all."""
    return FULL, FULL_BUDGET if header["num_patches"] is None else header["num_patches"]


@dataclass
class Answered:
    """
    All examples under one reducer and one number of kept tokens.

    Attributes:
        reducer, num_keep: what chose, and the number K of tokens that was asked for; where images differ in how many
            they have, the budget.
        answers: in the order of the examples.
        asked: the budgets that this K was asked for with.
    """

    reducer: str
    num_keep: int | float
    answers: list[Answer]
    asked: list[float | int] = field(default_factory=list)

    def column(self, name: str) -> np.ndarray:
        """A field of all answers, `[num_examples]` float64; NaN where an answer has none."""
        return np.array([getattr(answer, name) for answer in self.answers], dtype=np.float64)


@dataclass
class Measured:
    """
    One checkpoint on one set of examples, joined from the runs that measured it.

    Attributes:
        runs: that were joined.
        settings: in the order they were asked for.
    """

    runs: list[Run]
    settings: dict[Key, Answered] = field(default_factory=dict)

    @property
    def header(self) -> dict[str, Any]:
        """Of the first run; its checkpoint, data and metric are those of all."""
        return self.runs[0].header

    @property
    def examples(self) -> list[Answer]:
        """An answer to each example, for what it says of the example itself."""
        return next(iter(self.settings.values())).answers

    @cached_property
    def paired(self) -> Paired:
        """The scores of every setting on all examples."""
        return Paired({key: setting.column("score") for key, setting in self.settings.items()})

    @property
    def category_metrics(self) -> dict[str, str]:
        """Of a category, the metric that says more of its answers than the run's own, as the first run that knows."""
        return next((own for run in self.runs if (own := run.header.get("category_metrics"))), {})


def join_runs(runs: Sequence[Run]) -> list[Measured]:
    """
    Runs with the same checkpoint and the same data as one, in the order they were given.

    Raises:
        ValueError: if there are none, a run is not finished, runs of one checkpoint on the same data differ in what
            they measured, or two of them answered the same setting differently.
    """
    if not runs:
        raise ValueError("`runs` is empty; allowed are one or more run folders.")
    joined: dict[tuple[str, str], Measured] = {}
    for run in runs:
        check_record(run.header, FINISHED_FIELDS, str(run.folder / HEADER))
        key = run.header["checkpoint_hash"], run.header["data_hash"]
        _add(joined.setdefault(key, Measured([])), run)
    return list(joined.values())


def _add(measured: Measured, run: Run) -> None:
    for name in _IN_COMMON:
        if measured.runs and run.header.get(name) != measured.header.get(name):
            raise ValueError(
                f"runs of checkpoint {run.header['checkpoint']!r} on {run.header['data']!r} differ in {name!r}: "
                f"{measured.header.get(name)!r} and {run.header.get(name)!r} in {str(run.folder)!r}."
            )
    for (reducer, budget), answers in _finished_answers(run).items():
        # A fraction and a count may mean the same K: that is one setting, asked for in two ways.
        key = reducer, budget if answers[0].num_keep is None else answers[0].num_keep
        if measured.settings:
            _require_same_examples(measured.examples, answers, run)
        setting = measured.settings.setdefault(key, Answered(*key, answers))
        _require_agreement(setting, answers, run)
        if budget not in setting.asked:
            setting.asked.append(budget)
    measured.runs.append(run)


def _finished_answers(run: Run) -> dict[tuple[str, float | int], list[Answer]]:
    unreachable = {setting_of(row) for row in run.header["unreachable"]}
    answers = {key: own for key, own in run.answers_of_settings().items() if own or key not in unreachable}
    for (reducer, budget), own in answers.items():
        where = f"the run in {str(run.folder)!r} is not finished: {reducer!r} at {budget:g} has"
        if len(own) != run.header["num_examples"]:
            raise ValueError(f"{where} {len(own)} of {run.header['num_examples']} examples.")
        if any(answer.score is None for answer in own):
            raise ValueError(f"{where} no scores yet.")
    return answers


def _require_same_examples(examples: list[Answer], answers: list[Answer], run: Run) -> None:
    for example, answer in zip(examples, answers, strict=True):
        if (example.index, example.id) != (answer.index, answer.id):
            raise ValueError(
                f"the run in {str(run.folder)!r} has the example {answer.index} {answer.id!r}, where another run of "
                f"the same data has {example.index} {example.id!r}."
            )


def _require_agreement(setting: Answered, answers: list[Answer], run: Run) -> None:
    for name in _AGREE_ON:
        for before, now in zip(setting.answers, answers, strict=True):
            first, second = getattr(before, name), getattr(now, name)
            if first != second:
                raise ValueError(
                    f"{setting.reducer!r} with {kept_label(setting.num_keep)} was answered twice and differs: example "
                    f"{before.id!r} has {name} {first!r}, and {second!r} in {str(run.folder)!r}."
                )
