"""Adam on a matrix row by row, each read and written once; rows of unit length keep it in the same pass."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saehook.kernels.triton.tiles import LAUNCH, constexpr, on, power_of_two


def remove_parallel_(grad: Tensor, rows: Tensor) -> None:
    """Take from each row of `grad` [n, d] its component along the unit vector in that row of `rows`, in place."""
    assert grad.is_contiguous()
    assert rows.is_contiguous()
    n, width = rows.shape
    columns = power_of_two(width)
    with on(rows):
        _remove_parallel[(n,)](grad, rows, width, COLUMNS=columns, **_launch(columns))


def adam_rows_(adam: torch.optim.Adam, taken: Tensor, factor: Tensor | None = None, unit: Tensor | None = None) -> bool:
    """The step that `adam` would take on its float32 matrices, with its own state, in place; their gradients are dropped, so
    that its `step` afterwards takes the rest.

    Where `taken` (0-dim bool, on the device) is False nothing changes. Gradients count times `factor` (0-dim). `unit`: the
    matrix whose rows have unit length afterwards, but those of zeros; returned is whether it was stepped. The matrices are
    contiguous, and the state lies on the device.
    """
    group = adam.param_groups[0]
    beta1, beta2 = group["betas"]
    stepped_unit = False
    for rows in group["params"]:
        if rows.grad is None or rows.ndim != 2 or rows.dtype != torch.float32:
            continue
        state = adam.state[rows]
        if not state:
            state["step"] = torch.zeros((), device=rows.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(rows), torch.zeros_like(rows)
        state["step"] += taken
        tensors = rows.detach(), rows.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"]
        assert all(tensor.is_contiguous() for tensor in tensors)
        columns = power_of_two(rows.shape[1])
        with on(rows):
            _adam_rows[(len(rows),)](
                *tensors,
                state["step"],
                taken,
                state["step"] if factor is None else factor,
                rows.shape[1],
                group["lr"],
                1 - beta1,  # as a float32 0.999 is off by a hundred-thousandth of what it lacks to 1
                1 - beta2,
                _log(beta1),
                _log(beta2),
                group["eps"],
                SCALED=factor is not None,
                UNIT=rows is unit,
                COLUMNS=columns,
                **_launch(columns),
            )
        rows.grad = None
        stepped_unit |= rows is unit
    return stepped_unit


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _launch(columns: int) -> dict[str, Any]:
    """So that a thread has 8 columns, up to 4096 of them."""
    return {"num_warps": max(1, min(16, columns // 256)), **LAUNCH}


@triton.jit
def _remove_parallel(grad, rows, width, COLUMNS: constexpr):
    column = tl.arange(0, COLUMNS)
    place = tl.program_id(0).to(tl.int64) * width + column
    inside = column < width
    row = tl.load(rows + place, mask=inside, other=0.0)
    g = tl.load(grad + place, mask=inside, other=0.0)
    tl.store(grad + place, g - tl.sum(g * row) * row, mask=inside)


@triton.jit
def _correction(step, log_beta):
    """1 - beta^step; in float64, since beta is near 1."""
    return (1 - tl.exp(tl.load(step).to(tl.float64) * log_beta)).to(tl.float32)


@triton.jit
def _adam_rows(
    rows,
    grad,
    exp_avg,
    exp_avg_sq,
    step,
    taken,
    factor,
    width,
    lr,
    new1,
    new2,
    log_beta1,
    log_beta2,
    eps,
    SCALED: constexpr,
    UNIT: constexpr,
    COLUMNS: constexpr,
):
    if tl.load(taken):
        column = tl.arange(0, COLUMNS)
        place = tl.program_id(0).to(tl.int64) * width + column
        inside = column < width
        row = tl.load(rows + place, mask=inside, other=0.0)
        g = tl.load(grad + place, mask=inside, other=0.0)
        if SCALED:
            g *= tl.load(factor)
        first = tl.load(exp_avg + place, mask=inside, other=0.0)
        second = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
        first += new1 * (g - first)
        second += new2 * (g * g - second)
        size = tl.sqrt(second / _correction(step, log_beta2)) + eps
        row -= lr / _correction(step, log_beta1) * first / size
        if UNIT:
            norm = tl.sqrt(tl.sum(tl.where(inside, row * row, 0.0)))
            row /= tl.where(norm > 0, norm, 1.0)
        tl.store(rows + place, row, mask=inside)
        tl.store(exp_avg + place, first, mask=inside)
        tl.store(exp_avg_sq + place, second, mask=inside)
