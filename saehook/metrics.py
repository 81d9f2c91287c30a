"""Streaming sums in float64: reconstruction, sparsity, dead latents, losses. Each has `merge()` for several processes.

Only tokens of the mask are given to these: callers select them first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Moments:
    """Number, sum and sum of squares of vectors; mean and total variance of all of them, not of one batch."""

    n: int = 0
    total: Tensor | None = None
    square: float = 0.0

    def update(self, x: Tensor) -> None:
        """Add vectors [n, d]."""
        x = x.detach().double()
        self.n += x.shape[0]
        row = x.sum(0).cpu()
        self.total = row if self.total is None else self.total + row
        self.square += float(x.square().sum())

    def merge(self, other: Moments) -> None:
        """Add what `other` has seen."""
        self.n += other.n
        if other.total is not None:
            self.total = other.total if self.total is None else self.total + other.total
        self.square += other.square

    @property
    def mean(self) -> Tensor:
        """Mean vector, [d], float64."""
        assert self.total is not None
        return self.total / max(1, self.n)

    @property
    def variance(self) -> float:
        """Sum over vectors of the squared distance to the mean: Σ‖x‖² - ‖Σx‖² / n."""
        if self.total is None:
            return 0.0
        return self.square - float(self.total.square().sum()) / max(1, self.n)


@dataclass
class Reconstruction:
    """FVU = Σ‖x - x_hat‖² / Σ‖x - mean‖² over all tokens, with the mean over all tokens."""

    x: Moments = field(default_factory=Moments)
    error: float = 0.0

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add tokens: `x` and `x_hat` are [n, d]."""
        self.x.update(x)
        self.error += float((x.double() - x_hat.double()).square().sum())

    def merge(self, other: Reconstruction) -> None:
        """Add what `other` has seen."""
        self.x.merge(other.x)
        self.error += other.error

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; NaN without variance."""
        return self.error / self.x.variance if self.x.variance > 0 else float("nan")


@dataclass
class Firing:
    """How often and how strongly each latent fires."""

    tokens: int = 0
    count: Tensor | None = None
    total: Tensor | None = None
    maximum: Tensor | None = None

    def update(self, acts: Tensor) -> None:
        """Add activations [n, d_sae]."""
        acts = acts.detach()
        if acts.shape[0] == 0:
            return
        other = Firing(
            acts.shape[0],
            (acts != 0).sum(0).cpu(),
            acts.sum(0, dtype=torch.float64).cpu(),
            acts.amax(0).float().cpu(),
        )
        self.merge(other)

    def merge(self, other: Firing) -> None:
        """Add what `other` has seen."""
        if other.count is None or other.total is None or other.maximum is None:
            return
        if self.count is None or self.total is None or self.maximum is None:
            self.tokens, self.count, self.total, self.maximum = other.tokens, other.count, other.total, other.maximum
            return
        self.tokens += other.tokens
        self.count = self.count + other.count
        self.total = self.total + other.total
        self.maximum = torch.maximum(self.maximum, other.maximum)

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a token."""
        return float(self.count.sum()) / self.tokens if self.count is not None else float("nan")

    @property
    def dead_share(self) -> float:
        """Share of latents that never fired on these tokens."""
        return float((self.count == 0).double().mean()) if self.count is not None else float("nan")


@dataclass
class Mean:
    """A mean over tokens, summed in float64."""

    total: float = 0.0
    n: int = 0

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        self.total += float(values.detach().double().sum())
        self.n += values.numel()

    def merge(self, other: Mean) -> None:
        """Add what `other` has seen."""
        self.total += other.total
        self.n += other.n

    @property
    def value(self) -> float:
        """The mean; NaN of nothing."""
        return self.total / self.n if self.n else float("nan")
