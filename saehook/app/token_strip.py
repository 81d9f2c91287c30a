"""Tokens in a row, coloured by one latent; each can be clicked, or reached with the arrow keys."""

from __future__ import annotations

from typing import Any

import gradio as gr

# Text only ever enters the page through textContent: a value in an HTML template of Gradio is executed.
JS = """
const strip = element.querySelector('.strip');
const draw = () => {
  const focused = strip.contains(document.activeElement) ? document.activeElement.dataset.index : null;
  const tokens = (props.value && props.value.tokens) || [], numbers = props.value && props.value.numbers;
  strip.classList.toggle('numbers', !!numbers);
  const entry = Math.max(0, tokens.findIndex(token => token.selected));
  strip.replaceChildren(...tokens.map((token, i) => {
    const span = document.createElement('span');
    span.textContent = token.text;
    span.title = token.title;
    span.className = ['token', token.selected && 'selected', token.special && 'special', token.hot && 'hot']
      .filter(Boolean).join(' ');
    if (numbers && token.number) span.append(Object.assign(document.createElement('small'), {textContent: token.number}));
    span.dataset.index = i;
    span.tabIndex = i === entry ? 0 : -1;
    span.setAttribute('role', 'option');
    span.setAttribute('aria-selected', token.selected ? 'true' : 'false');
    span.style.setProperty('--share', token.share);
    return span;
  }));
  const legend = (props.value && props.value.legend) || '';
  element.querySelector('.legend').hidden = !legend;
  element.querySelector('.ramp').classList.toggle('both', !!(props.value && props.value.both));
  element.querySelector('.legend .says').textContent = legend;
  if (focused !== null && strip.children[focused]) strip.children[focused].focus();
};
let anchor = null;
const pick = event => {
  const token = event.target.closest('.token');
  if (!token) return;
  const index = +token.dataset.index;
  if (!event.shiftKey || anchor === null || anchor >= strip.children.length) anchor = index;
  trigger('select', {index, anchor});
};
draw();
watch('value', draw);
strip.addEventListener('click', pick);
strip.addEventListener('keydown', event => {
  const token = event.target.closest('.token');
  if (!token) return;
  if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); pick(event); }
  const next = {ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling}[event.key];
  if (next) { event.preventDefault(); token.tabIndex = -1; next.tabIndex = 0; next.focus(); }
});
"""
CSS = """
.strip { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 var(--font-mono);
  min-height: 2em; max-height: 22em; overflow-y: auto; padding: 8px 10px; tab-size: 4;
  border: 1px solid var(--border-color-primary); border-radius: 8px; background: var(--background-fill-primary); }
.token { cursor: pointer; border-radius: 3px; padding: 2px 0; color: var(--body-text-color);
  background: rgb(26 133 255 / calc(var(--share) * var(--strip-strength, 0.85)));
  box-shadow: inset -1px 0 0 rgb(128 128 128 / 0.35); }
.token.hot { background: rgb(212 17 89 / calc(var(--share) * var(--strip-strength, 0.85) * 0.75)); }
.token small { display: block; font-size: 9px; line-height: 1; text-align: center; }
.numbers .token { display: inline-block; min-width: 2.2em; text-align: center; vertical-align: top; white-space: pre; }
.token:hover { outline: 1px solid var(--body-text-color-subdued); }
.token:focus-visible { outline: 2px solid currentColor; outline-offset: 1px; }
.token.selected { box-shadow: 0 0 0 2px currentColor; }
.token.special { font-style: italic; color: var(--body-text-color-subdued); }
.legend { display: flex; align-items: center; gap: 8px; margin-top: 6px; font-size: 13px; color: var(--body-text-color-subdued); }
.legend[hidden] { display: none; }
.legend .ramp { flex: none; width: 90px; height: 10px; border-radius: 3px; border: 1px solid var(--border-color-primary);
  background: linear-gradient(to right, transparent, rgb(26 133 255 / var(--strip-strength, 0.85))); }
.legend .both { background: linear-gradient(to right, rgb(26 133 255 / 0.85), transparent, rgb(212 17 89 / 0.65)); }
.dark & { --strip-strength: 0.7; }
"""


def make_strip(value: dict[str, Any], *, label: str, **component: Any) -> gr.HTML:
    """A component whose value is `{"tokens": [{"text", "share", "title", "selected", "special", "hot", "number"}], "legend",
    "both", "numbers"}`; it sends `select(index, anchor)`, which differ where a range is chosen with Shift.

    `share` is how strong the colour is, `hot` makes it red instead of blue, `both` says that both occur. (No subclass of
    `gr.HTML`: Gradio writes a .pyi file beside each.)

    Args:
        label: the developer's text, never a visitor's: it becomes part of the template.
    """
    return gr.HTML(
        value,
        label=label,
        html_template=f'<div class="strip" role="listbox" aria-multiselectable="true" aria-label="{label}"></div>'
        '<div class="legend" hidden><span class="ramp"></span><span class="says" role="status"></span></div>',
        css_template=CSS,
        js_on_load=JS,
        apply_default_css=False,
        **component,
    )


NO_TOKENS: dict[str, Any] = {"tokens": [], "legend": ""}
"""A strip without a text."""
