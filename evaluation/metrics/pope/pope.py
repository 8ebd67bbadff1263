"""
POPE: does the model see objects that are not there? Yes-or-no questions, "yes" the positive class.

Li et al., arXiv 2305.10355. An answer becomes yes or no by the official rule: only what stands before the first period
counts; commas go; it is "no" if one of the words, as single spaces divide them, is "No", "no" or "not", else "yes". So
"There is no dog." is no, and everything that cannot be read is yes, "NO", "no!" and "None" among it.

Space at the ends of a prediction is removed first, which those who use the official script do before they save.
LLaVA-1.5's column for POPE is `f1`, computed for each of the categories random, popular and adversarial, and averaged.
"""

from statistics import fmean

import datasets
import evaluate
from sklearn.metrics import precision_recall_fscore_support


class Pope(evaluate.Metric):
    """
    Accuracy, precision, recall, F1 and share of yes.

    `compute` takes `predictions`, a string each, and `references`, a list of one "yes" or "no" each, and returns, all
    in [0, 1]: `pope`, the accuracy; `precision`, `recall` and `f1` of "yes", 0.0 where they would divide by zero (the
    official script stops there); `yes_ratio`, the share of predictions that are yes.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="arXiv 2305.10355",
            inputs_description=type(self).__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def score_examples(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """1.0 for every prediction that says what its reference says, else 0.0."""
        pairs = zip(predictions, references, strict=True)
        return [float(says_yes(prediction) == is_yes(answers)) for prediction, answers in pairs]

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("predictions is empty; there is nothing to average.")
        said = [says_yes(prediction) for prediction in predictions]
        precision, recall, f1, _ = precision_recall_fscore_support(
            [is_yes(answers) for answers in references], said, average="binary", zero_division=0.0
        )
        return {
            "pope": fmean(self.score_examples(predictions, references)),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "yes_ratio": fmean(said),
        }


def says_yes(prediction: str) -> bool:
    """Whether an answer is yes, by the rule above."""
    first_sentence = prediction.strip().split(".")[0]
    words = first_sentence.replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def is_yes(references: list[str]) -> bool:
    """
    Whether the one reference is "yes", but for case and space around it.

    Raises:
        ValueError: if there is not exactly one, or it is neither "yes" nor "no".
    """
    answers = [answer.strip().lower() for answer in references]
    if answers not in (["yes"], ["no"]):
        raise ValueError(f"references has {list(references)!r}; allowed is one 'yes' or one 'no'.")
    return answers == ["yes"]
