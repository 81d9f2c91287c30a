"""Curves and histograms as SVG for a page that stands alone: no script, light and dark, tooltips in `<title>`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from saehook.token_html import escape

STRETCHES = 200
"""A longer curve is cut into so many stretches, and each keeps its smallest and its largest value."""
BANDS = 48
"""Places along a chart that show their values under the mouse, at most."""
BINS_PER_DECADE = 5
WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 388, 8, 190
"""Edges of the plot inside the picture; its own pixels, as all positions here."""

# Eight colours that stay apart for protan, deutan and tritan eyes; the next eight curves get them again, dashed.
LIGHT = "#1f5fa8 #cf7d1a #16a78b #b00fd5 #9f85e3 #7f6543 #341836 #8a2208".split()
DARK = "#4787c6 #e8820a #1ebf9d #c08cff #bed5ff #ebc823 #fdfec5 #b85058".split()
DASHES = ("none", "7 5", "1 5", "10 5 1 5")
# The page says what --soft, --rule, --bar and --hover are.
CSS = """
.picture { display: block; width: 100%; height: auto; }
.picture text { font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums; text-anchor: middle; }
.picture .y { text-anchor: end; dominant-baseline: central; }
.rule { stroke: var(--rule); }
.axis { stroke: var(--soft); }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.dot { stroke-width: 8; }
.bar { fill: var(--bar); }
.band { fill: transparent; }
.band:hover { fill: var(--hover); }
.bar:hover { opacity: .7; }
.key { width: 36px; height: 8px; margin-right: .6em; }
"""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    number: int
    """Decides its colour and dash."""
    points: Sequence[tuple[float, float]]
    """(x, y) with x ascending; the line has a gap where y is NaN."""

    @property
    def path_class(self) -> str:
        """Class of its path, here and in the legend; a curve of one point is a dot."""
        dot = " dot" if len(self.points) == 1 else ""
        return f"line n{self.number} c{self.number % len(LIGHT)} d{self.number // len(LIGHT) % len(DASHES)}{dot}"

    @property
    def key(self) -> str:
        """Its line for a legend."""
        return f'<svg class="key" viewBox="0 0 36 8"><path class="{Curve("", self.number, []).path_class}" d="M2 4H34"/></svg>'


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` at the positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to eight round values."""
        if not self.log:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
            return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        fine = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        coarse = [10.0**power for power in powers[:: math.ceil(len(powers) / 8)]]
        inside = [[value for value in values if self.low <= value <= self.high] for values in (fine, coarse)]
        return inside[0] if len(inside[0]) <= 8 else inside[1]


def curve_chart(title: str, curves: Sequence[Curve], *, below: str, log: bool = False, share: bool = False) -> str:
    """A picture of curves that have at least one finite value; `below` names what x counts.

    Args:
        log: a logarithmic y axis; see `spans_decade`.
        share: y is a share, shown as a percentage.
    """
    points = [point for curve in curves for point in curve.points]
    x = Axis(0, max(place for place, _ in points) or 1, LEFT, RIGHT)
    y = _value_axis([value for _, value in points if not math.isnan(value)], log)
    lines = [f'<path class="{curve.path_class}" d="{_path(thin(curve.points), x, y)}"/>' for curve in curves]
    frame = _frame(x, y, tick, lambda value: tick(value, share), below)
    return _picture(title, frame + "".join(lines) + _bands(curves, x, below, share))


def spans_decade(curves: Iterable[Curve]) -> bool:
    """Whether a logarithmic axis can show the curves and is worth it: all positive, over a factor of ten."""
    values = [value for curve in curves for _, value in curve.points if not math.isnan(value)]
    return min(values) > 0 and max(values) >= 10 * min(values)


def _value_axis(values: Sequence[float], log: bool = False) -> Axis:
    if log:
        return Axis(min(values) / 1.1, max(values) * 1.1, BOTTOM, TOP, log=True)
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.05 * (high - low) or 1.0
    return Axis(low - margin if low < 0 else 0.0, high + margin, BOTTOM, TOP)


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """About two points for each of `STRETCHES`, so that every spike and every gap stays."""
    n = len(points)
    if n <= 2 * STRETCHES:
        return list(points)
    kept = {0, n - 1}
    for i in range(STRETCHES):
        stretch = range(n * i // STRETCHES, n * (i + 1) // STRETCHES)
        finite = [j for j in stretch if not math.isnan(points[j][1])]
        if finite:
            kept |= {min(finite, key=lambda j: points[j][1]), max(finite, key=lambda j: points[j][1])}
        if len(finite) < len(stretch):
            kept.add(next(j for j in stretch if math.isnan(points[j][1])))
    return [points[j] for j in sorted(kept)]


def _path(points: Iterable[tuple[float, float]], x: Axis, y: Axis) -> str:
    """Path data with a gap at each NaN; `h0` makes a dot of a point that stands alone."""
    parts, drawing = [], False
    for place, value in points:
        if not math.isnan(value):
            parts.append(f"{'L' if drawing else 'M'}{x(place):.1f} {y(value):.1f}{'' if drawing else 'h0'}")
        drawing = not math.isnan(value)
    return "".join(parts)


def _bands(curves: Sequence[Curve], x: Axis, below: str, share: bool) -> str:
    """Stripes that cover the chart, each with the values of all curves at one place as its tooltip."""
    values = [(curve.name, dict(curve.points)) for curve in curves]
    places = sorted({place for _, points in values for place in points})
    places = places[:: -math.ceil(len(places) / BANDS)][::-1]
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in pairwise(places)), RIGHT]
    stripes = []
    for place, (left, right) in zip(places, pairwise(edges), strict=True):
        told = [f"{name}: {human(points[place], share)}" for name, points in values if place in points]
        stripes.append(_rectangle("band", left, right, TOP, "\n".join([f"{human(place)} {below}", *told])))
    return "".join(stripes)


