"""A report as Markdown."""

from collections.abc import Mapping
from typing import Any

from .blocks import Block, Command, Curves, Listing, Table
from .sections import report_sections

CURVES = "curves.png"


def report_markdown(numbers: dict[str, Any], curves: str = CURVES, pictures: Mapping[str, str] | None = None) -> str:
    """
    The report as Markdown. The finding stands right below the title.

    Args:
        numbers: from [`report_numbers`].
        curves: the curves' path from the file.
        pictures: other pictures to show below the curves: what each shows, and its path.
    """
    first, *sections = report_sections(numbers)
    parts = [f"# {numbers['title']}", *(as_markdown(block, curves) for block in first.blocks)]
    for text, path in (pictures or {}).items():
        parts += [f"![{text.partition('.')[0]}]({path})", text]
    for section in sections:
        parts.append(f"{'#' * section.level} {section.title}")
        parts += [as_markdown(block, curves) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def as_markdown(block: Block, curves: str = CURVES) -> str:
    """One block; see [`report_markdown`]."""
    match block:
        case Table():
            head = [block.columns, ["---", *["---:"] * (len(block.columns) - 1)]]
            # A bar inside a cell would end it.
            body = [[cell.text.replace("|", "\\|") for cell in row] for row in block.rows]
            lines = [f"| {' | '.join(cells)} |" for cells in [*head, *body]]
            return "\n".join([f"{block.caption}:", "", *lines])
        case Listing():
            return "\n".join(f"- {item}" for item in block.items)
        case Command():
            return f"```\n{block.text}\n```"
        case Curves():
            return f"![{block.description}]({curves})"
        case _:
            return block
