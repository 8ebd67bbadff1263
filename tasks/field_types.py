"""Whether what a file says is of the type that a field has: files are written by hand, and by others."""

from enum import Enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def is_of_type(value: Any, expected: Any) -> bool:
    """
    Args:
        value: as JSON or YAML has it: lists stand for tuples too, words for members of enumerations, and whole numbers
            for fractions; truth is no number.
        expected: a type, or what an annotation says. What is not understood of it is not checked.
    """
    of, inner = get_origin(expected), get_args(expected)
    if of in (Union, UnionType):
        return any(is_of_type(value, one) for one in inner)
    if of is Literal:
        return value in inner
    if of is dict and isinstance(value, dict):
        return all(is_of_type(pair, one) for item in value.items() for pair, one in zip(item, inner, strict=True))
    if of is tuple and Ellipsis not in inner and isinstance(value, list | tuple):
        return len(value) == len(inner) and all(map(is_of_type, value, inner))
    if of in (list, tuple) and isinstance(value, list | tuple):
        return all(is_of_type(item, inner[0]) for item in value)
    return _is_plainly(value, of or expected)


def _is_plainly(value: Any, expected: Any) -> bool:
    if expected in (int, float):
        return isinstance(value, (int, expected)) and not isinstance(value, bool)
    if expected is Any or not isinstance(expected, type):
        return True
    if issubclass(expected, Enum):
        return isinstance(value, expected | str)
    return isinstance(value, expected)
