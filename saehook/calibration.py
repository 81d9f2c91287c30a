"""After training: the threshold that gives mean L0 = k on fresh tokens, and each latent's statistics on them.

Only a BatchTopK has a threshold to calibrate; for the others the statistics are taken by their inference rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saehook.config import BatchTopK
from saehook.metrics import Firing
from saehook.sae import SAE, LatentStats

ENTRIES_AT_ONCE = 2**24
"""Pre-activations that are held in memory together."""


@dataclass(frozen=True)
class Calibration:
    """What `Calibrator.finish` found."""

    tokens: int
    """Fresh tokens that were used."""
    l0: float | None
    """Mean L0 of the inference rule on them; None without tokens."""
    l0_before: float | None
    """Mean L0 with the threshold that the SAE had before; None where it had none."""


class Calibrator:
    """Keeps the k · `max_tokens` + 1 largest activations of a stream of tokens, with their latents, and nothing else.

    That is exact: with t tokens seen, mean L0 = k where the threshold is the (k · t + 1)-th largest activation, which
    is among those kept. Per-latent sums are taken over the activations above it.
    """

    def __init__(self, sae: SAE, max_tokens: int) -> None:
        """`sae` works on raw activations; `max_tokens` is at most how many will be given."""
        activation = sae.config.activation
        self.sae = sae
        self.k = activation.k if isinstance(activation, BatchTopK) else None
        """Mean L0 that the threshold shall give; None for an SAE whose rule needs no calibration."""
        self.firing = Firing()
        self.max_tokens = max_tokens
        self.tokens = 0
        self.values = torch.empty(0, device=sae.device)
        self.latents = torch.empty(0, dtype=torch.int32, device=sae.device)
        self._fired_before = torch.zeros((), dtype=torch.int64, device=sae.device)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add tokens [n, d_in]; those beyond `max_tokens` are left out."""
        x = x[: self.max_tokens - self.tokens]
        for chunk in x.split(max(1, ENTRIES_AT_ONCE // self.sae.d_sae)):
            pre_acts = self.sae.pre_acts(chunk.to(self.sae.device)).float()
            self.tokens += chunk.shape[0]
            if self.k is None:
                self.firing.update(self.sae.activate(pre_acts))
            else:
                self._keep_largest(pre_acts, self.k)

    def _keep_largest(self, pre_acts: Tensor, k: int) -> None:
        if self.sae.threshold is not None:
            self._fired_before += (pre_acts > self.sae.threshold.clamp(min=0)).sum()
        limit = k * self.max_tokens + 1
        full = self.values.numel() == limit
        found = (pre_acts > (self.values.min() if full else 0.0)).view(-1).nonzero().view(-1)
        self._append(pre_acts.view(-1)[found], found % self.sae.d_sae)
        if self.values.numel() > limit:
            self.values, kept = self.values.topk(limit, sorted=False)
            self.latents = self.latents[kept]

    def _append(self, values: Tensor, latents: Tensor) -> None:
        positive = values > 0
        self.values = torch.cat([self.values, values[positive]])
        self.latents = torch.cat([self.latents, latents[positive].to(torch.int32)])

    def finish(self) -> Calibration:
        """Set the threshold of a BatchTopK and `sae.stats`. With no tokens the SAE stays as it is."""
        sae = self.sae
        if self.tokens == 0:
            return Calibration(0, None, None)
        if self.k is None:
            sae.stats = stats_of(self.firing)
            return Calibration(self.tokens, self.firing.l0, None)
        before = int(self._fired_before) / self.tokens if sae.threshold is not None else None
        n = self.k * self.tokens + 1
        threshold = float(self.values.topk(n, sorted=False).values.min()) if self.values.numel() >= n else 0.0
        sae.set_threshold(threshold)
        above = self.values > threshold
        self.values, self.latents = self.values[above], self.latents[above]
        sae.stats = stats_of(self._kept())
        return Calibration(self.tokens, self.values.numel() / self.tokens, before)

    def _kept(self) -> Firing:
        values, latents = self.values.double(), self.latents.long()
        zeros = values.new_zeros(self.sae.d_sae)
        count = zeros.index_add(0, latents, torch.ones_like(values))
        total = zeros.index_add(0, latents, values)
        maximum = zeros.scatter_reduce(0, latents, values, "amax")
        return Firing(self.tokens, count.cpu(), total.cpu(), maximum.float().cpu())


def stats_of(firing: Firing) -> LatentStats:
    """What an SAE's file says of its latents, from at least one token."""
    assert firing.count is not None
    assert firing.total is not None
    assert firing.maximum is not None
    return LatentStats(
        max_act=firing.maximum.float(),
        density=(firing.count / firing.tokens).float(),
        mean_act=(firing.total / firing.tokens).float(),
        tokens=firing.tokens,
    )
