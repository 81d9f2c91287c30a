"""What runs give back: `Generation`, `Latents`, and the report of what the edits did. Plain data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehook.errors import ArgumentError, LatentError
from saehook.interventions import AnyEdit, Edit
from saehook.sae import DENSE_ENTRIES
from saehook.sparse_acts import Acts, columns_of
from saehook.token_html import escape, strip_html, table_html


class LatentChange(NamedTuple):
    """Activations of one latent before and after, over the tokens that were touched."""

    latent: int
    before: float
    """Mean."""
    after: float
    """Mean."""
    before_max: float
    after_max: float
    change: float
    """Mean of |after - before|."""


class EditReport(NamedTuple):
    """What one edit did in one run, all rows together."""

    edit: AnyEdit
    tokens: int
    """Tokens that it selected."""
    dose: float
    """Mean of ‖Δ‖/‖x‖ over them: how large the change is against the activation."""
    residual: float | None = None
    """With `mode='readback'`: mean of |encode(x') - z'| over them and its latents, how far the write is from what was asked."""
    latents: tuple[LatentChange, ...] = ()
    """In a full report, of each latent that the edit names: z as the edit sees it, and z'."""


class SiteReport(NamedTuple):
    """What happened at one site in one run: all its edits and the splice together."""

    site: str
    tokens: int
    """Tokens that were touched."""
    dose: float
    """Mean of ‖x' - x‖/‖x‖ over them."""


class SideEffects(NamedTuple):
    """What an attached SAE reads at a site before and after the edits there, encode(x) and encode(x')."""

    sae: str
    """Its name in `HookedSAEs.saes`."""
    latents: tuple[LatentChange, ...]
    """Latents that no edit names and that moved, the largest change first; at most `MOST_MOVED`."""


class RowReport(NamedTuple):
    """What a program changed in one row of the call."""

    ids: tuple[int, ...]
    """The row's tokens that the model was given: of a generation all but the last new one."""
    kl: tuple[float, ...]
    """After each of them KL(p ‖ q) in nats of the next token, p of the unedited model and q with the program."""
    unedited_ids: tuple[int, ...] | None = None
    """New tokens of the same row without the program, drawn with the same noise; None where nothing is generated."""
    unedited_text: str | None = None
    """Their text, special tokens left out."""
    first_divergent: int | None = None
    """Number of the first new token, from 0, that differs from it; None where none does."""

    @property
    def mean_kl(self) -> float:
        """Mean of `kl`, nats a token."""
        return sum(self.kl) / len(self.kl)


MOST_MOVED = 10


@dataclass(frozen=True)
class Report:
    """What a program did in one run, all its rows together.

    With `report="full"` also the changes of latents, `side_effects` and `rows` (`full_report.py` says how).
    """

    edits: tuple[EditReport, ...] = ()
    sites: tuple[SiteReport, ...] = ()
    side_effects: tuple[SideEffects, ...] = ()
    """For each attached SAE that reads an edited site."""
    rows: tuple[RowReport, ...] = ()
    """In the order of what the call returns."""

    def notes(self) -> list[str]:
        """One sentence for each edit that did nothing."""
        notes = []
        for number, (edit, tokens, dose, *_) in enumerate(self.edits, 1):
            if tokens == 0:
                checks = ["where="]
                if edit.when is not None:
                    checks.append("when=")
                if isinstance(edit, Edit) and edit.active_only:
                    checks.append("whether the latent is ever active")
                check = f"Check {', or '.join(checks)}."
                notes.append(f"edit {number} ({edit}) selected no token, so it did nothing. {check}")
            elif dose == 0:
                notes.append(
                    f"edit {number} ({edit}) changed nothing on the {tokens} tokens it selected: "
                    + (
                        "the latent already had that value there."
                        if isinstance(edit, Edit)
                        else "x was like that already."
                    )
                )
        return notes

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON, with the notes: edits as in a program, numbers unrounded, None for those that are not finite."""
        return {name: _data(value) for name, value in vars(self).items()} | {"notes": self.notes()}

    def to_json(self) -> str:
        """`to_data` as JSON."""
        return json.dumps(self.to_data(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        lines = []
        for e in self.edits:
            residual = "" if e.residual is None else f", read back to within {e.residual:.2g}"
            lines.append(f"{e.edit}: {e.tokens} tokens, ‖Δ‖/‖x‖ {e.dose:.3f}{residual}")
            lines += [f"  {_words(latent)}" for latent in e.latents]
        lines += [f"{s.site}: {s.tokens} tokens, ‖x'-x‖/‖x‖ {s.dose:.3f}" for s in self.sites]
        for s in self.side_effects:
            lines += [f"moved besides at {s.sae}, {_words(latent)}" for latent in s.latents]
        for number, row in enumerate(self.rows):
            line = f"row {number}: KL {row.mean_kl:.3g} nats a token"
            if row.unedited_ids is not None:
                same = "the text is the unedited one"
                line += (
                    f", {same if row.first_divergent is None else f'other text from new token {row.first_divergent}'}"
                )
            lines.append(line)
        return "\n".join(lines) or "nothing was edited"


def _words(c: LatentChange) -> str:
    return f"latent {c.latent}: mean {c.before:.3g} -> {c.after:.3g}, max {c.before_max:.3g} -> {c.after_max:.3g}"


def _data(value: Any) -> Any:
    """What stands in a report as JSON has it."""
    if isinstance(value, AnyEdit):
        return value.to_data()
    if hasattr(value, "_asdict"):
        return {name: _data(part) for name, part in value._asdict().items()}
    if isinstance(value, tuple):
        return [_data(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Generation:
    """One generated row."""

    ids: Tensor
    """Prompt and new tokens, 1-D int64 on the CPU, without padding."""
    new_ids: Tensor
    """The new tokens, an EOS that ended the row included."""
    text: str
    """The text of `new_ids`, special tokens left out."""
    report: Report
    """What the edits did, all rows of the call together."""


class LatentHit(NamedTuple):
    """A latent and where it fires most strongly in a text."""

    latent: int
    activation: float
    """Its largest activation, raw."""
    position: int
    """Index of that token."""
    token: str


@dataclass(frozen=True)
class Latents:
    """Latent activations of one row at one site."""

    site: str
    held: Acts
    """[S, d_sae], on the SAE's device; of a wide SAE only those that are not 0. All tokens, also those outside the mask, which
    the SAE was not trained on."""
    ids: Tensor
    """[S] int64 on the CPU."""
    tokens: list[str]
    """The text of each token."""
    mask: Tensor
    """[S] bool on the CPU: False outside the mask, at special tokens and what the SAE's `mask_rule` leaves out."""

    @property
    def acts(self) -> Tensor:
        """The activations as one dense tensor, [S, d_sae], on the SAE's device.

        Raises:
            ArgumentError: a wide SAE, and a text so long that the tensor would be too large.
        """
        if isinstance(self.held, Tensor):
            return self.held
        n, d_sae = len(self.ids), self.held.pairs.d_sae
        if n * d_sae > DENSE_ENTRIES:
            raise ArgumentError(
                f"{n} tokens x {d_sae:,} latents are too many for one dense tensor. Use .fired, .top(), .at() or .of(latent)."
            )
        return self.held.dense()

    @cached_property
    def fired(self) -> tuple[Tensor, Tensor, Tensor]:
        """(positions, latents, activations) of all that are not 0, [m] each, position by position; also outside the mask."""
        if isinstance(self.held, Tensor):
            positions, latents = self.held.nonzero(as_tuple=True)
            return positions, latents, self.held[positions, latents]
        return self.held.pairs.tokens, self.held.pairs.latents, self.held.values

    def of(self, latent: int) -> Tensor:
        """The activations of one latent, [S], on the SAE's device.

        Raises:
            LatentError: there is no such latent.
        """
        d_sae = self.held.shape[1] if isinstance(self.held, Tensor) else self.held.pairs.d_sae
        if not 0 <= latent < d_sae:
            raise LatentError(f"latent {latent} is outside 0..{d_sae - 1}, the latents of the SAE at {self.site}.")
        return columns_of(self.held, torch.tensor([latent], device=self.fired[0].device))[:, 0]

    def top(self, n: int = 10) -> list[LatentHit]:
        """The n latents with the largest activation on any token of the mask, in magnitude, strongest first; fewer if fewer
        fire."""
        if n < 1:
            raise ArgumentError(f"top({n}) asks for no latent; at least 1 is expected.")
        return self._strongest(self.mask.to(self.fired[0].device)[self.fired[0]], n)

    def at(self, position: int, n: int = 10) -> list[LatentHit]:
        """The n strongest latents of one token, strongest first; negative positions count from the end."""
        if n < 1:
            raise ArgumentError(f"at(..., n={n}) asks for no latent; at least 1 is expected.")
        if not -len(self.ids) <= position < len(self.ids):
            raise ArgumentError(f"position {position} is outside the {len(self.ids)} tokens.")
        return self._strongest(self.fired[0] == position % len(self.ids), n)

    def _strongest(self, some: Tensor, n: int) -> list[LatentHit]:
        """The n strongest latents among some of those that fired, each where it is strongest."""
        positions, latents, acts = (each[some & (self.fired[2] != 0)] for each in self.fired)
        falling = acts.abs().argsort(descending=True, stable=True)
        known, which = latents[falling].unique(return_inverse=True)
        places = torch.arange(len(falling), device=falling.device)
        first = torch.full_like(known, len(falling)).scatter_reduce(0, which, places, "amin")
        best = falling[first.sort().values[:n]]
        rows = zip(latents[best].tolist(), acts[best].tolist(), positions[best].tolist(), strict=True)
        return [LatentHit(latent, value, position, self.tokens[position]) for latent, value, position in rows]

    def _repr_html_(self) -> str:
        """For notebooks: the strongest latents, and the tokens coloured by each of the first five."""
        hits = self.top(10)
        rows = [(hit.latent, f"{hit.activation:.4g}", repr(hit.token), hit.position) for hit in hits]
        strips = [
            f"<p>latent {hit.latent} at {escape(self.site)}, from 0 to {hit.activation:.4g}</p>"
            + strip_html(
                self.tokens, (self.of(hit.latent).float().cpu() * self.mask).tolist(), hit.activation, hit.position
            )
            for hit in hits[:5]
        ]
        return table_html(("latent", "largest activation", "on token", "position"), rows) + "".join(strips)

    def l0(self) -> Tensor:
        """Latents that fire on each token, [S] int64 on the CPU."""
        return torch.bincount(self.fired[0], minlength=len(self.ids)).cpu()
