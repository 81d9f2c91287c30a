"""Pieces of text in groups, each token coloured by how strong a latent is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from saehook.dashboards import Context
from saehook.visible_text import visible_token

JS = """
const box = element.querySelector('.contexts');
const make = (tag, text, name) => { const node = document.createElement(tag); node.textContent = text ?? '';
  if (name) node.className = name; return node; };
const draw = () => box.replaceChildren(...((props.value || {}).groups || []).flatMap(group => [make('h4', group.title),
  ...group.contexts.map(context => {
    const line = make('div', '', 'context'), text = make('span', '', 'text');
    line.append(make('span', context.peak, 'peak'), ...(context.change ? [make('span', context.change, 'change')] : []), text);
    context.tokens.forEach(token => { const span = make('span', token.text, 'piece' + (token.peak ? ' top' : ''));
      span.title = token.title; span.style.setProperty('--share', token.share); text.append(span); });
    return line; })]));
draw();
watch('value', draw);
"""
CSS = """
.contexts { font-size: 13px; color: var(--body-text-color); }
.contexts h4 { margin: 10px 0 4px; font-size: 13px; font-weight: 600; }
.context { display: flex; gap: 10px; padding: 3px 8px; border-top: 1px solid var(--border-color-primary); align-items: baseline; }
.context .peak { flex: none; width: 4em; text-align: right; color: var(--body-text-color-subdued);
  font-variant-numeric: tabular-nums; }
.context .change { flex: none; width: 6em; text-align: right; font-variant-numeric: tabular-nums; }
.context .text { font: 13px/1.6 var(--font-mono); white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; overflow: hidden; }
.piece { background: rgb(26 133 255 / calc(var(--share) * 0.75)); border-radius: 2px; }
.piece.top { box-shadow: inset 0 -2px 0 currentColor; }
"""


def make_contexts(*, label: str, **component: Any) -> gr.HTML:
    """A component whose value is `{"groups": [{"title", "contexts": [{"peak", "change", "tokens": [{"text", "title",
    "share", "peak"}]}]}]}`.

    Args:
        label: the developer's text, never a visitor's: it becomes part of the template.
    """
    return gr.HTML(
        {"groups": []},
        label=label,
        html_template=f'<div class="contexts" role="region" aria-label="{label}"></div>',
        css_template=CSS,
        js_on_load=JS,
        apply_default_css=False,
        **component,
    )


def group(title: str, contexts: Sequence[Context], tokenizer: Any, largest: float) -> dict[str, Any]:
    """Contexts under a title, coloured from 0 to `largest`; line ends are shown in the line."""
    shown = []
    for context in contexts:
        changes = context.loss_change or [None] * len(context.ids)
        tokens = [
            {
                "text": visible_token(tokenizer, i).replace("\n", ""), "title": f"{act:.4g}" + _words(change),
                "peak": place == context.peak,
                "share": act / largest if largest else 0.0,
            }
            for place, (i, act, change) in enumerate(zip(context.ids, context.activations, changes, strict=True))
        ]  # fmt: skip
        mean = context.mean_change
        change = "" if mean is None else f"{mean:+.4f}"
        shown.append({"peak": f"{context.activations[context.peak]:.3g}", "change": change, "tokens": tokens})
    return {"title": title, "contexts": shown}


def _words(change: float | None) -> str:
    return "" if change is None else f"\nloss when ablated {change:+.4f} nats"