def histogram(title: str, logs: Sequence[float], low: int, high: int, *, below: str, what: str) -> str:
    """A picture of how many values lie where; `logs` are their log10 and lie from `low` to `high`.

    Args:
        below: what is counted along x.
        what: what a bar counts, for its tooltip.
    """
    last = (high - low) * BINS_PER_DECADE - 1
    counts = Counter(min(int((value - low) * BINS_PER_DECADE), last) for value in logs)
    return density_bars(title, [counts[i] for i in range(last + 1)], low, below=below, what=what)


def density_bars(title: str, counts: Sequence[int], low: int, *, below: str, what: str) -> str:
    """The same of what is counted already, `BINS_PER_DECADE` bins for each power of ten from 10^`low`."""
    edges = [low + i / BINS_PER_DECADE for i in range(len(counts) + 1)]

    def tooltip(n: int, left: float, right: float) -> str:
        return f"{n:,} {what}: {human(10**left, share=True)} to {human(10**right, share=True)}"

    return bars(title, edges, counts, below=below, tooltip=tooltip)


def bars(
    title: str,
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    below: str,
    tooltip: Callable[[int, float, float], str],
) -> str:
    """A picture of counts between rising edges; `tooltip(count, left, right)` is told under the mouse."""
    x = Axis(edges[0], edges[-1], LEFT, RIGHT)
    y = _value_axis([1, *counts])
    drawn = [
        _rectangle("bar", x(left) + 0.5, x(right) - 0.5, y(n), tooltip(n, left, right))
        for n, (left, right) in zip(counts, pairwise(edges), strict=True)
        if n
    ]
    return _picture(title, _frame(x, y, tick, lambda n: tick(n) if n == int(n) else "", below) + "".join(drawn))


def _rectangle(kind: str, left: float, right: float, top: float, tooltip: str) -> str:
    """One that stands on the x axis."""
    size = f'width="{right - left:.1f}" height="{BOTTOM - top:.1f}"'
    return f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" {size}><title>{escape(tooltip)}</title></rect>'


def _frame(x: Axis, y: Axis, x_label: Callable[[float], str], y_label: Callable[[float], str], below: str) -> str:
    parts = []
    for value in y.ticks():
        parts.append(f'<path class="rule" d="M{LEFT} {y(value):.1f}H{RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y(value):.1f}">{y_label(value)}</text>')
    for value in x.ticks():
        parts.append(f'<text class="x" x="{x(value):.1f}" y="{BOTTOM + 16}">{x_label(value)}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}">{escape(below)}</text>')
    return "".join(parts) + f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>'


def _picture(title: str, drawing: str) -> str:
    return (
        f'<svg class="picture" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{drawing}</svg>'
    )


def curve_css(n_curves: int) -> str:
    """The colours and dashes; a table row with the class of a curve, under the mouse, fades the others."""

    def palette(colours: Sequence[str]) -> str:
        return "".join(f".c{i}{{stroke:{colour}}}" for i, colour in enumerate(colours))

    dashes = "".join(f".d{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(DASHES))
    faded = "".join(f"body:has(tr:hover .n{i}) .line:not(.n{i}){{opacity:.12}}" for i in range(n_curves))
    return f"{CSS}{palette(LIGHT)}@media(prefers-color-scheme:dark){{{palette(DARK)}}}{dashes}{faded}"


def human(value: Any, share: bool = False) -> str:
    """A value in few digits: 5.0M, 4,096, 30.6, 0.053, and 2.6 % for a share; – for None."""
    if not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    size = abs(value)
    if not size < math.inf:
        return str(value)
    if share:
        return f"{100 * value:.1f}\xa0%" if size >= 0.01 else f"{100 * value:.2g}\xa0%"
    if 0 < size < 0.01 or size >= 9e14:
        return f"{value:.2g}"
    if size >= 10_000:
        for suffix in "KMBT":
            value /= 1000
            if abs(value) < 999.95:  # else it would be written as 1000.0
                return f"{value:.1f}{suffix}"
    if isinstance(value, int) or size >= 1000 or size == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def tick(value: float, share: bool = False) -> str:
    """A round value."""
    if share:
        return f"{100 * value:g}\xa0%"
    return f"{value:g}" if abs(value) < 1000 else human(value).replace(".0", "")
