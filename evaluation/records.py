"""Files of fields, read and checked before anything relies on them: JSON that runs leave, YAML that people write."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml


def read_record(path: str | Path, types: Mapping[str, Any], form: Literal["JSON", "YAML"] = "JSON") -> dict[str, Any]:
    """
    Reads an object.

    Args:
        path: of the file.
        types: fields that it has to have, and their types as annotations write them.
        form: of the file.

    Raises:
        ValueError: if the file is not of that form, is no object, or lacks a field or has another type in it; the
            message names both.
    """
    read = json.loads if form == "JSON" else yaml.safe_load
    try:
        record = read(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not {form}: {error}") from error
    check_record(record, types, str(path))
    return record


def check_record(record: Any, types: Mapping[str, Any], where: str) -> None:
    """`ValueError` if it is no object, or lacks one of the fields or has another type in it; `where` names it."""
    if not isinstance(record, dict):
        fields = f" with {', '.join(types)}" if types else ""
        raise ValueError(f"{where} is a {type(record).__name__}; expected is an object{fields}.")
    if missing := [field for field in types if field not in record]:
        raise ValueError(f"{where} has no {', '.join(map(repr, missing))}; expected are {', '.join(types)}.")
    check_types(record, types, where)


def check_types(record: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    """`ValueError` if a field that is there has another type than it should; `where` names what they are fields of."""
    for name, expected in types.items():
        if name in record and not is_of(record[name], expected):
            words = getattr(expected, "__name__", None) if get_origin(expected) is None else None
            raise ValueError(f"{where}: `{name}` is {_short(record[name])}; expected is {words or expected}.")


def is_of(value: Any, expected: Any) -> bool:
    """
    Whether a value from a file is of a type as annotations write it. A whole number is a `float` too, and what no file
    can say is not looked at.
    """
    origin, inner = get_origin(expected) or expected, get_args(expected)
    if origin in (Union, UnionType):
        return any(is_of(value, one) for one in inner)
    if origin in (None, NoneType):
        return value is None
    if origin is dict:
        keys, values = inner or (Any, Any)
        return isinstance(value, dict) and all(is_of(key, keys) and is_of(one, values) for key, one in value.items())
    if origin in (list, Sequence):
        return isinstance(value, list) and all(is_of(one, inner[0]) for one in value if inner)
    if origin in (int, float):
        return isinstance(value, int | origin) and not isinstance(value, bool)
    return isinstance(value, origin) if origin in (str, bool) else True


def _short(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
