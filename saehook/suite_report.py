"""The slow metrics of an evaluation (`SuiteResult.to_dict`) as parts of its page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from saehook.charts import Curve, curve_chart, escape
from saehook.page import figure, flat, grid, section, table

_CURVES = (
    ("fvu_topk", "FVU at another k", "the k′ largest pre-activations of each token"),
    ("fvu_threshold", "FVU at one threshold", "the same θ for all latents, as many of them on average"),
    ("delta_ce_topk", "Loss added at another k", "nats per token, the k′ largest spliced in"),
    ("delta_ce_threshold", "Loss added at one threshold", "nats per token"),
)
_RESPONSES = (
    ("gain", "Steering: what the latent promotes", "gain of its own top tokens, nats"),
    ("kl", "Steering: KL", "of the clean model to the steered one, nats per token"),
    ("loss_rise", "Steering: loss under the clean model", "rise, nats per token"),
)


def suite_sections(suite: Mapping[str, Any]) -> Iterator[str]:
    """HTML: the measures, what depends on k′ or strength as curves, single tasks, what is left out, how it was measured.

    Args:
        suite: `suite` of a file that `saehook eval --suite .. --json` wrote.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is something else.
    """
    rows: Sequence[Mapping[str, Any]] = suite["rows"]
    saes = list(dict.fromkeys(row["sae"] for row in rows))
    single = [row for row in rows if "." in row["name"]]
    whole = [row for row in rows if "." not in row["name"]]
    pictures = [*_curves(single, saes), *_dose_response(suite.get("steering", {}), rows)]
    yield section(
        "Latents, measured one by one", _table(whole, saes) + _left_out(suite.get("left_out", [])) + grid(pictures)
    )
    yield section("The same by task and by k′", _folded("Every number", _table(single, saes)) if single else "")
    settings = [(escape(key), [value]) for key, value in flat(suite.get("provenance", {}))]
    yield section(
        "How the latents were measured", _folded("Versions, text, rules", table(["setting", "value"], settings))
    )


def measure_text(row: Mapping[str, Any]) -> str:
    """`0.21 [0.2 … 0.23]`; the interval alone where it is wider than twice the number, and with what is missing where there
    was too little; – where there is no number."""
    value, low, high = row["value"], row["low"], row["high"]
    interval = "unknown" if low is None or high is None else f"{low:.3g} … {high:.3g}"
    if row["few"]:
        return f"{interval} ({row['few']})"
    if value is None or low is None or high is None:
        return "–" if value is None else f"{value:.3g}"
    return interval if high - low > 2 * abs(value) else f"{value:.3g} [{interval}]"


def _table(rows: Sequence[Mapping[str, Any]], saes: Sequence[str]) -> str:
    """A line for each measure, a column for each SAE."""
    if not rows:
        return ""
    cells = {(row["name"], row["sae"]): row for row in rows}
    body = []
    for name in dict.fromkeys(row["name"] for row in rows):
        first = next(row for row in rows if row["name"] == name)
        found = [cells.get((name, sae)) for sae in saes]
        measured = " / ".join(dict.fromkeys(f"{row['n']:,} {row['of']}" for row in found if row))
        said = [measure_text(row) if row else "–" for row in found]
        body.append((f"{escape(name.replace('_', ' '))}<br/><small>{escape(first['unit'])}</small>", [*said, measured]))
    note = "In brackets 95 % intervals by a bootstrap over what each number is measured on."
    return table(["measure", *saes, "measured on"], body) + f"<p>{note}</p>"


def _left_out(gone: Sequence[Mapping[str, str]]) -> str:
    said = (f"{each['site']}: no {each['metric'].replace('_', ' ')}: {each['why']}" for each in gone)
    return "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in said)


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _curves(rows: Sequence[Mapping[str, Any]], saes: Sequence[str]) -> Iterator[str]:
    """What is measured at several k′."""
    for stem, title, note in _CURVES:
        curves = []
        for i, sae in enumerate(saes):
            found = [row for row in rows if row["sae"] == sae and row["name"].startswith(f"{stem}.")]
            points = [(math.log2(int(row["name"].rpartition(".")[2])), row["value"]) for row in found]
            points = sorted(point for point in points if point[1] is not None)
            if points:
                curves.append(Curve(sae, i, points))
        if curves:
            yield figure(title, note, curve_chart(title, curves, below="log2 of k′"))


def _dose_response(
    responses: Mapping[str, Sequence[Mapping[str, Any]]], rows: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Means over the steered latents of each SAE, by strength."""
    saes = list(dict.fromkeys(row["sae"] for row in rows))
    names = {row["site"]: row["sae"] for row in rows if row["metric"] == "steering"}
    steered = {names[site]: latents for site, latents in responses.items() if latents and site in names}
    for key, title, note in _RESPONSES if steered else ():
        curves = []
        for sae, latents in steered.items():
            strengths = latents[0]["strengths"]
            means = [fmean(latent[key][i] for latent in latents) for i in range(len(strengths))]
            doublings = [math.log2(strength / strengths[0]) for strength in strengths]
            curves.append(Curve(sae, saes.index(sae), list(zip(doublings, means, strict=True))))
        latents = next(iter(steered.values()))
        below = f"doublings of {latents[0]['strengths'][0]:g} × the latent's maximum"
        yield figure(title, f"{note}; mean of {len(latents)} latents", curve_chart(title, curves, below=below))
