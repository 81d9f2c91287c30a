"""Latents that two SAEs share: matched by the cosine of their decoder rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saehook.errors import ArgumentError, ShapeError
from saehook.sae import SAE
from saehook.suite.latent_quality import max_cosine
from saehook.suite.measure import Measure, ratio

SAME = 0.7
"""Cosine above which two latents count as the same."""


@dataclass(frozen=True)
class Matches:
    """For each latent of one SAE the nearest of another."""

    cosine: Tensor
    """[n] float32"""
    latent: Tensor
    """The other's latent, [n] int64; several may have the same one."""
    mutual: Tensor
    """Whether each is the nearest of its nearest, [n] bool: at most one partner each."""

    @property
    def shared(self) -> Tensor:
        """Which latents have a partner of their own with a cosine above `SAME`, [n] bool."""
        return self.mutual & (self.cosine > SAME)


def match_latents(a: SAE, b: SAE, alive: Tensor | None = None, alive_b: Tensor | None = None) -> Matches:
    """The nearest latent of `b` for each of `a`; of the `alive` latents [n] of each only, where given.

    Raises:
        ShapeError: their decoders are of another width. ArgumentError: one of them has no alive latent.
    """
    if a.d_out != b.d_out:
        raise ShapeError(
            f"one SAE reconstructs activations of width {a.d_out}, the other of {b.d_out}: they are of two sites or models "
            "and have no latents in common. Compare SAEs of one site."
        )
    latents = torch.arange(a.d_sae, device=a.device) if alive is None else alive
    others = torch.arange(b.d_sae, device=b.device) if alive_b is None else alive_b
    if not len(latents) or not len(others):
        raise ArgumentError("one of the two SAEs has no alive latent, so nothing can be matched.")
    rows, columns = a.W_dec[latents], b.W_dec[others].to(a.device)
    cosine, nearest = max_cosine(rows, columns)
    back = max_cosine(columns, rows)[1]
    mutual = back[nearest] == torch.arange(len(latents), device=nearest.device)
    return Matches(cosine, others.to(nearest.device)[nearest], mutual)


def stability(saes: Sequence[SAE], alive: Sequence[Tensor] | None = None) -> list[Measure]:
    """How much SAEs of one site agree, such as those of several seeds; all ordered pairs.

    `max_cosine` = mean of the largest cosine; `shared_latents` = share with a partner of their own above `SAME`.
    Resampled are the latents of all pairs.

    Raises:
        ArgumentError: fewer than two SAEs. ShapeError: they are of different widths.
    """
    if len(saes) < 2:
        raise ArgumentError(f"{len(saes)} SAEs were given; at least two are compared.")
    pairs = [
        match_latents(saes[i], saes[j], *((alive[i], alive[j]) if alive else ()))
        for i, j in itertools.permutations(range(len(saes)), 2)
    ]
    cosine = torch.cat([pair.cosine for pair in pairs])
    shared = torch.cat([pair.shared for pair in pairs]).double()
    note = f"{len(saes)} SAEs, {len(pairs)} ordered pairs"
    return [
        ratio("max_cosine", "cosine", cosine, of="latents", tokens=0, note=note),
        ratio("shared_latents", "of the latents", shared, of="latents", tokens=0, note=f"{note}, cosine above {SAME}"),
    ]
