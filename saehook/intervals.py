"""Ratios of sums over tokens, and how far they can be trusted: a bootstrap over sequences, or of few a jackknife.

Tokens of one sequence are not independent, so what is drawn again is whole sequences (windows). A metric is a function of
sums, never an average of ratios; it is the same function for all sequences and for each draw of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

DRAWS = 1000
LEVEL = 0.95
MIN_SEQUENCES = 10
"""With fewer sequences a bootstrap is too narrow; a jackknife with Student's t takes its place."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom, for 2 up to `MIN_SEQUENCES` - 1 sequences."""
_DRAWN_AT_ONCE = 2**22

Sums = Mapping[str, Tensor]
"""Sums by name, each of the same shape."""
Ratio = Callable[[Sums], Tensor]


@dataclass
class SequenceSums:
    """Sums of quantities over the tokens of each sequence, float64."""

    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, owner: Tensor, n_sequences: int, **values: Tensor) -> None:
        """Add `n_sequences` new sequences: `values` [n] of the tokens that belong to the sequences `owner` [n] among them."""
        for name, value in {"n": torch.ones_like(owner), **values}.items():
            sums = torch.zeros(n_sequences, dtype=torch.float64, device=value.device)
            sums.index_add_(0, owner.to(value.device), value.double())
            self.parts.setdefault(name, []).append(sums.cpu())

    def merge(self, other: SequenceSums) -> None:
        """Add the sequences of `other`."""
        for name, parts in other.parts.items():
            self.parts.setdefault(name, []).extend(parts)

    def by_sequence(self) -> dict[str, Tensor]:
        """[sequences] float64 each."""
        return {name: torch.cat(parts) for name, parts in self.parts.items()}

    def totals(self) -> dict[str, Tensor]:
        """Sums over all sequences, scalars."""
        return {name: each.sum() for name, each in self.by_sequence().items()}


def intervals(sums: Sums, ratios: Mapping[str, Ratio], *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The central 95 % of each ratio over `DRAWS` draws of the sequences, with replacement.

    `sums`: [sequences] each. Of 2 up to `MIN_SEQUENCES` - 1 sequences each is left out once: value ± t · standard error of the
    jackknife (Efron and Tibshirani 1993, ch. 11), for a mean the textbook's. One sequence has no interval, nor has a ratio
    that some draw leaves without a denominator.
    """
    n = len(next(iter(sums.values())))
    if n < MIN_SEQUENCES:
        return _jackknife(sums, ratios, n) if n > 1 else {}
    table = torch.stack(list(sums.values()), 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    step = max(1, _DRAWN_AT_ONCE // n)
    for first in range(0, DRAWS, step):
        times = min(step, DRAWS - first)
        picked = torch.randint(n, (times, n), generator=generator)
        weights = torch.zeros(times, n, dtype=torch.float64).scatter_add_(
            1, picked, torch.ones(()).double().expand(times, n)
        )
        drawn.append(weights @ table)
    columns = dict(zip(sums, torch.cat(drawn).T, strict=True))
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    found = {}
    for name, ratio in ratios.items():
        values = ratio(columns)
        if values.isfinite().all():
            low, high = values.quantile(tails).tolist()
            found[name] = (low, high)
    return found


def _jackknife(sums: Sums, ratios: Mapping[str, Ratio], n: int) -> dict[str, tuple[float, float]]:
    totals = {name: each.sum() for name, each in sums.items()}
    without = {name: totals[name] - each for name, each in sums.items()}
    found = {}
    for name, ratio in ratios.items():
        value, values = float(ratio(totals)), ratio(without)
        error = STUDENT[n - 2] * float(((n - 1) * values.var(correction=0)).sqrt())
        if math.isfinite(value + error):
            found[name] = (value - error, value + error)
    return found
