"""What a page is: a grid of glyphs, the entries that can be asked for, and what each place shows."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

CELL = 8
"""Side of a glyph's place in pixels; at patches of this size a glyph is one visual token."""

NUM_CELLS = 24
"""Glyphs in a line, and lines on a page: 24 x 24 = 576 visual tokens."""

CAPITALS, DIGITS, SMALL = "ABCDEFGHJKLMNPRSTUVWXYZ", "0123456789", "abcdefghijklmnopqrstuvwxyz"
"""Keys are two capitals, values two digits, all other text is small letters. I, O and Q look like others."""

GLYPHS = CAPITALS + DIGITS + SMALL
BLANK = len(GLYPHS)
"""Label of a place without a glyph."""

MOST_ENTRIES = 15
"""Most entries on a page."""

# Of ten pairs of key and value, how many are asked for in each split.
_TEST_PAIRS, _VALIDATION_PAIRS = 2, 1

FORMS: tuple[str, ...] = ("ledger", "notes", "table")

Place = tuple[int, int]


@dataclass(frozen=True)
class Entry:
    """
    One value on a page and what it is found by.

    Attributes:
        key: two capitals: of a ledger or of notes the key before the value, of a table the head of the row.
        column: two capitals at the head of a table's column; empty elsewhere.
        value: two digits.
        row: line of the page, 0 at the top.
        key_places, column_places, value_places: row and column of each of their glyphs.
    """

    key: str
    column: str
    value: str
    row: int
    key_places: tuple[Place, ...]
    column_places: tuple[Place, ...]
    value_places: tuple[Place, ...]


@dataclass(frozen=True)
class Page:
    """
    A page and everything that is on it.

    Attributes:
        image: `24 * CELL` pixels a side.
        form: one of `FORMS`.
        glyphs: `[24, 24]` int64, indices into `GLYPHS` or `BLANK`.
        entries: in reading order.
        index: which page of its split.
    """

    image: Image.Image
    form: str
    glyphs: np.ndarray
    entries: tuple[Entry, ...]
    index: int

    def line(self, row: int) -> str:
        """A line as one reads it: its words, separated by single spaces."""
        return " ".join("".join(" " if glyph == BLANK else GLYPHS[glyph] for glyph in self.glyphs[row]).split())


def split_of_pair(key: str, value: str) -> str:
    """The split that shows this key with this value; no other does."""
    number = (7 * CAPITALS.index(key[0]) + 3 * CAPITALS.index(key[1]) + 13 * int(value[0]) + 9 * int(value[1])) % 10
    if number < _TEST_PAIRS:
        return "test"
    return "validation" if number < _TEST_PAIRS + _VALIDATION_PAIRS else "train"


PATCH_WORDS: dict[str, tuple[str, ...]] = {
    "patch_glyphs": (*GLYPHS, *(f"##{glyph}" for glyph in GLYPHS)),
    "patch_keys_first": tuple(CAPITALS),
    "patch_keys_second": tuple(f"##{capital}" for capital in CAPITALS),
    "patch_columns_first": tuple(CAPITALS),
    "patch_columns_second": tuple(f"##{capital}" for capital in CAPITALS),
    "patch_values_first": tuple(DIGITS),
    "patch_values_second": tuple(f"##{digit}" for digit in DIGITS),
    # Of the lines with entries, from the top; in letters, which nothing else that is told of an entry has.
    "patch_lines": tuple(SMALL[:MOST_ENTRIES]),
}
"""What is told of each patch, and the token of each class; one more class, the last, has nothing to tell."""

PATCH_LABELS: dict[str, int] = {name: len(words) + 1 for name, words in PATCH_WORDS.items()}
"""What is told of each patch, and in how many classes."""


def patch_labels(page: Page) -> dict[str, np.ndarray]:
    """
    What each patch shows, and what it belongs to: the glyph, first in its word or further on; for glyphs of entries
    also the two capitals of the key, of the column, the two digits of the value, and which of the lines with entries
    they are in. In a line of a ledger or a table every glyph belongs to the key. A table's key has no one value.

    Returns:
        For each name in `PATCH_LABELS`, int64 `[num_patches]`, row by row from the top left.
    """
    labels = {name: np.full(page.glyphs.shape, classes - 1) for name, classes in PATCH_LABELS.items()}
    is_glyph = page.glyphs != BLANK
    goes_on = np.pad(is_glyph, ((0, 0), (1, 0)))[:, :-1]
    labels["patch_glyphs"] = np.where(is_glyph, page.glyphs + len(GLYPHS) * goes_on, 2 * len(GLYPHS))
    lines = sorted({entry.row for entry in page.entries})
    for entry in page.entries:
        for place in (*entry.key_places, *entry.value_places):
            labels["patch_lines"][place] = lines.index(entry.row)
        own = (*entry.value_places, *(() if entry.column else entry.key_places))
        line = np.flatnonzero(page.glyphs[entry.row] != BLANK)
        of_key = own if page.form == "notes" else [(entry.row, column) for column in line]
        for number, which in enumerate(("first", "second")):
            for name, text, alphabet, places in (
                ("patch_keys", entry.key, CAPITALS, of_key),
                ("patch_columns", entry.column, CAPITALS, entry.value_places if entry.column else ()),
                ("patch_values", entry.value, DIGITS, own),
            ):
                for place in places:
                    labels[f"{name}_{which}"][place] = alphabet.index(text[number])
    return {name: label.reshape(-1) for name, label in labels.items()}
