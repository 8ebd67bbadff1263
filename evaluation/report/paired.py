"""Scores of several settings on the same examples, so that what is compared is compared example by example."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..statistics import bootstrap_means, difference, mean_interval

# Reducer and number of kept tokens, or budget.
Key = tuple[str, int | float]


@dataclass
class Paired:
    """
    Attributes:
        scores: of every setting, `[num_examples]`, one example or more.
    """

    scores: dict[Key, np.ndarray]

    @cached_property
    def draws(self) -> dict[Key, np.ndarray]:
        """Every setting's mean score on the same draws of examples, `[num_draws]`; see [`bootstrap_means`]."""
        return dict(zip(self.scores, bootstrap_means(np.stack(list(self.scores.values()))).T, strict=True))

    def only(self, chosen: np.ndarray, keys: Iterable[Key] | None = None) -> "Paired":
        """The same on the `chosen` examples, `[num_examples]` booleans, of which one or more is true."""
        return Paired({key: self.scores[key][chosen] for key in keys or self.scores})

    def mean(self, key: Key) -> dict[str, float]:
        """A setting's `score`, the mean over examples, and its 95% interval, `low` and `high`."""
        low, high = mean_interval(self.scores[key], self.draws[key])
        return {"score": float(self.scores[key].mean()), "low": low, "high": high}

    def difference(self, own: Key, other: Key) -> dict[str, Any]:
        """The paired difference of one setting to another; see [`adavtp.evaluation.statistics.difference`]."""
        return difference(self.scores[own] - self.scores[other], self.draws[own] - self.draws[other])

    def compare(
        self, rows: Sequence[dict[str, Any]], name: str, other_of: Callable[[Key], Key | tuple[None, Any] | None]
    ) -> list[dict[str, Any]]:
        """
        Puts under `name` into each row its difference to another setting, if that is here and of another reducer.
        Returns what was put there, of which p-values are not corrected yet.
        """
        compared = []
        for row in rows:
            own = row["reducer"], row["num_keep"]
            other = other_of(own)
            if other in self.scores and own[0] != other[0]:
                row[name] = self.difference(own, other) | {"other": other[0]}
                compared.append(row[name])
        return compared
