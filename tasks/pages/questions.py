"""What is asked about a page, in which words, and what is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .page import BLANK, Entry, Page, Place

SHORT_KINDS: tuple[str, ...] = ("value_of_key", "key_of_value", "cell", "larger", "below", "count")
LONG_KINDS: tuple[str, ...] = ("read_line", "read_entries")
QUESTION_KINDS: tuple[str, ...] = SHORT_KINDS + LONG_KINDS

# How many glyphs a line that is read aloud has, and all entries together.
_LINE_LENGTHS, _ENTRIES_LENGTHS = range(8, 21), range(20, 61)

_QUESTIONS = (
    "what is the value of",
    "which key has the value",
    "what is in row and column",
    "which is larger , or",
    "which key is below",
    "how many entries rows are there",
    "read the line of",
    "read all the entries",
)
WORDS: tuple[str, ...] = tuple(sorted({word for words in _QUESTIONS for word in words.split() if word != ","}))
"""Every word that a question can contain beside keys and values, sorted."""


@dataclass(frozen=True)
class Question:
    """
    A question, its answer, and where on the page the answer is read.

    Attributes:
        kind: one of `QUESTION_KINDS`.
        question: words of `WORDS`, keys, values and punctuation, separated by single spaces.
        answer: a key, a value, a number, or what the page says, words separated by single spaces.
        places: rows and columns of the glyphs that tell the answer.
    """

    kind: str
    question: str
    answer: str
    places: tuple[Place, ...]


def kinds_of_page(page: Page, kinds: Sequence[str] = QUESTION_KINDS) -> list[str]:
    """Those of `kinds` that this page can be asked, in their order. Raises `ValueError` for an unknown kind."""
    require_kinds(kinds)
    return [kind for kind in kinds if _can_be_asked(page, kind)]


def require_kinds(kinds: Sequence[str]) -> None:
    """Raises `ValueError` for a kind that is unknown."""
    for kind in kinds:
        if kind not in _ASKERS:
            raise ValueError(f"kinds contains {kind!r}; allowed are {', '.join(QUESTION_KINDS)}")


def ask_questions(page: Page, rng: np.random.Generator, kinds: Sequence[str]) -> list[Question]:
    """
    Asks one question per requested kind. A kind may be requested more than once; its questions then differ, as far as
    the page has enough of them.

    Args:
        rng: decides which of the possible questions are asked.
        kinds: the kinds to ask.

    Raises:
        ValueError: if a kind is unknown or not for this page, see [`kinds_of_page`].
    """
    asked: list[Question] = []
    for kind in kinds:
        if not kinds_of_page(page, [kind]):
            raise ValueError(f"kinds contains {kind!r}, which a page of the form {page.form!r} cannot be asked")
        for _ in range(30):
            question, answer, places = _ASKERS[kind](page, rng)
            if all(question != earlier.question for earlier in asked):
                break
        asked.append(Question(kind, question, answer, tuple(places)))
    return asked


# A question, its answer, and the places that tell it.
_Asked = tuple[str, str, Sequence[Place]]


def _can_be_asked(page: Page, kind: str) -> bool:
    if kind == "read_line":
        return bool(_readable_lines(page))
    if kind == "read_entries":
        return len(_read_entries(page)[1]) in _ENTRIES_LENGTHS
    if kind in ("larger", "below") and len(_first_entries(page)) < 2:
        return False
    if kind in ("value_of_key", "key_of_value", "larger"):
        return page.form != "table"
    return kind != "cell" or page.form == "table"


def _entry_of(page: Page, rng: np.random.Generator) -> Entry:
    return page.entries[rng.integers(len(page.entries))]


def _first_entries(page: Page) -> list[Entry]:
    """The first entry of each line that has any, from the top."""
    first = {entry.row: entry for entry in reversed(page.entries)}
    return [first[row] for row in sorted(first)]


def _readable_lines(page: Page) -> list[Entry]:
    return [entry for entry in _first_entries(page) if int((page.glyphs[entry.row] != BLANK).sum()) in _LINE_LENGTHS]


def _ask_value_of_key(page: Page, rng: np.random.Generator) -> _Asked:
    entry = _entry_of(page, rng)
    return f"what is the value of {entry.key} ?", entry.value, entry.key_places + entry.value_places


def _ask_key_of_value(page: Page, rng: np.random.Generator) -> _Asked:
    entry = _entry_of(page, rng)
    return f"which key has the value {entry.value} ?", entry.key, entry.key_places + entry.value_places


def _ask_cell(page: Page, rng: np.random.Generator) -> _Asked:
    entry = _entry_of(page, rng)
    places = entry.key_places + entry.column_places + entry.value_places
    return f"what is in row {entry.key} and column {entry.column} ?", entry.value, places


def _ask_larger(page: Page, rng: np.random.Generator) -> _Asked:
    first, second = (page.entries[number] for number in rng.permutation(len(page.entries))[:2])
    places = first.key_places + first.value_places + second.key_places + second.value_places
    larger = max(first, second, key=lambda entry: entry.value)
    return f"which is larger , {first.key} or {second.key} ?", larger.key, places


def _ask_below(page: Page, rng: np.random.Generator) -> _Asked:
    lines = _first_entries(page)
    number = int(rng.integers(len(lines) - 1))
    upper, lower = lines[number], lines[number + 1]
    return f"which key is below {upper.key} ?", lower.key, upper.key_places + lower.key_places


def _ask_count(page: Page, rng: np.random.Generator) -> _Asked:
    lines = _first_entries(page)
    counted = "rows" if page.form == "table" else "entries"
    return f"how many {counted} are there ?", str(len(lines)), [place for line in lines for place in line.key_places]


def _ask_read_line(page: Page, rng: np.random.Generator) -> _Asked:
    lines = _readable_lines(page)
    line = lines[rng.integers(len(lines))]
    places = [(line.row, column) for column in np.flatnonzero(page.glyphs[line.row] != BLANK).tolist()]
    return f"read the line of {line.key} .", page.line(line.row), places


def _ask_read_entries(page: Page, rng: np.random.Generator) -> _Asked:
    words, places = _read_entries(page)
    return "read all the entries .", " ".join(words), places


def _read_entries(page: Page) -> tuple[list[str], list[Place]]:
    """Keys and values in reading order, a table's key once in its row; and the places of their glyphs."""
    words, places = [], []
    for line in _first_entries(page):
        entries = [entry for entry in page.entries if entry.row == line.row]
        words += [line.key, *(entry.value for entry in entries)]
        places += [*line.key_places, *(place for entry in entries for place in entry.value_places)]
    return words, places


_ASKERS: dict[str, Callable[[Page, np.random.Generator], _Asked]] = {
    "value_of_key": _ask_value_of_key,
    "key_of_value": _ask_key_of_value,
    "cell": _ask_cell,
    "larger": _ask_larger,
    "below": _ask_below,
    "count": _ask_count,
    "read_line": _ask_read_line,
    "read_entries": _ask_read_entries,
}
