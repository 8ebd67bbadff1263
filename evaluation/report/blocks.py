"""What a report is made of: sections of sentences, tables, listings, commands and curves.

How each of them is written is said where a report is: as Markdown and as a page.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """What is written in a table's cell, with `code` and **bold**, and the number to sort by, if it has one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        caption: what the numbers are.
        columns: headings; the first names the rows.
        rows: of as many cells as there are columns.
    """

    caption: str
    columns: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Listing:
    """Sentences, one below the other."""

    items: list[str]


@dataclass(frozen=True)
class Command:
    """A command as it was typed."""

    text: str


@dataclass(frozen=True)
class Curves:
    """The place of the curves."""

    description: str


Block = str | Table | Listing | Command | Curves


@dataclass
class Section:
    """
    Attributes:
        title, level: the heading, and 2 or 3 as in HTML.
        folded: whether a page shows its tables only when they are asked for.
        blocks: paragraphs (text), tables, listings, commands and curves, in their order.
    """

    title: str
    level: int
    blocks: list[Block] = field(default_factory=list)
    folded: bool = False
