"""`adavtp families`: the model families that take a budget."""

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .console import console


def families(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List every model family: what a budget is for, where reducers can act, and which cannot, with the reason."""
    from ..evaluation.family_table import family_table

    rows, reasons = family_table(), {}
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=f"{len(rows)} families", show_lines=True)
    for column in ("family", "units", "stages", "refused, and the number of the reason"):
        table.add_column(column, no_wrap=column == "family")
    for row in rows:
        of_reason: dict[int, list[str]] = {}
        for name, reason in row["refused"].items():
            reason = without_names(reason, name, row["name"])
            of_reason.setdefault(reasons.setdefault(reason, len(reasons) + 1), []).append(name)
        refused = [f"{', '.join(names)} ({number})" for number, names in sorted(of_reason.items())]
        table.add_row(row["name"], ", ".join(row["units"]), ", ".join(row["stages"]), "\n".join(refused))
    console.print(table)
    for reason, number in reasons.items():
        console.print(f"({number}) {escape(reason)}")


def without_names(reason: str, reducer: str, family: str) -> str:
    """A reason in words that fit every reducer and family that has it."""
    replaced = {f"Reducer {reducer!r}": "It", f"A {family!r} model": "This model", f"a {family!r} model": "this model"}
    for name, word in replaced.items():
        reason = reason.replace(name, word)
    return reason
