"""The arithmetic of one training step, in versions that agree: `reference` (the definition), `sparse`, `dense`, and for
accelerators `triton`.

Where k latents a token are kept the choice is made from the sizes: sums over the selected pairs cost k / d_sae of a dense
product each, but run slower per operation, so the sparse version is taken where d_sae >= 8 k. On a GPU products are so fast that
they are taken below d_sae = 132 k (`dense_pairs`), and from there on the version of `triton`, where that is installed; then
selection, loss and optimiser have kernels of their own, too. A CPU that multiplies bfloat16 tells with that which pairs may be
kept (`screened`); all else is as in the sparse version. Where a penalty decides how many fire the choice is made in each step from
their number; on a GPU, where that is not to be read, the dense version is taken always. Where a step would hold too many
pre-activations, or the weights are not to be there whole in float32, it encodes some latents at a time (`running`, `by_rows`). At
inference, `encode_topk` and `encode_above` keep only what fires, where an SAE is so wide that [tokens, d_sae] would fill the
memory (`by_blocks`). The environment variable SAEHOOK_KERNELS=reference, screened, sparse, dense or triton overrides all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saehook.kernels import by_rows, dense, dense_pairs, product, reference, running, screened, sparse
from saehook.kernels.blockwise import encode_above, encode_topk
from saehook.kernels.choice import forced as _forced
from saehook.kernels.choice import log_once as _log_once
from saehook.kernels.choice import uses_triton
from saehook.kernels.comparison import ones_above
from saehook.kernels.device import queued
from saehook.kernels.reference import Activated, Autoencoded, Encoded, Rule, Select
from saehook.kernels.row_sums import RowsParameter, add_product, is_streamed
from saehook.kernels.running import Largest, Pairs, largest_of_batch, largest_of_each_token
from saehook.kernels.scratch import Scratch
from saehook.kernels.selection import Selection, above, batch_topk, topk

__all__ = [
    "Activated",
    "Autoencoded",
    "Encoded",
    "Largest",
    "Pairs",
    "RowsParameter",
    "Rule",
    "Scratch",
    "Select",
    "Selection",
    "adam_rows_",
    "add_product",
    "autoencode",
    "batch_topk",
    "by_blocks",
    "choose",
    "decode",
    "encode",
    "encode_above",
    "encode_topk",
    "gradients_by_rows",
    "is_streamed",
    "is_wide",
    "largest_of_batch",
    "largest_of_each_token",
    "ones_above",
    "queued",
    "remove_parallel_",
    "screened",
    "selected",
    "some_at_a_time",
    "squared_error",
    "topk",
    "uses_triton",
]

SPARSE_FROM = 8
"""d_sae / k from which the sparse version is taken: where both cost the same on a CPU, within the noise."""
SPARSE_FROM_CUDA = 132
"""The same on an H200, counted and not measured: from there on reading k rows of bfloat16 from the cache (6 TB/s) takes less
time than d_sae of a product (790 TFLOP/s)."""
SPARSE_SHARE = 1 / 16
"""Share of the pairs up to which `autoencode` is sparse. On a CPU sums cost as much as products at 1 / 8 (measured at
768 -> 16384 and 256 -> 4096), but with their lists and numbers each pair takes some 80 bytes."""
ROWS_FROM = 2**22
"""Numbers of a matrix from which rows of its gradient are made where they are used: 16 MiB in float32. Smaller ones stay in a CPU's
cache, and whole steps are as fast (measured: equal at 512 -> 8192, 7 % less time at 768 -> 16384)."""
SCREENED_FROM = 2**22
"""Pre-activations from which a CPU that multiplies bfloat16 looks for the kept pairs with that: with fewer, starting the operations
costs what they save."""
SCREENED_SPARSE_FROM = 64
"""d_sae / k from which it does: below, too many pairs may be among the kept."""
TOO_LITTLE = "products in bfloat16 tell too little in this step, and maybe in others"
"""What the log says, once, where the product is taken in float32 after all."""
WIDE_FROM = 2**18
"""d_sae from which runs encode some latents at a time: on a prompt of 128 tokens, 128 MiB of dense float32."""

Screen = Callable[[Tensor, Tensor, Tensor, int, Scratch | None], tuple[Tensor, Selection] | None]
"""From centred inputs [n, d_in], W_enc, b_enc, k and shared memory: pre-activations [m] and their pairs."""


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    select: Select,
    *,
    k: int,
    scratch: Scratch | None = None,
    screen: Screen | None = None,
) -> Encoded:
    """Encode `x` [n_tokens, d_in] and keep the pairs that `select` picks, about k a token.

    `scratch` gets the pre-activations, which are not needed afterwards, and in the backward pass W_enc's gradient. `screen`
    finds the same pairs, as far as they are positive, without all pre-activations in the dtype of `x`, unless it gives None; it is
    asked where that is faster.
    """
    if screen is not None and screens(x, W_enc, k):
        with torch.no_grad():
            centred = x - b_dec
            found = screen(centred, W_enc, b_enc, k, scratch)
        if found is not None:
            values, pairs = found
            return Encoded(selected(values, centred, W_enc, b_enc, b_dec, pairs, scratch), pairs)
        _log_once("sparse", TOO_LITTLE)
    version = choose(b_enc.shape[0], k, x.device)
    if version == "reference":
        return reference.encode(x, W_enc, b_enc, b_dec, select)
    return _over_pairs(version).encode(x, W_enc, b_enc, b_dec, select, scratch)


def decode(values: Tensor, W_dec: Tensor, selection: Selection, *, k: int, scratch: Scratch | None = None) -> Tensor:
    """Σ values · W_dec over each token's pairs, about k of them, without b_dec: [n_tokens, d_in].

    `scratch` gets W_dec's gradient in the backward pass, so give it to one call of a step only.
    """
    if is_streamed(W_dec):
        return by_rows.decode(values, W_dec, selection)
    version = choose(selection.d_sae, k, values.device)
    if version == "reference":
        return reference.decode(values, W_dec, selection)
    return _over_pairs(version).decode(values, W_dec, selection, scratch)


def _over_pairs(version: str) -> Any:
    """The module of that version; Triton is imported when it is needed."""
    if version == "dense":
        return dense_pairs
    if version == "triton":
        from saehook.kernels.triton import sparse as module

        return module
    return sparse


def remove_parallel_(grad: Tensor, rows: Tensor) -> None:
    """`decoder_rows.remove_parallel_` as one kernel, where `uses_triton`."""
    from saehook.kernels.triton import adam

    adam.remove_parallel_(grad, rows)


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """`losses.squared_error` of an `x` without gradient, where `uses_triton`."""
    from saehook.kernels.triton import token_errors

    return token_errors.squared_error(x, x_hat)


def adam_rows_(optimizer: torch.optim.Adam, taken: Tensor, factor: Tensor | None, unit: Tensor | None) -> bool:
    """See `triton.adam.adam_rows_`; where `uses_triton`."""
    from saehook.kernels.triton import adam

    return adam.adam_rows_(optimizer, taken, factor, unit)


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
    `scratch` gets the pre-activations, which must stay until the backward pass where many fire, and there the gradients of both
    matrices.
    """
    forced = _forced().replace("triton", "").replace("screened", "")  # there is none of Triton for any number of pairs
    if is_streamed(W_enc) or (not forced and some_at_a_time(len(x), W_enc)):
        return _autoencode_some_at_a_time(x, W_enc, b_enc, b_dec, W_dec, rule, per_latent, lower, scratch)
    if forced == "reference":
        return reference.autoencode(x, W_enc, b_enc, b_dec, W_dec, rule, per_latent)
    most = int((1.0 if forced == "sparse" else SPARSE_SHARE) * len(x) * len(b_enc))
    with torch.no_grad():
        centred = x - b_dec
        found = by_latent = None
        if screens(x, W_enc, 1):  # how many fire is not known yet
            found = screened.above(centred, W_enc, b_enc, lower.detach(), scratch)
            if found is None:
                _log_once("other", TOO_LITTLE)
        if found is None:
            by_latent = product.pre_acts_by_latent(centred, W_enc, b_enc, scratch)
            if forced != "dense" and not queued(x.device):
                pairs = above(by_latent, lower.detach(), most)
                found = None if pairs is None else (pairs.values(by_latent.T).to(x.dtype), pairs)
    if found is None:
        assert by_latent is not None
        _log_once("dense", f"SAEHOOK_KERNELS={forced}" if forced else "many latents fire, or on a GPU any number")
        return dense.autoencode(by_latent, centred, W_enc, b_enc, b_dec, W_dec, rule, tuple(per_latent), scratch)
    _log_once("sparse", f"SAEHOOK_KERNELS={forced}" if forced else f"at most {SPARSE_SHARE:.1%} of the latents fire")
    values, pairs = found
    return sparse.autoencode(values, centred, W_enc, b_enc, b_dec, W_dec, rule, per_latent, pairs, scratch)


