"""Which tokens an edit acts on, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import regex

from saehook.errors import ArgumentError, FormatError
from saehook.fields import check_fields, check_kinds, integers, listed, short

MAX_PATTERN = 1000
"""Characters of a regular expression."""


@dataclass(frozen=True)
class Where:
    """Which tokens an edit acts on: those that fit all that is given. Those outside the mask (special tokens, and what the
    SAE's `mask_rule` leaves out) only where `tokens` names them; special tokens also with `special` or `bos`."""

    prompt: bool = True
    """Tokens of the input."""
    generation: bool = True
    """Tokens that the model has generated."""
    tokens: tuple[int, ...] | None = None
    """Exactly these tokens of the input, counted among the row's own real tokens; negative from its end."""
    positions: tuple[int, int | None] | None = None
    """From the first to before the second, counted among the row's own real tokens, generated ones included; None: no
    end."""
    token_ids: tuple[int, ...] | None = None
    """Tokens with one of these ids. A special one also wants `special`."""
    pattern: str | None = None
    """Tokens that share a character with a match of this regular expression (of the package `regex`) in the row's text.
    A token of the input sees the whole input; a generated one only the text up to itself, so that what comes later changes
    nothing: `import \\w+` has selected ` numpy` once it is there, and the `import` before it only in the input."""
    roles: tuple[str, ...] | None = None
    """Tokens of the messages with one of these roles (`user`, `assistant`, ...), where the input is a conversation; the
    chat template's own tokens belong to the message that they announce. Generated tokens are the assistant's."""
    special: bool = False
    """Special tokens, too; the SAE's `mask_rule` holds for them as for others."""
    bos: bool = False
    """BOS, too, and no other special token."""
    rows: tuple[int, ...] | None = None
    """Rows of the input, from 0; its beams and return sequences are of the row that they continue."""

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}={getattr(self, name)!r} in a Where; True or False is expected.")
        for name in ("token_ids", "rows"):
            if getattr(self, name) is not None:
                values = integers(getattr(self, name), name)
                if not values or min(values) < 0:
                    raise ArgumentError(f"{name}={values} in a Where; one or more numbers from 0 are expected.")
                object.__setattr__(self, name, values)
        if self.positions is not None:
            object.__setattr__(self, "positions", _range(self.positions))
        if self.pattern is not None:
            _check_pattern(self.pattern)
        if self.roles is not None:
            object.__setattr__(self, "roles", _roles(self.roles))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", integers(self.tokens, "tokens"))
            if not self.tokens:
                raise ArgumentError("a Where with tokens=() names no token. Name one, or leave tokens out.")
            if not (self.prompt and self.generation):
                raise ArgumentError(
                    f"a Where with tokens={self.tokens} says prompt or generation, too. Tokens stand alone."
                )
        elif not (self.prompt or self.generation):
            raise ArgumentError("a Where with neither prompt nor generation nor tokens touches nothing. Switch one on.")

    def __str__(self) -> str:
        parts = []
        if self.tokens is not None:
            parts.append(f"tokens {listed(self.tokens)}")
        elif not (self.prompt and self.generation):
            parts.append("prompt" if self.prompt else "generation")
        if self.positions is not None:
            start, stop = self.positions
            parts.append(f"positions from {start}" + ("" if stop is None else f" to before {stop}"))
        if self.token_ids is not None:
            parts.append(f"ids {listed(self.token_ids)}")
        if self.pattern is not None:
            parts.append(f"text like /{self.pattern}/")
        if self.roles is not None:
            parts.append(f"of {listed(self.roles)}")
        if self.rows is not None:
            parts.append(f"rows {listed(self.rows)}")
        also = "special ones" if self.special else "BOS" if self.bos else ""
        return ", ".join(parts or ["every token"]) + (f", {also} included" if also else "")

    def to_data(self) -> dict[str, Any]:
        """What stands in a program's JSON: the fields that differ from their defaults."""
        data: dict[str, Any] = {}
        if self.tokens is None and not (self.prompt and self.generation):
            data |= {"prompt": self.prompt, "generation": self.generation}
        for name in _LISTS:
            if (values := getattr(self, name)) is not None:
                data[name] = list(values)
        if self.pattern is not None:
            data["pattern"] = self.pattern
        return data | {name: True for name in ("special", "bos") if getattr(self, name)}

    @staticmethod
    def from_data(data: Any, path: str) -> Where:
        """From a program's JSON.

        Raises:
            FormatError: an unknown field or a value of the wrong kind; `path` is named.
        """
        check_fields(data, path, {*_LISTS, *_SWITCHES, "pattern"})
        check_kinds(data, path, bool, _SWITCHES)
        check_kinds(data, path, list, [name for name in _LISTS if data.get(name) is not None])
        if data.get("tokens") is not None and {"prompt", "generation"} & set(data):
            raise FormatError(f"{path} names tokens and more: {data}. Leave out prompt and generation.")
        try:
            return Where(**data)
        except ArgumentError as error:
            raise FormatError(f"{path}: {error}") from None


