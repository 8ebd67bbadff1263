"""CIDEr-D: worked out by hand on captions of two words, and the words that captions are made of."""

import sys
from math import exp, sqrt

import pytest

from adavtp.evaluation.metric_modules import load_metric, score_examples


def words(caption: str) -> list[str]:
    return sys.modules[type(load_metric("cider")).__module__].tokens(caption)


def test_two_images_worked_out() -> None:
    # Every n-gram is in the reference of one image of two, or of none, so all weigh log 2 as often as they occur.
    # "red dog" and "red cat" share one word of two: cosine 1/2; no bigram; nothing longer. 10 * (1/2 + 0 + 0 + 0) / 4.
    # "blue dog" is its reference: 10 * (1 + 1 + 0 + 0) / 4.
    predictions, references = ["red dog", "blue dog"], [["red cat"], ["blue dog"]]
    assert score_examples("cider", predictions, references) == [pytest.approx(1.25), pytest.approx(5.0)]
    assert load_metric("cider").compute(predictions=predictions, references=references) == {
        "cider": pytest.approx(3.125),
        "cider_1": pytest.approx(7.5),
        "cider_2": pytest.approx(5.0),
        "cider_3": 0.0,
        "cider_4": 0.0,
    }


def test_a_repeated_word_counts_as_often_as_in_the_reference() -> None:
    # Counts (red 3, cat 1) against (1, 1): min(3, 1) * 1 + 1 * 1 over sqrt(10) sqrt(2); bigrams (red red 2, red cat 1)
    # against (red cat 1): 1 over sqrt(5); two words longer: exp(-2^2 / (2 * 6^2)).
    first = score_examples("cider", ["red red red cat", "a"], [["red cat"], ["blue"]])[0]
    assert first == pytest.approx(10 * (2 / sqrt(20) + 1 / sqrt(5)) / 4 * exp(-4 / 72))


def test_phrases_of_every_image_count_nothing_and_rare_ones_most() -> None:
    # "a" is in all three images: log 1. "red" is in two of three: log 3/2; "cat" in one: log 3.
    references = [["a red cat"], ["a red"], ["a blue"]]
    said_common, said_rare = (
        score_examples("cider", [caption, "x", "x"], references)[0] for caption in ("a red", "a cat")
    )
    assert score_examples("cider", ["a", "x", "x"], references)[0] == 0.0
    assert 0 < said_common < said_rare


def test_weights_are_counts_times_log_of_images_by_images_with_it() -> None:
    # One word a caption, so only n = 1 counts. "red" in two of three images, "cat" in one: with r = log 3/2 and
    # c = log 3 the cosine of (red, cat) and (red) is r^2 / (sqrt(r^2 + c^2) r); one word longer: exp(-1 / 72).
    r, c = 0.4054651081081644, 1.0986122886681098
    score = score_examples("cider", ["red cat", "x", "x"], [["red"], ["red cat"], ["blue"]])[0]
    assert score == pytest.approx(10 / 4 * r / sqrt(r**2 + c**2) * exp(-1 / 72))


def test_the_mean_over_references_counts() -> None:
    references = [["red cat", "green horse"], ["blue dog"]]
    # The first agrees wholly with "red cat" and not at all with "green horse".
    assert score_examples("cider", ["red cat", "x"], references) == [pytest.approx(2.5), 0.0]


def test_an_image_counts_once_however_often_people_wrote_the_phrase() -> None:
    # "red" is in one image of two, not in two references of three; "red cat" is one word longer and half as near.
    score = score_examples("cider", ["red", "x"], [["red", "red cat"], ["blue"]])[0]
    assert score == pytest.approx(10 / 4 * (1 + exp(-1 / 72) / sqrt(2)) / 2)


def test_an_image_alone_and_empty_captions_score_nothing() -> None:
    assert score_examples("cider", ["red cat"], [["red cat"]]) == [0.0]
    assert score_examples("cider", ["", "red cat", ""], [["red cat"], ["red cat"], [""]]) == [
        0.0,
        pytest.approx(5.0),
        0.0,
    ]


def test_order_does_not_matter() -> None:
    predictions = ["a red cat", "a dog on a mat", "two boats"]
    references = [["a red cat sits"], ["the dog on the mat", "a dog"], ["three boats at sea"]]
    forth = score_examples("cider", predictions, references)
    assert score_examples("cider", predictions[::-1], references[::-1])[::-1] == [pytest.approx(one) for one in forth]


# Caption -> the words that Stanford's tokenizer and coco-caption's list of punctuation make of it.
WORDS = {
    "A man's dog isn't here.": "a man 's dog is n't here",
    "He cannot, we've, they'll, I'd, I'm, you're": "he can not we 've they 'll i 'd i 'm you 're",
    "The dogs' ball; the man\u2019s \u201cball\u201d": "the dogs ball the man 's ball",
    "gonna wanna gotta": "gon na wan na got ta",
    "A black-and-white t-shirt, mother-in-law - 3-legged": "a black-and-white t-shirt mother-in-law 3-legged",
    "The U.S. flag at 3:30 p.m. near Mr. Smith": "the u.s. flag at 3:30 p.m. near mr. smith",
    "1,000 people, 50% off $5, 1/2, 3.5 kg, 2nd": "1,000 people 50 % off $ 5 1/2 3.5 kg 2nd",
    "a cat (white) [big]": "a cat -lrb- white -rrb- -lsb- big -rsb-",
    "cats -- really... one \u2013 two \u2014 wow!": "cats really one two wow",
    "yes!! what?!": "yes !! what ?!",
    "tv & dvd and/or radio": "tv & dvd and/or radio",
    "Caf\u00e9 na\u00efve": "caf\u00e9 na\u00efve",
    "  two\nlines\t": "two lines",
    "": "",
}


@pytest.mark.parametrize(("caption", "expected"), WORDS.items())
def test_words_of_a_caption(caption: str, expected: str) -> None:
    assert words(caption) == expected.split()


def test_the_reference_code_says_the_same() -> None:
    reference_code = pytest.importorskip("pycocoevalcap.cider.cider")
    predictions = ["a man riding a horse on a beach", "two dogs play with a ball", "", "a a a red bus bus"]
    references = [
        ["a man rides a horse on the beach", "a person riding a brown horse"],
        ["two dogs play with a ball in the grass"],
        ["a kitchen with a stove", "a red bus on a street"],
        ["a red bus on a street", "a bus", "the red bus is parked near a bus stop"],
    ]
    _, expected = reference_code.Cider().compute_score(
        dict(enumerate(references)), {place: [caption] for place, caption in enumerate(predictions)}
    )
    assert score_examples("cider", predictions, references) == pytest.approx(list(expected), abs=1e-12)


def test_a_caption_without_references_is_refused() -> None:
    with pytest.raises(ValueError, match="references of the prediction 'red cat' is empty"):
        score_examples("cider", ["red cat"], [[]])
