"""A table whose rows can be chosen; each row has a key."""

from __future__ import annotations

from typing import Any

import gradio as gr

from saehook.app.downloads import SAVE_CSS, SAVE_JS

JS = """
const table = element.querySelector('.table');
const make = (tag, text, name) => {
  const node = document.createElement(tag); node.textContent = text; if (name) node.className = name; return node; };
const tools = element.querySelector('.save');
const file = () => fileName(table.ariaLabel);
const records = () => (props.value.rows || []).map(row => [row.name ?? row.key, ...row.cells]);
tools.append(saveButton('CSV', table.ariaLabel, () => save(file() + '.csv', csv([props.value.columns, ...records()]), 'text/csv')),
  saveButton('JSON', table.ariaLabel, () => save(file() + '.json', JSON.stringify({caption: props.value.caption,
    rows: records().map(cells => Object.fromEntries(cells.map((cell, i) => [props.value.columns[i], cell])))}, null, 1),
    'application/json')));
const draw = () => {
  const focused = table.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const value = props.value || {};
  const head = document.createElement('tr');
  (value.columns || []).forEach(column => head.append(make('th', column)));
  const rows = (value.rows || []).map(row => {
    const tr = document.createElement('tr');
    tr.dataset.key = row.key;
    if (row.selected) tr.className = 'selected';
    const first = document.createElement('td');
    const button = make(value.plain ? 'span' : 'button', row.name ?? row.key);
    if (!value.plain) {
      button.dataset.key = row.key;
      button.setAttribute('aria-label', (value.what || 'latent') + ' ' + (row.name ?? row.key));
      button.setAttribute('aria-pressed', row.selected ? 'true' : 'false');
    }
    first.append(button);
    const strength = make('td', row.cells[0], 'strength' + (row.share < 0 ? ' below' : ''));
    strength.style.setProperty('--share', Math.abs(row.share || 0));
    tr.append(first, strength, ...row.cells.slice(1).map(cell => {
      const td = make('td', cell); td.title = cell; return td; }));
    return tr;
  });
  table.classList.toggle('plain', !!value.plain);
  table.querySelector('caption').textContent = value.caption || '';
  table.querySelector('thead').replaceChildren(head);
  table.querySelector('tbody').replaceChildren(...rows);
  tools.hidden = !rows.length;
  if (focused) table.querySelector('button[data-key="' + CSS.escape(focused) + '"]')?.focus();
};
draw();
watch('value', draw);
table.addEventListener('click', event => {
  const row = event.target.closest('tbody tr');
  if (row && !(props.value || {}).plain) trigger('select', {key: +row.dataset.key});
});
"""
STYLE = """
.box { max-height: 19.5em; overflow: auto; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-primary); }
.table { width: 100%; border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 0; }
.table caption { text-align: left; padding: 6px 10px; color: var(--body-text-color-subdued); white-space: pre-wrap; }
.table th { position: sticky; top: 0; text-align: left; font-weight: 600; padding: 4px 10px;
  background: var(--background-fill-secondary); }
.table td { padding: 2px 10px; white-space: pre; border-top: 1px solid var(--border-color-primary);
  max-width: 30em; overflow: hidden; text-overflow: ellipsis; color: var(--body-text-color); }
.table tbody tr { cursor: pointer; }
.table tbody tr:hover { background: var(--background-fill-secondary); }
.table tr.selected td { background-color: rgb(26 133 255 / 0.18); }
.table.plain tbody tr { cursor: default; }
.table button { all: unset; cursor: pointer; min-width: 3.5em; color: var(--link-text-color); }
.table tr.selected button { color: var(--body-text-color); font-weight: 600; }
.table button:focus-visible { outline: 2px solid currentColor; }
.table td.strength { --bar: rgb(26 133 255 / 0.45); background-image: linear-gradient(var(--bar), var(--bar));
  background-repeat: no-repeat; background-position: 0 50%; background-size: calc(var(--share) * 100%) 70%; }
.table td.below { --bar: rgb(212 17 89 / 0.4); }
"""


def make_table(value: dict[str, Any], *, label: str, **component: Any) -> gr.HTML:
    """A component whose value is `{"caption", "what", "plain", "columns", "rows": [{"key", "name", "cells", "share",
    "selected"}]}`; it sends `select(key)`, unless `plain` says that there is nothing to choose.

    The key is a whole number; `share`, from -1 to 1, is a bar behind the first of the cells, `what` the kind of thing that a
    row is. What it shows downloads as CSV or JSON.

    Args:
        label: the developer's text, never a visitor's: it becomes part of the template.
    """
    return gr.HTML(
        value,
        label=label,
        html_template=f'<div class="box"><table class="table" aria-label="{label}">'
        '<caption></caption><thead></thead><tbody></tbody></table></div><div class="save" hidden></div>',
        css_template=STYLE + SAVE_CSS,
        js_on_load=SAVE_JS + JS,
        apply_default_css=False,
        **component,
    )


def empty_table(caption: str) -> dict[str, Any]:
    """A table without rows that says why."""
    return {"caption": caption, "columns": [], "rows": []}
