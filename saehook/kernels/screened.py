"""Which pairs a step keeps, on CPUs that multiply bfloat16 much faster than float32: without the encoder's product in float32.

The product of inputs and weights rounded to bfloat16 tells each pre-activation up to a bound. Only those which may, by this
bound, be among the kept are computed in float32, and the kept are chosen from these numbers. So both are what the product in
float32 would have given, but for the order in which it adds.

With x̂ and ŵ for the rounded rows and â for what the product in bfloat16 gives,

    |x·w + b - â|  <=  ‖x - x̂‖ ‖w‖ + ‖x̂‖ ‖w - ŵ‖ + rounding of sums in float32 and of â

since x·w - x̂·ŵ = (x - x̂)·w + x̂·(w - ŵ) (Cauchy-Schwarz). The norms of what was rounded off are measured, not assumed.

Where the bound tells too little, so that too many would be computed again, the answer is None, and the product in float32 is to
be taken. That depends on nothing but the step's own numbers, so that a resumed run takes the same way.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from saehook.kernels.block_maxima import BLOCK, block_size
from saehook.kernels.scratch import Scratch, take
from saehook.kernels.selection import Selection
from saehook.kernels.sparse import pair_products

CANDIDATES_SHARE = 1 / 32
"""Share of the pairs up to which it is worth taking the product in bfloat16 and computing them again: well below that at which both
cost as much as the product in float32."""
MORE_CANDIDATES_SHARE = 1 / 16
"""Share of the pairs up to which computing them again costs less than the product in float32, once the other has been taken."""
SAMPLE = 16
"""One latent of so many is looked at first, to see whether the others are worth it."""
ENTRIES_AT_ONCE = 2**19
"""Numbers that are compared together: few enough to stay in a CPU's cache."""
WIDEST_SHARE = 1 / 8
"""Share of the latents that the candidates of one token may be, since all tokens are given as much room."""
ROUNDING = 1.05 * 2.0**-7
"""Relative error of a number that is rounded to bfloat16; twice what it is where a product is rounded once, as it should be."""
UNIT = 2.0**-24
"""The same of one that is rounded to float32, once."""

Found = tuple[Tensor, Selection]
"""Pre-activations [m], and their pairs."""


@cache
def is_fast() -> bool:
    """Whether this CPU has instructions that multiply bfloat16."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.11 and newer
    return torch.backends.mkldnn.is_available() and (known.get("avx512_bf16", False) or known.get("amx_bf16", False))


def largest_of_each_token(
    centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scratch: Scratch | None, *, descending: bool = False
) -> Found | None:
    """The k largest pre-activations of each of the inputs [n, d_in], as far as they are positive, ordered by latent. With
    `descending` by token, the largest first, and k of each: what is not positive is 0 there, of any latents, maybe twice."""
    n_tokens, d_sae = len(centred), len(b_enc)
    pairs = _Screen(centred, W_enc, scratch).candidates(b_enc, k)
    if pairs is None or len(pairs.tokens) == 0:
        return None
    order, offsets = pairs.by_token
    assert isinstance(order, Tensor), "they are ordered by latent"
    width = max(k, int(offsets.diff().max()))
    if width > max(k, WIDEST_SHARE * d_sae):
        return None
    values, tokens = _pre_acts(centred, W_enc, b_enc, pairs), pairs.tokens[order]
    padded = values.new_zeros(n_tokens, width)
    padded.view(-1)[tokens * width + torch.arange(len(tokens)) - offsets[tokens]] = values[order]
    largest, places = padded.topk(k, sorted=descending)
    kept = order[(offsets[:-1, None] + places).clamp(max=len(tokens) - 1)]
    if not descending:
        return _subset(values, pairs, kept[largest > 0])
    tokens = torch.arange(n_tokens).repeat_interleave(k)
    return largest.relu_().view(-1), Selection(tokens, pairs.latents[kept].view(-1), n_tokens, d_sae, order="token")


def largest_of_batch(centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scratch: Scratch | None) -> Found | None:
    """The n x k largest pre-activations of all inputs [n, d_in] together, as far as they are positive, ordered by latent."""
    if (pairs := _Screen(centred, W_enc, scratch).candidates(b_enc, k, of_each_token=False)) is None:
        return None
    values = _pre_acts(centred, W_enc, b_enc, pairs)
    largest, kept = values.topk(min(k * len(centred), len(values)), sorted=False)
    return _subset(values, pairs, kept[largest > 0])


def above(centred: Tensor, W_enc: Tensor, b_enc: Tensor, lower: Tensor, scratch: Scratch | None) -> Found | None:
    """The pre-activations of inputs [n, d_in] above `lower` [d_sae], ordered by latent."""
    if (pairs := _Screen(centred, W_enc, scratch).candidates(b_enc - lower)) is None:
        return None
    values = _pre_acts(centred, W_enc, b_enc, pairs)
    kept = (values > lower[pairs.latents]).nonzero().view(-1)
    return values[kept], pairs.subset(kept)


class _Screen:
    """Inputs and weights in bfloat16, and how far their products may be from those in full precision.

    Both have three columns more. Two hold the bias, in two parts. The third raises all pre-activations of a token, so far that
    those which may be above 0 are: bits are ordered as numbers are only where these are positive.
    """

    def __init__(self, centred: Tensor, W_enc: Tensor, scratch: Scratch | None) -> None:
        self.scratch = scratch
        rows = W_enc.detach().T
        self.width = rows.shape[1]
        like = torch.empty(0, dtype=torch.bfloat16)
        self.rows = take(scratch, "W_enc in bfloat16", (len(rows), self.width + 3), like)
        self.inputs = like.new_empty(len(centred), self.width + 3)
        norm, error = (x.max() for x in _narrow(rows, self.rows[:, : self.width]))
        norms, errors = _narrow(centred, self.inputs[:, : self.width])
        self.sums = 2 * (self.width + 5) * UNIT
        """Relative error of a sum in float32 with all products, and of another that it is compared with."""
        self.slack = 1.01 * (errors * norm + (norms + errors) * (error + self.sums * (norm + error)))
        """What the products of each token may be off by, [n]; a hundredth more, since norms are rounded, too."""

    def candidates(self, bias: Tensor, k: int = 0, *, of_each_token: bool = True) -> Selection | None:
        """All pairs whose pre-activation with this `bias` [d_sae] may be above 0 and, with `k`, among the k largest of its token
        or the n x k largest of all, ordered by latent; None where there are too many."""
        d_sae, n_tokens = len(bias), len(self.inputs)
        raised, slack = self._add(bias)
        if not slack.isfinite().all():
            return None
        pre_acts = take(self.scratch, "pre_acts in bfloat16", (d_sae, n_tokens), self.rows)
        found, done = torch.empty(0, dtype=torch.long), 0
        for end in dict.fromkeys([d_sae // (SAMPLE * BLOCK) * BLOCK or d_sae, d_sae]):
            torch.mm(self.rows[done:end], self.inputs.T, out=pre_acts[done:end])
            least = torch.zeros_like(slack)
            if k > 0:
                # The k-th largest maximum of some blocks is at most the k-th largest of all.
                at_least = _maxima(pre_acts[:end], block_size(d_sae, k)) * (1 - ROUNDING) - (raised + slack)
                here = k * end / d_sae
                if of_each_token:
                    least = at_least.T.topk(math.ceil(here), sorted=False).values.amin(1)
                else:
                    least = at_least.view(-1).topk(math.ceil(here * n_tokens), sorted=False).values.amin()
            bound = (least.clamp(min=0) + raised - slack) / (1 + ROUNDING)
            share = CANDIDATES_SHARE if end < d_sae else MORE_CANDIDATES_SHARE
            places = _not_below(pre_acts[:end], bound.expand_as(slack), int(share * end * n_tokens))
            if places is None:
                return None
            found, done = places, end
        return Selection(found % n_tokens, found // n_tokens, n_tokens, d_sae, order="latent")

    def _add(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the last columns. Returns by how much the pre-activations of each token are raised, and what they may then be off by
        beside their own rounding, both [n]."""
        coarse = bias.bfloat16()
        fine = (bias - coarse).bfloat16()
        left = (bias - coarse - fine).abs().max() + self.sums * bias.abs().max()
        raised = (1.1 * (self.slack + left)).bfloat16().to(bias.dtype)
        ones = torch.ones_like(raised)
        self.rows[:, self.width :] = torch.stack([coarse, fine, torch.ones_like(fine)], 1)
        self.inputs[:, self.width :] = torch.stack([ones, ones, raised], 1)
        return raised, self.slack + left + self.sums * raised


