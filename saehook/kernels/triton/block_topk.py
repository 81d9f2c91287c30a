"""The k largest pre-activations of each token, exactly, with one reading of them and without sorting.

The k largest of a row lie in the k blocks with the largest maxima. So a first kernel reads the row, keeps the maximum of each
block, and finds the k best blocks; a second one reads these again, about √(k · d_sae) entries, and finds the k best entries.
Which of many numbers are the k largest is found bit by bit: numbers as integers of the same order, and the largest
integer that at least k of them reach.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saehook.kernels.triton.tiles import LAUNCH, constexpr, on, parts, power_of_two

NEIGHBOURS = 8
"""Entries side by side that belong to one block: 16 bytes of bfloat16, the widest load of a thread."""
MOST_BLOCKS = 2048
"""So that the maxima stay in registers."""
MOST_CANDIDATES = 8192
"""Entries that the second kernel holds at most."""
BITS = {torch.bfloat16: 16, torch.float32: 32}


def block_size(d_sae: int, k: int) -> int:
    """Entries in a block, a power of two: about √(d_sae / k), where both kernels have equally many to compare."""
    size = NEIGHBOURS
    while size * size < d_sae / k or parts(d_sae, size) > MOST_BLOCKS:
        size *= 2
    return size


def applies(pre_acts: Tensor, k: int) -> bool:
    """Whether blocks fit: enough more than k of them, and few enough entries in k."""
    d_sae = pre_acts.shape[1]
    size = block_size(d_sae, k)
    few = power_of_two(k) * size <= MOST_CANDIDATES
    return pre_acts.dtype in BITS and few and parts(d_sae, size) >= 2 * k


def block_topk(pre_acts: Tensor, k: int) -> Tensor:
    """The latents of the k largest of each row of `pre_acts` [n_tokens, d_sae], [n_tokens, k] int64, in no order.

    Of equal ones at the k-th place any are taken. NaN counts as the largest, so that it is seen.
    """
    pre_acts = pre_acts.contiguous()
    n_tokens, d_sae = pre_acts.shape
    size = block_size(d_sae, k)
    n_blocks = max(power_of_two(parts(d_sae, size)), 2)
    sizes = {"SIDE": NEIGHBOURS, "BLOCKS": n_blocks, "BITS": BITS[pre_acts.dtype], "num_warps": 8, **LAUNCH}
    blocks = torch.empty(n_tokens, k, dtype=torch.int32, device=pre_acts.device)
    with on(pre_acts):
        _best_blocks[(n_tokens,)](pre_acts, blocks, d_sae, k, STRIPES=parts(d_sae, n_blocks * NEIGHBOURS), **sizes)
    latents = torch.empty(n_tokens, k, dtype=torch.int64, device=pre_acts.device)
    candidates = power_of_two(k) * size
    with on(pre_acts):
        _best_entries[(n_tokens,)](pre_acts, blocks, latents, d_sae, k, SIZE=size, CANDIDATES=candidates, **sizes)
    return latents


@triton.jit
def _as_integers(x, BITS: constexpr):
    """Integers in the order of the numbers."""
    magnitude = 0x7FFF if BITS == 16 else 0x7FFFFFFF
    infinity = 0x7F80 if BITS == 16 else 0x7F800000
    if BITS == 16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ magnitude, bits)
    return tl.where((bits & magnitude) > infinity, magnitude, ordered)


@triton.jit
def _least(BITS: constexpr):
    """Below every number."""
    return tl.full([], -0x8000 if BITS == 16 else -0x80000000, tl.int32)


@triton.jit
def _chosen(keys, k, BITS: constexpr):
    """Which of `keys` [n] are the k largest, and which of the chosen each is, counted from 0."""
    cut = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= k, 0, _least(BITS))
    for i in range(BITS - 1):
        higher = cut + (1 << (BITS - 2 - i))
        cut = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= k, higher, cut)
    above = (keys > cut).to(tl.int32)
    equal = (keys == cut).to(tl.int32)
    needed = k - tl.sum(above)
    chosen = above + tl.where(tl.cumsum(equal) <= needed, equal, 0)
    return chosen > 0, tl.cumsum(chosen) - 1


@triton.jit
def _best_blocks(pre_acts, blocks, d_sae, k, STRIPES: constexpr, SIDE: constexpr, BLOCKS: constexpr, BITS: constexpr):
    """Block b has the entries b · SIDE ... b · SIDE + SIDE - 1 of each stripe of BLOCKS · SIDE entries."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    within = block[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    least = _least(BITS)
    best = tl.full([BLOCKS, SIDE], 0, tl.int32) + least
    for stripe in range(STRIPES):
        latent = stripe * BLOCKS * SIDE + within
        inside = latent < d_sae
        entries = tl.load(pre_acts + token * d_sae + latent, mask=inside, other=0.0)
        best = tl.maximum(best, tl.where(inside, _as_integers(entries, BITS), least))
    chosen, place = _chosen(tl.max(best, 1), k, BITS)
    tl.store(blocks + token * k + place, block, mask=chosen)


@triton.jit
def _best_entries(
    pre_acts,
    blocks,
    latents,
    d_sae,
    k,
    SIZE: constexpr,
    CANDIDATES: constexpr,
    SIDE: constexpr,
    BLOCKS: constexpr,
    BITS: constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, CANDIDATES)
    number = candidate // SIZE
    within = candidate % SIZE
    block = tl.load(blocks + token * k + number, mask=number < k, other=0)
    latent = within // SIDE * (BLOCKS * SIDE) + block * SIDE + within % SIDE
    inside = (number < k) & (latent < d_sae)
    entries = tl.load(pre_acts + token * d_sae + latent, mask=inside, other=0.0)
    keys = tl.where(inside, _as_integers(entries, BITS), _least(BITS))
    chosen, place = _chosen(keys, k, BITS)
    tl.store(latents + token * k + place, latent.to(tl.int64), mask=chosen)
