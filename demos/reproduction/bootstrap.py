"""Intervals over sequences and seeds, paired: every draw takes the same sequences and seeds for all arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

DRAWS = 1000
Table = Mapping[str, Tensor]
"""Sums over the tokens of each sequence, by quantity: [sequences] float64 each."""
Sums = Mapping[str, Mapping[str, Tensor]]
"""By arm and quantity."""


def estimate(
    arms: Mapping[str, Sequence[Table]], statistic: Callable[[Sums], Tensor], *, seed: int = 0
) -> tuple[float, float, float]:
    """Value and central 95 % of a statistic of sums over all sequences and seeds.

    Args:
        arms: by name, a table for each seed; all tables have the same sequences, all arms the same seeds.
        statistic: of sums [draws], by arm and quantity, to [draws].
    """
    stacked = {
        arm: {name: torch.stack([table[name].double() for table in tables]) for name in tables[0]}
        for arm, tables in arms.items()
    }
    first = next(iter(next(iter(stacked.values())).values()))
    n_seeds, n_sequences = first.shape
    value = float(statistic({a: {q: x.sum()[None] for q, x in t.items()} for a, t in stacked.items()})[0])
    generator = torch.Generator().manual_seed(seed)
    seeds, sequences = (_weights(n, generator) for n in (n_seeds, n_sequences))
    drawn = {a: {q: torch.einsum("ds,sw,dw->d", seeds, x, sequences) for q, x in t.items()} for a, t in stacked.items()}
    values = statistic(drawn)
    values = values[values.isfinite()]
    if not len(values):
        return value, float("nan"), float("nan")
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value, low, high


def of_runs(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds, and the smallest and largest of them, where each seed gives one number."""
    return sum(values) / len(values), min(values), max(values)


def _weights(n: int, generator: torch.Generator) -> Tensor:
    """How often each of n is drawn in n draws with replacement, [DRAWS, n] float64."""
    drawn = torch.randint(n, (DRAWS, n), generator=generator)
    return torch.zeros(DRAWS, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(DRAWS, n).double())
