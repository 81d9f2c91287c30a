"""Which latents a step keeps: the lists that the sparse kernels run over."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from saehook.kernels import block_maxima
from saehook.kernels.device import queued

LATENTS_AT_ONCE = 512
"""Latents that `above` compares together: few enough to stay in a CPU's cache."""


class Selection:
    """Kept (token, latent) pairs of a batch, in the order of the tokens.

    A pair may have a pre-activation <= 0: its activation is then 0 and nothing flows through it.
    """

    def __init__(self, positions: Tensor, n_tokens: int, d_sae: int, *, per_token: int | None = None) -> None:
        """`positions` are token * d_sae + latent, [m], the tokens ascending; `per_token`: each token has that many."""
        self.positions = positions
        self.n_tokens = n_tokens
        self.d_sae = d_sae
        self._per_token = per_token

    @classmethod
    def from_pairs(cls, tokens: Tensor, latents: Tensor, n_tokens: int, d_sae: int) -> Selection:
        """The pairs (tokens[i], latents[i]), in any order."""
        return cls((tokens * d_sae + latents).sort().values, n_tokens, d_sae)

    @cached_property
    def latents(self) -> Tensor:
        """Latent of each pair, [m]."""
        return self.positions % self.d_sae

    @cached_property
    def tokens(self) -> Tensor:
        """Token of each pair, [m], ascending."""
        return self.positions // self.d_sae

    @cached_property
    def token_offsets(self) -> Tensor:
        """Where each token's pairs begin, [n_tokens + 1]."""
        if self._per_token is not None:
            end = self.n_tokens * self._per_token
            return torch.arange(0, end + 1, self._per_token, device=self.positions.device)
        return _offsets(self.tokens, self.n_tokens)

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The transposed lists: pairs ordered by latent, [m], and where each latent's begin, [d_sae + 1]."""
        ordered, order = self.latents.sort(stable=True)
        return order, _offsets(ordered, self.d_sae)

    def first_of_each_token(self, k: int) -> Selection:
        """The first k pairs of each token, where all tokens have the same number."""
        assert self._per_token is not None
        positions = self.positions.view(self.n_tokens, self._per_token)[:, :k].reshape(-1)
        return Selection(positions, self.n_tokens, self.d_sae, per_token=k)

    def by_group(self, ends: Tensor) -> Selection:
        """The same pairs, with the groups of latents that end before `ends` [G] as tokens of their own.

        Token t becomes the G tokens t·G ... t·G + G - 1, so that decoding gives each group's part of each token.
        """
        group = torch.searchsorted(ends, self.latents, right=True)
        return Selection.from_pairs(
            self.tokens * len(ends) + group, self.latents, self.n_tokens * len(ends), self.d_sae
        )

    def values(self, dense: Tensor) -> Tensor:
        """The entries of `dense` [n_tokens, d_sae] at the pairs, [m]."""
        if _is_by_latent(dense):
            return dense.T.reshape(-1).index_select(0, self.latents * self.n_tokens + self.tokens)
        return dense.reshape(-1).index_select(0, self.positions)


def _offsets(ascending: Tensor, n: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(n + 1, device=ascending.device))


def _is_by_latent(pre_acts: Tensor) -> bool:
    """Whether the memory of [n_tokens, d_sae] is latent-major."""
    return pre_acts.T.is_contiguous() and not pre_acts.is_contiguous()


def topk(pre_acts: Tensor, k: int, *, descending: bool = False) -> Selection:
    """The k largest of each token, on request the largest first; `activation_fns.topk` is the definition."""
    n_tokens, d_sae = pre_acts.shape
    if _is_by_latent(pre_acts) and block_maxima.applies(d_sae, k):
        latents = block_maxima.largest_of_each_token(pre_acts.T, k, descending=descending)
    else:
        latents = pre_acts.topk(k, dim=-1, sorted=descending).indices
    first = torch.arange(0, n_tokens * d_sae, d_sae, device=pre_acts.device)
    return Selection((latents + first[:, None]).view(-1), n_tokens, d_sae, per_token=k)


def batch_topk(pre_acts: Tensor, k: int) -> Selection:
    """The tokens × k largest entries of the whole batch; `activation_fns.batch_topk` is the definition."""
    n_tokens, d_sae = pre_acts.shape
    n = min(pre_acts.numel(), k * n_tokens)
    if _is_by_latent(pre_acts):
        by_latent = pre_acts.T
        if block_maxima.applies(d_sae, k):
            positions = block_maxima.largest_of_all(by_latent, n)
        else:
            positions = by_latent.reshape(-1).topk(n, sorted=False).indices
        return Selection.from_pairs(positions % n_tokens, positions // n_tokens, n_tokens, d_sae)
    return Selection(pre_acts.reshape(-1).topk(n, sorted=False).indices.sort().values, n_tokens, d_sae)


def above(by_latent: Tensor, lower: Tensor, most: int) -> Selection | None:
    """The pairs of latent-major `by_latent` [d_sae, n_tokens] above `lower` [d_sae]; None if more than `most`.

    Only for devices that are not queued, since the number is read.
    """
    assert not queued(by_latent.device)
    d_sae, n_tokens = by_latent.shape
    found, left = [], most
    for first in range(0, d_sae, LATENTS_AT_ONCE):
        rows = slice(first, first + LATENTS_AT_ONCE)
        positions = (by_latent[rows] > lower[rows, None]).view(-1).nonzero().view(-1)
        left -= positions.numel()
        if left < 0:
            return None
        found.append(positions + first * n_tokens)
    positions = torch.cat(found)
    return Selection.from_pairs(positions % n_tokens, positions // n_tokens, n_tokens, d_sae)
