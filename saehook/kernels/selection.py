"""Which latents a step keeps: the lists that the sparse kernels run over."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

SAMPLED_TOKENS = 64
"""Tokens from which `batch_topk` estimates its bound."""


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
        tokens = self.tokens * len(ends) + group
        return Selection(tokens * self.d_sae + self.latents, self.n_tokens * len(ends), self.d_sae)

    def values(self, dense: Tensor) -> Tensor:
        """The entries of `dense` [n_tokens, d_sae] at the pairs, [m]."""
        return dense.reshape(-1).index_select(0, self.positions)


def _offsets(ascending: Tensor, n: int) -> Tensor:
    return torch.searchsorted(ascending, torch.arange(n + 1, device=ascending.device))


def topk(pre_acts: Tensor, k: int, *, descending: bool = False) -> Selection:
    """The k largest of each token, on request the largest first; `activation_fns.topk` is the definition."""
    n_tokens, d_sae = pre_acts.shape
    latents = pre_acts.topk(k, dim=-1, sorted=descending).indices
    first = torch.arange(0, n_tokens * d_sae, d_sae, device=pre_acts.device)
    return Selection((latents + first[:, None]).view(-1), n_tokens, d_sae, per_token=k)


def batch_topk(pre_acts: Tensor, k: int) -> Selection:
    """The tokens × k largest positive entries of the whole batch; `activation_fns.batch_topk` is the definition.

    On a CPU only entries above a bound are sorted out; the bound comes from a few tokens, and where it proves too high
    all positive entries are taken. Elsewhere one flat top-k is used, which needs no synchronisation.
    """
    n_tokens, d_sae = pre_acts.shape
    flat = pre_acts.reshape(-1)
    n = min(flat.numel(), k * n_tokens)
    if flat.device.type == "cpu":
        positions = _above_bound(pre_acts, k, n)
        if positions.numel() > n:
            positions = positions[flat[positions].topk(n, sorted=False).indices].sort().values
    else:
        positions = flat.topk(n, sorted=False).indices.sort().values
    return Selection(positions, n_tokens, d_sae)


def _above_bound(pre_acts: Tensor, k: int, n: int) -> Tensor:
    """Positions of all entries above some bound >= 0, ascending: at least n of them unless fewer are positive."""
    flat = pre_acts.reshape(-1)
    sample = pre_acts[:: max(1, pre_acts.shape[0] // SAMPLED_TOKENS)]
    n_sample = min(sample.numel(), sample.shape[0] * k * 5 // 4 + 1)
    bound = sample.reshape(-1).topk(n_sample, sorted=False).values.min()
    positions = (flat > bound.clamp(min=0)).nonzero().view(-1)
    if positions.numel() < n and bound > 0:
        positions = (flat > 0).nonzero().view(-1)
    return positions
