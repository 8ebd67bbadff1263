"""Exact match, POPE, ANLS, multiple choice, MME, relaxed accuracy and reading against examples worked out by hand."""

from typing import Any

import pytest

from adavtp.evaluation.metric_modules import load_metric, score_examples


def compute(name: str, predictions: list[str], references: list[list[str]], **columns: Any) -> dict[str, float]:
    return load_metric(name).compute(predictions=predictions, references=references, **columns)


def scores_of(name: str, answers: list[str], reference: str, **columns: Any) -> list[float]:
    return score_examples(name, answers, [[reference]] * len(answers), **columns)


# Exact match.

EQUAL = [("Red", "red"), (" red\n", "RED"), ("a  red\tcar", "A red car"), ("", ""), ("CAF\u00c9", "caf\u00e9")]
UNEQUAL = [("red.", "red"), ("2", "two"), ("the car", "car")]


def test_exact_match_is_but_for_case_and_space() -> None:
    for pairs, score in ((EQUAL, 1.0), (UNEQUAL, 0.0)):
        predictions, references = zip(*pairs, strict=True)
        assert score_examples("exact_match", predictions, [[one] for one in references]) == [score] * len(pairs)
    assert score_examples("exact_match", ["red"] * 2, [["blue", "red"], ["blue", "green"]]) == [1.0, 0.0]


def test_exact_match_says_how_many_are_right_as_written() -> None:
    result = compute("exact_match", ["Red", "blue", "x", "y"], [["red"], ["blue"], ["z"], ["z"]])
    assert result == {"exact_match": 0.5, "as_written": 0.25}


def test_gqa_treats_the_prediction_alone() -> None:
    assert scores_of("gqa_accuracy", ["Yes.", " Yes...\n", "yes!"], "yes") == [1.0, 1.0, 0.0]
    assert score_examples("gqa_accuracy", ["yes", "e.g."], [["Yes"], ["e.g"]]) == [0.0, 1.0]


# POPE.


SAYS_NO = ["No", "no", "No, there is no dog.", "There is not a dog. Yes.", "Yes, no", "no, thanks", " no\n"]
# The last ones the official rule does not know as "no".
SAYS_YES = ["Yes", "There is a dog. No cat.", "", "perhaps", ".no", "NO", "no!", "None", "isn't", "Not"]


def test_pope_reads_answers_by_the_official_rule() -> None:
    for answers, says, other in ((SAYS_NO, "no", "yes"), (SAYS_YES, "yes", "no")):
        assert scores_of("pope", answers, says) == [1.0] * len(answers)
        assert scores_of("pope", answers, other) == [0.0] * len(answers)


def test_pope_figures_follow_from_the_four_counts() -> None:
    # Three true yes, two false yes, one true no, four false no.
    predictions = ["yes"] * 3 + ["yes"] * 2 + ["no"] * 1 + ["no"] * 4
    references = [["yes"]] * 3 + [["no"]] * 2 + [["no"]] * 1 + [["Yes"]] * 4
    precision, recall = 3 / 5, 3 / 7
    assert compute("pope", predictions, references) == {
        "pope": pytest.approx(4 / 10),
        "precision": pytest.approx(precision),
        "recall": pytest.approx(recall),
        "f1": pytest.approx(2 * precision * recall / (precision + recall)),
        "yes_ratio": pytest.approx(5 / 10),
    }


def test_pope_without_a_yes_has_no_precision() -> None:
    assert compute("pope", ["no", "no"], [["no"], ["yes"]]) == {
        "pope": 0.5,
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "yes_ratio": 0.0,
    }


@pytest.mark.parametrize("references", [["maybe"], ["yes", "no"], ["yes", "yes"], []])
@pytest.mark.parametrize("name", ["pope", "mme"])
def test_a_reference_that_is_not_yes_or_no_is_refused(name: str, references: list[str]) -> None:
    with pytest.raises(ValueError, match="allowed is one 'yes' or one 'no'"):
        score_examples(name, ["yes"], [references])