def _narrow(rows: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Norms [n] of `rows` [n, d] and of what is rounded off where they are written to `out` in bfloat16; each is so much larger
    that squares too small for float32 are in it."""
    norms, errors = rows.new_empty(len(rows)), rows.new_empty(len(rows))
    size = max(1, ENTRIES_AT_ONCE // rows.shape[1])
    for block in (slice(first, first + size) for first in range(0, len(rows), size)):
        part = rows[block]
        off = out[block].copy_(part).to(rows.dtype).sub_(part)
        torch.linalg.vector_norm(part, dim=1, out=norms[block])
        torch.linalg.vector_norm(off, dim=1, out=errors[block])
    smallest = math.sqrt(rows.shape[1] * torch.finfo(torch.float32).tiny)
    return norms + smallest, errors + smallest


def _maxima(pre_acts: Tensor, size: int) -> Tensor:
    """Of blocks of `size` latents of [latents, n] in bfloat16 the largest, where that is positive, else any; float32."""
    return pre_acts.view(torch.int16).view(-1, size, pre_acts.shape[1]).amax(1).view(torch.bfloat16).float()


def _not_below(pre_acts: Tensor, bound: Tensor, most: int) -> Tensor | None:
    """Where numbers [latents, n] in bfloat16 are not below the positive `bound` [n], as places in the flat tensor; None where that
    is at more than `most`."""
    n_tokens = pre_acts.shape[1]
    entries, below = pre_acts.view(torch.int16).numpy(), (bound.bfloat16().view(torch.int16) - 1).numpy()
    size = max(1, ENTRIES_AT_ONCE // n_tokens)
    found, above = [], np.empty((size, n_tokens), bool)
    for first in range(0, len(entries), size):
        part = entries[first : first + size]
        places = np.flatnonzero(np.greater(part, below, out=above[: len(part)]))
        most -= len(places)
        if most < 0:
            return None
        found.append(places + first * n_tokens)
    return torch.from_numpy(np.concatenate(found))


def _pre_acts(centred: Tensor, W_enc: Tensor, b_enc: Tensor, pairs: Selection) -> Tensor:
    """Of these pairs, [m], in float32."""
    rows = W_enc.detach().T.contiguous()
    return pair_products(centred, pairs.tokens, rows, pairs.latents).add_(b_enc[pairs.latents])


def _subset(values: Tensor, pairs: Selection, kept: Tensor) -> Found:
    """Those at the indices `kept`, in the order that all are in."""
    is_kept = torch.zeros(len(values), dtype=torch.bool)
    is_kept[kept] = True
    kept = is_kept.nonzero().view(-1)
    return values[kept], pairs.subset(kept)
