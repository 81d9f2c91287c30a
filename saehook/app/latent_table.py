"""Latents in a table, strongest first; a row chooses its latent."""

from __future__ import annotations

from typing import Any

import gradio as gr

from saehook.app.reading import Reading
from saehook.app.visible_text import one_line
from saehook.sae import SAE

JS = """
const table = element.querySelector('.latents');
const make = (tag, text, name) => {
  const node = document.createElement(tag); node.textContent = text; if (name) node.className = name; return node; };
const draw = () => {
  const focused = table.contains(document.activeElement) ? document.activeElement.dataset.latent : null;
  const value = props.value || {};
  const head = document.createElement('tr');
  (value.columns || []).forEach(column => head.append(make('th', column)));
  const rows = (value.rows || []).map(row => {
    const tr = document.createElement('tr');
    tr.dataset.latent = row.latent;
    if (row.selected) tr.className = 'selected';
    const first = document.createElement('td');
    const button = make('button', row.latent);
    button.dataset.latent = row.latent;
    button.setAttribute('aria-label', 'latent ' + row.latent);
    button.setAttribute('aria-pressed', row.selected ? 'true' : 'false');
    first.append(button);
    const strength = make('td', row.cells[0], 'strength');
    strength.style.setProperty('--share', row.share);
    tr.append(first, strength, ...row.cells.slice(1).map(cell => make('td', cell)));
    return tr;
  });
  table.querySelector('caption').textContent = value.caption || '';
  table.querySelector('thead').replaceChildren(head);
  table.querySelector('tbody').replaceChildren(...rows);
  if (focused) table.querySelector('button[data-latent="' + +focused + '"]')?.focus();
};
draw();
watch('value', draw);
table.addEventListener('click', event => {
  const row = event.target.closest('tbody tr');
  if (row) trigger('select', {latent: +row.dataset.latent});
});
"""
CSS = """
.box { max-height: 19.5em; overflow: auto; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-primary); }
.latents { width: 100%; border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 0; }
.latents caption { text-align: left; padding: 6px 10px; color: var(--body-text-color-subdued); white-space: pre-wrap; }
.latents th { position: sticky; top: 0; text-align: left; font-weight: 600; padding: 4px 10px;
  background: var(--background-fill-secondary); }
.latents td { padding: 2px 10px; white-space: pre; border-top: 1px solid var(--border-color-primary);
  max-width: 14em; overflow: hidden; text-overflow: ellipsis; color: var(--body-text-color); }
.latents tbody tr { cursor: pointer; }
.latents tbody tr:hover { background: var(--background-fill-secondary); }
.latents tr.selected td { background-color: rgb(26 133 255 / 0.18); }
.latents button { all: unset; cursor: pointer; min-width: 3.5em; color: var(--link-text-color); }
.latents button:focus-visible { outline: 2px solid currentColor; }
.latents td.strength { background-image: linear-gradient(rgb(26 133 255 / 0.45), rgb(26 133 255 / 0.45));
  background-repeat: no-repeat; background-position: 0 50%; background-size: calc(var(--share) * 100%) 70%; }
"""


def make_table(value: dict[str, Any], *, label: str, **component: Any) -> gr.HTML:
    """A component whose value is `{"caption", "columns", "rows": [{"latent", "cells", "share", "selected"}]}`; it sends
    `select(latent)`.

    Args:
        label: the developer's text, never a visitor's: it becomes part of the template.
    """
    return gr.HTML(
        value,
        label=label,
        html_template=f'<div class="box"><table class="latents" aria-label="{label}">'
        "<caption></caption><thead></thead><tbody></tbody></table></div>",
        css_template=CSS,
        js_on_load=JS,
        apply_default_css=False,
        **component,
    )


def table_value(reading: Reading | None, sae: SAE | None, latent: int | None, position: int | None) -> dict[str, Any]:
    """The strongest latents of a reading, or of its token at `position`."""
    if reading is None or sae is None:
        return {"caption": "Read a text to see its latents.", "columns": [], "rows": []}
    if position is None:
        hits, active = reading.top, reading.n_active
        what = "Strongest latents of the text"
        columns = ["latent", "largest activation", "on token"]
    else:
        hits, active = reading.top_at[position], reading.n_active_at[position]
        what = f"Strongest latents of token {position}, “{one_line(reading.tokens[position])}”"
        columns = ["latent", "activation"]
        if not reading.mask[position]:
            what += " (outside the mask: the SAE was not trained on it)"
    if sae.stats is not None:
        columns += ["recorded max", "fires on"]
    largest = hits[0].activation if hits else 1.0
    rows = []
    for hit in hits:
        cells = [f"{hit.activation:.3g}"]
        if position is None:
            cells.append(f"{one_line(reading.tokens[hit.position])}  ({hit.position})")
        if sae.stats is not None:
            cells += [f"{float(sae.stats.max_act[hit.latent]):.3g}", f"{float(sae.stats.density[hit.latent]):.2%}"]
        rows.append(
            {"latent": hit.latent, "cells": cells, "share": hit.activation / largest, "selected": hit.latent == latent}
        )
    return {"caption": f"{what} · showing {len(rows)} of {active} that fire", "columns": columns, "rows": rows}
