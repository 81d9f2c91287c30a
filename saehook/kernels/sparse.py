"""The kernels of a step in which few latents fire, in public torch operations, for any device.

The encoder's product is the only dense one. All else runs over the selected pairs: decoding and the gradients of both
weight matrices are sums of rows (`embedding_bag`), the latter over the lists sorted by latent, so that each row of a
gradient is written once. W_enc's gradient is latent-major in memory (the transposed view of a contiguous
[d_sae, d_in]); an optimiser is fastest when W_enc itself is, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.kernels.device import queued
from saehook.kernels.product import pre_acts, pre_acts_by_latent
from saehook.kernels.reference import Autoencoded, Encoded, Rule, Select
from saehook.kernels.scratch import Scratch
from saehook.kernels.selection import Selection

LATENTS_AT_ONCE = 1024
"""Rows of a gradient that are summed together on a CPU, so that they are in the cache when they go to their place."""


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
        if queued(x.device):  # a GPU's top-k is fastest along contiguous rows
            pre = pre_acts(centred, W_enc, b_enc)
        else:
            pre = pre_acts_by_latent(centred, W_enc, b_enc, scratch).T
        selection = select(pre)
        values = selection.values(pre).to(x.dtype)
    return Encoded(_Encode.apply(values, centred, W_enc, b_enc, b_dec, selection, scratch), selection)


def decode(values: Tensor, W_dec: Tensor, selection: Selection, scratch: Scratch | None = None) -> Tensor:
    """The same as `reference.decode`."""
    decoded = _sum_rows(W_dec.detach(), selection.latents, selection.token_offsets, values)
    return _DecoderGradient.apply(decoded, W_dec, values.detach(), selection, scratch)


def autoencode(
    by_latent: Tensor,
    centred: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_dec: Tensor,
    rule: Rule,
    per_latent: Sequence[Tensor],
    selection: Selection,
    scratch: Scratch | None = None,
) -> Autoencoded:
    """The same as `reference.autoencode`, from pre-activations [d_sae, n_tokens] and all pairs that the rule cares for."""
    latents = selection.latents
    values = selection.values(by_latent.T).to(centred.dtype)
    pre = _Encode.apply(values, centred, W_enc, b_enc, b_dec, selection, scratch)
    acts, cost, frozen = rule(pre, *(numbers.index_select(0, latents) for numbers in per_latent))
    fired = torch.zeros(len(b_enc), device=latents.device).index_add_(0, latents, (acts.detach() > 0).float())
    return Autoencoded(
        decode(acts, W_dec, selection, scratch),
        cost.sum(),
        fired,
        None if frozen is None else decode(frozen, W_dec.detach(), selection),
    )


def _sum_rows(matrix: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Row i: Σ weights[j] · matrix[indices[j]] over offsets[i] <= j < offsets[i + 1]."""
    return F.embedding_bag(indices, matrix, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _outer(weights: Tensor, rows: Tensor, selection: Selection, scratch: Scratch | None, name: str) -> Tensor:
    """Gradient of a latent-major matrix: row i is Σ weights · rows[token] over the pairs of latent i, [d_sae, d_in]."""
    order, offsets = selection.by_latent
    tokens, weights, rows = selection.tokens[order], weights[order], rows.contiguous()
    if scratch is None or queued(rows.device):
        return _sum_rows(rows, tokens, offsets, weights)
    gradient = scratch.take(name, (selection.d_sae, rows.shape[1]), rows)
    for first in range(0, selection.d_sae, LATENTS_AT_ONCE):
        some = offsets[first : first + LATENTS_AT_ONCE + 1]
        pairs = slice(int(some[0]), int(some[-1]))
        gradient[first : first + LATENTS_AT_ONCE] = _sum_rows(rows, tokens[pairs], some - some[0], weights[pairs])
    return gradient


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
        d_b_enc = grad.new_zeros(W_enc.shape[1]).index_add_(0, ctx.selection.latents, grad)
        d_W_enc = _outer(grad, centred, ctx.selection, ctx.scratch, "W_enc").T
        return None, None, d_W_enc, d_b_enc, -(W_enc @ d_b_enc), None, None


class _DecoderGradient(torch.autograd.Function):
    """Passes the decoded batch on; backward gives the gradient of W_dec (that of the values is `embedding_bag`'s)."""

    @staticmethod
    def forward(
        ctx: Any, decoded: Tensor, W_dec: Tensor, values: Tensor, selection: Selection, scratch: Scratch | None
    ) -> Tensor:
        ctx.save_for_backward(values)
        ctx.selection, ctx.scratch = selection, scratch
        return decoded.view_as(decoded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None, None
        (values,) = ctx.saved_tensors
        return grad, _outer(values, grad, ctx.selection, ctx.scratch, "W_dec"), None, None, None