# ANLS.


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("coca cola", ["coca cola"], 1.0),
        ("COCA  cola ", ["Coca Cola"], 1.0),
        # One letter of six replaced; one of five inserted; two of eight deleted.
        ("kitten", ["mitten"], 5 / 6),
        ("hous", ["house"], 4 / 5),
        ("elephant", ["elepha"], 6 / 8),
        # Exactly half counts, less does not.
        ("abcd", ["abxy"], 0.5),
        ("abc", ["axy"], 0.0),
        ("abcde", ["abxyz"], 0.0),
        ("a" * 101, ["a" * 50 + "b" * 51], 0.0),
        # The nearest of several.
        ("house", ["mouse", "hose", "cat"], 4 / 5),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        # kitten, sitten, sittin, sitting: three of seven.
        ("kitten", ["sitting"], 4 / 7),
        # One letter wrong; the length is of the text with its three spaces: 1 - 1 / 6.
        ("ab   c", ["ab d"], 1 - 1 / 6),
        # In capitals the sharp s is two letters: 1 - 1 / 7.
        ("stra\u00dfe", ["strane"], 1 - 1 / 7),
    ],
)
def test_anls(prediction: str, references: list[str], score: float) -> None:
    assert score_examples("anls", [prediction], [references]) == [pytest.approx(score)]


def test_anls_figures() -> None:
    result = compute("anls", ["kitten", "abc", "x"], [["mitten"], ["xyz"], ["x"]])
    assert result == {"anls": pytest.approx((5 / 6 + 0 + 1) / 3), "below_threshold": pytest.approx(1 / 3)}


# Multiple choice.

COLOURS = ["red", "dark red", "blue", "a light green"]


# The choice that is meant -> answers; none where there is neither a letter with a choice to it nor one choice's text.
READ = {
    "A": ["A, as it is dark red"],
    "B": ["B", "b", "(B)", "B.", "b.", "B)", "B. dark red", "(B) because it is", "dark  red", "It is a dark red car"]
    + ["The answer is B", "The answer is B.", "answer: b", "The answer is B because of the light"],
    "C": [" C:\n", "The answer is: (C).", "Answer: C", "The correct answer is option C", "Option C is right", "Blue."]
    + ["I said the answer is A, but the answer is C", "the answer is blue", "It is blue, really"],
    "D": ["A light green", "The answer is a light green."],
    None: ["E", "E. orange", "It is blue or red", "bluebird", "It is a bored one", "A car", "", "?"]
    + ["The answer is not known"],
}


@pytest.mark.parametrize(("letter", "answers"), READ.items())
def test_multiple_choice_reads_letters_and_texts(letter: str | None, answers: list[str]) -> None:
    assert_read("multiple_choice", letter, answers)


def assert_read(name: str, letter: str | None, answers: list[str]) -> None:
    choices = [COLOURS] * len(answers)
    for each in "ABCD":
        assert scores_of(name, answers, each, choices=choices) == [float(each == letter)] * len(answers)
    figures = compute(name, answers, [["A"]] * len(answers), choices=choices)
    assert figures["unreadable"] == float(letter is None)


def test_multiple_choice_takes_a_letter_for_a_letter_first() -> None:
    # The choices are letters themselves: a bare "A" is the first choice, and "C", with no third choice, the second.
    assert score_examples("multiple_choice", ["A", "c"], [["A"], ["B"]], [["B", "C"]] * 2) == [1.0, 1.0]


def test_multiple_choice_with_two_choices_of_one_text_is_unreadable_by_text() -> None:
    result = compute("multiple_choice", ["red", "B"], [["A"], ["B"]], choices=[["red", "red"]] * 2)
    assert result == {"multiple_choice": 0.5, "unreadable": 0.5}


def test_multiple_choice_with_choices_that_end_in_a_period() -> None:
    choices = ["It floats.", "It sinks."]
    assert score_examples("multiple_choice", ["it sinks", "It sinks.", "B"], [["B"]] * 3, [choices] * 3) == [1.0] * 3


