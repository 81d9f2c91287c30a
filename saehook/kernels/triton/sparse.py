"""`kernels/sparse.py` with kernels of our own: the gradients of exactly the pairs that were selected.

On a GPU the rows that are gathered (of W_dec, of the inputs, of the gradient) are read as bfloat16, which halves the traffic
that all of this consists of; sums and weights are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.kernels.product import pre_acts
from saehook.kernels.reference import Encoded, Select
from saehook.kernels.scratch import Scratch, take
from saehook.kernels.selection import Selection
from saehook.kernels.triton.latent_sums import latent_sums
from saehook.kernels.triton.token_sums import token_sums


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    select: Select,
    scratch: Scratch | None = None,
) -> Encoded:
    """The same as `reference.encode`. The pre-activations are not needed afterwards."""
    with torch.no_grad():
        centred = _gathered(x - b_dec)
        pre = pre_acts(centred, W_enc, b_enc)
        selection = select(pre)
        values = selection.values(pre).to(x.dtype)
    return Encoded(selected(values, centred, W_enc, b_enc, b_dec, selection, scratch), selection)


def selected(
    values: Tensor,
    centred: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    selection: Selection,
    scratch: Scratch | None = None,
) -> Tensor:
    """See `kernels.selected`."""
    return _Encode.apply(values, _gathered(centred), W_enc, b_enc, b_dec, selection, scratch)


def decode(values: Tensor, W_dec: Tensor, selection: Selection, scratch: Scratch | None = None) -> Tensor:
    """The same as `reference.decode`."""
    return _Decode.apply(values, W_dec, selection, scratch)


def _gathered(rows: Tensor) -> Tensor:
    """Rows as the kernels read them."""
    return rows.bfloat16() if rows.is_cuda else rows


class _Encode(torch.autograd.Function):
    """Passes the selected pre-activations on; backward gives the gradients of the encoder and of the centring."""

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
    ) -> Tensor:
        ctx.save_for_backward(centred, W_enc)
        ctx.selection, ctx.scratch = selection, scratch
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        centred, W_enc = ctx.saved_tensors
        d_rows = take(ctx.scratch, "W_enc", (W_enc.shape[1], W_enc.shape[0]), W_enc)
        d_b_enc = latent_sums(grad, centred, ctx.selection, d_rows).weights
        return None, None, d_rows.T, d_b_enc, -(W_enc @ d_b_enc), None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, selection: Selection, scratch: Scratch | None) -> Tensor:
        rows = _gathered(W_dec)
        ctx.save_for_backward(values, rows)
        ctx.selection, ctx.scratch, ctx.like = selection, scratch, W_dec
        return token_sums(values, rows, selection)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, rows = ctx.saved_tensors
        d_W_dec = take(ctx.scratch, "W_dec", tuple(rows.shape), ctx.like) if ctx.needs_input_grad[1] else None
        d_values = latent_sums(values, _gathered(grad), ctx.selection, d_W_dec, against=rows).dots
        return d_values, d_W_dec, None, None
