"""What a visitor has set, as data: for a link that restores it, and for a session file. It holds no results."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from saehook.errors import FormatError
from saehook.fields import check_fields, from_json

VERSION = 1
MAX_LINK_CHARS = 8192
MAX_CHARS = 200_000
"""Of the JSON inside a link, which is compressed."""
TABS = ("inspect", "generate", "sweep", "attribution", "latent", "search", "card")


@dataclass(frozen=True, kw_only=True)
class PageState:
    """All that a link restores. The values are as a browser sends them: whoever uses them checks them."""

    tab: str = "inspect"
    prompt: str = ""
    site: str = ""
    latent: str = ""
    program: dict[str, Any] = field(default_factory=dict)
    """The editor's value."""
    sample: bool = True
    temperature: float = 0.8
    top_p: float = 1.0
    new_tokens: int = 60
    seed: int = 0
    lanes: list[str] = field(default_factory=lambda: ["Base", "Spliced", "Edited"])

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
            default = getattr(PageState(), name)
            kinds = (
                (int, float) if isinstance(default, (int, float)) and not isinstance(default, bool) else type(default)
            )
            if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
                raise FormatError(f"the session's {name} is {str(value)[:60]!r}; for example {default!r} is expected.")
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