def test_multiple_choice_texts_are_looked_for_as_they_are() -> None:
    unreadable = compute(
        "multiple_choice",
        ["It is 345", "an orange!", "It is c++"],
        [["A"], ["B"], ["A"]],
        choices=[["3.5", "2.5"], ["", "red"], ["c++", "c"]],
    )
    # Nothing is "3.5" or in no words at all; a plus is a plus, and "c" a part of the longer text.
    assert unreadable == {"multiple_choice": pytest.approx(1 / 3), "unreadable": pytest.approx(2 / 3)}


def test_scienceqa_has_five_letters() -> None:
    references, choices = [["E"], ["F"], ["F"]], [["one", "two", "three", "four", "five", "six"]] * 3
    assert score_examples("scienceqa_accuracy", ["E", "F", "The answer is F."], references, choices) == [1.0, 0.0, 0.0]


def test_multiple_choice_references_are_letters_or_texts() -> None:
    assert score_examples("multiple_choice", ["B"] * 3, [["B"], ["dark red"], ["A", "B"]], [COLOURS] * 3) == [1.0] * 3
    for reference in ("E", "orange", "Red"):
        with pytest.raises(ValueError, match=f"references has '{reference}'; allowed are the letters A, B, C, D"):
            score_examples("multiple_choice", ["B"], [[reference]], [COLOURS])
    with pytest.raises(ValueError, match="the texts of the choices, each there once"):
        score_examples("multiple_choice", ["B"], [["red"]], [["red", "red"]])


READ_AS_LLAVA = {
    "B": ["B", " B\n", "B. dark red", "The answer is B."],
    "C": ["So. The answer is C, then."],
    None: ["b", "(B)", "B.", "B) red", "The answer is B", "the answer is B.", "dark red", "E", "F. red", ""]
    + ["The answer is A. The answer is B.", "The answer is E."],
}


@pytest.mark.parametrize(("letter", "answers"), READ_AS_LLAVA.items())
def test_scienceqa_reads_as_llava_does(letter: str | None, answers: list[str]) -> None:
    assert_read("scienceqa_accuracy", letter, answers)


# MME.


def test_mme_is_accuracy_and_accuracy_plus_of_every_category() -> None:
    # Existence: both right about image 1, one about image 2: accuracy 3/4, accuracy+ 1/2. OCR: one of two: 1/2, 0.
    # Code reasoning: an image with the name of another category's; both right: 1, 1.
    asked = [
        ("existence", "1", "yes", "Yes"),
        ("OCR", "3", "yes", "perhaps"),
        ("existence", "1", "no", "No, there is none"),
        ("existence", "2", "no", "Not at all"),
        ("code_reasoning", "1", "yes", " yes"),
        ("OCR", "3", "no", "no"),
        ("existence", "2", "yes", "I say yes"),
        ("code_reasoning", "1", "no", "NO"),
    ]
    categories, images, references, predictions = (list(column) for column in zip(*asked, strict=True))
    references = [[reference] for reference in references]
    assert compute("mme", predictions, references, images=images, categories=categories) == {
        "mme": pytest.approx(75 + 50 + 50 + 0 + 100 + 100),
        "perception": pytest.approx(75 + 50 + 50),
        "cognition": pytest.approx(200),
        "accuracy": pytest.approx(6 / 8),
        "accuracy_plus": pytest.approx(2 / 4),
        "unreadable": pytest.approx(2 / 8),
    }
    assert score_examples("mme", predictions, references) == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0]


def test_mme_reads_the_first_four_letters() -> None:
    for says, answers in {"yes": ["yes", "YES.", "eyes"], "no": ["no", "know", "a no", "  \n no"]}.items():
        assert scores_of("mme", answers, says) == [1.0] * len(answers)
    assert scores_of("mme", ["oh no"], "no") == scores_of("mme", ["oh no"], "yes") == [0.0]


