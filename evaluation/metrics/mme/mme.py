"""
MME: two yes-or-no questions about every image, one to be answered yes and one no.

Fu et al., arXiv 2306.13394. For each of its categories, accuracy is the share of questions that are answered rightly,
accuracy+ the share of images of which both are; a category's score is 100 (accuracy + accuracy+), at most 200. `mme`
is the sum over categories, ten of perception and four of cognition: at most 2800.

An answer is read by the official rule: in lower case, "yes" or "no" if it is that, or else if its first four letters
have "yes", or else "no", in them ("Not sure" is no); anything else is wrong. Space at the ends is removed first.
"""

import math
from collections import Counter
from statistics import fmean

import datasets
import evaluate

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class Mme(evaluate.Metric):
    """
    Score, and what it is made of.

    `compute` takes `predictions`, a string each; `references`, a list of one "yes" or "no" each; `images`, a string
    each that is the same for the two questions about an image; `categories`, the name of each one's category. It
    returns `mme`, `perception` and `cognition`, sums over the categories that there are; `accuracy` and
    `accuracy_plus` over all categories together, in [0, 1]; and `unreadable`, the share of answers that are neither
    yes nor no.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="arXiv 2306.13394",
            inputs_description=type(self).__doc__,
            features=datasets.Features(
                {"predictions": text, "references": datasets.List(text), "images": text, "categories": text}
            ),
        )

    def score_examples(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """1.0 for every question that is answered rightly, else 0.0; their mean is `accuracy`, not `mme`."""
        pairs = zip(predictions, references, strict=True)
        return [float(read(prediction) == the_reference(answers)) for prediction, answers in pairs]

    def _compute(
        self, predictions: list[str], references: list[list[str]], images: list[str], categories: list[str]
    ) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("predictions is empty; there is nothing to average.")
        right = self.score_examples(predictions, references)
        questions = list(zip(categories, images, strict=True))
        check_pairs(questions)
        right_of_image = Counter()
        for question, is_right in zip(questions, right, strict=True):
            right_of_image[question] += is_right
        scores = {category: category_score(category, right_of_image) for category in dict.fromkeys(categories)}
        return {
            "mme": math.fsum(scores.values()),
            "perception": math.fsum(score for category, score in scores.items() if category in PERCEPTION),
            "cognition": math.fsum(score for category, score in scores.items() if category in COGNITION),
            "accuracy": fmean(right),
            "accuracy_plus": fmean(count == 2 for count in right_of_image.values()),
            "unreadable": fmean(read(prediction) is None for prediction in predictions),
        }


def category_score(category: str, right_of_image: dict[tuple[str, str], float]) -> float:
    """100 (accuracy + accuracy+) of one category, in [0, 200], from the number of right answers of every image."""
    counts = [count for (its_category, _), count in right_of_image.items() if its_category == category]
    return 100 * (fmean(counts) / 2 + fmean(count == 2 for count in counts))


def check_pairs(questions: list[tuple[str, str]]) -> None:
    """
    Raises:
        ValueError: if an image of a category does not have exactly two questions, or a category is not one of MME's.
    """
    for (category, image), count in Counter(questions).items():
        if category not in PERCEPTION + COGNITION:
            raise ValueError(f"categories has {category!r}; allowed are {', '.join(PERCEPTION + COGNITION)}.")
        if count != 2:
            raise ValueError(f"images has {image!r} {count} times in category {category!r}; it has to be there twice.")


def read(prediction: str) -> str | None:
    """What an answer says, "yes", "no" or `None`, by the rule above."""
    start = prediction.strip().lower()[:4]
    return next((answer for answer in ("yes", "no") if answer in start), None)


def the_reference(references: list[str]) -> str:
    """
    The one reference, but for case and space around it.

    Raises:
        ValueError: if there is not exactly one, or it is neither "yes" nor "no".
    """
    answers = [answer.strip().lower() for answer in references]
    if answers not in (["yes"], ["no"]):
        raise ValueError(f"references has {list(references)!r}; allowed is one 'yes' or one 'no'.")
    return answers[0]