_LISTS = ("tokens", "positions", "token_ids", "roles", "rows")
_SWITCHES = ("prompt", "generation", "special", "bos")

EVERYWHERE = Where()


def _range(given: Any) -> tuple[int, int | None]:
    """(start, stop) of `positions`; stop may be None."""
    try:
        start, stop = given
    except (TypeError, ValueError):
        raise ArgumentError(
            f"positions={given!r} in a Where; (start, stop) is expected, stop None for no end."
        ) from None
    start, *rest = integers([start] if stop is None else [start, stop], "positions")
    if start < 0 or (rest and rest[0] <= start):
        raise ArgumentError(
            f"positions={given!r} hold no token; 0 <= start < stop is expected, counted from the row's first."
        )
    return start, rest[0] if rest else None


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN:
        raise ArgumentError(
            f"pattern={short(pattern)} in a Where; a regular expression of 1 to {MAX_PATTERN} characters is expected."
        )
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise ArgumentError(f"pattern={short(pattern)} in a Where is no regular expression: {error}.") from None
    if regex.search(r"\(\?(?:R|[+-]?\d+|&\w+|P>\w+)\)", regex.sub(r"\\.", "", pattern, flags=regex.DOTALL)):
        raise ArgumentError(
            f"pattern={short(pattern)} in a Where calls a group from within, which may take all memory. Write it without."
        )


def _roles(given: Any) -> tuple[str, ...]:
    names = tuple(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ArgumentError(f"roles={given!r} in a Where; one or more names are expected, such as ('user',).")
    return names


def prompt() -> Where:
    """The tokens of the input that are in the mask."""
    return Where(generation=False)


def generation() -> Where:
    """The tokens that the model generates."""
    return Where(prompt=False)


def tokens(*indices: int) -> Where:
    """Tokens of the input by index among the row's own real tokens: 0 the first (BOS counts where there is one),
    -1 the last of the prompt. An index that a row does not have is an error when the edit runs."""
    if not indices:
        raise ArgumentError("tokens() names no token. Write for example tokens(0, 3, -1).")
    return Where(tokens=tuple(indices))


def span(start: int, stop: int | None = None) -> Where:
    """Tokens `start` .. `stop` - 1 of the row, counted among its own real tokens, generated ones included; None: no end."""
    return Where(positions=(start, stop))


def token_ids(*ids: int) -> Where:
    """Tokens with one of these ids, of prompt and generation; `Where(token_ids=..., special=True)` for special ones."""
    return Where(token_ids=tuple(ids))


def matching(pattern: str) -> Where:
    """Tokens of prompt and generation whose text takes part in a match of this regular expression; see `Where.pattern`."""
    return Where(pattern=pattern)


def roles(*names: str) -> Where:
    """Tokens of the messages with one of these roles, where the input is a conversation."""
    return Where(roles=tuple(names))
