"""
Exact match: an answer is right if it equals one of the references.

Two configurations say when two texts are equal:

- `exact_match` (the default): after lower-casing, with space at the ends removed and every run of white space inside
  made one space. Nothing else: "2." is not "2", and "two" is not "2".
- `gqa_accuracy`: what LLaVA-1.5 does for GQA (arXiv 1902.09506). The prediction alone is treated: space at the ends
  and then periods at its end are removed, and it is lower-cased; references, one word in lower case there, stay as
  they are.
"""

from statistics import fmean

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """
    Share of predictions that equal one of their references.

    `compute` takes `predictions`, a string each, and `references`, a list of strings each, and returns, all in [0, 1]:
    `exact_match` (or `gqa_accuracy`), and `as_written`, the share that equals a reference character by character.
    """

    def _info(self) -> evaluate.MetricInfo:
        self.headline = {"default": "exact_match"}.get(self.config_name, self.config_name)
        if self.headline not in ("exact_match", "gqa_accuracy"):
            raise ValueError(f"config_name is {self.config_name!r}; allowed are 'exact_match' and 'gqa_accuracy'.")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=type(self).__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def score_examples(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """1.0 for every prediction that equals one of its references, else 0.0."""
        return [float(self._is_right(*pair)) for pair in zip(predictions, references, strict=True)]

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("predictions is empty; there is nothing to average.")
        as_written = [prediction in answers for prediction, answers in zip(predictions, references, strict=True)]
        return {
            self.headline: fmean(self.score_examples(predictions, references)),
            "as_written": fmean(as_written),
        }

    def _is_right(self, prediction: str, references: list[str]) -> bool:
        if not references:
            raise ValueError(f"references of the prediction {prediction!r} is empty; at least one is needed.")
        if self.headline == "gqa_accuracy":
            return prediction.strip().rstrip(".").lower() in references
        return without_case_and_space(prediction) in [without_case_and_space(answer) for answer in references]


def without_case_and_space(text: str) -> str:
    """The text in lower case, with one space between words and none at the ends."""
    return " ".join(text.lower().split())
