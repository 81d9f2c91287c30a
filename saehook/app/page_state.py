"""What a visitor has set, as data: for a link that restores it, and for a session file. It holds no results."""

from __future__ import annotations

import base64
import binascii
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import gradio as gr

from saehook.errors import ArgumentError, FormatError
from saehook.fields import check_fields, from_json

VERSION = 2
MAX_LINK_CHARS = 8192
MAX_CHARS = 200_000
"""Of the JSON inside a link, which is compressed."""
TABS = ("inspect", "generate", "sweep", "attribution", "latent", "search", "card")


@dataclass(frozen=True, kw_only=True)
class PageState:
    """All that a link restores. The values are as a browser sends them: whoever uses them checks them."""

    tab: str = "inspect"
    program: dict[str, Any] = field(default_factory=dict)
    """The editor's value."""
    tokens: list[Any] = field(default_factory=list)
    """The chosen tokens: the first, and that before which they end; none: the whole text."""
    controls: dict[str, Any] = field(default_factory=dict)
    """All others, by id."""

    def to_data(self) -> dict[str, Any]:
        """What stands in a session file."""
        program = {name: value for name, value in self.program.items() if name not in ("sites", "most")}
        return {"version": VERSION, **asdict(self), "program": program}

    @staticmethod
    def from_data(data: Any) -> PageState:
        """From a session file or a link.

        Raises:
            FormatError: an unknown field, or a value of the wrong kind.
        """
        known = {one.name: one for one in fields(PageState)}
        check_fields(data, "the session", {"version", *known}, {"version"})
        if data["version"] != VERSION:
            raise FormatError(f"the session has version {data['version']!r}; this page reads {VERSION}.")
        given = {name: data[name] for name in known if name in data}
        for name, value in given.items():
            kind = type(getattr(PageState(), name))
            if not isinstance(value, kind):
                raise FormatError(f"the session's {name} is {value!r:.60}; a {kind.__name__} is expected.")
        if given.get("tab", "inspect") not in TABS:
            raise FormatError(f"the session's tab is {given['tab'][:60]!r}; expected one of {', '.join(TABS)}.")
        return PageState(**given)

    def to_link(self) -> str:
        """The value of `s` in a link.

        Raises:
            FormatError: it would be too long for one.
        """
        packed = zlib.compress(json.dumps(self.to_data(), separators=(",", ":")).encode(), 9)
        text = base64.urlsafe_b64encode(packed).decode().rstrip("=")
        if len(text) > MAX_LINK_CHARS:
            raise FormatError(
                f"A link of {len(text)} characters is too long; at most {MAX_LINK_CHARS} are read. Use the session's JSON."
            )
        return text

    @staticmethod
    def from_link(text: str) -> PageState:
        """From the value of `s` in a link.

        Raises:
            FormatError: not what `to_link` writes.
        """
        if len(text) > MAX_LINK_CHARS:
            raise FormatError(f"The link has {len(text)} characters; at most {MAX_LINK_CHARS} are read.")
        try:
            packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            unpacker = zlib.decompressobj()
            plain = unpacker.decompress(packed, MAX_CHARS)
            if unpacker.unconsumed_tail or not unpacker.eof:
                raise FormatError(f"The link holds more than {MAX_CHARS} characters, or not all of it is there.")
            return PageState.from_data(from_json(plain.decode(), "link"))
        except (binascii.Error, zlib.error, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError("The link cannot be read. Was all of it copied?") from None


def control_values(controls: Sequence[Any], given: Mapping[str, Any]) -> list[Any]:
    """A value for each control: the given one, or that with which the page opens.

    Raises:
        ArgumentError: there is no such control, or it does not take that value; the message gives both.
    """
    unknown = sorted(set(given) - {control.elem_id for control in controls})
    if unknown:
        raise ArgumentError(f"the session sets {unknown[0][:60]!r}, which this page does not have.")
    return [
        _checked(control, given[control.elem_id]) if control.elem_id in given else control.value for control in controls
    ]


def _checked(control: Any, value: Any) -> Any:
    """Raises ArgumentError for a value that the browser's control could not have."""
    expected = None
    if isinstance(control, gr.Checkbox):
        expected = None if isinstance(value, bool) else "true or false"
    elif isinstance(control, (gr.Slider, gr.Number)):
        low, high = (
            -math.inf if control.minimum is None else control.minimum,
            math.inf if control.maximum is None else control.maximum,
        )
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        expected = None if number and low <= value <= high else f"a number from {low:g} to {high:g}"
    elif isinstance(control, (gr.CheckboxGroup, gr.Dropdown)):
        names = [name for _, name in control.choices]
        several = value if isinstance(control, gr.CheckboxGroup) else [value]
        fits = isinstance(several, list) and all(isinstance(one, str) and one in names for one in several)
        expected = None if fits else f"of {', '.join(map(str, names))}"
    elif not isinstance(value, str):
        expected = "a text"
    elif control.max_length is not None and len(value) > control.max_length:
        raise ArgumentError(
            f"“{control.label}” has {len(value)} characters; this page allows {control.max_length}. Shorten it."
        )
    if expected is not None:
        raise ArgumentError(f"“{control.label}” is {value!r:.60}; expected: {expected}.")
    return value
