"""After training: the threshold that gives mean L0 = k on fresh tokens, and each latent's statistics on them.

Only a BatchTopK has a threshold to calibrate; for the others the statistics are taken by their inference rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saehook.config import Activation, BatchTopK
from saehook.devices import ONE_DEVICE, OneDevice
from saehook.metrics import Firing, Histogram, Moments
from saehook.sae import QUANTILE_LEVELS, SAE, LatentStats

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

    def __init__(
        self, sae: SAE, max_tokens: int, activation: Activation | None = None, devices: OneDevice = ONE_DEVICE
    ) -> None:
        """`sae` works on raw activations; `max_tokens` is at most how many will be given. Of several `devices` this one has
        the latents of `sae`, and `activation` is that of all (None: the SAE's)."""
        activation = activation or sae.config.activation
        self.sae = sae
        self.activation, self.devices = activation, devices
        self.k = activation.k if isinstance(activation, BatchTopK) else None
        """Mean L0 that the threshold shall give; None for an SAE whose rule needs no calibration."""
        self.firing, self.histogram = Firing(), Histogram(sae.d_sae, sae.device)
        self.inputs = Moments()
        self.targets = Moments() if sae.is_transcoder else self.inputs
        self.max_tokens = max_tokens
        self.tokens = 0
        self.values = torch.empty(0, device=sae.device)
        self.latents = torch.empty(0, dtype=torch.int32, device=sae.device)
        self._fired_before = torch.zeros((), dtype=torch.int64, device=sae.device)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add tokens [n, d_in], for a transcoder with its targets [n, d_out]; those beyond `max_tokens` are left out."""
        left = self.max_tokens - self.tokens
        x = x[:left]
        self.inputs.update(x)
        if self.sae.is_transcoder:
            assert y is not None
            self.targets.update(y[:left])
        for chunk in x.split(max(1, ENTRIES_AT_ONCE // self.sae.d_sae)):
            pre_acts = self.sae.pre_acts(chunk.to(self.sae.device)).float()
            self.tokens += chunk.shape[0]
            if self.k is None:
                acts = self.devices.activate(self.sae, pre_acts, self.activation)
                self.firing.update(acts)
                self.histogram.update(acts)
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
            sae.stats = self._stats()
            return Calibration(self.tokens, self._sum(self.firing.l0), None)
        before = self._sum(int(self._fired_before)) / self.tokens if sae.threshold is not None else None
        n = self.k * self.tokens + 1
        threshold = self.devices.nth_largest(self.values, n)
        sae.set_threshold(threshold)
        above = self.values > threshold
        self.values, self.latents = self.values[above], self.latents[above]
        self.firing = self._kept()
        self.histogram.add(self.values, self.latents)
        sae.stats = self._stats()
        return Calibration(self.tokens, self._sum(self.values.numel()) / self.tokens, before)

    def _sum(self, here: float) -> float:
        """Over the devices that have the other latents."""
        return float(self.devices.add_latents(torch.tensor(here, dtype=torch.float64, device=self.sae.device)))

    def _kept(self) -> Firing:
        values, latents = self.values.double(), self.latents.long()
        zeros = values.new_zeros(self.sae.d_sae)
        count = zeros.index_add(0, latents, torch.ones_like(values))
        total = zeros.index_add(0, latents, values)
        maximum = zeros.scatter_reduce(0, latents, values, "amax")
        return Firing(self.tokens, count.cpu(), total.cpu(), maximum.float().cpu())

    @torch.no_grad()
    def _stats(self) -> LatentStats:
        """The mean of x_hat is `decode` of the mean activation, as `decode` is affine: no SAE in training normalises tokens.

        When the threshold of a BatchTopK is known, the tokens themselves are gone.
        """
        assert self.sae.config.normalize == "none"
        assert self.firing.total is not None
        means = self.firing.total / self.tokens, self.inputs.mean
        x_hat = self.devices.decode(self.sae, *(mean.to(self.sae.device) for mean in means))
        return stats_of(self.firing, self.histogram, self.targets.mean - x_hat.cpu())


def stats_of(firing: Firing, histogram: Histogram, mean_error: Tensor) -> LatentStats:
    """What an SAE's file says of it, from at least one token; `mean_error` is [d_out]."""
    assert firing.count is not None
    assert firing.total is not None
    assert firing.maximum is not None
    return LatentStats(
        max_act=firing.maximum.float(),
        density=(firing.count / firing.tokens).float(),
        mean_act=(firing.total / firing.tokens).float(),
        tokens=firing.tokens,
        quantiles=histogram.quantiles(QUANTILE_LEVELS, firing.maximum),
        mean_error=mean_error.float(),
    )
