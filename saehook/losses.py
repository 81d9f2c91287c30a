"""The terms of the training loss: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from saehook.kernels.product import mm, pre_acts_by_latent


def total_variance(x: Tensor) -> Tensor:
    """Mean squared distance of the tokens `x` [n, d] to their mean, summed over d; a scalar."""
    return (x - x.mean(0)).square().sum(-1).mean()


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean squared error of a token, summed over its d components."""
    return (x_hat - x).square().sum(-1).mean()


def reconstruction(x: Tensor, x_hat: Tensor, variance: Tensor | None = None) -> Tensor:
    """Mean squared error of a token, summed over its d components, as a fraction of the variance: an FVU.

    `variance` is that of the batch, or one that is fixed for the whole run, so that every token counts the same (Gao
    et al. 2024, released code).
    """
    if variance is None:
        variance = total_variance(x)
    return squared_error(x, x_hat) / variance


@torch.no_grad()
def add_auxk_gradient(
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    center: Tensor,
    dead: Tensor,
    k_aux: int,
    coefficient: float,
) -> Tensor:
    """The auxiliary loss that revives dead latents (Gao et al. 2024, appendix A.2), a scalar; `coefficient` times its
    gradient is added to `.grad` of the parameters, which must be there.

    The `k_aux` largest pre-activations of x - `center` among the dead latents, after ReLU, are decoded without bias and
    compared with `residual` = target - reconstruction, which gets no gradient. The error is a fraction of the residual's
    variance about its batch mean; 0 where that is 0. `dead` holds the indices of the dead latents: only their rows are
    read and written. With none the loss is 0.
    """
    if dead.numel() == 0:
        return residual.new_zeros(())
    centred = x - center
    encoder, bias, decoder = (p.index_select(0, dead) for p in (W_enc.T, b_enc, W_dec))
    # k_aux is so large a share of the dead that products cost less than sums over pairs; latent-major ones the least.
    pre = pre_acts_by_latent(centred, encoder.T, bias).T.contiguous()
    values, latents = pre.topk(min(k_aux, dead.numel()), dim=-1, sorted=False)
    acts = centred.new_zeros(len(dead), len(x)).scatter_(0, latents.T, values.T.to(x.dtype).relu_())
    error = mm(acts.T, decoder).sub_(residual)
    variance = total_variance(residual)
    share = torch.where(variance > 0, 1 / variance, 0)
    loss = (error.square().sum(-1).mean() * share).nan_to_num(0.0)
    d_decoded = error.mul_(2 * coefficient / len(x) * share)
    d_pre = mm(decoder, d_decoded.T).mul_(acts > 0)
    d_bias = d_pre.sum(1)
    _grad(W_dec).index_add_(0, dead, mm(acts, d_decoded))
    _grad(W_enc).T.index_add_(0, dead, mm(d_pre, centred))
    _grad(b_enc).index_add_(0, dead, d_bias)
    if center.requires_grad:
        _grad(center).sub_(d_bias @ encoder)
    return loss


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
