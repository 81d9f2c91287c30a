"""A session as a page that stands alone: the prompt, the program, what the lanes wrote, and how to do it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from saehook.app.page_state import PageState
from saehook.interventions import Program
from saehook.latent_page import PAGE
from saehook.token_html import escape

PRE = '<pre style="white-space:pre-wrap;overflow-wrap:anywhere">'


def session_page(
    state: PageState, prompt: str, program: Program, python: str, shell: str, lanes: Mapping[str, Any]
) -> str:
    """The page.

    Args:
        python, shell: what repeats the edited lane.
        lanes: values of the lanes (`lane_value`), by name, as a browser sends them.
    """
    parts = [f"<h2>Prompt</h2>{PRE}{escape(prompt)}</pre>", f"<h2>Edits</h2>{program._repr_html_()}"]
    for name, lane in lanes.items():
        if isinstance(lane, dict) and lane.get("text"):
            notes = [str(note.get("text", "")) for note in _list(lane.get("notes")) if isinstance(note, dict)]
            says = "".join(f"<li>{escape(line)}</li>" for line in [lane.get("status", ""), *notes])
            text = (
                f"{escape(lane.get('prompt', ''))}<strong>{escape(lane['text'])}</strong>{escape(lane.get('end', ''))}"
            )
            parts.append(f"<h2>{escape(name)}</h2>{PRE}{text}</pre><ul>{says}</ul>")
    again = (
        ("Python", python),
        ("Shell", shell),
        ("Session, to be restored on the page", json.dumps(state.to_data(), indent=1)),
    )
    parts += [f"<h2>{title}</h2>{PRE}{escape(text)}</pre>" for title, text in again]
    return PAGE.format(title="A session of saehook", body="\n".join(parts))


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []
