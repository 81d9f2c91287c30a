"""Losses of the variants of a splice-in evaluation, summed in float64 by window and by position in the window.

A token counts where its loss is finite in all variants of the row, so that all means are over the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saehook.errors import ArgumentError
from saehook.intervals import Ratio, SequenceSums, intervals

LOSSES: dict[str, Ratio] = {
    "ce_clean": lambda s: s["ce_clean"] / s["n"],
    "ce_spliced": lambda s: s["ce_spliced"] / s["n"],
    "ce_zero": lambda s: s["ce_zero"] / s["n"],
    "ce_mean": lambda s: s["ce_mean"] / s["n"],
    "delta_ce": lambda s: s["ce_spliced"] / s["n"] - s["ce_clean"] / s["n"],
    "ce_recovered_zero": lambda s: (s["ce_zero"] - s["ce_spliced"]) / (s["ce_zero"] - s["ce_clean"]),
    "ce_recovered_mean": lambda s: (s["ce_mean"] - s["ce_spliced"]) / (s["ce_mean"] - s["ce_clean"]),
    "kl": lambda s: s["kl"] / s["n"],
    "top1": lambda s: s["top1"] / s["n"],
}


class RowLosses:
    """Sums of the losses of one row: by sequence, and by position."""

    def __init__(self, length: int) -> None:
        """`length`: of the windows."""
        self.sums = SequenceSums()
        self.by_position = {
            name: torch.zeros(length - 1, dtype=torch.float64) for name in ("n", "ce_clean", "ce_spliced", "kl")
        }
        self.not_finite = 0
        """Tokens with a loss that is not finite in some run; they are left out."""

    def add(self, rows: Tensor, columns: Tensor, n_rows: int, values: Mapping[str, Tensor]) -> None:
        """Add a batch of `n_rows` windows: `values` [n] by name, of the tokens at `rows` and `columns` [n]."""
        finite = torch.stack([value.isfinite() for value in values.values()]).all(0).cpu()
        self.not_finite += int((~finite).sum())
        rows, columns = rows[finite], columns[finite]
        kept = {name: value.cpu()[finite].double() for name, value in values.items()}
        self.sums.add(rows, n_rows, **kept)
        for name, sums in self.by_position.items():
            sums.index_add_(0, columns, kept[name] if name != "n" else torch.ones_like(kept["kl"]))

    def positions(self) -> dict[str, list[float]]:
        """Mean losses at stretches of positions: one by one at first, then growing by a quarter; those with a token."""
        length = len(self.by_position["n"])
        starts = [0]
        while starts[-1] < length:
            starts.append(starts[-1] + max(1, starts[-1] // 4 - 3))
        found: dict[str, list[float]] = {"position": [], "tokens": []}
        for first, end in zip(starts, starts[1:], strict=False):
            sums = {name: float(each[first:end].sum()) for name, each in self.by_position.items()}
            if n := sums.pop("n"):
                found["position"].append(first)
                found["tokens"].append(int(n))
                for name, value in sums.items():
                    found.setdefault(name, []).append(value / n)
        return found


def values_of(
    sums: SequenceSums, ratios: Mapping[str, Ratio], name: str, seed: int
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """The ratios over all sequences, None for one without a denominator, and their intervals.

    Raises:
        ArgumentError: nothing was added for the row `name`.
    """
    table = sums.by_sequence()
    some = table["n"] > 0
    if not some.any():
        raise ArgumentError(
            f"the losses of {name} are nowhere finite: the model gives NaN on this text. Check its dtype."
        )
    table = {each: values[some] for each, values in table.items()}
    totals = {each: values.sum() for each, values in table.items()}
    found = {each: float(ratio(totals)) for each, ratio in ratios.items()}
    return {each: value if math.isfinite(value) else None for each, value in found.items()}, intervals(
        table, ratios, seed=seed
    )
