"""Attribution against ablation: do the effects that one backward pass predicts agree with those that ablation measures?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehook.attribution import LogProb
from saehook.suite.measure import Measure, between
from saehook.suite.sample import ids_of

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs
    from saehook.tokenization import Windows

TOKENS = 16
"""Tokens of a row; every active latent on each of them is ablated once."""
RESAMPLES = 200


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two [n]; NaN where one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else float("nan")


def ranks(values: Tensor) -> Tensor:
    """Place of each value [n] in rising order, equal ones share the mean of theirs, [n] float64."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks of two [n]."""
    return pearson(ranks(a), ranks(b))


def attribution_accuracy(hooked: HookedSAEs, tokens: Windows | Tensor, *, n_rows: int = 8) -> dict[str, list[Measure]]:
    """Pearson and Spearman correlation of first-order and exact effects of every active latent on every token of some rows, on
    the log-probability of the row's true next token; by the name of the SAE. Resampled are rows."""
    ids = ids_of(tokens)
    rows = ids[:: max(1, len(ids) // n_rows)][:n_rows]
    length = min(TOKENS, ids.shape[1] - 1)
    pairs: dict[str, list[Tensor]] = {name: [] for name in hooked.sites}
    for row in rows:
        metric = LogProb(int(row[length]))
        quick, exact = (hooked.attribute(row[:length], metric, exact=exact) for exact in (False, True))
        assert torch.equal(quick.latent, exact.latent)
        for number, name in enumerate(quick.sites):
            mine = quick.site == number
            if mine.any():
                pairs[name].append(torch.stack([quick.effect[mine], exact.effect[mine]]).double())
    return {name: _measures(found, length) for name, found in pairs.items()}


def _measures(pairs: list[Tensor], length: int) -> list[Measure]:
    note = f"{sum(pair.shape[1] for pair in pairs)} pairs of latent and token"
    measures = []
    for name, correlation in (("attribution_pearson", pearson), ("attribution_spearman", spearman)):
        value, low, high = _interval(pairs, correlation)
        n = len(pairs)
        measures.append(Measure(name, value, "correlation", low, high, n, "rows", n * length, note=note))
    return measures


def _interval(pairs: list[Tensor], correlation: Callable[[Tensor, Tensor], float]) -> tuple[float, float, float]:
    if not pairs:
        return float("nan"), float("nan"), float("nan")
    value = correlation(*torch.cat(pairs, 1))
    if len(pairs) < 2:
        return value, float("nan"), float("nan")
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(len(pairs), (len(pairs),), generator=generator).tolist()
        found.append(correlation(*torch.cat([pairs[i] for i in drawn], 1)))
    return value, *between(torch.tensor(found))
