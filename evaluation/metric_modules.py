"""
The metrics by their names.

Each is an `evaluate.Metric` in a folder of `metrics/`, one file that needs nothing else of this package, so
`evaluate.load(METRICS[name], name)` loads it offline, here or from a copy of the folder. Where one idea is measured
with several rules, as VQA accuracy is for VQA v2, TextVQA and VizWiz, the folder has a configuration for each.
`compute(predictions=..., references=...)` returns a figure under the metric's own name, and others.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

_FOLDERS = Path(__file__).parent / "metrics"

# Name of the metric -> folder that has it.
METRICS: dict[str, Path] = {
    name: _FOLDERS / folder
    for name, folder in {
        "exact_match": "exact_match",
        "gqa_accuracy": "exact_match",
        "vqa_accuracy": "vqa_accuracy",
        "textvqa_accuracy": "vqa_accuracy",
        "vizwiz_accuracy": "vqa_accuracy",
        "llava_vqa_accuracy": "vqa_accuracy",
        "llava_vizwiz_accuracy": "vqa_accuracy",
        "multiple_choice": "multiple_choice",
        "scienceqa_accuracy": "multiple_choice",
        "pope": "pope",
        "mme": "mme",
        "anls": "anls",
        "relaxed_accuracy": "relaxed_accuracy",
        "cider": "cider",
        "character_accuracy": "reading",
        "entry_f1": "reading",
    }.items()
}

# Metrics of which other figures are cited than the mean of their scores.
CITED_BY_OTHER_FIGURES = ("pope", "mme", "multiple_choice", "scienceqa_accuracy")

# Metrics where an example's score depends on the examples it is scored with.
SCORED_TOGETHER = ("cider",)


def load_metric(name: str) -> "evaluate.Metric":
    """
    A metric, loaded without network; what is added to it is kept in memory and not in files that processes share.
    `ValueError` if there is none of this name in [`METRICS`].
    """
    import evaluate

    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    return evaluate.load(str(METRICS[name]), name, keep_in_memory=True)


@cache
def _scorer(name: str) -> "evaluate.Metric":
    # Loading takes as long as scoring some thousand examples; scoring leaves nothing behind in a metric.
    return load_metric(name)


def needs_choices(name: str) -> bool:
    """Whether a metric reads an answer by the choices that the question gave."""
    return "choices" in _scorer(name).features


def score_examples(
    name: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    choices: Sequence[Sequence[str] | None] | None = None,
) -> list[float]:
    """
    A score for every example. Their mean is the metric's own figure; for `mme`, of which it is no mean, `accuracy`.

    Args:
        name: one of [`METRICS`]. The metrics in [`SCORED_TOGETHER`] need all examples in one call.
        predictions: the model's answers.
        references: for each the answers that people gave; how many a metric needs is said in its file.
        choices: for each the texts of its choices; needed for `multiple_choice` and `scienceqa_accuracy`, and not
            looked at for others.

    Returns:
        Scores in [0, 1], for `cider` in [0, 10].

    Raises:
        ValueError: if there is no such metric, lengths differ, or a metric does not have what it needs.
    """
    columns = {"predictions": predictions, "references": references}
    if needs_choices(name):
        columns["choices"] = choices
    for column, values in columns.items():
        if values is None or len(values) != len(predictions):
            there = "none" if values is None else str(len(values))
            raise ValueError(f"{name} needs {column} for each of {len(predictions)} predictions; there are {there}.")
    for column in set(columns) - {"predictions"}:
        for place, texts in enumerate(columns[column]):
            if texts is None or isinstance(texts, str):
                raise ValueError(f"{column}[{place}] is {texts!r}; it has to be a list of strings.")
    return _scorer(name).score_examples(**{column: list(values) for column, values in columns.items()})
