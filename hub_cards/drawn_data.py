"""What cards say of the data that AdaVTP draws itself, by the names that commands and recipes call them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DrawnData:
    """
    Attributes:
        name: as cards write it.
        question: an example of what is asked.
        content: what the pictures show, and what the questions are about.
        license: of the pictures, in the Hub's spelling.
        source: where what is drawn comes from, in the Hub's spelling.
    """

    name: str
    question: str
    content: str
    license: str
    source: str


DRAWN_DATA = {
    "digit-scenes": DrawnData(
        name="digit scenes",
        question="What colour is the largest digit?",
        content="synthetic scenes of coloured handwritten digits, and the questions are about their values, colours "
        "and places",
        # The handwriting's; its attribution is on the card.
        license="cc-by-4.0",
        source="extended|other-optical-recognition-of-handwritten-digits",
    ),
    "pages": DrawnData(
        name="pages",
        question="How many entries are there?",
        content="synthetic pages of dense text, and the questions ask for what stands in an entry, a cell or a line",
        license="apache-2.0",
        source="original",
    ),
}
