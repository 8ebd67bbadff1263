"""VQA accuracy: the rule of ten answers, and its normalisation step by step, worked out by hand."""

from fractions import Fraction
from itertools import combinations

import pytest

from adavtp.evaluation.metric_modules import load_metric, score_examples

# Text -> what the normalisation makes of it.
NORMALISED = {
    # New lines, tabs and space.
    "\tred\ncar\n": "red car",
    "red\r\ncar": "red car",
    "red\u00a0car": "red car",
    "  red    car ": "red car",
    "": "",
    "   ": "",
    # Punctuation: a space where it stands between letters, nothing where it stands beside a space.
    "yes!": "yes",
    "yes!no": "yes no",
    "yes! no": "yes no",
    "t-shirt": "t shirt",
    "x-y - z": "xy z",
    "x-y -z": "xy z",
    "x-y- z": "xy z",
    "x - y": "x y",
    "x_y": "x y",
    '"stop"': "stop",
    "(red) [car] {x}": "red car x",
    "<red>": "red",
    "1+1=2": "1 1 2",
    "@home": "home",
    "`red`;blue\\green": "red blue green",
    "red,blue": "red blue",
    "why?": "why",
    # A comma between digits: all punctuation of the text goes, without a space.
    "1,000": "1000",
    "1,2": "12",
    "1, 2": "1 2",
    "1,000-2,000": "10002000",
    "1000-2000": "1000 2000",
    "about 1,000 t-shirts": "about 1000 tshirts",
    # Periods go unless a digit follows, whatever comes before.
    "3.5": "3.5",
    ".5": ".5",
    "v.2": "v.2",
    "3.": "3",
    "e.g.": "eg",
    "$3.50.": "$3.50",
    "...": "",
    "." * 33 + "x": ".x",
    # Marks that stay.
    "3:30": "3:30",
    "50%": "50%",
    "rock & roll #1*": "rock & roll #1*",
    "dog's": "dog's",
    # Case, number words, articles.
    "RED": "red",
    "two": "2",
    "Ten": "10",
    "none": "0",
    "zero": "0",
    "eleven": "eleven",
    "twenty-two": "twenty 2",
    "a  cat.": "cat",
    "The cat and an apple": "cat and apple",
    "a": "",
    "another": "another",
    # Steps one after the other: the slash makes a word "a", the period too, and both are articles then.
    "n/a": "n",
    "n / a": "n",
    "a.n": "",
    # Contractions.
    "dont": "don't",
    "DONT": "don't",
    "don't": "don't",
    "it's": "it's",
    "its": "its",
    "itll": "it'll",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "couldntve": "couldntve",
    "yall'd've": "y'all'd've",
    "'ows'at": "'ow's'at",
    "twas": "'twas",
    "somebody'd": "somebodyd",
    "Im": "im",
    "don\u2019t": "don\u2019t",
    # Other scripts.
    "CAF\u00c9!": "caf\u00e9",
    "na\u00efve-looking": "na\u00efve looking",
    "\u0663\u060c\u0665": "\u0663\u060c\u0665",
}


@pytest.mark.parametrize(("text", "normalised"), NORMALISED.items())
def test_normalisation(text: str, normalised: str) -> None:
    # VizWiz normalises predictions and leaves answers as they are: full score says that the two are the same.
    assert score_examples("vizwiz_accuracy", [text], [[normalised] * 10]) == [1.0]


def test_answers_are_normalised_as_predictions_are() -> None:
    for text in ("1,000", "A cat!", "dont", "two"):
        assert score_examples("vqa_accuracy", [NORMALISED.get(text, "cat")], [[text] * 9 + ["red"]]) == [1.0]


