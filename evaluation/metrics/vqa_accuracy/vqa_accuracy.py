r"""
VQA accuracy: an answer is right to the degree that people gave it.

Ten people answered each question. Against nine of them, an answer scores min(number of the nine who gave it / 3, 1),
and its accuracy is the mean over the ten ways to leave one out (Antol et al., arXiv 1505.00468; the formula is often
printed for all ten answers, official code leaves one out, and so does this). Given by 0, 1, 2, 3 and 4 or more of the
ten, it scores 0, 0.3, 0.6, 0.9 and 1.

Texts are normalised before they are compared, in this order:

1. New lines and tabs become spaces; space at the ends goes.
2. Each of ``; / [ ] " { } ( ) = + \ _ - > < @ ` , ? !`` is removed everywhere if it stands beside a space anywhere in
   the text, and else becomes a space. If a comma stands between two digits anywhere, all of them are removed: "1,000"
   becomes "1000", but "1,000-2,000" becomes "10002000". Apostrophes and other marks (`: ' & % $ # *`) stay.
3. A period goes unless a digit follows: "3.5" and ".5" stay, "3." becomes "3". (The official expression means to ask
   for a digit before it too, but its look-behind is misspelt and asks for nothing; and the call passes a flag where
   the most replacements belong, so only the first 32 periods go.)
4. Lower case; white space splits words; number words none, zero, one, ... ten become digits ("none" is 0); the words
   a, an and the go; an apostrophe that was left out of a contraction is put back ("dont" becomes "don't"). "its" stays
   as it is, for it is a word; "somebody'd" becomes "somebodyd", as the official table has it.

What is normalised differs between official evaluations, so there are several configurations:

- `vqa_accuracy` (the default; VQA v2, OK-VQA): where the ten answers, after step 1, are all the same, nothing further
  is normalised: "Yes." does not match ten times "yes". Else prediction and answers are. (Not in the papers.)
- `textvqa_accuracy` (TextVQA; the evaluator that LLaVA-1.5 uses): prediction and answers always; before step 1 each is
  lower-cased, loses commas and question marks, and has "'s" split off ("dog's" becomes "dog 's").
- `vizwiz_accuracy` (VizWiz): the prediction always, answers never.
- `llava_vqa_accuracy`, `llava_vizwiz_accuracy`: the same after what the authors of LLaVA-1.5 do to the predictions
  that they submit, which is to normalise them as for TextVQA. So "Yes." matches ten times "yes".
"""

import re
from statistics import fmean

import datasets
import evaluate

CONFIGURATIONS = (
    "vqa_accuracy",
    "textvqa_accuracy",
    "vizwiz_accuracy",
    "llava_vqa_accuracy",
    "llava_vizwiz_accuracy",
)
NUM_ANSWERS = 10
NUM_ANSWERS_FOR_FULL_SCORE = 3

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
MOST_PERIODS_REMOVED = 32

NUMBER_WORDS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=1
    )
}
ARTICLES = {"a", "an", "the"}

# The contractions of the official table. It knows each of them with any one of its apostrophes left out.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""

APOSTROPHE_PUT_BACK = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


class VqaAccuracy(evaluate.Metric):
    """
    Mean agreement of predictions with ten people's answers.

    `compute` takes `predictions`, a string each, and `references`, a list of ten strings each, and returns, all in
    [0, 1]: `vqa_accuracy` (or the name of the configuration), and `given_by_someone`, the share of predictions that at
    least one of the ten gave.
    """

    def _info(self) -> evaluate.MetricInfo:
        self.headline = "vqa_accuracy" if self.config_name == "default" else self.config_name
        if self.headline not in CONFIGURATIONS:
            raise ValueError(f"config_name is {self.config_name!r}; allowed are {', '.join(CONFIGURATIONS)}.")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=type(self).__doc__,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def score_examples(self, predictions: list[str], references: list[list[str]]) -> list[float]:
        """The accuracy of every prediction: 0.0, 0.3, 0.6, 0.9 or 1.0."""
        return [
            agreement(*self._normalise(prediction, answers))
            for prediction, answers in zip(predictions, references, strict=True)
        ]

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("predictions is empty; there is nothing to average.")
        scores = self.score_examples(predictions, references)
        return {self.headline: fmean(scores), "given_by_someone": fmean(score > 0 for score in scores)}

    def _normalise(self, prediction: str, answers: list[str]) -> tuple[str, list[str]]:
        """Prediction and answers as the configuration compares them."""
        if self.headline == "textvqa_accuracy":
            return normalise_for_textvqa(prediction), [normalise_for_textvqa(answer) for answer in answers]
        if self.headline.startswith("llava_"):
            prediction = normalise_for_textvqa(prediction)
        if self.headline.endswith("vizwiz_accuracy"):
            return normalise(prediction), answers
        prediction, answers = on_one_line(prediction), [on_one_line(answer) for answer in answers]
        if len(set(answers)) == 1:
            return prediction, answers
        return normalise(prediction), [normalise(answer) for answer in answers]


def agreement(prediction: str, answers: list[str]) -> float:
    """
    min(matches / 3, 1) against nine of ten answers, mean over the ten ways to leave one out.

    Args:
        prediction, answers: normalised; ten answers.

    Raises:
        ValueError: if there are not ten answers.
    """
    if len(answers) != NUM_ANSWERS:
        raise ValueError(
            f"references of the prediction {prediction!r} has {len(answers)} answers; VQA accuracy is defined for"
            f" {NUM_ANSWERS}. For fewer, use exact_match."
        )
    matches = [answer == prediction for answer in answers]
    return fmean(min(1, (sum(matches) - left_out) / NUM_ANSWERS_FOR_FULL_SCORE) for left_out in matches)


def normalise(text: str) -> str:
    """Steps 1 to 4 of the normalisation, see above."""
    return normalise_words(remove_punctuation(on_one_line(text)))


def normalise_for_textvqa(text: str) -> str:
    """The normalisation with what TextVQA's evaluator does before it."""
    return normalise(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def on_one_line(text: str) -> str:
    """Step 1."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def remove_punctuation(text: str) -> str:
    """Steps 2 and 3."""
    goes_everywhere = COMMA_BETWEEN_DIGITS.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        goes = goes_everywhere or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if goes else " ")
    return PERIOD_BEFORE_NO_DIGIT.sub("", cleaned, count=MOST_PERIODS_REMOVED)


def normalise_words(text: str) -> str:
    """Step 4."""
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(APOSTROPHE_PUT_BACK.get(word, word) for word in words if word not in ARTICLES)
