"""The kernels of a step in which few latents fire, in public torch operations, for any device.

The encoder's product is the only dense one. All else runs over the selected pairs: decoding and the gradients of both
weight matrices are sums of rows (`embedding_bag`), the latter over the lists sorted by latent, so that each row of a
gradient is written once. W_enc's gradient is latent-major in memory (the transposed view of a contiguous
[d_sae, d_in]); an optimiser is fastest when W_enc itself is, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.kernels.reference import Encoded, Select, pre_acts
from saehook.kernels.selection import Selection


def encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, select: Select, out: Tensor | None = None
) -> Encoded:
    """The same as `reference.encode`. The pre-activations are written to `out` and not needed afterwards."""
    with torch.no_grad():
        centred = x - b_dec
        pre = pre_acts(centred, W_enc, b_enc, out)
        selection = select(pre)
        values = selection.values(pre).to(x.dtype).relu()
    return Encoded(_Encode.apply(values, centred, W_enc, b_enc, b_dec, selection), selection)


def decode(values: Tensor, W_dec: Tensor, selection: Selection) -> Tensor:
    """The same as `reference.decode`."""
    decoded = _sum_rows(W_dec.detach(), selection.latents, selection.token_offsets, values)
    return _DecoderGradient.apply(decoded, W_dec, values.detach(), selection)


def _sum_rows(matrix: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Row i: Σ weights[j] · matrix[indices[j]] over offsets[i] <= j < offsets[i + 1]."""
    return F.embedding_bag(indices, matrix, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _outer(weights: Tensor, rows: Tensor, selection: Selection) -> Tensor:
    """Gradient of a latent-major matrix: row i is Σ weights · rows[token] over the pairs of latent i, [d_sae, d_in]."""
    order, offsets = selection.by_latent
    return _sum_rows(rows.contiguous(), selection.tokens[order], offsets, weights[order])


class _Encode(torch.autograd.Function):
    """Passes the selected activations on; backward gives the gradients of the encoder and of the centring."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, centred: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, selection: Selection
    ) -> Tensor:
        ctx.save_for_backward(values, centred, W_enc)
        ctx.selection = selection
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, centred, W_enc = ctx.saved_tensors
        d_pre = torch.where(values > 0, grad, 0)
        d_b_enc = d_pre.new_zeros(W_enc.shape[1]).index_add_(0, ctx.selection.latents, d_pre)
        d_W_enc = _outer(d_pre, centred, ctx.selection).T
        return None, None, d_W_enc, d_b_enc, -(W_enc @ d_b_enc), None


class _DecoderGradient(torch.autograd.Function):
    """Passes the decoded batch on; backward gives the gradient of W_dec (that of the values is `embedding_bag`'s)."""

    @staticmethod
    def forward(ctx: Any, decoded: Tensor, W_dec: Tensor, values: Tensor, selection: Selection) -> Tensor:
        ctx.save_for_backward(values)
        ctx.selection = selection
        return decoded.view_as(decoded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (values,) = ctx.saved_tensors
        return grad, _outer(values, grad, ctx.selection), None, None
