"""Dense products: the pre-activations, which every step needs, and those of the versions that go without lists of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from saehook.kernels.scratch import Scratch, take


def in_bfloat16(device: torch.device) -> torch.autocast:
    """Products within are computed in bfloat16 on a GPU, which is also the dtype of their result."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in the dtype of `b`, where it is given into `out`. Without gradients, as all below but `pre_acts`."""
    if a.device.type != "cuda":
        return torch.mm(a, b, out=out)
    with in_bfloat16(a.device):
        product = a @ b
    return product.to(b.dtype) if out is None else out.copy_(product)


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if a.device.type != "cuda":
        total.addmm_(a, b)
    else:
        total += mm(a, b)


def pre_acts(centred: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """`centred` W_enc + b_enc, [n_tokens, d_sae]; on a GPU in bfloat16."""
    with in_bfloat16(centred.device):
        return torch.addmm(b_enc, centred, W_enc)


def pre_acts_by_latent(centred: Tensor, W_enc: Tensor, b_enc: Tensor, scratch: Scratch | None = None) -> Tensor:
    """The same, latent-major: [d_sae, n_tokens].

    In this order a CPU is faster, and what is done latent by latent runs over contiguous memory.
    """
    with in_bfloat16(centred.device):
        if centred.is_cuda:
            return torch.addmm(b_enc[:, None], W_enc.T, centred.T)
        out = take(scratch, "pre_acts", (b_enc.shape[0], centred.shape[0]), centred)
        return torch.addmm(b_enc[:, None], W_enc.T, centred.T, out=out)
