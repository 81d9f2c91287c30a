"""Plots of an outcome as SVG, with matplotlib (`pip install -e '.[plots]'`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reproduction.outcome import Plot, Series


def draw(plots: Sequence[Plot], file: Path) -> None:
    """All plots of one claim side by side; the same numbers give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "saehook", "svg.fonttype": "none", "font.size": 8, "axes.grid": True}
    matplotlib.rcParams |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(1, len(plots), figsize=(4.6 * len(plots), 3.4), squeeze=False, layout="constrained")
    for axis, plot in zip(axes[0], plots, strict=True):
        for i, series in enumerate(plot.series):
            _add(axis, plot, series, i)
        axis.set_title(plot.title, fontsize=9)
        axis.set_xlabel(plot.x)
        axis.set_ylabel(plot.y)
        if plot.ticks:
            axis.set_xticks(range(len(plot.ticks)), plot.ticks, rotation=25, ha="right", fontsize=7)
            axis.axhline(1.0, color="black", linewidth=0.6) if plot.y == "ratio" else None
        if plot.log_x:
            axis.set_xscale("log", base=2 if all(x >= 0.05 for s in plot.series for x in s.x) else 10)
        if plot.log_y:
            axis.set_yscale("log")
        if len(plot.series) > 1 or plot.series[0].label:
            axis.legend(fontsize=6, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    file.write_text("\n".join(line.rstrip() for line in file.read_text(encoding="utf-8").splitlines()) + "\n", "utf-8")


def _add(axis, plot: Plot, series: Series, i: int) -> None:
    color = f"C{i % 10}"
    x = [v + 0.12 * (i - (len(plot.series) - 1) / 2) for v in series.x] if plot.ticks else series.x
    label = series.label.replace("`", "").split(" (")[0]
    if plot.ticks:
        axis.plot(x, series.y, "o", color=color, markersize=4, label=label)
    else:
        axis.plot(x, series.y, "-" if len(x) > 12 else "o-", color=color, markersize=3, linewidth=1, label=label)
    if series.low and all(v is not None for v in (*series.low, *series.high)):
        ends = [[max(0.0, y - a) for y, a in zip(series.y, series.low, strict=True)]]
        ends.append([max(0.0, b - y) for y, b in zip(series.y, series.high, strict=True)])
        axis.errorbar(x, series.y, yerr=ends, fmt="none", ecolor=color, elinewidth=1, capsize=2)
