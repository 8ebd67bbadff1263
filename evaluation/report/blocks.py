"""What a report is made of, and how each part is written as Markdown; page.html.jinja has the same as HTML."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        caption: what the numbers are.
        columns: headings; the first names the rows.
        rows: of as many cells as there are columns, with `code` and **bold**.
        folded: whether a page shows it only when it is asked for.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]
    folded: bool = False


@dataclass(frozen=True)
class Command:
    """A command as it was typed."""

    text: str


@dataclass(frozen=True)
class Curves:
    """The place of the curves."""

    description: str


# A text is a paragraph, a list of texts stands one below the other.
Block = str | list[str] | Table | Command | Curves


class Section(NamedTuple):
    """A heading, with its level as in HTML, and what stands below it."""

    title: str
    level: int
    blocks: list[Block]


def as_markdown(block: Block, curves: str = "") -> str:
    """One block as Markdown; `curves` is their path from the file."""
    match block:
        case Table():
            head = [block.columns, ["---", *["---:"] * (len(block.columns) - 1)]]
            # A bar inside a cell would end it.
            body = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
            lines = [f"| {' | '.join(cells)} |" for cells in [*head, *body]]
            if block.folded:
                # Inside a line of HTML no Markdown is read.
                opening = f"<details><summary>{inline(block.caption)}</summary>"
                return "\n".join([opening, "", *lines, "", "</details>"])
            return "\n".join([f"{block.caption}:", "", *lines])
        case Command():
            return f"```\n{block.text}\n```"
        case Curves():
            return f"![{block.description}]({curves})"
        case list():
            return "\n".join(f"- {item}" for item in block)
        case _:
            return block


def inline(text: str) -> Markup:
    """`code`, **bold** and \\* of a text as HTML."""
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    html = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", html)
    return Markup(html.replace("\\*", "*"))


def number_of(cell: str) -> float | None:
    """The number that a cell begins with, which a page sorts by; `None` where it begins with something else."""
    found = re.match(r"\**([+-]?\d+(?:\.\d+)?)", cell)
    return float(found[1]) if found else None
