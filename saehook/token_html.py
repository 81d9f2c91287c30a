"""Tokens in a row, coloured by how strong something is on each, as a piece of HTML that needs nothing else: for notebooks and for
pages that are sent to somebody. All text is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from saehook.visible_text import visible

STRIP = (
    "white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.8 ui-monospace,monospace;padding:4px 8px;"
    "border:1px solid #8886;border-radius:6px"
)


def strip_html(
    tokens: Sequence[str], strengths: Sequence[float], largest: float | None = None, marked: int | None = None
) -> str:
    """One row of tokens.

    Args:
        tokens: their texts.
        strengths: one for each; blue from 0 to `largest`, which is the largest of them where none is given.
        marked: index of a token that is underlined.
    """
    most = max((abs(s) for s in strengths), default=0.0) if largest is None else largest
    pieces = []
    for i, (token, strength) in enumerate(zip(tokens, strengths, strict=True)):
        share = min(1.0, max(0.0, strength / most)) if most else 0.0
        style = f"background:rgb(26 133 255/{0.75 * share:.3f})" + (";border-bottom:2px solid" if i == marked else "")
        pieces.append(f'<span style="{style}" title="{escape(f"{strength:.4g}")}">{escape(shown(token))}</span>')
    return f'<div style="{STRIP}">{"".join(pieces)}</div>'


def table_html(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table."""
    style = 'style="text-align:left;padding:2px 10px"'
    head = "".join(f"<th {style}>{escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td {style}>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def shown(token: str) -> str:
    """A token's text with its line ends visible."""
    return visible(token).replace("\n", "↵\n")


def escape(value: object) -> str:
    """Text for HTML, in elements and attributes, without the characters that it may not hold."""
    allowed = r"\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff"
    return html.escape(re.sub(f"[^{allowed}]", "\ufffd", str(value)))
