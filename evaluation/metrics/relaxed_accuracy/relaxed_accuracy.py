"""
Relaxed accuracy: numbers read off a chart may be 5% off.

ChartQA (Masry et al., arXiv 2203.10244, section 5.1), after Methani et al. (arXiv 1909.00997). The paper has no code;
what is cited is the evaluation of Pix2Struct (arXiv 2210.03347), and this is its rule:

- A text is a number if Python's `float` reads it, or reads it without the "%" it ends in, which makes it a hundredth:
  "5%" is 0.05 and not 5; "1,000" and "$5" are no numbers.
- If prediction and reference are numbers and the reference is not 0, the answer is right if they differ by at most 5%
  of the reference. Else the texts have to be equal but for case.

Space at the ends of a prediction is removed first. Several references: the answer is right if one of them says so.
"""

from statistics import fmean

import datasets
import evaluate

MOST_RELATIVE_CHANGE = 0.05


class RelaxedAccuracy(evaluate.Metric):
    """
    Share of predictions that equal a reference, or come within 5% of it.

    `compute` takes `predictions`, a string each, and `references`, a list of strings each. It returns, both in [0, 1]:
    `relaxed_accuracy`, and `exact_match`, the share that equals a reference but for case.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="arXiv 2203.10244",
            inputs_description=type(self).__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def score_examples(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """1.0 for every prediction that is right, else 0.0."""
        return [float(is_right(*pair)) for pair in zip(predictions, references, strict=True)]

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("predictions is empty; there is nothing to average.")
        pairs = zip(predictions, references, strict=True)
        equal = [any(is_equal(prediction.strip(), answer) for answer in answers) for prediction, answers in pairs]
        return {"relaxed_accuracy": fmean(self.score_examples(predictions, references)), "exact_match": fmean(equal)}


def is_right(prediction: str, references: list[str]) -> bool:
    """
    Whether a prediction is near enough to one of the references.

    Raises:
        ValueError: if there is no reference.
    """
    if not references:
        raise ValueError(f"references of the prediction {prediction!r} is empty; at least one is needed.")
    return any(is_near(prediction.strip(), reference) for reference in references)


def is_near(prediction: str, reference: str) -> bool:
    """Within 5% of the reference if both are numbers and it is not 0, else equal but for case."""
    said, wanted = as_number(prediction), as_number(reference)
    if said is None or not wanted:
        return is_equal(prediction, reference)
    return abs(said - wanted) / abs(wanted) <= MOST_RELATIVE_CHANGE


def is_equal(prediction: str, reference: str) -> bool:
    return prediction.lower() == reference.lower()


def as_number(text: str) -> float | None:
    """The number that a text is, or `None`."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
