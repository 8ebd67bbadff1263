"""A report as one file that a person opens: tables that sort, the curves, and what each setting kept of each picture.

Nothing is loaded from anywhere: pictures, curves and numbers are inside. Each picture is there once, and what a
setting kept of it is drawn over it, so that hundreds of settings of an example cost little more than one.
"""

import base64
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..runs import Answer
from .blocks import Command, Curves, Table, inline, number_of
from .joined import Measured, kept_label
from .sections import report_sections

TEMPLATE = "page.html.jinja"

# Wider tables are folded.
_MOST_COLUMNS = 10

_PIXELS_PER_POINT = 1.25


def report_page(numbers: dict[str, Any], viewed: Sequence[dict[str, Any]], curves: str) -> str:
    """
    The page (HTML).

    Args:
        numbers: from [`report_numbers`].
        viewed: of each checkpoint the first examples, see [`viewed_examples`].
        curves: the curves as SVG.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": inline, "number": number_of}
    kinds = {"table": Table, "command": Command, "curves": Curves}
    environment.tests |= {name: lambda block, kind=kind: isinstance(block, kind) for name, kind in kinds.items()}
    return environment.get_template(TEMPLATE).render(
        title=numbers["title"],
        sections=report_sections(numbers),
        curves=Markup(_as_element(curves)),
        viewer={"checkpoints": [one for one in viewed if one["examples"]]},
        most_columns=_MOST_COLUMNS,
    )


def _as_element(svg: str) -> str:
    """The SVG without what belongs to a file, as wide as the page but never so narrow that it cannot be read."""
    element = svg[svg.index("<svg") :]
    points = float(re.search(r'viewBox="0 0 ([\d.]+)', element)[1])
    start, rest = element.split(">", 1)
    start = re.sub(r' (width|height)="[^"]*"', "", start)
    return f'{start} style="min-width: {_PIXELS_PER_POINT * points:.0f}px">{rest}'


def viewed_examples(measured: Measured, about: dict[str, Any]) -> dict[str, Any]:
    """
    The examples of one checkpoint that have pictures, with every setting's answer and what it kept; `about` has the
    numbers, one of `checkpoints` of [`report_numbers`].
    """
    settings = list(measured.settings.values())
    columns = list(zip(*(setting.answers for setting in settings), strict=True))
    return {
        "name": f"{about['checkpoint']} on {about['data']}",
        "num_layers": about["num_layers"],
        "is_share": about["is_share"],
        "reducers": about["reducers"],
        "budgets": [budget["num_keep"] for budget in about["budgets"]],
        "labels": [kept_label(budget["num_keep"]) for budget in about["budgets"]],
        "examples": [
            {
                "id": str(answers[0].id),
                "question": answers[0].question,
                "answers": answers[0].answers,
                "category": answers[0].category,
                **_picture(measured, answers),
            }
            for answers in columns
            if any(answer.layers_seen for answer in answers)
        ],
    }


def _picture(measured: Measured, answers: Sequence[Answer]) -> dict[str, Any]:
    """An example's picture, in panels of units with their place and grid, and what every setting kept of it."""
    index = answers[0].index
    run = next((run for run in measured.runs if run.picture(index).is_file()), None)
    if run is None:
        return {"picture": None, "answered": [_answered(answer, 0) for answer in answers]}
    shown, grids = run.shown_image(index)
    sizes = [rows * columns for rows, columns in grids]
    begins = list(accumulate(sizes, initial=0))
    panels = [
        [{"place": shown.places[unit], "grid": grids[unit], "begin": begins[unit]} for unit in panel]
        for panel in shown.panels
    ]
    return {
        "picture": f"data:image/png;base64,{base64.b64encode(run.picture(index).read_bytes()).decode()}",
        "shape": shown.image.size,
        "panels": panels,
        "answered": [_answered(answer, sum(sizes)) for answer in answers],
    }


def _answered(answer: Answer, num_tokens: int) -> dict[str, Any]:
    """
    One cell of the viewer: what was answered, and the layers that saw each of a picture's tokens, one byte each, or
    `None` where the picture shows others.
    """
    seen = answer.layers_seen or []
    return {
        "reducer": answer.reducer,
        "num_keep": answer.budget if answer.num_keep is None else answer.num_keep,
        "prediction": answer.prediction,
        "score": answer.score,
        "tokens": answer.visual_tokens,
        "layers": base64.b64encode(bytes(seen)).decode() if seen and len(seen) == num_tokens else None,
    }
