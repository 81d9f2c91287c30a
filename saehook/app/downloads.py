"""Files that the browser makes of what it shows: the server writes none."""

from __future__ import annotations

import json

# For the scripts of components: `save(name, text, type)`, `csv(rows)`, and a row of buttons.
SAVE_JS = """
const save = (name, content, type) => {
  const a = document.createElement('a');
  a.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], {type}));
  a.download = name; a.click(); setTimeout(() => URL.revokeObjectURL(a.href), 1000); };
const fileName = text => text.replace(/[^\\w]+/g, '-').replace(/^-+|-+$/g, '').slice(0, 40) || 'saehook';
const csv = rows => rows.map(row => row.map(cell => '"' + String(cell ?? '').replaceAll('"', '""') + '"').join(','))
  .join('\\r\\n') + '\\r\\n';
const saveButton = (text, what, act) => {
  const button = document.createElement('button');
  button.type = 'button'; button.textContent = text; button.ariaLabel = text + ' of ' + what; button.onclick = act;
  return button; };
"""
SAVE_CSS = """
.save { display: flex; gap: 4px; margin-top: 4px; }
.save[hidden] { display: none; }
.save button { all: unset; font-size: 11px; padding: 1px 7px; cursor: pointer; border-radius: 5px;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); color: var(--body-text-color); }
.save button:focus-visible { outline: 2px solid var(--color-accent); }
"""
_PAGE = """text => { const a = document.createElement('a');
  a.href = URL.createObjectURL(new Blob([text], {type: 'text/html'})); a.download = NAME; a.click(); return []; }"""


def download_page(name: str) -> str:
    """JavaScript that keeps a text as a page of this name."""
    return _PAGE.replace("NAME", json.dumps(name))
