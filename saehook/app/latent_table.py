"""The table of the latents that fire in a text, or on some of its tokens: which it lists, in which order, and with what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from saehook.app.reading import SHOWN, Reading
from saehook.errors import SaehookError
from saehook.latent_notes import LatentNote, read_notes
from saehook.results import LatentHit
from saehook.sae import SAE
from saehook.visible_text import one_line, visible

Span = tuple[int, int] | None
"""Chosen tokens, from the first to before the second."""
SORTS = {
    "activation": lambda row: -row.hit.activation,
    "effect on the loss, ≈": lambda row: -abs(row.effect) if math.isfinite(row.effect) else math.inf,
    "rarest first": lambda row: row.density,
}


@dataclass(frozen=True)
class Filter:
    """Which latents the table leaves out."""

    dense: float = 1.0
    """Those that fire on a larger share of tokens."""
    least: float = 0.0
    """Those that are never as strong in the text."""
    words: str = ""
    """Those whose label lacks one of the words."""

    def passes(self, activation: float, density: float, label: str) -> bool:
        """Whether a latent stays."""
        wanted = self.words.casefold().split()
        fits = all(word in label.casefold() for word in wanted)
        return density <= self.dense and activation >= self.least and fits


class Row(NamedTuple):
    """A latent that the table lists."""

    hit: LatentHit
    effect: float
    """To first order; NaN where the text has no loss."""
    density: float
    label: str


class Listed(NamedTuple):
    """What the table shows."""

    rows: list[Row]
    passed: int
    """How many the filters keep."""
    active: int
    """How many fire."""
    labelled: bool
    """Whether any latent of the SAE has a label."""
    trouble: str
    """Why labels cannot be read."""


def filter_of(dense: float | None, least: float | None, words: str) -> Filter:
    return Filter(float(dense or 0) / 100, float(least or 0), str(words or ""))


def telling_latent(reading: Reading, sae: SAE) -> str:
    """The latent with which a text is shown first: of those with a label the one nearest to its recorded maximum, else the
    strongest."""
    rows = listed(reading, sae, None, "activation", Filter(), most=sae.d_sae).rows
    named = [row for row in rows if row.label]
    if named and sae.stats is not None:
        most = sae.stats.max_act
        named.sort(key=lambda row: -row.hit.activation / max(float(most[row.hit.latent]), 1e-30))
    first = (named or rows)[:1]
    return str(first[0].hit.latent) if first else ""


def listed(reading: Reading, sae: SAE, span: Span, sort: str, keep: Filter, most: int = SHOWN) -> Listed:
    """The latents of a reading, or of its tokens in `span`, that the table shows.

    Args:
        sort: one of `SORTS`.
    """
    facts = reading.facts
    start, stop = span or (0, len(facts.ids))
    hits, active = facts.strongest(sae.d_sae, start, stop)
    density = None if sae.stats is None else sae.stats.density
    labels, trouble = labels_of(sae)
    rows = [
        Row(
            hit,
            facts.effects.get(hit.latent, math.nan),
            0.0 if density is None else float(density[hit.latent]),
            labels.get(hit.latent, ""),
        )
        for hit in hits
    ]
    rows = [row for row in rows if keep.passes(row.hit.activation, row.density, row.label)]
    shown = sorted(rows, key=SORTS.get(sort, SORTS["activation"]))[:most]
    return Listed(shown, len(rows), active, bool(labels), trouble)


def table_value(reading: Reading, sae: SAE, latent: int | None, span: Span, found: Listed) -> dict[str, Any]:
    """The listed latents as a table."""
    facts = reading.facts
    start, stop = span or (0, len(facts.ids))
    one = span is not None and stop - start == 1
    if span is None:
        what = "Strongest latents of the text"
    elif one:
        what = f"Strongest latents of token {start}, “{one_line(reading.tokens[start])}”"
        what += "" if facts.mask[start] else " (outside the mask: the SAE was not trained on it)"
    else:
        what = f"Strongest latents of tokens {start} to {stop - 1}"
    columns = ["latent", *(["activation"] if one else ["largest activation", "on token"])]
    columns += ["label"] if found.labelled else []
    columns += [] if sae.stats is None else ["recorded max", "fires on"]
    columns += ["loss without it, ≈", "measured"]
    largest = max((row.hit.activation for row in found.rows), default=1.0)
    rows = []
    for row in found.rows:
        hit = row.hit
        cells = [f"{hit.activation:.3g}"]
        if not one:
            cells.append(f"{one_line(reading.tokens[hit.position])}  ({hit.position})")
        if found.labelled:
            cells.append(row.label)
        if sae.stats is not None:
            cells += [f"{float(sae.stats.max_act[hit.latent]):.3g}", f"{row.density:.2%}"]
        cells += [_nats(row.effect), _nats(reading.measured.get(hit.latent, math.nan))]
        rows.append(
            {"key": hit.latent, "cells": cells, "share": hit.activation / largest, "selected": hit.latent == latent}
        )
    fire, keep = found.active, found.passed
    of = f"{fire} that fire" if keep == fire else f"{keep} that the filters keep, {fire} fire"
    return {"caption": f"{what} · showing {len(rows)} of {of}{found.trouble}", "columns": columns, "rows": rows}


def _nats(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "–"


def labels_of(sae: SAE) -> tuple[dict[int, str], str]:
    """What the latents are called, and why that cannot be read."""
    try:
        notes: dict[int, LatentNote] = read_notes(sae)
    except SaehookError as problem:
        return {}, f" · no labels: {problem}"
    return {latent: one_line(visible(note.label)) for latent, note in notes.items()}, ""
