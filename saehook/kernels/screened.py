"""Which pairs a step keeps, on CPUs that multiply bfloat16 much faster than float32: without the encoder's product in float32.

The product of inputs and weights rounded to bfloat16 tells each pre-activation up to a bound. Only those which may, by this
bound, be among the kept are computed in float32, and the kept are chosen from these numbers. So both are what the product in
float32 would have given, but for the order in which it adds.

With x̂ and ŵ for the rounded rows and â for what the product in bfloat16 gives,

    |x·w + b - â|  <=  ‖x - x̂‖ ‖w‖ + ‖x̂‖ ‖w - ŵ‖ + rounding in float32 + rounding of b and of â

since x·w - x̂·ŵ = (x - x̂)·w + x̂·(w - ŵ) (Cauchy-Schwarz). The norms of what was rounded off are measured, not assumed.

Where the bound tells too little, so that too many would be computed again, the answer is None, and the product in float32 is to
be taken. That depends on nothing but the step's own numbers, so that a resumed run takes the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from saehook.kernels.block_maxima import BLOCK, block_size
from saehook.kernels.scratch import Scratch, take
from saehook.kernels.selection import Selection
from saehook.kernels.sparse import pair_products

CANDIDATES_SHARE = 1 / 32
"""Share of the pairs up to which computing them again costs less than the product in bfloat16 saves (measured at 768 -> 16384:
both are equal at 1 / 20)."""
SAMPLE = 16
"""One latent of so many is looked at first, to see whether the others are worth it."""
ENTRIES_AT_ONCE = 2**19
"""Numbers that are compared together: few enough to stay in a CPU's cache."""
ROUNDING = 1.05 * 2.0**-7
"""Relative error of a number that is rounded to bfloat16 twice: as a product, and with the bias added."""
UNIT = 2.0**-24
"""The same of one that is rounded to float32 once."""
FLUSHED = 1e-30
"""More than products of numbers that are too small for bfloat16 amount to."""

Found = tuple[Tensor, Selection]
"""Pre-activations [m], and their pairs."""
Least = Callable[[Tensor, Tensor], Tensor]
"""From the pre-activations of the first latents in bfloat16 [some, n], and how far each token's may be from those in float32
[n]: what the least that is kept of each token is at least, [n], as far as these latents tell."""


