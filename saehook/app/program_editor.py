"""The editor of a program: one row for each edit, and what belongs to all of them. Its value is that of `program_rows`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr


def make_editor(value: dict[str, Any], **component: Any) -> gr.HTML:
    """A component whose value is that of `program_rows.editor_value`; it sends `input` after a visitor's changes."""
    return gr.HTML(
        value,
        label="Edits",
        html_template=_beside(".html"),
        css_template=_beside(".css"),
        js_on_load=_beside(".js"),
        apply_default_css=False,
        **component,
    )


def _beside(suffix: str) -> str:
    return Path(__file__).with_suffix(suffix).read_text(encoding="utf-8")
