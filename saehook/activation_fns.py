"""The activation functions, on pre-activations of shape [..., d_sae].

`activate` is the inference rule: a token's latents never depend on the other tokens of the batch. Training only are the
batch rule of BatchTopK (`batch_topk`) and the straight-through estimators of JumpReLU (`jumprelu_ste`).
"""

from __future__ import annotations

from typing import Any, assert_never

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.config import AbsTopK, Activation, BatchTopK, GroupMax, JumpReLU, ReLU, TopK
from saehook.errors import MissingStatError
from saehook.kernels.comparison import ones_above


def topk(pre_acts: Tensor, k: int) -> Tensor:
    """The k largest of each token, then ReLU; exactly k survive a tie (Gao et al. 2024)."""
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_acts).scatter_(-1, indices, values.relu())


def abs_topk(pre_acts: Tensor, k: int) -> Tensor:
    """The k of each token that are largest in magnitude, with their signs; exactly k survive a tie (arXiv 2510.00404)."""
    indices = pre_acts.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(pre_acts).scatter_(-1, indices, pre_acts.gather(-1, indices))


def groupmax(pre_acts: Tensor, k: int) -> Tensor:
    """The largest of each of k groups of neighbouring latents, then ReLU; of equals the first (sparsify 1.3)."""
    groups = pre_acts.unflatten(-1, (k, -1))
    values, indices = groups.max(dim=-1, keepdim=True)
    return torch.zeros_like(groups).scatter_(-1, indices, values.relu()).flatten(-2)


def batch_topk(pre_acts: Tensor, k: int) -> Tensor:
    """The tokens × k largest positive pre-activations of the whole batch (Bussmann et al. 2024, equation 4)."""
    flat = pre_acts.relu().flatten()
    n = min(flat.numel(), k * (pre_acts.numel() // pre_acts.shape[-1]))
    values, indices = flat.topk(n, sorted=False)
    return torch.zeros_like(flat).scatter_(0, indices, values).view_as(pre_acts)


def jumprelu(pre_acts: Tensor, threshold: Tensor) -> Tensor:
    """pre where pre > threshold (and positive), else 0. `threshold` is a scalar or [d_sae], float32."""
    acts = pre_acts.relu()
    return acts * (acts > threshold)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        step = ones_above(pre_acts, threshold.clamp(min=0).to(pre_acts.dtype))
        ctx.save_for_backward(pre_acts, threshold, step)
        ctx.bandwidth = bandwidth
        return pre_acts * step, step

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_acts: Tensor, d_step: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre_acts, threshold, step = ctx.saved_tensors
        in_window = (pre_acts - threshold).abs_().lt_(ctx.bandwidth / 2)
        d_threshold = torch.addcmul(d_step, d_acts, threshold).mul_(in_window).sum_to_size(threshold.shape)
        return d_acts * step, d_threshold / -ctx.bandwidth, None


def jumprelu_ste(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """`jumprelu` and the step 1[pre > threshold], from PRE-activations, with gradients.

    With K the rectangle, 1 where |pre - threshold| < bandwidth / 2: the activation has ∂/∂pre = 1[fires] and the
    straight-through ∂/∂threshold = -(threshold / bandwidth) K (Rajamanoharan et al. 2024, equation 11); the step has only
    ∂/∂threshold = -(1 / bandwidth) K (equation 12). `threshold` broadcasts with `pre_acts`.

    From post-activations, which are 0 below the threshold, half of the window would be lost.
    """
    return _JumpReLU.apply(pre_acts, threshold, bandwidth)


def check_threshold(activation: Activation, threshold: Tensor | None) -> None:
    """Raises MissingStatError for a BatchTopK or JumpReLU without threshold."""
    if isinstance(activation, (BatchTopK, JumpReLU)) and threshold is None:
        raise MissingStatError(
            f"this SAE is a {type(activation).__name__} without threshold, so there is no rule that treats each "
            "token alone. Train it to the end, or set it: sae.threshold = torch.nn.Parameter(torch.tensor(0.1))."
        )


def activate(pre_acts: Tensor, activation: Activation, threshold: Tensor | None) -> Tensor:
    """Latent activations by the inference rule, in the dtype of `pre_acts`.

    Raises:
        MissingStatError: a BatchTopK or JumpReLU without threshold.
    """
    match activation:
        case ReLU():
            return pre_acts.relu()
        case TopK(k=k):
            return topk(pre_acts, k)
        case AbsTopK(k=k):
            return abs_topk(pre_acts, k)
        case GroupMax(k=k):
            return groupmax(pre_acts, k)
        case BatchTopK() | JumpReLU():
            check_threshold(activation, threshold)
            assert threshold is not None
            return jumprelu(pre_acts, threshold)
        case _:
            assert_never(activation)
