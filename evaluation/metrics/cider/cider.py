"""
CIDEr-D: how much a caption agrees with what people wrote, rare phrases counting more than common ones.

Vedantam et al., arXiv 1411.5726. A caption is a vector for each n = 1..4, with an entry for every n-gram w:

    g(w) = count(w) * log(number of images / number of images with w in a reference)

An example's score is 10 times the mean over n and over its references of

    exp(-(difference in length)^2 / (2 * 6^2)) * sum_w min(g_caption(w), g_reference(w)) g_reference(w)
                                                / (|g_caption| |g_reference|)

in [0, 10]; `cider` is the mean over examples, and papers print 100 times as much (LLaVA prints 110 for 1.1). As in the
reference code, coco-caption: lengths are numbers of words, n-grams of no reference are taken to be in one image's, and
the images are those that are scored together. So an example's score depends on the others, one alone scores 0, and a
caption of one word scores 2.5 at most.

Before that coco-caption runs Stanford's tokenizer, a Java program. `tokens` does what it does with captions: lower
case; punctuation is split off and dropped; "n't", "'s", "'ll" and so on are words of their own; brackets become words
such as "-lrb-", because its list of punctuation has them in capitals; words with hyphens, numbers with periods and
commas, and abbreviations stay whole. Emoticons, e-mail addresses and other rarities may be split otherwise.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean

import datasets
import evaluate

LONGEST_NGRAM = 4
LENGTH_DEVIATION = 6.0

Ngram = tuple[str, ...]

ABBREVIATIONS = "mr|mrs|ms|dr|st|ave|blvd|rd|mt|jr|sr|vs|etc|inc|co|ltd"
TOKEN = re.compile(
    rf"""
    (?:[a-z]\.){{2,}} | (?-i:[A-Z]\.)                     # U.S., p.m., J.
    | (?:{ABBREVIATIONS})\.                               # Mr.
    | (?:(?<!\S)[-+])?\d+(?:[.,:/]\d+)*\w*(?:-\w+)*        # 3.5, 1,000, 3:30, 1/2, -5, 2nd, 7-11
    | [#@]?(?!\d)\w+(?:[-/@._']\w+)*'?                    # dog, t-shirt, and/or, don't, dogs'
    | '(?:s|m|d|ll|re|ve)\b                               # 's, where the text is split already
    | -- | [!?]+ | \S                                     # marks
    """,
    re.VERBOSE | re.IGNORECASE,
)
CONTRACTION = re.compile(r"(.+)(n't|'s|'m|'d|'ll|'re|'ve|')|(can)(not)|(gon|wan)(na)|(got)(ta)", re.IGNORECASE)
PLAIN_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2026", "''\"\"--.")
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = set("'\"`.?!,:;-") | {"--"}


class Cider(evaluate.Metric):
    """
    CIDEr-D of captions.

    `compute` takes `predictions`, a caption each, and `references`, a list of captions each, and returns, all in
    [0, 10]: `cider`, and `cider_1` to `cider_4`, the same for n-grams of one length, whose mean it is.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="arXiv 1411.5726",
            inputs_description=type(self).__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def score_examples(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """The score of every caption among these, in [0, 10]: they say together which n-grams are rare."""
        return [fmean(scores) for scores in scores_by_length(predictions, references)]

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("predictions is empty; there is nothing to average.")
        by_length = [fmean(scores) for scores in zip(*scores_by_length(predictions, references), strict=True)]
        return {"cider": fmean(by_length)} | {
            f"cider_{length}": score for length, score in enumerate(by_length, start=1)
        }


@dataclass
class Caption:
    """
    A caption as its n-grams.

    Attributes:
        counts: how often each n-gram is in it.
        length: number of its words.
        vectors: for each length of n-grams, its weight g(w) for each n-gram w.
        norms: of the vectors.
    """

    counts: Counter[Ngram]
    length: int = 0
    vectors: list[dict[Ngram, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, text: str) -> "Caption":
        """The caption that a text is."""
        words = tokens(text)
        return cls(
            Counter(
                tuple(words[start : start + length])
                for length in range(1, LONGEST_NGRAM + 1)
                for start in range(len(words) - length + 1)
            ),
            len(words),
        )

    def weigh(self, rarity: dict[Ngram, float], rarest: float) -> "Caption":
        """Sets vectors and norms, from log(number of images / number of images with w) of each n-gram w."""
        self.vectors = [{} for _ in range(LONGEST_NGRAM)]
        for ngram, count in self.counts.items():
            self.vectors[len(ngram) - 1][ngram] = count * rarity.get(ngram, rarest)
        self.norms = [math.hypot(*vector.values()) for vector in self.vectors]
        return self


def scores_by_length(predictions: list[str], references: list[list[str]]) -> list[list[float]]:
    """
    The scores of every caption, in [0, 10], one for each length of n-grams.

    Raises:
        ValueError: if a caption has no references.
    """
    for prediction, texts in zip(predictions, references, strict=True):
        if not texts:
            raise ValueError(f"references of the prediction {prediction!r} is empty; at least one is needed.")
    captions = [Caption.of(prediction) for prediction in predictions]
    written = [[Caption.of(text) for text in texts] for texts in references]
    images_with = Counter(chain.from_iterable(set().union(*(text.counts for text in texts)) for texts in written))
    num_images = len(written)
    rarity = {ngram: math.log(num_images / count) for ngram, count in images_with.items()}
    for caption in chain(captions, *written):
        caption.weigh(rarity, math.log(num_images))
    return [
        [10 * fmean(similarity(caption, text, place) for text in texts) for place in range(LONGEST_NGRAM)]
        for caption, texts in zip(captions, written, strict=True)
    ]


def similarity(caption: Caption, reference: Caption, place: int) -> float:
    """The summand of the formula above, in [0, 1], for n-grams of length `place` + 1."""
    weights = reference.vectors[place]
    product = sum(
        min(weight, weights[ngram]) * weights[ngram]
        for ngram, weight in caption.vectors[place].items()
        if ngram in weights
    )
    if product == 0:
        return 0.0
    nearness = math.exp(-((caption.length - reference.length) ** 2) / (2 * LENGTH_DEVIATION**2))
    return nearness * product / (caption.norms[place] * reference.norms[place])


def tokens(text: str) -> list[str]:
    """The words of a caption, in lower case, without punctuation."""
    found = chain.from_iterable(split_contraction(token) for token in TOKEN.findall(text.translate(PLAIN_QUOTES)))
    return [BRACKETS.get(token, token) for token in (token.lower() for token in found) if token not in DROPPED]


def split_contraction(token: str) -> list[str]:
    """The parts of a word with an ending such as "n't" or "'s", or the word."""
    match = CONTRACTION.fullmatch(token)
    return [part for part in match.groups() if part] if match else [token]