@pytest.mark.parametrize("matches", range(11))
def test_score_is_the_mean_over_all_sets_of_nine_people(matches: int) -> None:
    answers = ["red"] * matches + ["blue"] * (10 - matches)
    of_sets = [min(Fraction(nine.count("red"), 3), Fraction(1)) for nine in combinations(answers, 9)]
    assert len(of_sets) == 10
    for name in ("vqa_accuracy", "textvqa_accuracy", "vizwiz_accuracy"):
        assert score_examples(name, ["red"], [answers]) == [pytest.approx(float(sum(of_sets) / 10))]


def test_scores_of_the_worked_example() -> None:
    # Two said 2, one "two", one "Two." and six 3: four of ten agree, and 3 has six.
    answers = ["2", "2", "two", "Two."] + ["3"] * 6
    assert score_examples("vqa_accuracy", ["two", "the 3", "4", "2."], [answers] * 4) == [1.0, 1.0, 0.0, 1.0]
    # Three agree: against seven sets of nine all three are left, against three sets two: (7 * 1 + 3 * 2/3) / 10.
    answers = ["cat"] * 3 + ["dog"] * 7
    assert score_examples("vqa_accuracy", ["A cat"], [answers]) == [pytest.approx(0.9)]


def test_vqa_v2_normalises_only_where_people_disagree() -> None:
    unanimous, divided = ["yes"] * 10, ["yes"] * 9 + ["no"]
    assert score_examples("vqa_accuracy", ["Yes.", " yes\n"], [unanimous] * 2) == [0.0, 1.0]
    assert score_examples("vqa_accuracy", ["Yes."], [divided]) == [1.0]
    # Answers that differ in the space around them only are one answer.
    assert score_examples("vqa_accuracy", ["Yes"], [["yes", "yes\t"] * 5]) == [0.0]


def test_textvqa_normalises_always() -> None:
    assert score_examples("textvqa_accuracy", ["Yes."], [["yes"] * 10]) == [1.0]
    assert score_examples("textvqa_accuracy", ["yes"], [["Yes."] * 10]) == [1.0]


def test_textvqa_splits_off_the_genitive_and_drops_commas_first() -> None:
    cases = {"dog's": "dog 's", "DOG'S": "dog 's", "1,000-2,000": "1000 2000", "red,blue": "redblue", "wh?y": "why"}
    for text, normalised in cases.items():
        others = ["something else"]
        assert score_examples("textvqa_accuracy", [text], [[normalised] * 9 + others]) == [1.0]
        assert score_examples("vqa_accuracy", [text], [[normalised] * 9 + others]) == [0.0]


def test_vizwiz_leaves_answers_as_they_are() -> None:
    assert score_examples("vizwiz_accuracy", ["Yes.", "Yes."], [["yes"] * 10, ["Yes."] * 10]) == [1.0, 0.0]


def test_llava_normalises_what_it_submits() -> None:
    assert score_examples("llava_vqa_accuracy", ["Yes."], [["yes"] * 10]) == [1.0]
    assert score_examples("llava_vqa_accuracy", ["yes"], [["Yes"] * 10]) == [0.0]
    assert score_examples("llava_vqa_accuracy", ["Dog's."], [["dog 's"] * 10]) == [1.0]
    assert score_examples("llava_vizwiz_accuracy", ["Dog's."], [["dog 's"] * 10]) == [1.0]
    assert score_examples("llava_vizwiz_accuracy", ["dog"], [["Dog"] * 10]) == [0.0]


def test_figures_of_a_set() -> None:
    metric = load_metric("vqa_accuracy")
    references = [["red"] * 10, ["red"] + ["blue"] * 9, ["red"] * 10]
    result = metric.compute(predictions=["red", "red", "blue"], references=references)
    # 1, 0.3 (nine sets of nine have one who said red) and 0.
    assert result == {"vqa_accuracy": pytest.approx(1.3 / 3), "given_by_someone": pytest.approx(2 / 3)}


@pytest.mark.parametrize("number", [0, 1, 9, 11])
def test_other_than_ten_answers_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"has {number} answers; VQA accuracy is defined for 10"):
        score_examples("vqa_accuracy", ["red"], [["red"] * number])
