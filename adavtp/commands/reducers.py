"""`adavtp reducers`: the list of registered reducers."""

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .console import console

NEEDS_IN_WORDS = {
    "attention": "attention row",
    "cls": "CLS",
    "pixel_values": "pixel values",
    "question_ids": "question ids",
    "tower_patches": "tower patches",
}


def reducers(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List every registered reducer: where it acts, what it needs, its parameters and its paper."""
    from ..evaluation.reducer_table import reducer_table

    rows = reducer_table()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=f"{len(rows)} reducers")
    for column in ("reducer", "stage", "trained", "own rule", "needs", "parameters", "paper"):
        table.add_column(column, no_wrap=column in ("reducer", "trained"))
    for row in rows:
        table.add_row(
            row["name"],
            row["stage"] + (f", part of {row['part_of']}" if row["part_of"] else ""),
            "yes" if row["trained"] else "",
            "yes" if row["own_rule"] else "",
            ", ".join(NEEDS_IN_WORDS.get(need, need) for need in row["needs"]),
            escape(", ".join(f"{key}={value}" for key, value in row["parameters"].items())),
            row["paper"],
        )
    console.print(table)
    console.print("own rule: keeps as many as it sees fit where no budget is given.", style="dim")
