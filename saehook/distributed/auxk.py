"""The auxiliary loss that revives dead latents, where these lie on several devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehook.distributed.selection import topk
from saehook.kernels.product import mm, pre_acts_by_latent

if TYPE_CHECKING:
    from saehook.distributed.shards import Shards

WHAT = "AuxK"


@torch.no_grad()
def add_auxk_gradient(
    devices: Shards,
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
    """The same as `losses.add_auxk_gradient`, with `dead` those here among the latents here, and the tokens of `x` here.

    The `k_aux` largest are of all dead latents, mean and variance of all tokens; gradients are of the tokens here.
    """
    mesh = devices.mesh
    numbers = mesh.gather(torch.tensor([dead.numel()], device=x.device), "latent", WHAT).view(-1).tolist()
    if sum(numbers) == 0:
        return residual.new_zeros(())
    centred = x - center
    encoder, bias, decoder = (p.index_select(0, dead) for p in (W_enc.T, b_enc, W_dec))
    pre = pre_acts_by_latent(centred, encoder.T, bias).T.contiguous()
    kept = topk(pre, k_aux, mesh, sum(numbers), max(numbers))
    acts = centred.new_zeros(len(dead), len(x))
    acts[kept.latents, kept.tokens] = pre[kept.tokens, kept.latents].to(x.dtype).relu()
    error = mesh.reduce_(mm(acts.T, decoder), "latent", WHAT).sub_(residual)
    variance = devices.total_variance(residual)
    share = torch.where(variance > 0, 1 / variance, 0)
    loss = (devices.mean(error.square().sum(-1)) * share).nan_to_num(0.0)
    d_decoded = error.mul_(2 * coefficient / devices.number(len(x)) * share)
    d_pre = mm(decoder, d_decoded.T).mul_(acts > 0)
    d_bias = d_pre.sum(1)
    _grad(W_dec).index_add_(0, dead, mm(acts, d_decoded))
    _grad(W_enc).T.index_add_(0, dead, mm(d_pre, centred))
    _grad(b_enc).index_add_(0, dead, d_bias)
    if center.requires_grad:
        _grad(center).sub_(mesh.reduce_(d_bias @ encoder, "latent", WHAT))
    return loss


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