def screens(x: Tensor, W_enc: Tensor, k: int) -> bool:
    """Whether the pairs that a step keeps, about k a token, are looked for in bfloat16 first; the reason goes to the log, once."""
    full = x.dtype == W_enc.dtype and x.dtype in {torch.float32, torch.float64}
    if queued(x.device) or not full or is_streamed(W_enc) or len(x) == 0:
        return False
    if forced := _forced():
        return forced == "screened" and bool(_log_once(forced, f"SAEHOOK_KERNELS={forced}"))
    d_sae = W_enc.shape[1]
    if d_sae < SCREENED_SPARSE_FROM * k or len(x) * d_sae < SCREENED_FROM or not screened.is_fast():
        return False
    return bool(_log_once("screened", "this CPU multiplies bfloat16 faster than float32"))


def some_at_a_time(n_tokens: int, W_enc: Tensor) -> bool:
    """Whether a step encodes some latents at a time, so that never all pre-activations are there."""
    return is_streamed(W_enc) or running.too_many(n_tokens, W_enc.shape[1], W_enc.device)


def gradients_by_rows(matrix: Tensor) -> bool:
    """Whether a matrix in training is best a `RowsParameter`: a large one on a CPU, but for SAEHOOK_KERNELS=reference."""
    return not queued(matrix.device) and matrix.numel() >= ROWS_FROM and _forced() != "reference"


