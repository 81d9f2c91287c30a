"""The arithmetic of one training step, in two versions that agree: `reference` (dense) and `sparse`.

The choice is made per call. Sums over the selected pairs cost k / d_sae of a dense product each, but run slower per
operation, so the sparse version is taken where d_sae >= 8 k. The environment variable SAEHOOK_KERNELS=reference or
SAEHOOK_KERNELS=sparse overrides that.
"""

from __future__ import annotations

import functools
import logging
import os

from torch import Tensor

from saehook.kernels import reference, sparse
from saehook.kernels.reference import Encoded, Select
from saehook.kernels.selection import Selection, batch_topk, topk

__all__ = ["Encoded", "Select", "Selection", "batch_topk", "choose", "decode", "encode", "topk"]

SPARSE_FROM = 8
"""d_sae / k from which the sparse version is taken: where both cost the same on a CPU, within the noise."""


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    select: Select,
    *,
    k: int,
    scratch: Tensor | None = None,
) -> Encoded:
    """Encode `x` [n_tokens, d_in] and keep the pairs that `select` picks, about k a token.

    `scratch` is memory that steps share, flat and of the dtype of `x`, for the pre-activations: on a CPU, fresh memory
    for them costs a third of the product. Use it for nothing else during the call; the result does not refer to it.
    """
    n_tokens, d_sae = x.shape[0], b_enc.shape[0]
    if choose(d_sae, k) == "reference":
        return reference.encode(x, W_enc, b_enc, b_dec, select)
    out = None if scratch is None else scratch[: n_tokens * d_sae].view(n_tokens, d_sae)
    return sparse.encode(x, W_enc, b_enc, b_dec, select, out)


def decode(values: Tensor, W_dec: Tensor, selection: Selection, *, k: int) -> Tensor:
    """Σ values · W_dec over each token's pairs, about k of them, without b_dec: [n_tokens, d_in]."""
    chosen = reference if choose(selection.d_sae, k) == "reference" else sparse
    return chosen.decode(values, W_dec, selection)


def choose(d_sae: int, k: int) -> str:
    """`reference` or `sparse`; the reason goes to the log, once."""
    forced = os.environ.get("SAEHOOK_KERNELS", "")
    if forced in {"reference", "sparse"}:
        return _log_once(forced, f"SAEHOOK_KERNELS={forced}")
    sign, name = (">=", "sparse") if d_sae >= SPARSE_FROM * k else ("<", "reference")
    return _log_once(name, f"d_sae / k {sign} {SPARSE_FROM}")


@functools.cache
def _log_once(name: str, reason: str) -> str:
    logging.getLogger("saehook").info("%s kernels, because %s", name, reason)
    return name
