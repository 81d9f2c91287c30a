"""Which latents a step keeps: the lists that the sparse kernels run over."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saehook.kernels.block_maxima import depth, largest_of_all, largest_of_each_token, largest_of_flat
from saehook.kernels.choice import uses_triton
from saehook.kernels.device import queued

LATENTS_AT_ONCE = 512
"""Latents that `above` compares together: few enough to stay in a CPU's cache."""
FEW_KEYS = 2**15
"""Below so many, torch on a CPU sorts by comparisons, and numpy by radix: three to four times as fast (measured)."""
SEGMENT = 256
"""Pairs of one latent that an accelerator's program takes at most."""


class Selection:
    """Kept (token, latent) pairs of a batch.

    A pair may have a pre-activation <= 0: its activation is then 0 and nothing flows through it.
    """

    def __init__(self, tokens: Tensor, latents: Tensor, n_tokens: int, d_sae: int, *, order: str = "") -> None:
        """The pairs (tokens[i], latents[i]), [m]; `order` says by which of both they ascend: `token`, `latent`, or ''."""
        self.tokens = tokens.contiguous()
        self.latents = latents.contiguous()
        self.n_tokens = n_tokens
        self.d_sae = d_sae
        self.order = order

    @cached_property
    def by_token(self) -> tuple[Tensor | slice, Tensor]:
        """The pairs ordered by token, as an index of [m], and where each token's begin, [n_tokens + 1]."""
        return _ordered(self.tokens, self.n_tokens, presorted=self.order == "token")

    @cached_property
    def by_latent(self) -> tuple[Tensor | slice, Tensor]:
        """The pairs ordered by latent, as an index of [m], and where each latent's begin, [d_sae + 1]."""
        return _ordered(self.latents, self.d_sae, presorted=self.order == "latent")

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The lists by latent cut into segments of at most SEGMENT pairs, at least one for each latent.

        The latent of each segment, where segments of each latent end [d_sae], and the latent of each segment that is not the
        first of its latent; all in the order of latents. There is room for as many segments as the sizes allow: of those
        that do not exist the latent is d_sae.
        """
        starts = self.by_latent[1]
        ends = (((starts[1:] + (SEGMENT - 1)) - starts[:-1]) // SEGMENT).clamp(min=1).cumsum(0)
        n_spare = len(self.latents) // SEGMENT
        places = torch.arange(self.d_sae + n_spare, device=ends.device)
        spare_ends = ends - places[: self.d_sae] - 1
        spare = torch.searchsorted(spare_ends, places[:n_spare], right=True)
        return torch.searchsorted(ends, places, right=True), ends, spare

    @property
    def positions(self) -> Tensor:
        """token * d_sae + latent, [m]."""
        return self.tokens * self.d_sae + self.latents

    def subset(self, some: Tensor) -> Selection:
        """The pairs at the ascending indices `some`."""
        return Selection(self.tokens[some], self.latents[some], self.n_tokens, self.d_sae, order=self.order)

    def first_of_each_token(self, k: int) -> Selection:
        """The first k pairs of each token, where all tokens have the same number and the pairs their order."""
        assert self.order == "token"
        tokens, latents = (x.view(self.n_tokens, -1)[:, :k].reshape(-1) for x in (self.tokens, self.latents))
        return Selection(tokens, latents, self.n_tokens, self.d_sae, order="token")

    def by_group(self, ends: Tensor) -> Selection:
        """The same pairs, with the groups of latents that end before `ends` [G] as tokens of their own.

        Token t becomes the G tokens t·G ... t·G + G - 1, so that decoding gives each group's part of each token.
        """
        group = torch.searchsorted(ends, self.latents, right=True)
        order = self.order if self.order == "latent" else ""
        n_tokens = self.n_tokens * len(ends)
        return Selection(self.tokens * len(ends) + group, self.latents, n_tokens, self.d_sae, order=order)

    def values(self, dense: Tensor) -> Tensor:
        """The entries of `dense` [n_tokens, d_sae] at the pairs, [m]."""
        if _is_by_latent(dense):
            return dense.T.reshape(-1).index_select(0, self.latents * self.n_tokens + self.tokens)
        return dense.reshape(-1).index_select(0, self.positions)


def _ordered(keys: Tensor, n: int, *, presorted: bool) -> tuple[Tensor | slice, Tensor]:
    """An index that sorts `keys`, all in 0..n-1, and where each key's places begin, [n + 1]."""
    ascending, index = keys, slice(None)
    if not presorted:  # by radix: the narrower the keys, the fewer passes
        narrow = keys.to(torch.int16 if n < 2**15 else torch.int32)
        if not queued(keys.device) and len(keys) < FEW_KEYS and n < 2**15:
            index = torch.from_numpy(np.argsort(narrow.numpy(), kind="stable"))
        else:
            ascending, index = narrow.sort(stable=True)
    if not queued(keys.device):
        return index, F.pad(torch.bincount(keys, minlength=n).cumsum(0), (1, 0))
    return index, torch.searchsorted(ascending, torch.arange(n + 1, device=keys.device, dtype=ascending.dtype))


