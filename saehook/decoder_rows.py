"""What keeps the decoder's rows at unit length: their gradients are orthogonal to them, and they are normalised after a step."""

from __future__ import annotations

import torch
from torch import Tensor

from saehook import kernels

ROWS_AT_ONCE = 1024
"""Rows that are projected or normalised together: few enough to stay in a CPU's cache."""


@torch.no_grad()
def remove_parallel_(grad: Tensor, rows: Tensor) -> None:
    """Take from each row of `grad` [n, d] its component along the unit vector in that row of `rows`, in place."""
    if kernels.uses_triton(rows.device):
        return kernels.remove_parallel_(grad, rows)
    for g, unit in zip(grad.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE), strict=True):
        g.addcmul_(unit, (g * unit).sum(-1, keepdim=True), value=-1)


@torch.no_grad()
def normalize_rows_(rows: Tensor, allowed: Tensor | None = None) -> None:
    """Give each row of `rows` [n, d] unit length, in place; a row of zeros stays.

    Where `allowed` (0-dim bool) is False every bit stays; without it rows of unit length may change in the last one.
    """
    for block in rows.split(ROWS_AT_ONCE):
        norm = torch.linalg.vector_norm(block, dim=-1, keepdim=True)
        changed = norm > 0 if allowed is None else (norm > 0) & allowed
        block.div_(torch.where(changed, norm, 1))
