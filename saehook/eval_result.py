"""What an evaluation gives: a row of numbers for each SAE, their intervals, and what is needed to repeat it. Plain data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from saehook.errors import ArgumentError, FormatError
from saehook.intervals import MIN_SEQUENCES

CLEAR = 0.1
"""A number is printed where its interval reaches no further than this share of it; else the interval is."""
CLEAR_DIFFERENCE = 5e-4
"""Or no further than this: the last digit that is shown."""
FIRINGS = 100
"""Mean number of firings of a latent from which on a share of dead latents means something."""
_SHOWN = {
    "delta_ce": "delta ce",
    "kl": "kl",
    "top1": "top-1",
    "ce_recovered_zero": "recovered",
    "ce_recovered_mean": "(mean)",
    "ce_clean": "ce clean",
    "ce_spliced": "spliced",
    "ce_zero": "zero",
    "ce_mean": "mean",
    "fvu": "fvu",
    "cosine": "cosine",
    "gamma": "gamma",
}
"""Columns of the table."""
_ABSOLUTE = {"ce_clean", "ce_spliced", "ce_zero", "ce_mean"}
"""Shown as numbers whatever their intervals, which are those of the text and not of the SAE."""


@dataclass(frozen=True)
class EvalRow:
    """One SAE, or all together. Losses in nats per token; None is what does not exist or was not measured."""

    sae: str
    """Name of the SAE."""
    site: str
    """Its site, or `all`."""
    tokens: int
    """Tokens of the mask."""
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    delta_ce: float
    ce_recovered_zero: float | None
    ce_recovered_mean: float | None
    kl: float
    fvu: float | None
    l0: float
    dead_share: float
    top1: float | None = None
    """Share of tokens whose likeliest next token is that of the clean run."""
    cosine: float | None = None
    norm_ratio: float | None = None
    gamma: float | None = None
    windows: int | None = None
    """Sequences with a token that counts."""
    nan_tokens: int = 0
    """Tokens whose activation is not finite: in no other number."""
    nan_losses: int = 0
    """Tokens whose loss is not finite in one of the runs: in none of the losses."""
    d_sae: int | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals over sequences by the name of the field; see `saehook.intervals`."""
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)
    """More blocks by name: `positions`, `l0`, `density`, `special`; other measurements put theirs beside them."""

    def numbers(self) -> dict[str, Any]:
        """Fields without intervals and blocks: what stands in a table or in an SAE's file."""
        return {name: value for name, value in vars(self).items() if name not in ("intervals", "extra")}

    def unclear(self) -> dict[str, int]:
        """Fields whose interval is too wide for a number, and how many tokens would be enough: its width falls with the root
        of their number. Absolute losses are none of them. For `dead_share` enough is where a latent fires `FIRINGS` times in
        the mean."""
        found = {}
        for name, (low, high) in self.intervals.items():
            if name in _ABSOLUTE:
                continue
            value, half = getattr(self, name), (high - low) / 2
            allowed = max(CLEAR * abs(value), CLEAR_DIFFERENCE) if value is not None else math.inf
            if half > allowed:
                found[name] = math.ceil(self.tokens * (half / allowed) ** 2)
        if self.d_sae is not None and self.l0 > 0 and self.tokens * self.l0 < FIRINGS * self.d_sae:
            found["dead_share"] = math.ceil(FIRINGS * self.d_sae / self.l0)
        return found