def _is_by_latent(pre_acts: Tensor) -> bool:
    """Whether the memory of [n_tokens, d_sae] is latent-major."""
    return pre_acts.T.is_contiguous() and not pre_acts.is_contiguous()


def topk(pre_acts: Tensor, k: int, *, descending: bool = False) -> Selection:
    """The k largest of each token, on request the largest first; `activation_fns.topk` is the definition."""
    n_tokens, d_sae = pre_acts.shape
    if uses_triton(pre_acts.device) and (found := _by_kernel(pre_acts, k)) is not None:
        latents = found
        if descending:
            latents = latents.gather(1, pre_acts.gather(1, latents).argsort(1, descending=True))
    elif _is_by_latent(pre_acts) and depth(pre_acts.T, k):
        latents = largest_of_each_token(pre_acts.T, k, descending=descending)
    else:
        latents = pre_acts.topk(k, dim=-1, sorted=descending).indices
    tokens = torch.arange(n_tokens, device=pre_acts.device)[:, None].expand(n_tokens, k)
    return Selection(tokens.reshape(-1), latents.reshape(-1), n_tokens, d_sae, order="token")


def _by_kernel(pre_acts: Tensor, k: int) -> Tensor | None:
    """The latents of the k largest of each token, where the sizes are fit for the kernel."""
    from saehook.kernels.triton import block_topk

    return block_topk.block_topk(pre_acts, k) if block_topk.applies(pre_acts, k) else None


def batch_topk(pre_acts: Tensor, k: int) -> Selection:
    """The tokens × k largest entries of the whole batch; `activation_fns.batch_topk` is the definition."""
    n_tokens, d_sae = pre_acts.shape
    n = min(pre_acts.numel(), k * n_tokens)
    if not _is_by_latent(pre_acts):
        flat = pre_acts.reshape(-1)
        positions = largest_of_flat(flat, n) if queued(flat.device) else flat.topk(n, sorted=False).indices
        return Selection(positions // d_sae, positions % d_sae, n_tokens, d_sae)
    if depth(pre_acts.T, k):
        positions = largest_of_all(pre_acts.T, k)
    else:
        positions = pre_acts.T.reshape(-1).topk(n, sorted=False).indices
    return Selection(positions % n_tokens, positions // n_tokens, n_tokens, d_sae)


def above(by_latent: Tensor, lower: Tensor, most: int) -> Selection | None:
    """The pairs of latent-major `by_latent` [d_sae, n_tokens] above `lower` [d_sae]; None if more than `most`.

    Only for devices that are not queued, since the number is read.
    """
    assert not queued(by_latent.device)
    d_sae, n_tokens = by_latent.shape
    found, left = [], most
    for first in range(0, d_sae, LATENTS_AT_ONCE):
        rows = slice(first, first + LATENTS_AT_ONCE)
        fires = (by_latent[rows] > lower[rows, None]).view(-1)
        positions = np.flatnonzero(fires.numpy())  # where few are true six times as fast as torch's nonzero
        left -= len(positions)
        if left < 0:
            return None
        found.append(torch.from_numpy(positions + first * n_tokens))
    positions = torch.cat(found)
    return Selection(positions % n_tokens, positions // n_tokens, n_tokens, d_sae, order="latent")
