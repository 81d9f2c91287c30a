"""Streaming sums: reconstruction, sparsity, dead latents, quantiles, losses. Each has `merge()` for several processes.

Only tokens of the mask are given to these: callers select them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK_LOGITS = 2**20
"""Logits that `token_kl` holds in float64 at a time."""
BINS = 128
BINS_PER_OCTAVE = 10
ROWS_AT_ONCE = 2**14
"""Latents whose bins are worked on together, so that temporary memory does not grow with d_sae."""
_NO_BIN = -(2**15)
"""Below the bin of every float."""


def token_kl(clean: Tensor, edited: Tensor) -> Tensor:
    """KL(clean ‖ edited) in nats of each token, [n] float64, from logits [n, vocabulary]; no copy of either is ever whole."""
    step = max(1, CHUNK_LOGITS // clean.shape[-1])
    parts = [clean.new_empty(0, dtype=torch.float64)]
    for p, q in zip(clean.split(step), edited.split(step), strict=True):
        log_p = p.double().log_softmax(-1)
        parts.append((log_p.exp() * (log_p - q.to(p.device).double().log_softmax(-1))).sum(-1))
    return torch.cat(parts)


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


class Histogram:
    """Positive activations of each latent, counted in bins of equal width in the logarithm: 512 bytes per latent.

    Bins are 2^(1/10) wide and end at a latent's largest activation; they follow it upwards, and what is too small for
    the lowest is counted there. So a quantile is within 7.2 % of the exact one, plus 1/6,200 of the largest activation,
    whatever the distribution; it is much nearer where many activations share a bin, over which they are spread evenly.
    The counts do not depend on the order in which activations come. An update costs one look for what is positive
    and then as much as there is of it, not tokens × d_sae × bins.
    """

    def __init__(self, d_sae: int, device: torch.device | str | None = None) -> None:
        """Nothing seen yet; `device` is that of the activations to come."""
        self.counts = torch.zeros(d_sae, BINS, dtype=torch.int32, device=device)
        """[d_sae, BINS]; the last column is bin `top`."""
        self.top = torch.full((d_sae,), _NO_BIN, dtype=torch.int32, device=device)
        """Bin of the largest activation, [d_sae]; bin i holds 2^(i/10) up to 2^((i+1)/10)."""

    def update(self, acts: Tensor) -> None:
        """Add activations [n, d_sae]."""
        acts = acts.detach()
        tokens, latents = (acts > 0).nonzero(as_tuple=True)
        self.add(acts[tokens, latents], latents)

    def add(self, values: Tensor, latents: Tensor) -> None:
        """Add positive activations [n] of the latents [n]."""
        latents = latents.long()
        bins = (values.float().log2() * BINS_PER_OCTAVE).floor().clamp(_NO_BIN + 1, -_NO_BIN).to(torch.int32)
        self._raise(torch.full_like(self.top, _NO_BIN).scatter_reduce(0, latents, bins, "amax"))
        column = (bins - self.top[latents] + BINS - 1).clamp(min=0)
        self.counts.view(-1).index_add_(0, latents * BINS + column, torch.ones_like(bins))

    def _raise(self, top: Tensor) -> None:
        """Move what was counted to lower columns, where the largest activation is now larger."""
        shift = top - self.top
        columns = torch.arange(BINS, device=top.device)
        filled = self.counts[:, -1] > 0  # of what has been seen, the largest stands there
        for rows in ((shift > 0) & filled).nonzero().view(-1).split(ROWS_AT_ONCE):
            counts, moved = self.counts[rows], (columns - shift[rows, None]).clamp(min=0)
            self.counts[rows] = torch.zeros_like(counts).scatter_add(1, moved, counts)
        self.top = torch.maximum(self.top, top)

    def merge(self, other: Histogram) -> None:
        """Add what `other` has seen."""
        device = self.counts.device
        raised = Histogram(0)
        raised.counts, raised.top = other.counts.to(device, copy=True), other.top.to(device)
        raised._raise(self.top)
        self._raise(raised.top)
        self.counts += raised.counts

    def quantiles(self, levels: Sequence[float], maximum: Tensor) -> Tensor:
        """Quantiles at `levels`, linear between neighbours as in `torch.quantile`: [d_sae, len(levels)], float32, CPU.

        Rising from level to level, at most `maximum` [d_sae], and 0 for a latent that never fired.
        """
        parts = zip(*(x.split(ROWS_AT_ONCE) for x in (self.counts, self.top, maximum)), strict=True)
        return torch.cat([_quantiles(counts, top, most.to(top.device), levels).cpu() for counts, top, most in parts])


def _quantiles(counts: Tensor, top: Tensor, maximum: Tensor, levels: Sequence[float]) -> Tensor:
    seen = counts.cumsum(1)
    n = seen[:, -1:]
    place = (n - 1).clamp(min=0) * torch.tensor(levels, dtype=torch.float64, device=counts.device)
    first = place.long()

    def ordered(index: Tensor) -> Tensor:
        """The activation with that number in rising order, [rows, levels]."""
        column = torch.searchsorted(seen, index, right=True).clamp(max=BINS - 1)
        inside = counts.gather(1, column)
        share = (index - seen.gather(1, column) + inside + 0.5) / inside.clamp(min=1)
        exponent = (top[:, None].double() - (BINS - 1) + column + share) / BINS_PER_OCTAVE
        return torch.minimum(exponent.exp2(), maximum[:, None].double())

    low, high = ordered(first), ordered(torch.minimum(first + 1, (n - 1).clamp(min=0)))
    found = torch.minimum(low + (high - low) * (place - first), high)  # never above by rounding
    return torch.where(n > 0, found, 0.0).float()


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
