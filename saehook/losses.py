"""The terms of the training loss: pure functions of tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saehook import kernels


def total_variance(x: Tensor) -> Tensor:
    """Mean squared distance of the tokens `x` [n, d] to their mean, summed over d; a scalar."""
    mean = x.mean(0)
    if kernels.uses_triton(x.device) and not x.requires_grad:
        return kernels.squared_error(mean.expand_as(x), x)
    return (x - mean).square().sum() / len(x)


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean squared error of a token, summed over its d components."""
    if kernels.uses_triton(x.device) and not x.requires_grad:
        return kernels.squared_error(x, x_hat)
    return F.mse_loss(x_hat, x, reduction="sum") / len(x)  # on a CPU half the passes of squares and sums


def reconstruction(x: Tensor, x_hat: Tensor, variance: Tensor | None = None) -> Tensor:
    """Mean squared error of a token, summed over its d components, as a fraction of the variance: an FVU.

    `variance` is that of the batch, or one that is fixed for the whole run, so that every token counts the same (Gao
    et al. 2024, released code).
    """
    if variance is None:
        variance = total_variance(x)
    return squared_error(x, x_hat) / variance
