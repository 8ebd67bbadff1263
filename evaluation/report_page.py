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

from .report import report_sections
from .report_blocks import Command, Curves, Listing, Table
from .report_numbers import Answered, Measured

TEMPLATE = "report_page.html.jinja"

# Wider tables are folded.
_MOST_COLUMNS = 10

_PIXELS_PER_POINT = 1.25


def report_page(numbers: dict[str, Any], measured: Sequence[Measured], curves: str) -> str:
    """
    The page (HTML).

    Args:
        numbers: from [`report_numbers`].
        measured: what they were made from, with the pictures of the first examples.
        curves: the curves as SVG.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = _inline
    environment.tests |= {"table": _is(Table), "listing": _is(Listing), "command": _is(Command), "curves": _is(Curves)}
    viewed = [_viewed(one, about) for one, about in zip(measured, numbers["checkpoints"], strict=True)]
    return environment.get_template(TEMPLATE).render(
        title=numbers["title"],
        sections=report_sections(numbers),
        curves=Markup(_as_element(curves)),
        viewer={"checkpoints": [one for one in viewed if one["examples"]]},
        most_columns=_MOST_COLUMNS,
    )


def _is(kind: type) -> Any:
    return lambda block: isinstance(block, kind)


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


def _viewed(measured: Measured, about: dict[str, Any]) -> dict[str, Any]:
    """The examples of one checkpoint that have pictures, with every setting's answer and what it kept."""
    kept, pictures = {}, {}
    for run in measured.runs:
        kept |= {(reducer, budget, index): seen for (index, reducer, budget), seen in run.kept().items()}
        for index, _, _ in run.kept():
            if run.picture(index).is_file():
                pictures.setdefault(index, run.picture(index))
    shown = {index for _, _, index in kept}
    settings = list(measured.settings.values())
    return {
        "name": f"{about['checkpoint']} on {about['data']}",
        "num_layers": about["num_layers"],
        "side": round(about["num_patches"] ** 0.5),
        "is_share": about["is_share"],
        "reducers": about["reducers"],
        "budgets": [budget["num_keep"] for budget in about["budgets"]],
        "examples": [
            {
                "id": str(example["id"]),
                "question": example["question"],
                "answers": example["answers"],
                "category": example["category"],
                "picture": _as_data(pictures[example["index"]]) if example["index"] in pictures else None,
                "answered": [_answered(setting, place, example["index"], kept, about) for setting in settings],
            }
            for place, example in enumerate(measured.examples)
            if example["index"] in shown
        ],
    }


def _answered(setting: Answered, place: int, index: int, kept: dict[Any, list[int]], about: dict[str, Any]) -> Any:
    """One cell of the viewer: what was answered, and the layers that saw each patch, one byte each."""
    seen = next((seen for budget in setting.asked if (seen := kept.get((setting.reducer, budget, index)))), None)
    # Several images, or patches that are no square, are not drawn.
    drawn = seen is not None and len(seen) == about["num_patches"] == round(len(seen) ** 0.5) ** 2
    return {
        "reducer": setting.reducer,
        "num_keep": setting.num_keep,
        "prediction": setting.predictions[place],
        "score": float(setting.scores[place]),
        "tokens": float(setting.visual_tokens[place]),
        "layers": base64.b64encode(np.asarray(seen, dtype=np.uint8).tobytes()).decode() if drawn else None,
    }


def _as_data(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
