"""Pre-activations of selected pairs as autograd sees them, whichever version found them and makes their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.kernels.row_sums import row_blocks
from saehook.kernels.scratch import Scratch
from saehook.kernels.selection import Selection

Gradients = Callable[[Tensor, Tensor, Tensor, Selection, Scratch | None], tuple[Tensor | None, Tensor]]
"""From the gradient of the pairs [m], centred inputs, W_enc, the pairs and shared memory: the gradients of W_enc, latent-major
[d_sae, d_in], or None where W_enc has been given it, and of b_enc."""


def encoded(
    values: Tensor,
    centred: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    selection: Selection,
    scratch: Scratch | None,
    gradients: Gradients,
) -> Tensor:
    """The pre-activations `values` [m] of the selected pairs of `centred` = x - `b_dec`, with the gradients of all parameters."""
    return _Encoded.apply(values, centred, W_enc, b_enc, b_dec, selection, scratch, gradients)


class _Encoded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        selection: Selection,
        scratch: Scratch | None,
        gradients: Gradients,
    ) -> Tensor:
        ctx.given = centred, W_enc, selection, scratch
        ctx.gradients = gradients
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        W_enc = ctx.given[1]
        d_rows, d_b_enc = ctx.gradients(grad, *ctx.given)
        d_W_enc = None if d_rows is None else d_rows.T
        return None, None, d_W_enc, d_b_enc, -some_columns_product(W_enc.detach(), d_b_enc), None, None, None


def some_columns_product(W_enc: Tensor, d_b_enc: Tensor) -> Tensor:
    """W_enc @ d_b_enc, [d_in]; where their dtypes differ, some columns at a time."""
    if W_enc.dtype == d_b_enc.dtype:
        return W_enc @ d_b_enc
    total = d_b_enc.new_zeros(len(W_enc))
    for block in row_blocks(len(d_b_enc), len(W_enc)):
        total += W_enc[:, block].to(d_b_enc.dtype) @ d_b_enc[block]
    return total
