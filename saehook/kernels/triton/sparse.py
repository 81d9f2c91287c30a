"""`kernels/sparse.py` with kernels of our own: the gradients of exactly the pairs that were selected.

On a GPU the rows that are gathered (of W_dec, of the inputs, of the gradient) are read as bfloat16, which halves the traffic
that all of this consists of; sums and weights are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.kernels.encoded import encoded
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
    return encoded(values, _gathered(centred), W_enc, b_enc, b_dec, selection, scratch, _gradients)


def decode(values: Tensor, W_dec: Tensor, selection: Selection, scratch: Scratch | None = None) -> Tensor:
    """The same as `reference.decode`."""
    return _Decode.apply(values, W_dec, selection, scratch)


def _gathered(rows: Tensor) -> Tensor:
    """Rows as the kernels read them."""
    return rows.bfloat16() if rows.is_cuda else rows


def _gradients(
    grad: Tensor, centred: Tensor, W_enc: Tensor, selection: Selection, scratch: Scratch | None
) -> tuple[Tensor, Tensor]:
    """See `encoded.Gradients`."""
    d_rows = take(scratch, "W_enc", (W_enc.shape[1], W_enc.shape[0]), W_enc)
    return d_rows, latent_sums(grad, centred, selection, d_rows).weights


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
