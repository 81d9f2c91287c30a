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
) -> Tensor:
    """The loss, a scalar; `coefficient` times its gradient is added to `.grad` of the weights, which must be there.

    The `k_aux` largest pre-activations of x - center among the dead latents, after ReLU, are decoded without bias and compared
    with `residual` = target - reconstruction, which gets no gradient. The error is a fraction of the residual's variance
    about its batch mean; 0 where that is 0. `dead` holds the indices of the dead latents here: only their rows are read and
    written. With none anywhere the loss is 0.
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
    at_once = max(1, running.DENSE_ENTRIES // most)
    for inputs, target in zip(centred.split(at_once), residual.split(at_once), strict=True):
        # k_aux is so large a share of the dead that products cost less than sums over pairs; latent-major ones the least.
        pre = pre_acts_by_latent(inputs, encoder.T, bias).T.contiguous()
        kept = devices.topk(pre, min(k_aux, total), total, most)
        acts = inputs.new_zeros(len(dead), len(inputs))
        values = kept.values(pre).to(x.dtype).relu_()
        acts.view(-1).scatter_(0, kept.latents * len(inputs) + kept.tokens, values)
        error = devices.sum_latents(mm(acts.T, decoder), WHAT).sub_(target)
        errors.append(error.square().sum(-1))
        d_decoded = error.mul_(2 * coefficient / devices.number(len(x)) * share)
        d_pre = mm(decoder, d_decoded.T).mul_(acts > 0)
        d_bias += d_pre.sum(1)
        kernels.add_product(weights.W_dec, dead, acts, d_decoded)
        kernels.add_product(weights.W_enc, dead, d_pre, inputs, columns=True)
    _grad(weights.b_enc).index_add_(0, dead, d_bias)
    if weights.center.requires_grad:
        _grad(weights.center).sub_(devices.sum_latents(d_bias @ encoder, WHAT))
    return (devices.mean(torch.cat(errors)) * share).nan_to_num(0.0)


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
