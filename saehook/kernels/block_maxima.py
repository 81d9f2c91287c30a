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


def applies(d_sae: int, k: int) -> bool:
    """Whether blocks fit, and are enough more than k that looking at them first pays."""
    return d_sae % BLOCK == 0 and d_sae // BLOCK >= 2 * k


def largest_of_each_token(by_latent: Tensor, k: int, *, descending: bool = False) -> Tensor:
    """The latents of the k largest of each token, [n_tokens, k]."""
    n_tokens = by_latent.shape[1]
    tokens = torch.arange(n_tokens)[:, None]
    top, *below = _levels(by_latent)
    rows = top.T.contiguous().topk(k, sorted=False).indices
    for level in below:
        parts = (rows[:, :, None] * WIDTH + torch.arange(WIDTH)).view(n_tokens, -1)
        best = level.view(-1).take(parts * n_tokens + tokens).topk(k, sorted=descending).indices
        rows = parts.gather(1, best)
    return rows


def largest_of_all(by_latent: Tensor, n: int) -> Tensor:
    """Where the n largest of all tokens together are in the flat tensor (latent * n_tokens + token), [n]."""
    n_tokens = by_latent.shape[1]
    top, *below = _levels(by_latent)
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


def _levels(by_latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima of 64 latents, of 8, and the entries."""
    n_tokens = by_latent.shape[1]
    eights = by_latent.view(-1, WIDTH, n_tokens).amax(1)
    return eights.view(-1, WIDTH, n_tokens).amax(1), eights, by_latent
