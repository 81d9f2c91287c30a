"""Plots of an outcome as SVG, with matplotlib (`pip install -e '.[plots]'`)."""

from __future__ import annotations

from pathlib import Path

from reproduction.outcome import Outcome, Plot, Series, short

COLUMNS = 3


def draw(outcome: Outcome, file: Path) -> None:
    """All plots of one claim, three in a row; the same numbers give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "saehook", "svg.fonttype": "none", "font.size": 8, "axes.grid": True}
    matplotlib.rcParams |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    columns = min(len(outcome.plots), COLUMNS)
    rows = -(-len(outcome.plots) // COLUMNS)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(outcome.plots) :]:
        axis.remove()
    for axis, plot in zip(axes.flat, outcome.plots, strict=False):
        if plot.quantities:
            _places(axis, outcome, plot)
        for i, series in enumerate(plot.series):
            _curve(axis, series, f"C{i % 10}", named=bool(plot.ticks))
        if plot.ticks:
            axis.set_xticks(range(len(plot.ticks)), plot.ticks, rotation=25, ha="right", fontsize=7)
        axis.set_title(short(plot.title), fontsize=9)
        axis.set_xlabel(plot.x)
        axis.set_ylabel(plot.y)
        if plot.log_x:
            axis.set_xscale("log", base=2 if all(x >= 0.05 for s in plot.series for x in s.x) else 10)
        if plot.log_y:
            axis.set_yscale("log")
        if len(plot.series) + len(plot.quantities) > 1:
            axis.legend(fontsize=6, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    file.write_text("\n".join(line.rstrip() for line in file.read_text(encoding="utf-8").splitlines()) + "\n", "utf-8")


def _places(axis, outcome: Outcome, plot: Plot) -> None:
    """Findings of some quantities, by data."""
    findings = [f for f in outcome.findings if f.quantity in plot.quantities]
    places = list(dict.fromkeys(f.data for f in findings))
    for i, quantity in enumerate(plot.quantities):
        mine = [f for f in findings if f.quantity == quantity]
        x = [places.index(f.data) + 0.12 * (i - (len(plot.quantities) - 1) / 2) for f in mine]
        series = Series(quantity, x, [f.value for f in mine], [f.low for f in mine], [f.high for f in mine])
        axis.plot(x, series.y, "o", color=f"C{i % 10}", markersize=4, label=quantity)
        _intervals(axis, series, f"C{i % 10}")
    axis.set_xticks(range(len(places)), [short(place) for place in places], rotation=25, ha="right", fontsize=7)
    if plot.y == "ratio":
        axis.axhline(1.0, color="black", linewidth=0.6)


def _curve(axis, series: Series, color: str, *, named: bool = False) -> None:
    line = "o" if named else "-" if len(series.x) > 12 else "o-"  # no line between places that have names
    label = series.label.replace("`", "").split(" (")[0]
    axis.plot(series.x, series.y, line, color=color, markersize=3, linewidth=1, label=label)
    _intervals(axis, series, color)


def _intervals(axis, series: Series, color: str) -> None:
    if series.low and all(v is not None for v in (*series.low, *series.high)):
        ends = [[max(0.0, y - a) for y, a in zip(series.y, series.low, strict=True)]]
        ends.append([max(0.0, b - y) for y, b in zip(series.y, series.high, strict=True)])
        axis.errorbar(series.x, series.y, yerr=ends, fmt="none", ecolor=color, elinewidth=1, capsize=2)
