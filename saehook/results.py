"""What runs give back: `Generation`, `Latents`, and the report of what the edits did. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saehook.errors import ArgumentError
from saehook.interventions import AnyEdit, Edit


class EditReport(NamedTuple):
    """What one edit did in one run, all rows together."""

    edit: AnyEdit
    tokens: int
    """Tokens that it selected."""
    dose: float
    """Mean of ‖Δ‖/‖x‖ over them: how large the change is against the activation."""
    residual: float | None = None
    """With `mode='readback'`: mean of |encode(x') - z'| over them and its latents, how far the write is from what was asked."""


class SiteReport(NamedTuple):
    """What happened at one site in one run: all its edits and the splice together."""

    site: str
    tokens: int
    """Tokens that were touched."""
    dose: float
    """Mean of ‖x' - x‖/‖x‖ over them."""


@dataclass(frozen=True)
class Report:
    """What a program did in one run."""

    edits: tuple[EditReport, ...] = ()
    sites: tuple[SiteReport, ...] = ()

    def notes(self) -> list[str]:
        """One sentence for each edit that did nothing."""
        notes = []
        for number, (edit, tokens, dose, _) in enumerate(self.edits, 1):
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

    def __str__(self) -> str:
        lines = [
            f"{e.edit}: {e.tokens} tokens, ‖Δ‖/‖x‖ {e.dose:.3f}"
            + ("" if e.residual is None else f", read back to within {e.residual:.2g}")
            for e in self.edits
        ]
        lines += [f"{s.site}: {s.tokens} tokens, ‖x'-x‖/‖x‖ {s.dose:.3f}" for s in self.sites]
        return "\n".join(lines) or "nothing was edited"


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
    acts: Tensor
    """[S, d_sae], on the SAE's device; all tokens, also those outside the mask, which the SAE was not trained on."""
    ids: Tensor
    """[S] int64 on the CPU."""
    tokens: list[str]
    """The text of each token."""
    mask: Tensor
    """[S] bool on the CPU: False outside the mask, at special tokens and what the SAE's `mask_rule` leaves out."""

    def top(self, n: int = 10) -> list[LatentHit]:
        """The n latents with the largest activation on any token of the mask, strongest first; fewer if fewer fire."""
        if n < 1:
            raise ArgumentError(f"top({n}) asks for no latent; at least 1 is expected.")
        acts = self.acts * self.mask[:, None].to(self.acts.device)
        values, positions = acts.max(0)
        values, latents = values.topk(min(n, values.numel()))
        return [
            LatentHit(latent, value, int(positions[latent]), self.tokens[int(positions[latent])])
            for latent, value in zip(latents.tolist(), values.tolist(), strict=True)
            if value > 0
        ]

    def at(self, position: int, n: int = 10) -> list[LatentHit]:
        """The n strongest latents of one token, strongest first; negative positions count from the end."""
        if n < 1:
            raise ArgumentError(f"at(..., n={n}) asks for no latent; at least 1 is expected.")
        if not -len(self.ids) <= position < len(self.ids):
            raise ArgumentError(f"position {position} is outside the {len(self.ids)} tokens.")
        position %= len(self.ids)
        values, latents = self.acts[position].topk(min(n, self.acts.shape[1]))
        return [
            LatentHit(latent, value, position, self.tokens[position])
            for latent, value in zip(latents.tolist(), values.tolist(), strict=True)
            if value > 0
        ]

    def l0(self) -> Tensor:
        """Latents that fire on each token, [S] int64 on the CPU."""
        return torch.count_nonzero(self.acts, dim=-1).cpu()
