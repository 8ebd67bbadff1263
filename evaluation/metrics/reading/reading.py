"""
Reading: an answer is a text that was read off a page.

Two configurations say how near it comes:

- `character_accuracy` (the default): 1 - CER, at least 0. CER, the character error rate, is the number of characters
  to insert, delete or replace to get from the prediction to the reference, divided by the reference's length.
- `entry_f1`: the answer as entries. A word in capitals is a key, and the words behind it, up to the next key, are its
  values; an entry is a key with one of its values. F1 is the harmonic mean of precision and recall of these.

With several references, the nearest counts. White space at the ends and runs of it inside do not matter; case does.
"""

from collections import Counter
from statistics import fmean

import datasets
import evaluate
from rapidfuzz.distance import Levenshtein


class Reading(evaluate.Metric):
    """
    How much of what stands on a page was read.

    `compute` takes `predictions`, a string each, and `references`, a list of strings each, and returns
    `character_accuracy` and `character_error_rate` (each the mean of examples), or `entry_f1`, and beside it `exact`,
    the share of texts that are read without a fault. All are in [0, 1], but for the error rate, which has no bound.
    """

    def _info(self) -> evaluate.MetricInfo:
        self.headline = {"default": "character_accuracy"}.get(self.config_name, self.config_name)
        if self.headline not in ("character_accuracy", "entry_f1"):
            raise ValueError(f"config_name is {self.config_name!r}; allowed are 'character_accuracy' and 'entry_f1'.")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=type(self).__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def score_examples(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """The score of every prediction, 0.0 to 1.0."""
        score = _entry_score if self.headline == "entry_f1" else _character_score
        return [score(*pair) for pair in zip(predictions, references, strict=True)]

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("predictions is empty; there is nothing to average.")
        pairs = list(zip(predictions, references, strict=True))
        figures = {
            self.headline: fmean(self.score_examples(predictions, references)),
            "exact": fmean(_spaced(prediction) in map(_spaced, answers) for prediction, answers in pairs),
        }
        if self.headline == "character_accuracy":
            figures["character_error_rate"] = fmean(_error_rate(*pair) for pair in pairs)
        return figures


def character_error_rate(prediction: str, reference: str) -> float:
    """Characters to change / length of the reference; of an empty reference, of one character."""
    prediction, reference = _spaced(prediction), _spaced(reference)
    return Levenshtein.distance(prediction, reference) / max(len(reference), 1)


def entry_f1(prediction: str, reference: str) -> float:
    """2 |shared| / (|read| + |there|) of entries; 1.0 if there are none and none was read."""
    read, there = _entries(prediction), _entries(reference)
    total = read.total() + there.total()
    return 2 * (read & there).total() / total if total else 1.0


def _entries(text: str) -> Counter[tuple[str, str]]:
    entries, key = Counter(), ""
    for word in text.split():
        if word.isupper():
            key = word
        else:
            entries[key, word] += 1
    return entries


def _entry_score(prediction: str, references: list[str]) -> float:
    return max(entry_f1(prediction, reference) for reference in _some(references, prediction))


def _character_score(prediction: str, references: list[str]) -> float:
    return max(0.0, 1.0 - _error_rate(prediction, references))


def _error_rate(prediction: str, references: list[str]) -> float:
    return min(character_error_rate(prediction, reference) for reference in _some(references, prediction))


def _some(references: list[str], prediction: str) -> list[str]:
    if not references:
        raise ValueError(f"references of the prediction {prediction!r} is empty; at least one is needed.")
    return references


def _spaced(text: str) -> str:
    return " ".join(text.split())