@dataclass(frozen=True)
class EvalResult:
    """The rows, and what is needed to repeat them."""

    results: list[EvalRow]
    provenance: dict[str, Any] = field(default_factory=dict)

    def with_block(self, name: str, blocks: Mapping[str, dict[str, Any]]) -> EvalResult:
        """A copy in which `blocks`, plain data by the name of the SAE, stand in the rows' `extra` as `name`.

        Raises:
            ArgumentError: a name that no row has.
        """
        known = [row.sae for row in self.results]
        if unknown := [sae for sae in blocks if sae not in known]:
            raise ArgumentError(f"no row is called {', '.join(unknown)}; there are {', '.join(known)}.")
        rows = [
            dataclasses.replace(row, extra=row.extra | {name: blocks[row.sae]}) if row.sae in blocks else row
            for row in self.results
        ]
        return EvalResult(rows, self.provenance)

    def to_json(self) -> str:
        """`{"results": [...], "provenance": {...}}`, floats unrounded, null for what is not finite."""
        rows = [dataclasses.asdict(row) for row in self.results]
        return json.dumps(_finite({"results": rows, "provenance": self.provenance}), indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> EvalResult:
        """The inverse of `to_json`; also of files from before a field was measured.

        Raises:
            FormatError: the text is no evaluation.
        """
        try:
            data = json.loads(text)
            known = {each.name for each in dataclasses.fields(EvalRow)}
            rows = []
            for row in data["results"]:
                row = {name: value for name, value in row.items() if name in known}
                row["intervals"] = {name: (low, high) for name, (low, high) in row.get("intervals", {}).items()}
                rows.append(EvalRow(**row))
            return EvalResult(rows, dict(data["provenance"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"this is no evaluation ({error!r}). Write one with `saehook eval --json FILE`."
            ) from None

    def table(self) -> str:
        """The rows as text, with notes on what they mean and how far they can be trusted."""
        head = ["sae", "site", *_SHOWN.values(), "L0", "dead"]
        lines = [head, *(_cells(row) for row in self.results)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = "\n".join(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )
        return "\n".join([text, *self.notes()])

    def notes(self) -> Iterator[str]:
        """Sentences below the table."""
        tokens = dict.fromkeys(f"{row.tokens:,}" for row in self.results)
        yield f"{' / '.join(tokens)} tokens; losses in nats per token; dead: fired on none of them"
        saes = self.provenance.get("saes", {})
        rules = {name: sae["mask_rule"] for name, sae in saes.items() if "mask_rule" in sae}
        for rule in dict.fromkeys(rules.values()):
            sites = ", ".join(site for site in rules if rules[site] == rule)
            yield f"tokens that count{f' at {sites}' if len(set(rules.values())) > 1 else ''}: {rule}"
        if rules:
            yield "other tokens (special ones, sinks) keep their activation in every run and are in no number"
        for row in self.results:
            yield from _warnings(row)


def _cells(row: EvalRow) -> list[str]:
    unclear = row.unclear()

    def cell(name: str) -> str:
        value = getattr(row, name)
        if value is None:
            return "–"
        if row.windows == 1 and name not in _ABSOLUTE:
            return f"≈ {value:.1g}"
        if name in unclear and name in row.intervals:
            low, high = row.intervals[name]
            return f"[{low:.3f}, {high:.3f}]"
        return f"{value:.3f}"

    dead = f"{100 * row.dead_share:.1f}%"
    numbers = [cell(name) for name in _SHOWN]
    return [row.sae, row.site, *numbers, f"{row.l0:.1f}", f"≤ {dead}" if "dead_share" in unclear else dead]


def _warnings(row: EvalRow) -> Iterator[str]:
    if row.nan_tokens:
        yield f"{row.sae}: {row.nan_tokens:,} tokens have activations that are not finite; they are in no other number"
    if row.nan_losses:
        yield f"{row.sae}: {row.nan_losses:,} tokens have a loss that is not finite; they are in none of the losses"
    if row.windows is not None and row.windows < MIN_SEQUENCES:
        few = "1 window is" if row.windows == 1 else f"{row.windows} windows are"
        how = (
            "to say how exact the numbers are"
            if row.windows < 2
            else "for a bootstrap, so intervals are by Student's t"
        )
        yield (
            f"{row.sae}: {few} too few {how}; at least {MIN_SEQUENCES} are needed, about "
            f"{math.ceil(row.tokens * MIN_SEQUENCES / max(1, row.windows)):,} tokens"
        )
    for name, needed in row.unclear().items():
        if name == "dead_share":
            yield (
                f"{row.sae}: too few tokens for the share of dead latents, which is an upper bound here; about "
                f"{needed:,} are needed"
            )
        else:
            yield f"{row.sae}: too few tokens for {_SHOWN.get(name, name)}, shown as an interval; about {needed:,} are needed"


def _finite(value: Any) -> Any:
    """JSON data without NaN and infinity."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
