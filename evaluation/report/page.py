"""A report as one file that a person opens: tables that sort, the curves, and what each setting kept of each picture.

Nothing is loaded from anywhere: pictures, curves and numbers are inside. Each picture is there once, and what a
setting kept of it is drawn over it, so that hundreds of settings of an example cost little more than one.
"""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..runs import Answer
from .blocks import Command, Curves, Table, number_of
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
    environment.filters |= {"inline": _inline, "number": number_of}
    kinds = {"table": Table, "command": Command, "curves": Curves}
    environment.tests |= {name: lambda block, kind=kind: isinstance(block, kind) for name, kind in kinds.items()}
    return environment.get_template(TEMPLATE).render(
        title=numbers["title"],
        sections=report_sections(numbers),
        curves=Markup(_as_element(curves)),
        viewer={"checkpoints": [one for one in viewed if one["examples"]]},
        most_columns=_MOST_COLUMNS,
    )


def _inline(text: str) -> Markup:
    """`code`, **bold** and \\* as they are meant."""
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    html = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", html)
    return Markup(html.replace("\\*", "*"))


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
        "side": round((about["num_patches"] or 0) ** 0.5),
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
                "picture": _picture(measured, answers[0].index),
                "answered": [_answered(answer, about) for answer in answers],
            }
            for answers in columns
            if any(answer.layers_seen for answer in answers)
        ],
    }


def _answered(answer: Answer, about: dict[str, Any]) -> dict[str, Any]:
    """One cell of the viewer: what was answered, and the layers that saw each patch, one byte each."""
    seen = answer.layers_seen or []
    # Several images, or patches that are no square, are not drawn.
    is_drawn = len(seen) == about["num_patches"] == round(len(seen) ** 0.5) ** 2
    return {
        "reducer": answer.reducer,
        "num_keep": answer.budget if answer.num_keep is None else answer.num_keep,
        "prediction": answer.prediction,
        "score": answer.score,
        "tokens": answer.visual_tokens,
        "layers": base64.b64encode(np.asarray(seen, dtype=np.uint8).tobytes()).decode() if is_drawn else None,
    }


def _picture(measured: Measured, index: int) -> str | None:
    paths = (run.picture(index) for run in measured.runs)
    path = next((path for path in paths if path.is_file()), None)
    return path and f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
