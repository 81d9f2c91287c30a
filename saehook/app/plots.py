"""Small pictures of numbers over a common x, whose points can be chosen; each downloads as SVG or PNG, the numbers as CSV or
JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from saehook.app.downloads import SAVE_CSS, SAVE_JS


def make_plots(*, label: str, **component: Any) -> gr.HTML:
    """A component whose value is what `plots_value` returns; it sends `select(key)` with the index of the point.

    Args:
        label: the developer's text, never a visitor's: it becomes part of the template.
    """
    return gr.HTML(
        {"panels": []},
        label=label,
        html_template=f'<div class="plots" role="group" aria-label="{label}"></div>',
        css_template=_beside(".css") + SAVE_CSS,
        js_on_load=SAVE_JS + _beside(".js"),
        apply_default_css=False,
        **component,
    )


def plots_value(
    x: Iterable[float], panels: Sequence[dict[str, Any]], *, what: str, below: str, selected: int | None = None
) -> dict[str, Any]:
    """Pictures over the same x.

    Args:
        panels: what `panel` returns.
        what: what one x is, for a listener. below: the text below the x axis.
        selected: index of the x that is marked.
    """
    return {"x": list(x), "panels": list(panels), "what": what, "below": below, "selected": selected}


def panel(
    title: str,
    series: dict[str, Sequence[float]],
    *,
    base: float | None = None,
    mark: float | None = None,
    edges: Sequence[float] | None = None,
    zero: bool = False,
    **kind: bool,
) -> dict[str, Any]:
    """One picture.

    Args:
        series: y by name, one for each x; what is not finite is left out.
        base: a dashed line, for comparison. mark: an upright one, at an x.
        edges: of bars of unequal width, one more than there are x.
        zero: the y axis holds 0.
        kind: `bars`: bars instead of a line; `still`: no point can be chosen; `logarithmic`: x is.
    """
    lines = [{"name": name, "y": [_finite(v) for v in values]} for name, values in series.items()]
    more = {"base": None if base is None else _finite(base), "mark": mark, "edges": edges and list(edges)}
    return {"title": title, "series": lines, **more, "zero": zero, **kind}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _beside(suffix: str) -> str:
    return Path(__file__).with_suffix(suffix).read_text(encoding="utf-8")
