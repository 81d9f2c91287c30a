"""Latent activations as pairs: what runs hold of an SAE so wide that [tokens, d_sae] would fill the memory.

`SAE.encode` stays dense. `encode_for` chooses by the SAE's size (`kernels.by_blocks`), and the functions below do the same with
either kind, so that whoever edits or reads latents is written once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saehook.config import AbsTopK, GroupMax
from saehook.kernels import Selection
from saehook.sae import SAE


@dataclass(frozen=True)
class SparseActs:
    """Activations [..., d_sae], of which only those that are not 0 are held."""

    values: Tensor
    """[m], in the SAE's dtype, ordered by token."""
    pairs: Selection
    """Their tokens, counted over all leading dimensions, and latents."""
    leading: tuple[int, ...]
    """The shape without d_sae."""

    def columns(self, latents: Tensor) -> Tensor:
        """The activations of some latents [s] on every token, dense [..., s]."""
        ascending, order = latents.sort()
        place, known = self._places(ascending)
        found = self.values.new_zeros(self.pairs.n_tokens, len(latents))
        if len(latents):
            found = found.index_put((self.pairs.tokens[known], order[place[known]]), self.values[known])
        return found.view(*self.leading, len(latents))

    def without(self, latents: Tensor, tokens: Tensor | None = None) -> SparseActs:
        """The same with 0 at some latents [s], and on some tokens (bool, of the leading shape) at all."""
        left = ~self._places(latents.sort().values)[1]
        if tokens is not None:
            left = left & ~tokens.reshape(-1)[self.pairs.tokens]
        some = left.nonzero().view(-1)
        return SparseActs(self.values[some], self.pairs.subset(some), self.leading)

    def _places(self, ascending: Tensor) -> tuple[Tensor, Tensor]:
        """For each pair, where its latent stands among those, and whether it does."""
        if not len(ascending):
            return torch.zeros_like(self.pairs.latents), torch.zeros_like(self.pairs.latents, dtype=torch.bool)
        place = torch.searchsorted(ascending, self.pairs.latents).clamp_max(len(ascending) - 1)
        return place, ascending[place] == self.pairs.latents

    def sum_rows(self, sae: SAE, dtype: torch.dtype | None = None) -> Tensor:
        """Σ z_i W_dec[i] of each token, [..., d_out], computed in `dtype`; None: that of the weights."""
        return sae.combine_pairs(self.values, self.pairs, dtype).view(*self.leading, sae.d_out)

    def dense(self) -> Tensor:
        """[..., d_sae]."""
        flat = self.values.new_zeros(self.pairs.n_tokens * self.pairs.d_sae)
        return flat.index_put((self.pairs.positions,), self.values).view(*self.leading, self.pairs.d_sae)


Acts = Tensor | SparseActs
"""Latent activations of either kind."""


def encode(sae: SAE, x: Tensor) -> SparseActs:
    """`sae.encode(x)` for `x` [..., d_in] without a tensor of its size; gradients as there.

    Raises:
        ShapeError, MissingStatError: as `SAE.encode`. FormatError: damaged weights of a mapped file.
    """
    inputs, activation = sae.inputs(x), sae.config.activation
    with torch.no_grad():
        dense = isinstance(activation, (AbsTopK, GroupMax))
        values, pairs = _by_pieces(sae, x) if dense else sae.fired(inputs)
    sae.check_read(values, inputs)
    if torch.is_grad_enabled() and (inputs.requires_grad or sae.learns):
        again = (inputs[pairs.tokens] * sae.encoder_rows(pairs.latents)).sum(-1) + sae.b_enc[pairs.latents]
        values = values + (again - again.detach())  # the same bits as without gradients
    return SparseActs(values, pairs, tuple(x.shape[:-1]))


def _by_pieces(sae: SAE, x: Tensor) -> tuple[Tensor, Selection]:
    """`sae.encode` of some tokens at a time, of which what fires is kept: for activation functions without a kernel."""
    tokens, latents, values, before = [], [], [], 0
    for piece in sae.pieces(x.reshape(-1, sae.d_in)):
        acts = sae.encode(piece)
        rows, columns = acts.nonzero(as_tuple=True)
        tokens.append(rows + before)
        latents.append(columns)
        values.append(acts[rows, columns])
        before += len(piece)
    pairs = Selection(torch.cat(tokens), torch.cat(latents), before, sae.d_sae, order="token")
    return torch.cat(values), pairs


def encode_for(sae: SAE, x: Tensor) -> Acts:
    """`sae.encode(x)` as runs take it: dense, or pairs where the SAE is wide."""
    return encode(sae, x) if sae.by_pairs else sae.encode(x)


def reconstructed(sae: SAE, x: Tensor) -> tuple[Tensor, Acts]:
    """`sae(x).x_hat` and the activations, of either kind."""
    if not sae.by_pairs:
        found = sae(x)
        return found.x_hat, found.acts
    acts = encode(sae, x)
    return sae.finish(acts.sum_rows(sae) + sae.b_dec, x), acts


def fired_pairs(acts: Acts) -> tuple[Tensor, Tensor]:
    """Tokens and latents of the activations [n, d_sae] that are not 0, [m] each."""
    if isinstance(acts, SparseActs):
        some = acts.values.nonzero().view(-1)
        return acts.pairs.tokens[some], acts.pairs.latents[some]
    return acts.nonzero(as_tuple=True)  # type: ignore[return-value]


def columns_of(acts: Acts, latents: Tensor) -> Tensor:
    """The activations of some latents [s], [..., s]."""
    return acts[..., latents] if isinstance(acts, Tensor) else acts.columns(latents)


def sum_others(sae: SAE, acts: Acts, latents: Tensor) -> Tensor:
    """Σ z_i W_dec[i] over all latents but some, [..., d_out] float32."""
    if isinstance(acts, Tensor):
        return sae.combine(acts.float().index_fill(-1, latents, 0.0))
    return acts.without(latents).sum_rows(sae, torch.float32)


def decode_with(
    sae: SAE, acts: Acts, latents: Tensor, values: Tensor, emptied: Tensor | None = None, x: Tensor | None = None
) -> Tensor:
    """`sae.decode` of activations in which some latents have other values, [..., d_out].

    Args:
        latents: [s], each once.
        values: of them, [..., s].
        emptied: tokens on which all other latents are 0, bool of the leading shape.
        x: as for `SAE.decode`.
    """
    if isinstance(acts, Tensor):
        if emptied is not None:
            acts = torch.where(emptied[..., None], 0.0, acts)
        return sae.decode(acts.index_copy(-1, latents, values.to(acts.dtype)) if len(latents) else acts, x)
    summed = acts.without(latents, emptied).sum_rows(sae)
    if len(latents):
        summed = summed + values.to(sae.dtype) @ sae.decoder_rows(latents)
    return sae.finish(summed + sae.b_dec, x)


def pre_and_acts(sae: SAE, x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations and activations of some latents [s], each [..., s] float32."""
    if not sae.by_pairs:
        pre_acts = sae.pre_acts(x)
        return pre_acts[..., latents].float(), sae.activate(pre_acts)[..., latents].float()
    inputs = sae.inputs(x)
    pre = torch.addmm(sae.b_enc[latents], inputs, sae.encoder_rows(latents).T).view(*x.shape[:-1], len(latents))
    return pre.float(), encode(sae, x).columns(latents).float()