def selected(
    values: Tensor,
    centred: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    selection: Selection,
    scratch: Scratch | None = None,
) -> Tensor:
    """The pre-activations `values` [m] of pairs, however they were found, of `centred` = x - `b_dec`, with their gradients."""
    triton = uses_triton(values.device) and not is_streamed(W_enc)
    module = _over_pairs("triton" if triton else "sparse")
    return module.selected(values, centred, W_enc, b_enc, b_dec, selection, scratch)


def _autoencode_some_at_a_time(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_dec: Tensor,
    rule: Rule,
    per_latent: Sequence[Tensor],
    lower: Tensor,
    scratch: Scratch | None,
) -> Autoencoded:
    with torch.no_grad():
        centred = x - b_dec
        most = min(int(SPARSE_SHARE * len(x) * len(b_enc)), running.DENSE_ENTRIES // 4)
        found = None if queued(x.device) else running.above(centred, W_enc, b_enc, lower, most)
    if found is None:
        return by_rows.autoencode(centred, W_enc, b_enc, b_dec, W_dec, rule, per_latent)
    values, pairs = found
    pre = selected(values, centred, W_enc, b_enc, b_dec, pairs, scratch)
    acts, cost, frozen = rule(pre, *(numbers.index_select(0, pairs.latents) for numbers in per_latent))
    fired = torch.zeros(len(b_enc), device=x.device).index_add_(0, pairs.latents, (acts.detach() > 0).float())
    fixed = None
    if frozen is not None:
        if is_streamed(W_dec):
            fixed = by_rows.decode(frozen, W_dec, pairs, frozen=True)
        else:
            fixed = sparse.decode(frozen, W_dec.detach(), pairs)
    return Autoencoded(decode(acts, W_dec, pairs, k=1, scratch=scratch), cost.sum(), fired, fixed)


def choose(d_sae: int, k: int, device: torch.device) -> str:
    """The version that is taken where k latents a token are kept; the reason goes to the log, once."""
    if (name := _forced()) and (name != "triton" or uses_triton(device)):
        return _log_once(name.replace("screened", "sparse"), f"SAEHOOK_KERNELS={name}")
    if device.type == "cuda" and d_sae < SPARSE_FROM_CUDA * k:
        return _log_once("dense", f"d_sae / k < {SPARSE_FROM_CUDA} on a GPU")
    if d_sae < SPARSE_FROM * k:
        return _log_once("reference", f"d_sae / k < {SPARSE_FROM}")
    if uses_triton(device):
        return _log_once("triton", f"d_sae / k >= {SPARSE_FROM_CUDA} on a GPU, with Triton installed")
    return _log_once("sparse", f"d_sae / k >= {SPARSE_FROM}")


def is_wide(d_sae: int) -> bool:
    """Whether [tokens, d_sae] is not to be made for more than some tokens; never with SAEHOOK_KERNELS=reference or dense."""
    return d_sae >= WIDE_FROM and _forced() not in {"reference", "dense"}


def by_blocks(d_sae: int) -> bool:
    """Whether runs encode some latents at a time and hold only what fires; the reason goes to the log, once."""
    if forced := _forced():
        name = "dense" if forced in {"reference", "dense"} else "blockwise"
        return _log_once(name, f"SAEHOOK_KERNELS={forced}") == "blockwise"
    sign, name = (">=", "blockwise") if is_wide(d_sae) else ("<", "dense")
    return _log_once(name, f"d_sae {sign} {WIDE_FROM:,} at inference") == "blockwise"
