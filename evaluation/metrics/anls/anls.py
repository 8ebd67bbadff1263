"""
ANLS, average normalised Levenshtein similarity: an answer read off an image may have a few letters wrong.

With d the number of letters to insert, delete or replace to get from the prediction to a reference, the similarity is
1 - d / (length of the longer one). An example's score is the similarity to its nearest reference, or 0 if that is
below 0.5, for then it is another answer and not the same one misread (Biten et al., arXiv 1905.13648, equation 1;
DocVQA, arXiv 2007.00398).

As in the evaluation script of the challenge, where it differs from the papers:

- Both texts are lower-cased, and runs of white space in them become one space.
- A similarity of exactly 0.5 counts (the papers ask for a distance below 0.5).
- Lengths are those of the texts before white space was reduced, and in capitals, where "ß" has two letters.
- Two empty texts are equal.
"""

from statistics import fmean

import datasets
import evaluate
from rapidfuzz.distance import Levenshtein

THRESHOLD = 0.5


class Anls(evaluate.Metric):
    """
    Mean similarity of predictions to their nearest references.

    `compute` takes `predictions`, a string each, and `references`, a list of strings each. It returns, both in [0, 1]:
    `anls`, and `below_threshold`, the share of examples that score 0 because no reference is similar enough.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="arXiv 1905.13648",
            inputs_description=type(self).__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def score_examples(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """The score of every prediction: 0.0, or 0.5 to 1.0."""
        return [similarity_to_nearest(*pair) for pair in zip(predictions, references, strict=True)]

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("predictions is empty; there is nothing to average.")
        scores = self.score_examples(predictions, references)
        return {"anls": fmean(scores), "below_threshold": fmean(score == 0 for score in scores)}


def similarity_to_nearest(prediction: str, references: list[str]) -> float:
    """
    Similarity to the nearest reference, 0.0 if that is below the threshold.

    Raises:
        ValueError: if there is no reference.
    """
    if not references:
        raise ValueError(f"references of the prediction {prediction!r} is empty; at least one is needed.")
    nearest = max(similarity(prediction, reference) for reference in references)
    return nearest if nearest >= THRESHOLD else 0.0


def similarity(prediction: str, reference: str) -> float:
    """1 - d / (length of the longer one), in [0, 1]."""
    length = max(len(prediction.upper()), len(reference.upper()))
    distance = Levenshtein.distance(" ".join(prediction.lower().split()), " ".join(reference.lower().split()))
    return 1 - distance / length if length else 1.0
