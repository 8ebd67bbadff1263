"""Budgets and reducers as people write them, and what they mean.

`reducer_label` in settings.py is the way back.
"""

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..modeling.modeling_adavtp import ReducerSpec


def budget_of_text(text: str) -> float | int:
    """
    `0.4` is a fraction, `57` a number of tokens, as in Python.

    Raises:
        ValueError: if it is no number. Whether a model allows the number, it says itself.
    """
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither a fraction such as 0.4 nor a number of tokens.") from error


def reducer_of_text(text: str) -> "ReducerSpec":
    """
    A reducer from its text: a name, a name with parameters as in `fastv:layer=2:rows=last`, or several with commas
    between them, a stack.

    Raises:
        ValueError: if it has none of these forms.
    """
    entries = [_entry(part.strip()) for part in re.split(r",(?![^\[]*\])", text)]
    return entries if len(entries) > 1 or isinstance(entries[0], dict) else entries[0]


def _entry(text: str) -> str | dict[str, Any]:
    name, *parameters = text.split(":")
    pairs = [parameter.partition("=") for parameter in parameters]
    if not name or any(not key or not equals for key, equals, _ in pairs):
        raise ValueError(f"{text!r} is no reducer; write a name, or NAME:PARAMETER=VALUE as in fastv:layer=2.")
    return {"name": name, **{key: _value(value) for key, _, value in pairs}} if pairs else name


def _value(text: str) -> Any:
    """JSON where it is some, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
