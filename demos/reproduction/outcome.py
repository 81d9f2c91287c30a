"""What came out of one claim, as plain data, and the rule that turns numbers into a verdict."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

REPRODUCED, NOT_REPRODUCED, UNTESTED = "reproduced", "not reproduced", "could not be tested at this scale"
NOT_RUN = "not run yet"

VERDICT_RULE = (
    "A finding **holds** if its whole 95 % interval is on the expected side, **fails** if none of it is, else it is "
    "**open**. A claim is *reproduced* if all its findings hold, *not reproduced* if one fails, and *could not be tested at "
    "this scale* if one is open and none fails, or if a condition of the comparison (matched L0) does not hold for any data. "
    "Findings on data for which a condition does not hold are not counted."
)


@dataclass(frozen=True)
class Finding:
    """One number that the claim says something about."""

    data: str
    """What it was measured on."""
    quantity: str
    value: float
    low: float
    """Lower end of the 95 % interval; the value where it is exact."""
    high: float
    above: float | None = None
    """Expected is more than this; None: no such bound."""
    below: float | None = None
    """Expected is less than this."""
    condition: bool = False
    """Something without which the other findings on the same data mean nothing."""

    @property
    def counts(self) -> bool:
        """Whether anything is expected of it."""
        return self.above is not None or self.below is not None

    @property
    def state(self) -> str:
        """`holds`, `fails`, `open`; empty where nothing is expected."""
        if not self.counts:
            return ""
        if not all(map(math.isfinite, (self.value, self.low, self.high))):
            return "open"
        bottom = -math.inf if self.above is None else self.above
        top = math.inf if self.below is None else self.below
        if bottom < self.low and self.high < top:
            return "holds"
        return "fails" if self.high <= bottom or self.low >= top else "open"

    @property
    def expected(self) -> str:
        """As text."""
        if self.above is not None and self.below is not None:
            return f"{self.above:g} … {self.below:g}"
        return f"> {self.above:g}" if self.above is not None else "" if self.below is None else f"< {self.below:g}"


@dataclass(frozen=True)
class Series:
    """One curve of a plot."""

    label: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Plot:
    """Axes with curves."""

    title: str
    x: str
    y: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False
    quantities: list[str] = field(default_factory=list)
    """Of the findings, side by side for all data, in place of series of its own."""
    ticks: list[str] = field(default_factory=list)
    """Names of the places 0, 1, 2, ... on the x axis; empty where x is a number."""


@dataclass(frozen=True)
class Outcome:
    """What is known of one claim; data that were measured at different times stand side by side (`joined`)."""

    findings: list[Finding]
    plots: list[Plot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    untestable: str = ""
    """Why nothing could be measured."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Of each command that measured a part of it: date, versions, seeds, seconds, and what was trained, by data."""

    @property
    def verdict(self) -> str:
        """By `VERDICT_RULE`."""
        return verdict(self.findings, self.untestable)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite are None."""
        return _plain(dataclasses.asdict(self))

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Outcome:
        """The inverse of `to_dict`."""
        nan: dict[str, Any] = {name: float("nan") for name in ("value", "low", "high")}
        findings = [Finding(**nan | {k: v for k, v in f.items() if v is not None}) for f in data["findings"]]
        plots = [Plot(**p | {"series": [Series(**s) for s in p["series"]]}) for p in data["plots"]]
        return Outcome(findings, plots, data["notes"], data["untestable"], data["runs"])


def joined(old: Outcome, new: Outcome) -> Outcome:
    """The new one, with what the old one found on other data; of data that were measured again only the new is left."""
    if not new.findings:
        return old if old.findings else new
    again = {finding.data for finding in new.findings} | {data for run in new.runs for data in run["trained"]}
    findings = sorted([f for f in old.findings if f.data not in again] + new.findings, key=_place)
    plots = {plot.title: plot for plot in old.plots}
    for plot in new.plots:
        plots[plot.title] = _joined_plots(plots[plot.title], plot) if plot.title in plots else plot
    runs = []
    for run in old.runs:
        left = {data: facts for data, facts in run["trained"].items() if data not in again}
        if left:
            runs.append(run | {"trained": left})
    return Outcome(findings, list(plots.values()), new.notes, new.untestable, runs + new.runs)


def _place(finding: Finding) -> int:
    """Planted data first, then the bundled model, then the second one."""
    return 1 if "bundled model" in finding.data else 2 if "stories260K" in finding.data else 0


def _joined_plots(old: Plot, new: Plot) -> Plot:
    """Curves of the new one stand for those of the same name."""
    curves = {series.label: series for series in (*old.series, *new.series)}
    quantities = list(dict.fromkeys([*old.quantities, *new.quantities]))
    return dataclasses.replace(new, series=list(curves.values()), quantities=quantities)


def verdict(findings: Sequence[Finding], untestable: str = "") -> str:
    """One of the three; see `VERDICT_RULE`."""
    counted = counted_findings(findings)
    states = {finding.state for finding in counted}
    if untestable or not counted:
        return UNTESTED
    if "fails" in states:
        return NOT_REPRODUCED
    return UNTESTED if "open" in states else REPRODUCED


def counted_findings(findings: Sequence[Finding]) -> list[Finding]:
    """Those with an expectation, on data for which every condition holds."""
    spoilt = {f.data for f in findings if f.condition and f.state != "holds"}
    return [f for f in findings if f.counts and not f.condition and f.data not in spoilt]


def why(outcome: Outcome) -> str:
    """The verdict's reason, in a few words."""
    if outcome.untestable:
        return outcome.untestable
    counted = counted_findings(outcome.findings)
    spoilt = sorted({f.data for f in outcome.findings if f.condition and f.state != "holds"})
    parts = [f"{sum(f.state == 'holds' for f in counted)} of {len(counted)} findings hold"]
    for state in ("fails", "open"):
        places: dict[str, list[str]] = {}
        for f in counted:
            if f.state == state:
                places.setdefault(f.quantity, []).append(short(f.data))
        if places:
            said = [f"{quantity} ({' | '.join(data)})" for quantity, data in places.items()]
            parts.append(f"{state}: {'; '.join(said)}")
    if spoilt:
        parts.append(f"not counted, since a condition does not hold: {', '.join(spoilt)}")
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "."


def short(data: str) -> str:
    """`planted, 96 in 64 dim., poisson`; sites by their model."""
    if planted := re.match(r"planted directions \((\d+) in (\d+) dimensions, (\w+) counts", data):
        return f"planted, {planted[1]} in {planted[2]} dim., {planted[3]}"
    return (
        data.replace("`", "").replace(" of the bundled model", ", bundled").replace(" of stories260K", ", stories260K")
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
