"""The kernel of a step in which many latents fire, where sums over pairs would cost more than products.

Forward and backward go over blocks of latents and tokens, so that beside the pre-activations nothing of their size is held,
and on a CPU what is done entry by entry stays in its shared cache: a pass over a block then costs one or two hundredths of its
product. Five products: encoder, decoder, and the gradients of activations and both matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.kernels.comparison import ones_above
from saehook.kernels.device import queued
from saehook.kernels.product import add_mm, mm
from saehook.kernels.reference import Autoencoded, Rule
from saehook.kernels.scratch import Scratch, take

ENTRIES_AT_ONCE = 2**20
"""Pre-activations in a block on a CPU. Of a quarter, all would stay in the cache of a core, but products are a fifth slower
with two threads (measured at 768 wide)."""
TOKENS_AT_ONCE = 1024
"""At most as many tokens are in a block on a CPU, so that it has enough latents: of few of either, products are slow."""
ENTRIES_AT_ONCE_QUEUED = 2**26
"""Pre-activations in a block on other devices, where larger products are faster; all tokens are in each."""


def autoencode(
    by_latent: Tensor,
    centred: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_dec: Tensor,
    rule: Rule,
    per_latent: tuple[Tensor, ...],
    scratch: Scratch | None = None,
) -> Autoencoded:
    """The same as `reference.autoencode`, from pre-activations [d_sae, n_tokens], which must stay until the backward pass."""
    return Autoencoded(*_Dense.apply(by_latent, centred, W_enc, b_enc, b_dec, W_dec, rule, scratch, *per_latent))


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        by_latent: Tensor,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        W_dec: Tensor,
        rule: Rule,
        scratch: Scratch | None,
        *per_latent: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(by_latent, centred, W_enc, W_dec, *per_latent)
        ctx.rule, ctx.scratch = rule, scratch
        decoded, total_cost = centred.new_zeros(len(centred), W_dec.shape[1]), centred.new_zeros(())
        fired = torch.zeros(len(b_enc), device=centred.device)
        total_frozen = None
        for rows in _latents(by_latent):
            numbers = [p[rows, None] for p in per_latent]
            for tokens in _tokens(by_latent):
                acts, cost, frozen = rule(by_latent[rows, tokens].to(centred.dtype), *numbers)
                add_mm(decoded[tokens], acts.T, W_dec[rows])
                total_cost += cost.sum()
                fired[rows] += ones_above(acts, 0).sum(1)
                if frozen is not None:
                    total_frozen = torch.zeros_like(decoded) if total_frozen is None else total_frozen
                    add_mm(total_frozen[tokens], frozen.T, W_dec[rows])
        ctx.mark_non_differentiable(fired)
        return decoded, total_cost, fired, total_frozen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_latent, centred, W_enc, W_dec, *per_latent = ctx.saved_tensors
        d_decoded, d_cost, _, d_frozen = grads
        assert d_decoded is not None
        assert d_cost is not None
        d_W_enc = take(ctx.scratch, "W_enc", tuple(W_enc.T.shape), W_dec)
        d_W_dec = take(ctx.scratch, "W_dec", tuple(W_dec.shape), W_dec)
        d_b_enc = W_dec.new_zeros(len(W_dec))
        d_per_latent = [torch.zeros_like(p) for p in per_latent]
        for rows in _latents(by_latent):
            for tokens in _tokens(by_latent):
                with torch.enable_grad():
                    pre = by_latent[rows, tokens].to(centred.dtype).detach().requires_grad_()
                    numbers = [p[rows].detach().requires_grad_() for p in per_latent]
                    acts, cost, frozen = ctx.rule(pre, *(p[:, None] for p in numbers))
                outputs, d_outputs = [acts, cost], [mm(W_dec[rows], d_decoded[tokens].T), d_cost.expand_as(cost)]
                if frozen is not None:
                    assert d_frozen is not None
                    outputs.append(frozen)
                    d_outputs.append(mm(W_dec[rows], d_frozen[tokens].T))
                d_pre, *d_numbers = torch.autograd.grad(outputs, [pre, *numbers], d_outputs)
                for gradient, here, there in ((d_W_dec, acts.detach(), d_decoded), (d_W_enc, d_pre, centred)):
                    if tokens.start == 0:
                        mm(here, there[tokens], out=gradient[rows])
                    else:
                        add_mm(gradient[rows], here, there[tokens])
                d_b_enc[rows] += d_pre.sum(1)
                for whole, part in zip(d_per_latent, d_numbers, strict=True):
                    whole[rows] += part
        return None, None, d_W_enc.T, d_b_enc, -(W_enc @ d_b_enc), d_W_dec, None, None, *d_per_latent


def _latents(by_latent: Tensor) -> Iterator[slice]:
    """Latents that are treated together."""
    entries = ENTRIES_AT_ONCE_QUEUED if queued(by_latent.device) else ENTRIES_AT_ONCE
    return _slices(len(by_latent), max(1, entries // _tokens_at_once(by_latent)))


def _tokens(by_latent: Tensor) -> Iterator[slice]:
    """Tokens that are treated together."""
    return _slices(by_latent.shape[1], _tokens_at_once(by_latent))


def _tokens_at_once(by_latent: Tensor) -> int:
    n_tokens = by_latent.shape[1]
    return max(1, n_tokens if queued(by_latent.device) else min(n_tokens, TOKENS_AT_ONCE))


def _slices(n: int, size: int) -> Iterator[slice]:
    """At least one."""
    return (slice(first, min(first + size, n)) for first in range(0, max(n, 1), size))
