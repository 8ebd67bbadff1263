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


LAST = "."
"""What the last line of entries is told in place of the key below it."""

PATCH_WORDS: dict[str, tuple[str, ...]] = {
    "patch_glyphs": (*GLYPHS, *(f"##{glyph}" for glyph in GLYPHS)),
    "patch_keys_first": tuple(CAPITALS),
    "patch_keys_second": tuple(f"##{capital}" for capital in CAPITALS),
    "patch_columns_first": tuple(CAPITALS),
    "patch_columns_second": tuple(f"##{capital}" for capital in CAPITALS),
    "patch_values_first": tuple(DIGITS),
    "patch_values_second": tuple(f"##{digit}" for digit in DIGITS),
    "patch_below_first": (*CAPITALS, LAST),
    "patch_below_second": tuple(f"##{capital}" for capital in CAPITALS),
    "patch_lines_first": tuple(DIGITS),
    "patch_lines_second": tuple(f"##{digit}" for digit in DIGITS),
}
"""What is told of each patch, and the token of each class; one more class, the last, has nothing to tell."""

PATCH_ROLES: dict[str, int] = dict.fromkeys(PATCH_WORDS, 0) | {
    **dict.fromkeys(("patch_below_first", "patch_below_second"), 1),
    **dict.fromkeys(("patch_lines_first", "patch_lines_second"), 2),
}
"""What the words are to a patch: its own, 0; of the line below, 1; the number of its line, 2."""

PATCH_LABELS: dict[str, int] = {name: len(words) + 1 for name, words in PATCH_WORDS.items()}
"""What is told of each patch, and in how many classes."""


def patch_labels(page: Page) -> dict[str, np.ndarray]:
    """
    What each patch shows, and what it belongs to: the glyph, first in its word or further on; for glyphs of entries
    also the two capitals of the key, of the column, and of the key in the next line with entries, the two digits of
    the value, and the number of the line among those with entries, from 1. In a line of a ledger or a table every
    glyph belongs to the key. A table's key has no one value, and the head of a column belongs to its column alone.

    Returns:
        For each name in `PATCH_LABELS`, int64 `[num_patches]`, row by row from the top left.
    """
    labels = {name: np.full(page.glyphs.shape, classes - 1) for name, classes in PATCH_LABELS.items()}
    is_glyph = page.glyphs != BLANK
    goes_on = np.pad(is_glyph, ((0, 0), (1, 0)))[:, :-1]
    labels["patch_glyphs"] = np.where(is_glyph, page.glyphs + len(GLYPHS) * goes_on, 2 * len(GLYPHS))
    key_of_line = {entry.row: entry.key for entry in page.entries}
    lines = sorted(key_of_line)
    for entry in page.entries:
        number = lines.index(entry.row)
        below = key_of_line[lines[number + 1]] if number + 1 < len(lines) else LAST
        told_of_line = {"patch_below_first": below[0], "patch_lines_first": str(number + 1)[0]}
        told_of_line |= {"patch_below_second": f"##{below[1:]}", "patch_lines_second": f"##{str(number + 1)[1:]}"}
        for name, word in told_of_line.items():
            for place in (*entry.key_places, *entry.value_places) if word != "##" else ():
                labels[name][place] = PATCH_WORDS[name].index(word)
        own = (*entry.value_places, *(() if entry.column else entry.key_places))
        line = np.flatnonzero(page.glyphs[entry.row] != BLANK)
        of_key = own if page.form == "notes" else [(entry.row, column) for column in line]
        of_column = (*entry.column_places, *entry.value_places) if entry.column else ()
        for number, which in enumerate(("first", "second")):
            for name, text, alphabet, places in (
                ("patch_keys", entry.key, CAPITALS, of_key),
                ("patch_columns", entry.column, CAPITALS, of_column),
                ("patch_values", entry.value, DIGITS, own),
            ):
                for place in places:
                    labels[f"{name}_{which}"][place] = alphabet.index(text[number])
    return {name: label.reshape(-1) for name, label in labels.items()}
