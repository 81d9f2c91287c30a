"""The write after which an encoder reads what was asked for.

Adding Σ a_j W_dec[j] to x moves the pre-activation of latent i by Σ a_j W_dec[j] · W_enc[:, i]. For some latents S at once
that is a linear system of the size of S; writing z' - z itself would solve it only if latents did not overlap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saehook.errors import ArgumentError


def solve(overlap: Tensor, change: Tensor, wanted: Tensor) -> Tensor:
    """a [..., s] with a @ overlap = change on the wanted latents, and 0 on the others.

    Args:
        overlap: W_dec[S] @ W_enc[:, S], [s, s] float32.
        change: of each pre-activation, [..., s].
        wanted: [..., s] bool.

    Raises:
        ArgumentError: no amounts do it: the system is singular.
    """
    every = wanted.all(-1, keepdim=True)
    try:
        amount = torch.linalg.solve(overlap, change, left=False)
        if not bool((every | ~wanted.any(-1, keepdim=True)).all()):  # some tokens want some of the latents
            both = wanted[..., :, None] & wanted[..., None, :]
            eye = torch.eye(len(overlap), device=overlap.device)
            each = torch.linalg.solve(torch.where(both, overlap, eye), change[..., None, :], left=False)[..., 0, :]
            amount = torch.where(every, amount, each)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        raise ArgumentError(
            "mode='readback': no write gives these latents the values asked for together, since what is decoded along one of "
            "them moves others by just as much. Name fewer latents, or leave mode out."
        ) from None
    return torch.where(wanted, amount, 0.0)