@cache
def is_fast() -> bool:
    """Whether this CPU has instructions that multiply bfloat16."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.11 and newer
    return torch.backends.mkldnn.is_available() and (known.get("avx512_bf16", False) or known.get("amx_bf16", False))


def largest_of_each_token(
    centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scratch: Scratch | None, *, descending: bool = False
) -> Found | None:
    """The k largest pre-activations of each of the inputs [n, d_in], as far as they are positive, ordered by latent. With
    `descending` by token, the largest first, and k of each: any pairs with the number 0 stand for what is not positive."""
    n_tokens, d_sae = len(centred), len(b_enc)

    def least(pre_acts: Tensor, slack: Tensor) -> Tensor:
        some = math.ceil(k * len(pre_acts) / d_sae)
        kth = _maxima(pre_acts, d_sae, k).T.float().topk(some, sorted=False).values.amin(1)
        return kth * (1 - ROUNDING) - slack

    pairs = _Screen(centred, W_enc, scratch).candidates(b_enc, least)
    if pairs is None or len(pairs.tokens) == 0:
        return None
    order, offsets = pairs.by_token
    width = max(k, int(offsets.diff().max()))
    values, tokens = _pre_acts(centred, W_enc, b_enc, pairs), pairs.tokens[order]
    padded = values.new_zeros(n_tokens, width)
    padded.view(-1)[tokens * width + torch.arange(len(tokens)) - offsets[tokens]] = values[order]
    largest, places = padded.topk(k, sorted=descending)
    kept = torch.arange(len(tokens))[order][(offsets[:-1, None] + places).clamp(max=len(tokens) - 1)]
    if not descending:
        return _subset(values, pairs, kept[largest > 0])
    tokens = torch.arange(n_tokens).repeat_interleave(k)
    return largest.relu_().view(-1), Selection(tokens, pairs.latents[kept].view(-1), n_tokens, d_sae, order="token")


def largest_of_batch(centred: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scratch: Scratch | None) -> Found | None:
    """The n x k largest pre-activations of all inputs [n, d_in] together, as far as they are positive, ordered by latent."""
    d_sae, number = len(b_enc), k * len(centred)

    def least(pre_acts: Tensor, slack: Tensor) -> Tensor:
        some = math.ceil(number * len(pre_acts) / d_sae)
        at_least = _maxima(pre_acts, d_sae, k).float().mul_(1 - ROUNDING).sub_(slack)
        return at_least.view(-1).topk(some, sorted=False).values.amin().expand_as(slack)

    if (pairs := _Screen(centred, W_enc, scratch).candidates(b_enc, least)) is None:
        return None
    values = _pre_acts(centred, W_enc, b_enc, pairs)
    largest, kept = values.topk(min(number, len(values)), sorted=False)
    return _subset(values, pairs, kept[largest > 0])


def above(centred: Tensor, W_enc: Tensor, b_enc: Tensor, lower: Tensor, scratch: Scratch | None) -> Found | None:
    """The pre-activations of inputs [n, d_in] above `lower` [d_sae], ordered by latent."""
    if (pairs := _Screen(centred, W_enc, scratch).candidates(b_enc - lower)) is None:
        return None
    values = _pre_acts(centred, W_enc, b_enc, pairs)
    kept = (values > lower[pairs.latents]).nonzero().view(-1)
    return values[kept], pairs.subset(kept)


class _Screen:
    """Inputs and weights in bfloat16, and how far their products may be from those in float32."""

    def __init__(self, centred: Tensor, W_enc: Tensor, scratch: Scratch | None) -> None:
        self.scratch = scratch
        rows = W_enc.detach().T
        like = torch.empty(0, dtype=torch.bfloat16)
        self.rows = take(scratch, "W_enc in bfloat16", tuple(rows.shape), like)
        self.inputs = torch.empty_like(centred, dtype=torch.bfloat16)
        norm, error = (x.max() for x in _narrow(rows, self.rows))
        norms, errors = _narrow(centred, self.inputs)
        sums = 2 * (rows.shape[1] + 2) * UNIT * (norm + error)
        self.slack = 1.01 * (errors * norm + (norms + errors) * (error + sums)) + FLUSHED
        """For each token, [n], without what the bias adds; a hundredth more, since norms are rounded, too."""

    def candidates(self, bias: Tensor, least: Least | None = None) -> Selection | None:
        """All pairs whose pre-activation with this `bias` [d_sae] may be above 0, and as large as the `least` that is kept,
        ordered by latent; None where there are too many."""
        d_sae, n_tokens = len(bias), len(self.inputs)
        # Bits are ordered as numbers are only where these are positive: all are raised so far that the bounds are.
        raised = 1.1 * (self.slack.max() + 2 * ROUNDING * bias.abs().max())
        raised_bias = bias + raised
        narrow_bias = raised_bias.bfloat16()
        slack = self.slack + (raised_bias - narrow_bias).abs().max() + ROUNDING * raised_bias.abs().max()
        if not slack.isfinite().all():
            return None
        pre_acts = take(self.scratch, "pre_acts in bfloat16", (d_sae, n_tokens), narrow_bias)
        positions = torch.empty(0, dtype=torch.long)
        done = 0
        for end in dict.fromkeys([d_sae // (SAMPLE * BLOCK) * BLOCK or d_sae, d_sae]):
            some = slice(done, end)
            torch.addmm(narrow_bias[some, None], self.rows[some], self.inputs.T, out=pre_acts[some])
            bound = raised if least is None else torch.maximum(least(pre_acts[:end], slack), raised)
            positions = _not_below(pre_acts[:end], (bound - slack) / (1 + ROUNDING))
            if len(positions) > CANDIDATES_SHARE * end * n_tokens:
                return None
            done = end
        return Selection(positions % n_tokens, positions // n_tokens, n_tokens, d_sae, order="latent")


def _narrow(rows: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Norms [n] of `rows` [n, d] and of what is rounded off where they are written to `out` in bfloat16."""
    norms, errors = rows.new_empty(len(rows)), rows.new_empty(len(rows))
    size = max(1, ENTRIES_AT_ONCE // rows.shape[1])
    for block in (slice(first, first + size) for first in range(0, len(rows), size)):
        part = rows[block]
        off = out[block].copy_(part).to(rows.dtype).sub_(part)
        torch.linalg.vector_norm(part, dim=1, out=norms[block])
        torch.linalg.vector_norm(off, dim=1, out=errors[block])
    return norms, errors


def _maxima(pre_acts: Tensor, d_sae: int, k: int) -> Tensor:
    """The largest of blocks of latents, [blocks, n]; of `pre_acts` in bfloat16 [some, n], whose bits are ordered as numbers are,
    where they are positive. The k-th largest of them is at most the k-th largest of all."""
    return pre_acts.view(torch.int16).view(-1, block_size(d_sae, k), pre_acts.shape[1]).amax(1).view(torch.bfloat16)


def _not_below(pre_acts: Tensor, bound: Tensor) -> Tensor:
    """Where numbers [latents, n] in bfloat16 are not below the positive `bound` [n], as places in the flat tensor."""
    n_tokens = pre_acts.shape[1]
    entries, below = pre_acts.view(torch.int16).numpy(), (bound.bfloat16().view(torch.int16) - 1).numpy()
    size = max(1, ENTRIES_AT_ONCE // n_tokens)
    found, above = [], np.empty((size, n_tokens), bool)
    for first in range(0, len(entries), size):
        part = entries[first : first + size]
        found.append(np.flatnonzero(np.greater(part, below, out=above[: len(part)])) + first * n_tokens)
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
