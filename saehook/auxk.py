"""The auxiliary loss that revives dead latents (Gao et al. 2024, appendix A.2), on any number of devices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saehook import kernels
from saehook.devices import ONE_DEVICE, OneDevice
from saehook.kernels import running
from saehook.kernels.product import mm, pre_acts_by_latent

WHAT = "AuxK"
TOKENS_AT_ONCE = 512
"""Tokens that are treated together on a CPU: what is made of a thousand dead latents then stays in its cache."""


class Weights(NamedTuple):
    """What the loss has gradients for: of all latents here."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    center: Tensor
    """What the encoder subtracts from its input, [d_in]."""


@torch.no_grad()
def add_auxk_gradient(
    x: Tensor,
    residual: Tensor,
    weights: Weights,
    dead: Tensor,
    k_aux: int,
    coefficient: float,
    devices: OneDevice = ONE_DEVICE,
    pre_acts: Tensor | None = None,
) -> Tensor:
    """The loss, a scalar; `coefficient` times its gradient is added to `.grad` of the weights, which must be there.

    The `k_aux` largest pre-activations of x - center among the dead latents, after ReLU, are decoded without bias and compared
    with `residual` = target - reconstruction, which gets no gradient. The error is a fraction of the residual's variance
    about its batch mean; 0 where that is 0. `dead` holds the indices of the dead latents here: only their rows are read and
    written. With none anywhere the loss is 0. `pre_acts`: of all latents here, [latents, n], where they are known.
    """
    total, most = devices.shared_number(dead.numel())
    if total == 0:
        return residual.new_zeros(())
    centred = x - weights.center
    encoder, bias, decoder = (
        p.index_select(0, dead).to(x.dtype) for p in (weights.W_enc.T, weights.b_enc, weights.W_dec)
    )
    variance = devices.total_variance(residual)
    share = torch.where(variance > 0, 1 / variance, 0)
    errors, d_bias = [], torch.zeros_like(bias)
    by_rows = isinstance(weights.W_dec, kernels.RowsParameter) and not weights.W_dec.streamed
    at_once = max(1, running.DENSE_ENTRIES // most)
    if not kernels.queued(x.device):
        at_once = min(at_once, TOKENS_AT_ONCE)
    for first in range(0, len(x), at_once):
        tokens = slice(first, first + at_once)
        inputs, target = centred[tokens], residual[tokens]
        # k_aux is so large a share of the dead that products cost less than sums over pairs; latent-major ones the least.
        if pre_acts is None:
            pre = pre_acts_by_latent(inputs, encoder.T, bias)
        else:
            pre = pre_acts[:, tokens].index_select(0, dead)
        acts = devices.largest(pre, min(k_aux, total), total, most).to(x.dtype)
        error = devices.sum_latents(mm(acts.T, decoder), WHAT).sub_(target)
        errors.append(error.square().sum(-1))
        d_decoded = error.mul_(2 * coefficient / devices.number(len(x)) * share)
        d_pre = mm(decoder, d_decoded.T).mul_(kernels.ones_above(acts, 0))
        d_bias += d_pre.sum(1)
        along = torch.linalg.vecdot(acts, d_pre) if by_rows else None
        kernels.add_product(weights.W_dec, dead, acts, d_decoded, along=along)
        kernels.add_product(weights.W_enc, dead, d_pre, inputs, columns=True)
    _grad(weights.b_enc).index_add_(0, dead, d_bias)
    if weights.center.requires_grad:
        _grad(weights.center).sub_(devices.sum_latents(d_bias @ encoder, WHAT))
    return (devices.mean(torch.cat(errors)) * share).nan_to_num(0.0)


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
