"""The terms of the training loss: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from saehook import kernels


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


def auxk(
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    dead: Tensor,
    k_aux: int,
) -> Tensor:
    """The auxiliary loss that revives dead latents (Gao et al. 2024, appendix A.2), without its coefficient.

    The `k_aux` largest pre-activations among the dead latents, after ReLU, are decoded without bias and compared with
    `residual` = x - x_hat, which gets no gradient. The error is a fraction of the residual's variance about its batch
    mean; 0 where that is 0. `dead` holds the indices of the dead latents: only their weights are touched. With none
    the loss is 0, without a gradient.
    """
    target = residual.detach()
    if dead.numel() == 0:
        return target.new_zeros(())
    k_aux = min(k_aux, dead.numel())
    pre, selection = kernels.encode(
        x,
        W_enc.T.index_select(0, dead).T,
        b_enc.index_select(0, dead),
        b_dec,
        lambda pre_acts: kernels.topk(pre_acts, k_aux),
        k=k_aux,
    )
    decoded = kernels.decode(pre.relu(), W_dec.index_select(0, dead), selection, k=k_aux)
    variance = total_variance(target)
    share = torch.where(variance > 0, 1 / variance, 0)
    return (squared_error(target, decoded) * share).nan_to_num(0.0)
