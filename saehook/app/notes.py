"""Lines of text under something, each of a kind."""

from __future__ import annotations

from typing import Any

import gradio as gr

JS = """
const list = element.querySelector('.lines');
const draw = () => list.replaceChildren(...(props.value || []).map(line => {
  const item = document.createElement('li'); item.className = line.kind; item.textContent = line.text; return item; }));
draw();
watch('value', draw);
"""
CSS = """
.lines { list-style: none; margin: 0; padding: 0; font-size: 13px; color: var(--body-text-color); }
.lines li { margin: 4px 0 0; padding: 0 0 0 8px; overflow-wrap: anywhere; border-left: 3px solid #7a7a85; }
.lines li.warning { border-left-color: #D41159; font-weight: 600; }
"""


def make_notes(*, label: str, **component: Any) -> gr.HTML:
    """A component whose value is `[{"kind": "note" | "warning", "text"}]`.

    Args:
        label: the developer's text, never a visitor's: it becomes part of the template.
    """
    return gr.HTML(
        [],
        label=label,
        html_template=f'<ul class="lines" role="status" aria-label="{label}"></ul>',
        css_template=CSS,
        js_on_load=JS,
        apply_default_css=False,
        **component,
    )
