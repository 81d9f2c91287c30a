"""The definition of the kernels: dense products, gradients by autograd. `sparse.py` must agree with this file."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saehook.kernels.selection import Selection


class Encoded(NamedTuple):
    """The selected latents of a batch."""

    values: Tensor
    """Activations of the selected pairs, [m]; 0 where the pre-activation is not positive."""
    selection: Selection
    """The selected pairs."""


Select = Callable[[Tensor], Selection]
"""Picks pairs from pre-activations [n_tokens, d_sae]."""


def pre_acts(centred: Tensor, W_enc: Tensor, b_enc: Tensor, out: Tensor | None = None) -> Tensor:
    """The dense product of the encoder, [n_tokens, d_sae]; on a GPU in bfloat16, which is also the result's dtype.

    `out` may be a buffer for it where no gradient is recorded.
    """
    with torch.autocast(centred.device.type, dtype=torch.bfloat16, enabled=centred.is_cuda):
        return torch.addmm(b_enc, centred, W_enc, out=out)


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, select: Select) -> Encoded:
    """Activations at the pairs that `select` picks from the pre-activations; `x` is [n_tokens, d_in].

    Everything but `x` may get a gradient; the selection itself is constant.
    """
    pre = pre_acts(x - b_dec, W_enc, b_enc).to(x.dtype)
    with torch.no_grad():
        selection = select(pre)
    return Encoded(selection.values(pre).relu(), selection)


def decode(values: Tensor, W_dec: Tensor, selection: Selection) -> Tensor:
    """Σ values · W_dec over each token's pairs, without b_dec, [n_tokens, d_in]."""
    acts = values.new_zeros(selection.n_tokens * selection.d_sae)
    return acts.index_put((selection.positions,), values).view(-1, selection.d_sae) @ W_dec
