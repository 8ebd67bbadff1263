"""Setting a page: which form, which entries, where, in which face, on which paper."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from ..splits import is_whole, random_numbers
from .page import (
    BLANK,
    CAPITALS,
    CELL,
    FORMS,
    GLYPHS,
    MOST_ENTRIES,
    NUM_CELLS,
    SMALL,
    Entry,
    Page,
    Place,
    split_of_pair,
)
from .questions import WORDS
from .typefaces import FACES, NUDGE, glyph_masks

# A page has at least five entries, unless it is asked to have fewer.
_FEWEST_ENTRIES = 5
_MOST_ROWS, _MOST_COLUMNS = 7, 4
_LARGEST_MARGIN = 4
# Of the places for other text, a line or the rest of one, the share that has it.
TEXT_SHARE = 0.85


def draw_page(
    split: str,
    index: int,
    seed: int = 0,
    max_entries: int = MOST_ENTRIES,
    text_share: float = TEXT_SHARE,
    forms: Sequence[str] = FORMS,
) -> Page:
    """
    Draws one page; the same arguments always give the same one.

    Args:
        split: `"train"`, `"validation"` or `"test"`. Each has its own faces, its own margins and its own pairs of key
            and value.
        index: which page of the split, 0 or more. The forms take turns.
        seed: which of the endless sequences of pages, 0 or more.
        max_entries: most entries on a page, 1 to 15; pages with few are easier to learn from. A table has four cells
            at least.
        text_share: of the places for text that no question asks about, the share that has it, 0 to 1.
        forms: of `FORMS`.

    Raises:
        ValueError: if an argument is outside what is allowed.
    """
    rng = random_numbers(split, index, seed)
    require_contents(max_entries, text_share, forms)
    form = forms[index % len(forms)]
    setter = _Setter(split, text_share, rng)
    _SETTERS[form](setter, max_entries)
    face = FACES[split][rng.integers(len(FACES[split]))]
    image = _print(setter.glyphs, setter.underlined, face, rng)
    return Page(Image.fromarray(image), form, setter.glyphs, tuple(setter.entries), index)


def require_contents(max_entries: int, text_share: float, forms: Sequence[str]) -> None:
    """Raises `ValueError` for more entries than a page has room for, or none, a share that is none, or such a form."""
    if not is_whole(max_entries) or not 1 <= max_entries <= MOST_ENTRIES:
        raise ValueError(f"max_entries is {max_entries!r}; allowed are 1 to {MOST_ENTRIES}")
    if not 0 <= text_share <= 1:
        raise ValueError(f"text_share is {text_share!r}; allowed are 0 to 1")
    if not forms or not set(forms) <= set(FORMS):
        raise ValueError(f"forms is {forms!r}; allowed are some of {', '.join(FORMS)}")


class _Setter:
    """A page while it is set: its grid, what is on it so far, and where its text begins and ends."""

    def __init__(self, split: str, text_share: float, rng: np.random.Generator) -> None:
        self.split, self.text_share, self.rng = split, text_share, rng
        self.glyphs = np.full((NUM_CELLS, NUM_CELLS), BLANK)
        self.entries: list[Entry] = []
        self.underlined: list[tuple[int, int, int]] = []
        self.left, self.end = self._margins()

    def _margins(self) -> tuple[int, int]:
        """First column of the text, and the one behind its last. A fifth of the pairs is never met in training."""
        while True:
            left, right = self.rng.integers(0, _LARGEST_MARGIN + 1, 2).tolist()
            if ((3 * left + right) % 5 == 0) == (self.split != "train"):
                return left, NUM_CELLS - right

    def number(self, least: int, most: int) -> int:
        """A whole number from `least` to `most`, both included."""
        return int(self.rng.integers(least, most + 1))

    def keys(self, count: int) -> list[str]:
        """Keys that differ."""
        numbers = self.rng.permutation(len(CAPITALS) ** 2)[:count].tolist()
        return [CAPITALS[number // len(CAPITALS)] + CAPITALS[number % len(CAPITALS)] for number in numbers]

    def values(self, keys: Sequence[str]) -> list[str]:
        """A value for each key, none twice, each in a pair of the split."""
        free = [f"{number:02d}" for number in self.rng.permutation(100).tolist()]
        values = []
        for key in keys:
            value = next(value for value in free if split_of_pair(key, value) == self.split)
            free.remove(value)
            values.append(value)
        return values

    def put(self, row: int, column: int, text: str) -> tuple[Place, ...]:
        """Sets glyphs side by side; returns their places."""
        self.glyphs[row, column : column + len(text)] = [GLYPHS.index(glyph) for glyph in text]
        return tuple((row, column + offset) for offset in range(len(text)))

    def text(self, row: int, start: int, end: int) -> None:
        """Perhaps sets small letters, in words of two to six, from column `start` up to `end`."""
        if self.rng.random() >= self.text_share:
            return
        while end - start >= 2:
            length = min(self.number(2, 6), end - start)
            word = "".join(SMALL[number] for number in self.rng.integers(0, len(SMALL), length))
            # A word that questions are made of would be one token where the page has several glyphs.
            if word not in WORDS:
                self.put(row, start, word)
                start += length + 1

    def text_around(self, first: int, last: int) -> None:
        """Sets text above and below the lines from `first` to `last`, one line apart."""
        for row in [*range(first - 1), *range(last + 2, NUM_CELLS)]:
            self.text(row, self.left, self.end - self.number(0, 5))


def _set_ledger(page: _Setter, most: int) -> None:
    """Key at the left, value at the right or behind the key, and text in the rest of the line."""
    keys = page.keys(page.number(min(_FEWEST_ENTRIES, most), most))
    pitch = page.number(1, 2) if 2 * len(keys) <= NUM_CELLS else 1
    top = page.number(0, NUM_CELLS - pitch * (len(keys) - 1) - 1)
    behind_key = page.rng.random() < 0.3
    column = page.left + 3 if behind_key else page.end - 2
    for number, (key, value) in enumerate(zip(keys, page.values(keys), strict=True)):
        row = top + number * pitch
        key_places, value_places = page.put(row, page.left, key), page.put(row, column, value)
        start, end = (column + 3, page.end) if behind_key else (page.left + 3, column - 1)
        page.text(row, start, end - page.number(0, 4))
        page.entries.append(Entry(key, "", value, row, key_places, (), value_places))
    page.text_around(top, top + pitch * (len(keys) - 1))


def _set_notes(page: _Setter, most: int) -> None:
    """Lines of text, some of them with an underlined key and value anywhere in it."""
    keys = page.keys(page.number(min(_FEWEST_ENTRIES, most), most))
    marked = dict(zip(sorted(page.rng.permutation(NUM_CELLS)[: len(keys)].tolist()), keys, strict=True))
    values = dict(zip(keys, page.values(keys), strict=True))
    for row in range(NUM_CELLS):
        if row not in marked:
            page.text(row, page.left, page.end - page.number(0, 4))
            continue
        key, column = marked[row], page.number(page.left, page.end - 5)
        key_places, value_places = page.put(row, column, key), page.put(row, column + 3, values[key])
        page.text(row, page.left, column - 1)
        page.text(row, column + 6, page.end)
        page.underlined.append((row, column, column + 5))
        page.entries.append(Entry(key, "", values[key], row, key_places, (), value_places))


def _set_table(page: _Setter, most: int) -> None:
    """Heads of rows at the left, heads of columns above, a value in every cell, and text around it."""
    num_columns = page.number(2, max(2, min(_MOST_COLUMNS, most // 2)))
    num_rows = page.number(2, max(2, min(_MOST_ROWS, most // num_columns)))
    names = page.keys(num_rows + num_columns)
    rows, columns = names[:num_rows], names[num_rows:]
    values = iter(page.values([key for key in rows for _ in columns]))
    pitch, gap = page.number(1, 2), page.number(3, (page.end - page.left - 2) // num_columns)
    top = page.number(0, NUM_CELLS - pitch * num_rows - 1)
    heads = [page.put(top, page.left + gap * number, column) for number, column in enumerate(columns, start=1)]
    for number, key in enumerate(rows, start=1):
        row = top + pitch * number
        key_places = page.put(row, page.left, key)
        for at, (column, head) in enumerate(zip(columns, heads, strict=True), start=1):
            value = next(values)
            places = page.put(row, page.left + gap * at, value)
            page.entries.append(Entry(key, column, value, row, key_places, head, places))
    page.text_around(top, top + pitch * num_rows)


_SETTERS: dict[str, Callable[[_Setter, int], None]] = {
    "ledger": _set_ledger,
    "notes": _set_notes,
    "table": _set_table,
}


def _print(
    glyphs: np.ndarray, underlined: Sequence[tuple[int, int, int]], face: str, rng: np.random.Generator
) -> np.ndarray:
    """Ink on paper: uint8 `[height, width, 3]`."""
    masks = glyph_masks(face)
    masks = np.concatenate([masks, np.zeros_like(masks[:1])])
    # A line is out of place as a whole, and each of its glyphs a little more to the side.
    down = np.broadcast_to(rng.integers(0, 2 * NUDGE + 1, (NUM_CELLS, 1)), glyphs.shape)
    right = rng.integers(0, 2 * NUDGE + 1, glyphs.shape)
    opacity = masks[glyphs, down, right].transpose(0, 2, 1, 3).reshape(NUM_CELLS * CELL, NUM_CELLS * CELL)
    for row, start, end in underlined:
        opacity[row * CELL + CELL - 1, start * CELL : end * CELL] = 0.8
    paper = rng.uniform(170, 255) + rng.uniform(-12, 12, 3)
    ink = rng.uniform(0, 90) + rng.uniform(-20, 20, 3)
    slope = np.linspace(0, 1, NUM_CELLS * CELL)
    shade = rng.uniform(-15, 15) * slope[:, None] + rng.uniform(-15, 15) * slope[None]
    grain = rng.normal(0, rng.uniform(1, 8), opacity.shape)
    pixels = paper + (shade + grain)[..., None] + opacity[..., None] * (ink - paper)
    return pixels.clip(0, 255).astype(np.uint8)
