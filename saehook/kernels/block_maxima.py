"""The largest of many pre-activations by descent through the maxima of blocks, exactly.

The k largest of a set of entries lie in the k blocks with the largest maxima. So of 64 entries one is compared, then of the
chosen blocks' 8 parts of 8, then of 8 entries: an eighth of the work of a `topk` over everything. For latent-major
pre-activations [d_sae, n_tokens], where a block is 64 latents on one token.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 8
"""Each level has that many times fewer entries than the one below."""
BLOCK = WIDTH * WIDTH
"""Entries that the highest level compares as one."""


ENTRIES_FROM = 2**17
"""Below so many, operations cost more to start than they compute."""


def depth(by_latent: Tensor, k: int) -> int:
    """Levels above the entries [d_sae, n_tokens] themselves, at most two: as many as have whole blocks, and enough more than k that
    looking at them first pays."""
    if by_latent.numel() < ENTRIES_FROM:
        return 0
    return {1: 0, WIDTH: 1, BLOCK: 2}[block_size(len(by_latent), k)]


def block_size(d_sae: int, k: int) -> int:
    """Latents of which the highest level has one: in whole blocks, and enough more of these than k."""
    return max(size for size in (1, WIDTH, BLOCK) if size == 1 or (d_sae % size == 0 and d_sae // size >= 2 * k))


def largest_of_each_token(by_latent: Tensor, k: int, *, descending: bool = False) -> Tensor:
    """The latents of the k largest of each token, [n_tokens, k]; with a `depth` above 0."""
    n_tokens = by_latent.shape[1]
    tokens = torch.arange(n_tokens)[:, None]
    top, *below = _levels(by_latent, k)
    rows = top.T.contiguous().topk(k, sorted=False).indices
    for level in below:
        parts = (rows[:, :, None] * WIDTH + torch.arange(WIDTH)).view(n_tokens, -1)
        best = level.view(-1).take(parts * n_tokens + tokens).topk(k, sorted=descending).indices
        rows = parts.gather(1, best)
    return rows


def largest_of_all(by_latent: Tensor, k: int) -> Tensor:
    """Where the n_tokens x k largest of all tokens together are in the flat tensor (latent * n_tokens + token)."""
    n_tokens = by_latent.shape[1]
    n = n_tokens * k
    top, *below = _levels(by_latent, k)
    positions = top.view(-1).topk(n, sorted=False).indices
    for level in below:
        # Row r of a level is rows r * WIDTH ... of the one below, at the same token.
        first = positions + positions // n_tokens * ((WIDTH - 1) * n_tokens)
        parts = (first[:, None] + torch.arange(0, WIDTH * n_tokens, n_tokens)).view(-1)
        positions = parts[level.view(-1).take(parts).topk(n, sorted=False).indices]
    return positions


def largest_of_flat(entries: Tensor, n: int) -> Tensor:
    """Where the n largest of `entries` [size] are, [n]; the blocks are 64 neighbours. For any device."""
    if entries.numel() % BLOCK or entries.numel() // BLOCK < 2 * n:
        return entries.topk(n, sorted=False).indices
    blocks = entries.view(-1, BLOCK)
    chosen = blocks.amax(1).topk(n, sorted=False).indices
    best = blocks[chosen].view(-1).topk(n, sorted=False).indices
    return chosen[best // BLOCK] * BLOCK + best % BLOCK


def _levels(by_latent: Tensor, k: int) -> list[Tensor]:
    """The entries, below the maxima of 8 latents, below those of 64, as many as `depth` says: the highest first."""
    n_tokens = by_latent.shape[1]
    levels = [by_latent]
    for _ in range(depth(by_latent, k)):
        levels.insert(0, levels[0].view(-1, WIDTH, n_tokens).amax(1))
    return levels
