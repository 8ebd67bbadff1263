"""
Multiple choice: which of the choices, lettered A, B, C and so on, did the model mean?

Two configurations say how that is read out of an answer; what cannot be read is wrong, and counted.

`multiple_choice` (the default) first cuts off an announcement, "the answer is", "answer: option", "Option" and the
like; what follows the last one is read. The first of these that fits counts; a letter is one that has a choice to it.

1. The answer is a letter and nothing else, but for brackets around it and one mark after it: "B", "b", "(B)", "B.".
2. It is the text of one choice, but for case, white space and a final period: "red".
3. It begins with a capital letter set off by brackets or one of . ) : , "B. red", "(B) because"; after an announcement
   a space is enough: "The answer is B because".
4. It has in it, as whole words, the text of one choice only, not counting texts that are part of another found one:
   "It is a dark red car" of "red", "dark red" and "blue".

`scienceqa_accuracy` is LLaVA-1.5's rule for ScienceQA (arXiv 2209.09513), once space at the ends is removed: the
answer is one of A to E alone, or begins with one of them, a period and a space, or has "The answer is X", X a capital
letter and some character after it, in it exactly once. A letter beyond the last choice cannot be read.
"""

import re
from statistics import fmean

import datasets
import evaluate

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTERS_OF_SCIENCEQA = LETTERS[:5]

ANNOUNCEMENT = re.compile(
    r"\b(?:answer|option|choice)(?:\s+is\b:?|\s*:)\s*(?:(?:option|choice)\s+)?|^(?:option|choice)\s+", re.IGNORECASE
)
LETTER_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:,]?")
LETTER_SET_OFF = re.compile(r"\(?([A-Z])[.):,]")
LETTER_AND_SPACE = re.compile(r"([A-Z])\s")
ANSWER_OF_SCIENCEQA = re.compile(r"The answer is ([A-Z]).")


class MultipleChoice(evaluate.Metric):
    """
    Share of answers that mean the right choice.

    `compute` takes `predictions`, a string each; `references`, for each a list of the letters or texts of the choices
    that are right, as a rule one (a single capital letter with a choice to it is a letter); `choices`, for each the
    list of the choices' texts. It returns, both in [0, 1]: `multiple_choice` (or `scienceqa_accuracy`),
    and `unreadable`, the share of predictions that mean no choice by the rule, which are wrong.
    """

    def _info(self) -> evaluate.MetricInfo:
        self.headline = "multiple_choice" if self.config_name == "default" else self.config_name
        if self.headline not in ("multiple_choice", "scienceqa_accuracy"):
            raise ValueError(
                f"config_name is {self.config_name!r}; allowed are 'multiple_choice' and 'scienceqa_accuracy'."
            )
        text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=type(self).__doc__,
            features=datasets.Features({"predictions": text, "references": texts, "choices": texts}),
        )

    def score_examples(
        self, predictions: list[str], references: list[list[str]], choices: list[list[str]]
    ) -> list[float]:
        """1.0 for every prediction that means a right choice, else 0.0."""
        right = [
            [place_of(answer, texts) for answer in answers] for answers, texts in zip(references, choices, strict=True)
        ]
        return [float(place in places) for place, places in zip(self._read(predictions, choices), right, strict=True)]

    def _compute(
        self, predictions: list[str], references: list[list[str]], choices: list[list[str]]
    ) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("predictions is empty; there is nothing to average.")
        return {
            self.headline: fmean(self.score_examples(predictions, references, choices)),
            "unreadable": fmean(place is None for place in self._read(predictions, choices)),
        }

    def _read(self, predictions: list[str], choices: list[list[str]]) -> list[int | None]:
        """The place, from 0, of the choice that every prediction means."""
        read = read_as_llava if self.headline == "scienceqa_accuracy" else read_choice
        return [read(*pair) for pair in zip(predictions, choices, strict=True)]


def read_choice(prediction: str, choices: list[str]) -> int | None:
    """The place, from 0, of the choice that an answer means by the first rule above, or `None`."""
    *announced, answer = ANNOUNCEMENT.split(prediction.strip())
    if alone := letter_in(LETTER_ALONE.fullmatch(answer), choices):
        return LETTERS.index(alone)
    equal = [place for place, choice in enumerate(choices) if plain(choice) == plain(answer)]
    if equal:
        return equal[0] if len(equal) == 1 else None
    first = LETTER_SET_OFF.match(answer) or (LETTER_AND_SPACE.match(answer) if announced else None)
    if letter := letter_in(first, choices):
        return LETTERS.index(letter)
    return place_of_only_text(plain(answer), [plain(choice) for choice in choices])


def read_as_llava(prediction: str, choices: list[str]) -> int | None:
    """The place, from 0, of the choice that an answer means by LLaVA-1.5's rule for ScienceQA, or `None`."""
    answer = prediction.strip()
    begins = re.match(r"([A-E])(?:$|\. )", answer)
    announced = ANSWER_OF_SCIENCEQA.findall(answer)
    letters = [begins[1]] if begins else announced
    if len(letters) != 1 or letters[0] not in LETTERS_OF_SCIENCEQA[: len(choices)]:
        return None
    return LETTERS.index(letters[0])


def letter_in(match: re.Match | None, choices: list[str]) -> str | None:
    """The letter that was found, a capital, if there is a choice to it."""
    letter = match[1].upper() if match else None
    return letter if letter and LETTERS.index(letter) < len(choices) else None


def place_of_only_text(answer: str, choices: list[str]) -> int | None:
    """The place of the only choice whose text is in an answer as whole words, or `None`."""
    found = [
        place
        for place, choice in enumerate(choices)
        if choice and re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", answer)
    ]
    longest = [
        place
        for place in found
        if not any(choices[place] in choices[other] and choices[place] != choices[other] for other in found)
    ]
    return longest[0] if len(longest) == 1 else None


def plain(text: str) -> str:
    """In lower case, with one space between words and no period at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def place_of(reference: str, choices: list[str]) -> int:
    """
    The place, from 0, of the choice that a reference names by its letter or its text.

    Raises:
        ValueError: if it names none, or its text is that of several.
    """
    if len(reference) == 1 and reference in LETTERS[: len(choices)]:
        return LETTERS.index(reference)
    places = [place for place, choice in enumerate(choices) if choice == reference]
    if len(places) != 1:
        raise ValueError(
            f"references has {reference!r}; allowed are the letters {', '.join(LETTERS[: len(choices)])} and the texts"
            f" of the choices, each there once: {list(choices)!r}."
        )
    return places[0]
