"""Checks on data that a user or a file gives: whole numbers, finite numbers, the objects and fields of JSON."""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from saehook.errors import ArgumentError, FormatError

MAX_VALUE = 3.4028234663852886e38
"""The largest float32: edits are computed in it."""
MAX_INTEGER = 2**62
MAX_NESTING = 100
"""Of lists and objects in JSON."""


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


class JSONObject(dict[str, Any]):
    """An object of a JSON text."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        """Fields that it has more than once."""


def from_json(text: str, what: str) -> Any:
    """JSON as data, objects as `JSONObject`.

    Raises:
        FormatError: no JSON, or nested too deep; `what` is its name in the message.
    """
    try:
        data = json.loads(text, object_pairs_hook=JSONObject)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the {what} is not JSON: {error}.") from None
    rest = [(data, what, 0)] if isinstance(data, (dict, list)) else []
    while rest:
        value, path, depth = rest.pop()
        if depth > MAX_NESTING:
            raise FormatError(f"{path} is nested more than {MAX_NESTING} deep. Make it simpler.")
        if depth > 3:  # as far as a path helps a reader
            names = [""] * len(value)
        else:
            names = (
                [f".{short(key, quote=False)}" for key in value]
                if isinstance(value, dict)
                else [f"[{i}]" for i in range(len(value))]
            )
        inner = value.values() if isinstance(value, dict) else value
        rest += [
            (each, path + name, depth + 1)
            for each, name in zip(inner, names, strict=True)
            if isinstance(each, (dict, list))
        ]
    return data


def check_fields(data: Any, path: str, known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raises FormatError, naming `path`, unless `data` is an object with those fields and no other."""
    if not isinstance(data, dict):
        raise FormatError(f"{path} is {short(data)}; an object is expected.")
    if twice := getattr(data, "twice", None):
        raise FormatError(f"{path} has the field {short(twice[0])} twice. Leave one of them out.")
    unknown, missing = set(data) - set(known), set(required) - set(data)
    if unknown or missing:
        problem = f"has unknown fields {sorted(unknown)}" if unknown else f"lacks {sorted(missing)}"
        raise FormatError(f"{path} {short(problem, quote=False)}; expected are {sorted(known)}.")


def check_kinds(data: dict[str, Any], path: str, kind: type, names: Sequence[str]) -> None:
    """Raises FormatError where one of these fields is there and is no `kind` (`str`, `bool` or `list`)."""
    expected = {str: "a string", bool: "true or false", list: "a list"}[kind]
    for name in names:
        if name in data and not isinstance(data[name], kind):
            raise FormatError(f"{path}.{name} is {short(data[name])}; {expected} is expected.")


def short(value: Any, quote: bool = True) -> str:
    """`repr` of what was given, cut where it would fill the screen."""
    text = repr(value) if quote else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