def test_mme_refuses_images_without_their_two_questions_and_unknown_categories() -> None:
    with pytest.raises(ValueError, match="images has '1' 1 times in category 'OCR'"):
        compute("mme", ["yes"], [["yes"]], images=["1"], categories=["OCR"])
    with pytest.raises(ValueError, match="categories has 'ocr'; allowed are existence"):
        compute("mme", ["yes"] * 2, [["yes"]] * 2, images=["1"] * 2, categories=["ocr"] * 2)


# Relaxed accuracy.


# Reference -> right and wrong predictions. Zero has no 5%, so that the texts count, as with what is no number.
RELAXED = {
    "100": (["105", "95"], ["105.1", "94.9"]),
    "-100": (["-105"], ["105"]),
    "3.5": ([" 3.5\n"], ["nan"]),
    "5%": (["5.2%", "0.05"], ["5"]),
    "0": (["0"], ["0.0", "0.001"]),
    "1,000": (["1,000"], ["1000"]),
    "5": (["5"], ["$5", ""]),
    "yes": (["Yes"], ["yes."]),
}


def test_relaxed_accuracy() -> None:
    for reference, (right, wrong) in RELAXED.items():
        expected = [1.0] * len(right) + [0.0] * len(wrong)
        assert scores_of("relaxed_accuracy", right + wrong, reference) == expected, reference
    assert score_examples("relaxed_accuracy", ["104"], [["1", "100"]]) == [1.0]


def test_relaxed_accuracy_says_how_many_are_exact() -> None:
    result = compute("relaxed_accuracy", ["104", " Yes", "7", "b"], [["100"], ["yes"], ["9"], ["a"]])
    assert result == {"relaxed_accuracy": 0.5, "exact_match": 0.25}


# Reading.


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("KX office 42", ["KX office 42"], 1.0),
        # One of 12 characters is another, one is missing, one is too many.
        ("KX offlce 42", ["KX office 42"], 1 - 1 / 12),
        ("KX ofice 42", ["KX office 42"], 1 - 1 / 12),
        ("KX office 421", ["KX office 42"], 1 - 1 / 12),
        # Case matters, space does not.
        ("kX", ["KX"], 1 / 2),
        (" KX\n 42", ["KX 42"], 1.0),
        # An answer may be longer than what there is to read: CER 3, and no less than 0 of it is right.
        ("KXKX", ["Q"], 0.0),
        ("KX", ["QX", "KX"], 1.0),
        ("", [""], 1.0),
    ],
)
def test_character_accuracy(prediction: str, references: list[str], score: float) -> None:
    assert score_examples("character_accuracy", [prediction], [references]) == [pytest.approx(score)]


def test_the_character_error_rate_has_no_bound() -> None:
    figures = compute("character_accuracy", ["KXKX", "42"], [["Q"], ["42"]])
    assert figures == {"character_accuracy": 0.5, "character_error_rate": 2.0, "exact": 0.5}


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("KX 42 MB 17", "KX 42 MB 17", 1.0),
        # In another order they are the same entries; with another value, one of two is there and one of two is right.
        ("MB 17 KX 42", "KX 42 MB 17", 1.0),
        ("KX 42 MB 18", "KX 42 MB 17", 0.5),
        # One of two was read: precision 1, recall 1/2.
        ("KX 42", "KX 42 MB 17", 2 / 3),
        # A table's row: a key and its three values; two of them are right, of four that were read.
        ("SP 41 59 05 06", "SP 41 59 04", 4 / 7),
        # The same value under another key is another entry.
        ("KX MB 42", "KX 42", 0.0),
        ("", "KX 42", 0.0),
        ("", "", 1.0),
    ],
)
def test_entry_f1(prediction: str, reference: str, score: float) -> None:
    assert score_examples("entry_f1", [prediction], [[reference]]) == [pytest.approx(score)]


# All.


@pytest.mark.parametrize(
    "name", ["exact_match", "gqa_accuracy", "anls", "relaxed_accuracy", "character_accuracy", "entry_f1"]
)
def test_an_example_without_references_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="references of the prediction 'red' is empty; at least one is needed"):
        score_examples(name, ["red"], [[]])
