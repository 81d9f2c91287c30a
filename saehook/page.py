"""A page of HTML that stands alone: it loads nothing and runs nothing, and has tables, figures and text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from saehook.charts import curve_css, escape


def page(title: str, parts: Iterable[str], n_curves: int) -> str:
    """The whole page; `title` is HTML, `n_curves` the most curves in one chart."""
    return PAGE.format(title=title, css=CSS + curve_css(n_curves), body="\n".join(parts))


def section(title: str, body: str) -> str:
    """A part of the page; nothing where there is no body."""
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def grid(figures: Iterable[str]) -> str:
    """Figures beside each other."""
    inside = "".join(figures)
    return f'<div class="grid">{inside}</div>' if inside else ""


def figure(title: str, note: str, picture: str) -> str:
    """A picture with its caption."""
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>{picture}</figure>"


def table(head: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """The first cell of a row is HTML, the others are text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>" for first, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested data as (dotted name, text)."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and len(value) > 8:
            yield prefix + key, f"{len(value):,} values"
        else:
            yield prefix + key, f"{value:,}" if type(value) is int else str(value)


def counted(n: int, noun: str) -> str:
    """1 SAE, 2 SAEs."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


# The policy lets nothing run and nothing load, whatever a file says.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
CSS = """
:root { color-scheme: light dark; --ground: #f5f6f8; --card: #fff; --ink: #1c1f24; --soft: #59606b; --rule: #dfe2e7;
  --bar: #1f5fa8; --hover: #1c1f2414; --note: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ground: #121418; --card: #1b1e24; --ink: #e8eaed; --soft: #a3abb8;
  --rule: #343a44; --bar: #4787c6; --hover: #ffffff16; --note: #3d3318; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 80rem; margin: auto; padding: 1.5rem clamp(.75rem, 2vw, 1.5rem) 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
p, dl, dd, figure { margin: 0; }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2.25rem; }
dd { font-weight: 600; }
dt, header p, section > p, figcaption, small, thead { color: var(--soft); font-size: .88rem; }
.note { background: var(--note); border-radius: 8px; padding: .5rem .9rem; margin-top: 1rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.scroll + .grid, details + details { margin-top: 1rem; }
.scroll + p { margin-top: .5rem; }
figure, .scroll, details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
figure { padding: .8rem .8rem .4rem; min-width: 0; }
figcaption { margin-bottom: .4rem; }
figcaption b { color: var(--ink); font-size: .95rem; margin-right: .3em; }
summary { padding: .6rem .9rem; cursor: pointer; font-weight: 600; }
.scroll { overflow-x: auto; }
details .scroll { border-width: 1px 0 0; border-radius: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
tbody { font-size: .88rem; }
th, td { padding: .4rem .8rem; text-align: right; font-weight: inherit; overflow-wrap: normal; }
td { white-space: nowrap; }
th:first-child, details td, details th { text-align: left; overflow-wrap: anywhere; min-width: 10rem; }
details td { white-space: normal; width: 75%; }
details th { min-width: 12.5rem; }
tbody tr { border-top: 1px solid var(--rule); }
tbody tr:hover { background: var(--hover); }
"""
