"""The kernels of a step in which few latents fire, in torch operations, for any device.

The encoder's product is the only dense one. All else runs over the selected pairs: decoding and the gradients of both
weight matrices are sums of rows (`embedding_bag`), the latter over the lists sorted by latent. Where a matrix is a
`RowsParameter` these lists are its gradient, for an optimiser that makes rows of them; else they are summed, each row written
once. W_enc's gradient is then latent-major in memory (the transposed view of a contiguous [d_sae, d_in]); an optimiser is
fastest when W_enc itself is, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.kernels.device import queued
from saehook.kernels.encoded import encoded
from saehook.kernels.product import pre_acts, pre_acts_by_latent
from saehook.kernels.reference import Autoencoded, Encoded, Rule, Select
from saehook.kernels.row_sums import RowsParameter, RowSums, sum_rows
from saehook.kernels.scratch import Scratch, take
from saehook.kernels.selection import Selection

PAIRS_AT_ONCE = 1024
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
    """The pre-activations `values` [m] of the selected pairs, however they were found, with their gradients."""
    return encoded(values, centred, W_enc, b_enc, b_dec, selection, scratch, _gradients)


def decode(values: Tensor, W_dec: Tensor, selection: Selection, scratch: Scratch | None = None) -> Tensor:
    """The same as `reference.decode`."""
    return _Decode.apply(values, W_dec, selection, scratch)


def autoencode(
    values: Tensor,
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
    """The same as `reference.autoencode`, from all pairs that the rule cares for and their pre-activations [m]."""
    latents = selection.latents
    pre = selected(values, centred, W_enc, b_enc, b_dec, selection, scratch)
    acts, cost, frozen = rule(pre, *(numbers.index_select(0, latents) for numbers in per_latent))
    fired = torch.zeros(len(b_enc), device=latents.device).index_add_(0, latents, (acts.detach() > 0).float())
    return Autoencoded(
        decode(acts, W_dec, selection, scratch),
        cost.sum(),
        fired,
        None if frozen is None else decode(frozen, W_dec.detach(), selection),
    )


def pair_products(a: Tensor, places: Tensor, b: Tensor, b_places: Tensor) -> Tensor:
    """a[places[i]] · b[b_places[i]] for each i, [m]."""
    if _products_of_rows is not None:
        return _products_of_rows(a, b, b_places, b_places.new_zeros(1), places, 0)
    return pair_products_in_public(a, places, b, b_places)


_products_of_rows = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
"""What autograd calls for the weights of an `embedding_bag`; not public, and more than ten times as fast on a CPU as what is."""


def pair_products_in_public(a: Tensor, places: Tensor, b: Tensor, b_places: Tensor) -> Tensor:
    """The same as `pair_products`, in public torch operations."""
    parts = zip(places.split(PAIRS_AT_ONCE), b_places.split(PAIRS_AT_ONCE), strict=True)
    return torch.cat([(a[some] * b[others]).sum(-1) for some, others in parts])


def _without_zeros(weights: Tensor, selection: Selection) -> tuple[Tensor, Selection]:
    """Only the pairs that weigh something, where their number may be read."""
    if queued(weights.device) or len(some := weights.nonzero().view(-1)) == len(weights):
        return weights, selection
    return weights[some], selection.subset(some)


def _blocks(offsets: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Latents that are treated together, their pairs, and where each latent's begin among these."""
    if queued(offsets.device):
        yield slice(None), slice(None), offsets
        return
    for first in range(0, len(offsets) - 1, LATENTS_AT_ONCE):
        part = offsets[first : first + LATENTS_AT_ONCE + 1]
        yield slice(first, first + LATENTS_AT_ONCE), slice(int(part[0]), int(part[-1])), part - part[0]


def _gradients(
    grad: Tensor, centred: Tensor, W_enc: Tensor, selection: Selection, scratch: Scratch | None
) -> tuple[Tensor | None, Tensor]:
    """See `encoded.Gradients`."""
    grad, selection = _without_zeros(grad, selection)
    d_b_enc = grad.new_zeros(W_enc.shape[1]).index_add_(0, selection.latents, grad)
    if isinstance(W_enc, RowsParameter):
        W_enc.pending.append(RowSums.of(centred, selection, grad))
        return None, d_b_enc
    order, offsets = selection.by_latent
    tokens, weights = selection.tokens[order], grad[order]
    d_rows = take(scratch, "W_enc", (W_enc.shape[1], W_enc.shape[0]), centred)
    for latents, pairs, starts in _blocks(offsets):
        d_rows[latents] = sum_rows(centred, tokens[pairs], starts, weights[pairs])
    return d_rows, d_b_enc


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, selection: Selection, scratch: Scratch | None) -> Tensor:
        ctx.save_for_backward(values)
        ctx.W_dec, ctx.selection, ctx.scratch = W_dec, selection, scratch
        values, selection = _without_zeros(values, selection)
        order, offsets = selection.by_token
        return sum_rows(W_dec.detach(), selection.latents[order], offsets, values[order])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Row j of W_dec's gradient is Σ value · grad[token] over the pairs of latent j, and the gradient of a value grad[token] ·
        W_dec[j]. So the product of row j with W_dec[j] is Σ value · gradient of the value."""
        (values,) = ctx.saved_tensors
        W_dec, selection, grad = ctx.W_dec, ctx.selection, grad.contiguous()
        order, offsets = selection.by_latent
        tokens, latents = selection.tokens[order], selection.latents[order]
        d_values, values = pair_products(grad, tokens, W_dec.detach(), latents), values[order]
        d_W_dec = None
        if isinstance(W_dec, RowsParameter) and ctx.needs_input_grad[1]:
            along = values.new_zeros(len(W_dec)).index_add_(0, latents, values * d_values)
            W_dec.pending.append(RowSums(grad, tokens, values, offsets, along))
        elif ctx.needs_input_grad[1]:
            d_W_dec = take(ctx.scratch, "W_dec", tuple(W_dec.shape), W_dec)
            for rows, pairs, starts in _blocks(offsets):
                d_W_dec[rows] = sum_rows(grad, tokens[pairs], starts, values[pairs])
        if not isinstance(order, slice):
            d_values = torch.empty_like(d_values).index_copy_(0, order, d_values)
        return d_values, d_W_dec, None, None
