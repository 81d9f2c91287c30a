"""The arithmetic of one training step, in versions that agree: `reference` (the definition), `sparse` and `dense`.

Where k latents a token are kept the choice is made from the sizes: sums over the selected pairs cost k / d_sae of a dense
product each, but run slower per operation, so the sparse version is taken where d_sae >= 8 k. Where a penalty decides how
many fire it is made in each step from their number; on a GPU, where that is not to be read, the dense version is taken
always. At inference, `encode_topk` and `encode_above` keep only what fires, where an SAE is so wide that [tokens, d_sae]
would fill the memory (`by_blocks`). The environment variable SAEHOOK_KERNELS=reference, sparse or dense overrides all.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from saehook.kernels import dense, product, reference, sparse
from saehook.kernels.blockwise import encode_above, encode_topk
from saehook.kernels.device import queued
from saehook.kernels.reference import Activated, Autoencoded, Encoded, Rule, Select
from saehook.kernels.scratch import Scratch
from saehook.kernels.selection import Selection, above, batch_topk, topk

__all__ = [
    "Activated",
    "Autoencoded",
    "Encoded",
    "Rule",
    "Scratch",
    "Select",
    "Selection",
    "autoencode",
    "batch_topk",
    "by_blocks",
    "choose",
    "decode",
    "encode",
    "encode_above",
    "encode_topk",
    "is_wide",
    "queued",
    "topk",
]

SPARSE_FROM = 8
"""d_sae / k from which the sparse version is taken: where both cost the same on a CPU, within the noise."""
SPARSE_SHARE = 1 / 16
"""Share of the pairs up to which `autoencode` is sparse. On a CPU sums cost as much as products at 1 / 8 (measured at
768 -> 16384 and 256 -> 4096), but with their lists and numbers each pair takes some 80 bytes."""


WIDE_FROM = 2**18
"""d_sae from which runs encode some latents at a time: on a prompt of 128 tokens, 128 MiB of dense float32."""


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    select: Select,
    *,
    k: int,
    scratch: Scratch | None = None,
) -> Encoded:
    """Encode `x` [n_tokens, d_in] and keep the pairs that `select` picks, about k a token.

    `scratch` gets the pre-activations, which are not needed afterwards, and in the backward pass W_enc's gradient.
    """
    if choose(b_enc.shape[0], k) == "reference":
        return reference.encode(x, W_enc, b_enc, b_dec, select)
    return sparse.encode(x, W_enc, b_enc, b_dec, select, scratch)


def decode(values: Tensor, W_dec: Tensor, selection: Selection, *, k: int, scratch: Scratch | None = None) -> Tensor:
    """Σ values · W_dec over each token's pairs, about k of them, without b_dec: [n_tokens, d_in].

    `scratch` gets W_dec's gradient in the backward pass, so give it to one call of a step only.
    """
    if choose(selection.d_sae, k) == "reference":
        return reference.decode(values, W_dec, selection)
    return sparse.decode(values, W_dec, selection, scratch)


def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_dec: Tensor,
    rule: Rule,
    per_latent: Sequence[Tensor],
    lower: Tensor,
    *,
    scratch: Scratch | None = None,
) -> Autoencoded:
    """Encode `x` [n_tokens, d_in], apply `rule` to every pre-activation, decode; no tensor of that size is kept but one.

    `per_latent` are numbers of the rule, [d_sae] each, differentiable; at or below `lower` [d_sae] it gives zeros.
    `scratch` gets the pre-activations, which must stay until the backward pass, and there the gradients of both matrices.
    """
    forced = _forced()
    if forced == "reference":
        return reference.autoencode(x, W_enc, b_enc, b_dec, W_dec, rule, per_latent)
    with torch.no_grad():
        centred = x - b_dec
        by_latent = product.pre_acts_by_latent(centred, W_enc, b_enc, scratch)
        selection = None
        if forced != "dense" and not queued(x.device):
            share = 1.0 if forced == "sparse" else SPARSE_SHARE
            selection = above(by_latent, lower.detach(), int(share * by_latent.numel()))
    if selection is None:
        _log_once("dense", f"SAEHOOK_KERNELS={forced}" if forced else "many latents fire, or on a GPU any number")
        return dense.autoencode(by_latent, centred, W_enc, b_enc, b_dec, W_dec, rule, tuple(per_latent), scratch)
    _log_once("sparse", f"SAEHOOK_KERNELS={forced}" if forced else f"at most {SPARSE_SHARE:.1%} of the latents fire")
    return sparse.autoencode(by_latent, centred, W_enc, b_enc, b_dec, W_dec, rule, per_latent, selection, scratch)


def choose(d_sae: int, k: int) -> str:
    """`reference` or `sparse`, where k latents a token are kept; the reason goes to the log, once."""
    if (forced := _forced()) in {"reference", "sparse"}:
        return _log_once(forced, f"SAEHOOK_KERNELS={forced}")
    sign, name = (">=", "sparse") if d_sae >= SPARSE_FROM * k else ("<", "reference")
    return _log_once(name, f"d_sae / k {sign} {SPARSE_FROM}")


def is_wide(d_sae: int) -> bool:
    """Whether [tokens, d_sae] is not to be made for more than some tokens; never with SAEHOOK_KERNELS=reference or dense."""
    return d_sae >= WIDE_FROM and _forced() in {"", "sparse"}


def by_blocks(d_sae: int) -> bool:
    """Whether runs encode some latents at a time and hold only what fires; the reason goes to the log, once."""
    if forced := _forced():
        return _log_once("blockwise" if forced == "sparse" else "dense", f"SAEHOOK_KERNELS={forced}") == "blockwise"
    sign, name = (">=", "blockwise") if is_wide(d_sae) else ("<", "dense")
    return _log_once(name, f"d_sae {sign} {WIDE_FROM:,} at inference") == "blockwise"


def _forced() -> str:
    name = os.environ.get("SAEHOOK_KERNELS", "")
    return name if name in {"reference", "sparse", "dense"} else ""


@functools.cache
def _log_once(name: str, reason: str) -> str:
    logging.getLogger("saehook").info("%s kernels, because %s", name, reason)
    return name
