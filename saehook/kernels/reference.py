"""The definition of the kernels: dense products, gradients by autograd. `sparse.py` and `dense.py` must agree with this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saehook.kernels.product import in_bfloat16, pre_acts
from saehook.kernels.selection import Selection


class Encoded(NamedTuple):
    """The selected latents of a batch."""

    pre_acts: Tensor
    """Pre-activations of the selected pairs, [m], in the dtype of the input."""
    selection: Selection
    """The selected pairs."""


Select = Callable[[Tensor], Selection]
"""Picks pairs from pre-activations [n_tokens, d_sae]."""


class Activated(NamedTuple):
    """What a `Rule` makes of pre-activations; all of their shape."""

    acts: Tensor
    """Activations, to be decoded."""
    cost: Tensor
    """What each contributes to the sparsity penalty."""
    frozen: Tensor | None = None
    """Further activations, to be decoded with weights that get no gradient."""


Rule = Callable[..., Activated]
"""An activation function, pair by pair: from pre-activations and numbers per latent, which broadcast with them. Autograd
differentiates it. Where the pre-activation is not above a bound of the latent it gives zeros, without gradients."""


class Autoencoded(NamedTuple):
    """A batch through an encoder, a `Rule` and the decoder."""

    decoded: Tensor
    """Σ acts · W_dec, without b_dec, [n_tokens, d_in]."""
    cost: Tensor
    """Sum of the costs, a scalar."""
    fired: Tensor
    """On how many tokens each latent fired, [d_sae], float32."""
    frozen: Tensor | None
    """Σ frozen · W_dec, [n_tokens, d_in], where the rule has these."""


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, select: Select) -> Encoded:
    """Pre-activations at the pairs that `select` picks; `x` is [n_tokens, d_in].

    Everything but `x` may get a gradient; the selection itself is constant.
    """
    pre = pre_acts(x - b_dec, W_enc, b_enc).to(x.dtype)
    with torch.no_grad():
        selection = select(pre)
    return Encoded(selection.values(pre), selection)


def decode(values: Tensor, W_dec: Tensor, selection: Selection) -> Tensor:
    """Σ values · W_dec over each token's pairs, without b_dec, [n_tokens, d_in]."""
    acts = values.new_zeros(selection.n_tokens * selection.d_sae)
    return acts.index_put((selection.positions,), values).view(-1, selection.d_sae) @ W_dec


def autoencode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor, W_dec: Tensor, rule: Rule, per_latent: Sequence[Tensor]
) -> Autoencoded:
    """All latents by one `rule`; `x` is [n_tokens, d_in], `per_latent` are the rule's numbers, [d_sae] each.

    Everything but `x` may get a gradient.
    """
    acts, cost, frozen = rule(pre_acts(x - b_dec, W_enc, b_enc).to(x.dtype), *per_latent)
    with in_bfloat16(x.device):
        decoded = (acts @ W_dec).to(x.dtype)
        frozen = None if frozen is None else (frozen @ W_dec.detach()).to(x.dtype)
    return Autoencoded(decoded, cost.sum(), (acts.detach() > 0).sum(0, dtype=torch.float32), frozen)
