"""The kernels of a step that keeps k latents a token, by dense products: for accelerators whose products are so fast that sums
over the pairs are slower, where k is not a very small share of d_sae.

Four products, like `reference`, but nothing of the pre-activations' size is held in float32 on a GPU, and gradients go to their
place at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.kernels.encoded import encoded
from saehook.kernels.product import mm, pre_acts
from saehook.kernels.reference import Encoded, Select
from saehook.kernels.scratch import Scratch, take
from saehook.kernels.selection import Selection


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
        centred = x - b_dec
        pre = pre_acts(centred, W_enc, b_enc)
        selection = select(pre)
        values = selection.values(pre).to(x.dtype)
    return Encoded(encoded(values, centred, W_enc, b_enc, b_dec, selection, scratch, _gradients), selection)


def decode(values: Tensor, W_dec: Tensor, selection: Selection, scratch: Scratch | None = None) -> Tensor:
    """The same as `reference.decode`."""
    return _Decode.apply(values, W_dec, selection, scratch)


def _dense(values: Tensor, selection: Selection) -> Tensor:
    """[n_tokens, d_sae] with these numbers at the pairs; on a GPU in bfloat16."""
    dtype = torch.bfloat16 if values.is_cuda else values.dtype
    dense = torch.zeros(selection.n_tokens * selection.d_sae, dtype=dtype, device=values.device)
    dense.index_copy_(0, selection.positions, values.to(dtype))
    return dense.view(selection.n_tokens, selection.d_sae)


def _gradients(
    grad: Tensor, centred: Tensor, W_enc: Tensor, selection: Selection, scratch: Scratch | None
) -> tuple[Tensor, Tensor]:
    """See `encoded.Gradients`."""
    d_pre = _dense(grad, selection)
    d_rows = take(scratch, "W_enc", (W_enc.shape[1], W_enc.shape[0]), W_enc)
    mm(d_pre.T, centred, out=d_rows)
    return d_rows, d_pre.sum(0, dtype=grad.dtype)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, selection: Selection, scratch: Scratch | None) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.selection, ctx.scratch = selection, scratch
        return mm(_dense(values, selection), W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, W_dec = ctx.saved_tensors
        d_W_dec = None
        if ctx.needs_input_grad[1]:
            d_W_dec = take(ctx.scratch, "W_dec", tuple(W_dec.shape), W_dec)
            mm(_dense(values, ctx.selection).T, grad, out=d_W_dec)
        return ctx.selection.values(mm(grad, W_dec.T)), d_W_dec, None, None
