"""Checks on data that a user or a file gives: whole numbers, finite numbers, the fields of a JSON object."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from saehook.errors import ArgumentError, FormatError

MAX_VALUE = 3.4028234663852886e38
"""The largest float32: edits are computed in it."""
MAX_INTEGER = 2**62


def integers(values: Any, what: str) -> tuple[int, ...]:
    """Whole numbers as a tuple.

    Raises:
        ArgumentError: anything else, a bool or a string, too.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ArgumentError(f"{what} are {short(values)}; whole numbers are expected.")
    result = []
    for value in values:
        try:
            if isinstance(value, bool):
                raise TypeError
            result.append(operator.index(value))
        except TypeError:
            raise ArgumentError(f"{short(value)} among the {what} is no whole number.") from None
        if abs(result[-1]) > MAX_INTEGER:
            raise ArgumentError(f"{short(value)} among the {what} is too large.")
    return tuple(result)


def number(value: Any, what: str, expected: str = "a finite number is expected (in float32)") -> float:
    """A finite number as a float.

    Raises:
        ArgumentError: anything else, a bool, NaN or what float32 cannot hold, too.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_VALUE:
        raise ArgumentError(f"{what} is {short(value)}; {expected}.")
    return float(value)


def listed(values: Iterable[Any]) -> str:
    """As in a sentence: `1, 2, 3`."""
    return ", ".join(map(str, values))


def check_fields(data: Any, path: str, known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raises FormatError, naming `path`, unless `data` is an object with those fields and no other."""
    if not isinstance(data, dict):
        raise FormatError(f"{path} is {short(data)}; an object is expected.")
    unknown, missing = set(data) - set(known), set(required) - set(data)
    if unknown or missing:
        problem = f"has unknown fields {sorted(unknown)}" if unknown else f"lacks {sorted(missing)}"
        raise FormatError(f"{path} {short(problem, quote=False)}; expected are {sorted(known)}.")


def check_kinds(data: dict[str, Any], path: str, kind: type, names: Sequence[str]) -> None:
    """Raises FormatError where one of these fields is there and is no `kind` (`str` or `bool`)."""
    expected = {str: "a string", bool: "true or false"}[kind]
    for name in names:
        if name in data and not isinstance(data[name], kind):
            raise FormatError(f"{path}.{name} is {short(data[name])}; {expected} is expected.")


def short(value: Any, quote: bool = True) -> str:
    """`repr` of what was given, cut where it would fill the screen."""
    text = repr(value) if quote else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
