"""The squared error of each token and its gradient, each with one reading of both tensors and nothing of their size between."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.kernels.triton.tiles import LAUNCH, constexpr, on, power_of_two, sum_dtype


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """`losses.squared_error`; only `x_hat` [n, d] gets a gradient. `x` may be one row, expanded."""
    return _SquaredError.apply(x, x_hat)


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor) -> Tensor:
        ctx.save_for_backward(x, x_hat)
        errors = torch.empty(len(x_hat), dtype=x_hat.dtype, device=x_hat.device)
        with on(x_hat):
            _token_errors[(len(x_hat),)](errors, *_sizes(x, x_hat), SUM=sum_dtype(x_hat), **_launch(x_hat))
        return errors.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, x_hat = ctx.saved_tensors
        out = torch.empty_like(x_hat, memory_format=torch.contiguous_format)
        factor = grad * (2 / len(x_hat))
        with on(x_hat):
            _differences[(len(x_hat),)](out, factor, *_sizes(x, x_hat), **_launch(x_hat))
        return None, out


def _sizes(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    assert x.stride(1) == x_hat.stride(1) == 1 or x.shape[1] == 1
    return x, x_hat, x.stride(0), x_hat.stride(0), x.shape[1]


def _launch(x: Tensor) -> dict[str, Any]:
    columns = power_of_two(x.shape[1])
    return {"COLUMNS": columns, "num_warps": max(1, min(16, columns // 256)), **LAUNCH}


@triton.jit
def _token_errors(errors, x, x_hat, x_stride, x_hat_stride, width, SUM: constexpr, COLUMNS: constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    there = tl.load(x + token * x_stride + column, mask=inside, other=0.0).to(SUM)
    error = tl.load(x_hat + token * x_hat_stride + column, mask=inside, other=0.0).to(SUM) - there
    tl.store(errors + token, tl.sum(error * error))


@triton.jit
def _differences(out, factor, x, x_hat, x_stride, x_hat_stride, width, COLUMNS: constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    there = tl.load(x + token * x_stride + column, mask=inside, other=0.0)
    error = tl.load(x_hat + token * x_hat_stride + column, mask=inside, other=0.0) - there
    tl.store(out + token * width + column, tl.load(factor) * error, mask=inside)
