"""A step whose weights are read some latents at a time, since they may be in bfloat16 and are not to be there whole in the dtype of
the tokens, in which all arithmetic is: for SAEs of which a device can hold the weights, and little else.

The matrices are streamed `RowsParameter`s, whose gradients are never whole either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saehook.kernels.encoded import some_columns_product
from saehook.kernels.product import mm
from saehook.kernels.reference import Autoencoded, Rule
from saehook.kernels.row_sums import WEIGHTS_AT_ONCE, RowSums, is_streamed, row_blocks, sum_rows
from saehook.kernels.running import encode_block
from saehook.kernels.selection import Selection
from saehook.kernels.sparse import pair_products

ACTS_AT_ONCE = 2**24
"""Pre-activations in a block of `autoencode`, at most."""


def decode(values: Tensor, W_dec: Tensor, selection: Selection, *, frozen: bool = False) -> Tensor:
    """As `sparse.decode`; with `frozen` the matrix gets no gradient."""
    return _Decode.apply(values, W_dec, selection, frozen)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, selection: Selection, frozen: bool) -> Tensor:
        ctx.save_for_backward(values)
        ctx.W_dec, ctx.selection, ctx.frozen = W_dec, selection, frozen
        found = values.new_zeros(selection.n_tokens, W_dec.shape[1])
        for block, some, rows in _pairs_of_blocks(W_dec, selection, values):
            pairs = Selection(selection.tokens[some], selection.latents[some] - block.start, len(found), len(rows))
            order, offsets = pairs.by_token
            found += sum_rows(rows, pairs.latents[order], offsets, values[some][order])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (values,) = ctx.saved_tensors
        W_dec, selection, grad = ctx.W_dec, ctx.selection, grad.contiguous()
        d_values = torch.empty_like(values)
        for block, some, rows in _pairs_of_blocks(W_dec, selection, values):
            d_values[some] = pair_products(grad, selection.tokens[some], rows, selection.latents[some] - block.start)
        if not ctx.frozen:
            W_dec.pending.append(RowSums.of(grad, selection, values))
        return d_values, None, None, None


def _pairs_of_blocks(W: Tensor, selection: Selection, like: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of latents, the indices of their pairs, and their rows of `W` [d_sae, d]."""
    order, offsets = selection.by_latent
    every = torch.arange(len(selection.latents), device=like.device)[order]
    blocks = list(row_blocks(len(W), W.shape[1]))
    ends = offsets[torch.tensor([0, *(block.stop for block in blocks)], device=offsets.device)].tolist()
    for block, first, last in zip(blocks, ends, ends[1:], strict=False):
        if first < last:
            yield block, every[first:last], W.detach()[block].to(like.dtype)


# --- many latents fire ------------------------------------------------------------------------------------------------


def autoencode(
    centred: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_dec: Tensor,
    rule: Rule,
    per_latent: Sequence[Tensor],
) -> Autoencoded:
    """As `dense.autoencode`, with the pre-activations of each block made again in the backward pass instead of kept."""
    return Autoencoded(*_Again.apply(centred, W_enc, b_enc, b_dec, W_dec, rule, *per_latent))


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
        W_dec: Tensor,
        rule: Rule,
        *per_latent: Tensor,
    ) -> tuple[Tensor | None, ...]:
        step = _Step(centred, W_enc.detach(), b_enc.detach(), W_dec.detach(), rule, [p.detach() for p in per_latent])
        ctx.step, ctx.matrices = step, (W_enc, W_dec)
        decoded, total_cost = centred.new_zeros(len(centred), W_dec.shape[1]), centred.new_zeros(())
        fired = torch.zeros(len(b_enc), device=centred.device)
        total_frozen = None
        for block in step.blocks():
            acts, cost, frozen = rule(step.pre_acts(block), *(p[block, None] for p in step.per_latent))
            rows = W_dec[block].to(centred.dtype)
            decoded += mm(acts.T, rows)
            total_cost += cost.sum()
            fired[block] = (acts > 0).sum(1, dtype=torch.float32)
            if frozen is not None:
                total_frozen = torch.zeros_like(decoded) if total_frozen is None else total_frozen
                total_frozen += mm(frozen.T, rows)
        ctx.mark_non_differentiable(fired)
        return decoded, total_cost, fired, total_frozen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        step, (W_enc, W_dec) = ctx.step, ctx.matrices
        step.d_decoded, step.d_cost, _, step.d_frozen = grads
        whole = not is_streamed(W_enc)
        d_W_enc = torch.empty_like(W_enc.T, memory_format=torch.contiguous_format) if whole else None
        d_W_dec = torch.empty_like(W_dec) if whole else None
        d_b_enc = torch.empty_like(step.b_enc)
        d_per_latent = [torch.empty_like(p) for p in step.per_latent]
        for block in step.blocks():
            found = step.gradients(block)
            if d_W_enc is not None and d_W_dec is not None:
                d_W_enc[block], d_W_dec[block] = found.W_enc, found.W_dec
            d_b_enc[block] = found.b_enc
            for all_of_them, part in zip(d_per_latent, found.per_latent, strict=True):
                all_of_them[block] = part
        if not whole:
            W_enc.pending.append(_Part(step, "W_enc"))
            W_dec.pending.append(_Part(step, "W_dec"))
        d_b_dec = -some_columns_product(step.W_enc, d_b_enc)
        return None, None if d_W_enc is None else d_W_enc.T, d_b_enc, d_b_dec, d_W_dec, None, *d_per_latent


class _Gradients(NamedTuple):
    """Of some latents."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    per_latent: list[Tensor]


class _Step:
    """What the gradients of any block of latents can be made from."""

    def __init__(
        self, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, rule: Rule, per_latent: list[Tensor]
    ) -> None:
        self.centred, self.W_enc, self.b_enc, self.W_dec = centred, W_enc, b_enc, W_dec
        self.rule, self.per_latent = rule, per_latent
        self.d_decoded: Tensor | None = None
        self.d_cost: Tensor | None = None
        self.d_frozen: Tensor | None = None
        self._last: tuple[slice, _Gradients] | None = None

    def blocks(self) -> Iterator[slice]:
        d_sae, n = len(self.b_enc), max(1, len(self.centred))
        size = max(1, min(WEIGHTS_AT_ONCE // max(1, self.W_dec.shape[1]), ACTS_AT_ONCE // n))
        return (slice(first, min(first + size, d_sae)) for first in range(0, d_sae, size))

    def pre_acts(self, block: slice) -> Tensor:
        """[latents, n]."""
        return encode_block(self.centred, self.W_enc, self.b_enc, block).T.to(self.centred.dtype)

    def gradients(self, block: slice) -> _Gradients:
        """Of one block; the last is remembered, since both matrices ask for it."""
        if self._last is not None and self._last[0] == block:
            return self._last[1]
        assert self.d_decoded is not None
        rows = self.W_dec[block].to(self.centred.dtype)
        with torch.enable_grad():
            pre = self.pre_acts(block).detach().requires_grad_()
            numbers = [p[block].detach().requires_grad_() for p in self.per_latent]
            acts, cost, frozen = self.rule(pre, *(p[:, None] for p in numbers))
            outputs = [acts, cost.sum()] + ([] if frozen is None else [frozen])
        d_outputs = [mm(rows, self.d_decoded.T), self.d_cost]
        if frozen is not None:
            assert self.d_frozen is not None
            d_outputs.append(mm(rows, self.d_frozen.T))
        d_pre, *d_numbers = torch.autograd.grad(outputs, [pre, *numbers], d_outputs)
        found = _Gradients(mm(d_pre, self.centred), mm(acts.detach(), self.d_decoded), d_pre.sum(1), d_numbers)
        self._last = block, found
        return found


class _Part(NamedTuple):
    """The gradient of one of both matrices, made again."""

    step: _Step
    name: str

    def add_to(self, rows: Tensor, latents: slice) -> None:
        for block in self.step.blocks():
            first, last = max(block.start, latents.start), min(block.stop, latents.stop)
            if first < last:
                found = getattr(self.step.gradients(block), self.name)
                rows[first - latents.start : last - latents.start] += found[first - block.start : last - block.start]

    def along(self, latents: slice) -> None:
        return None  # not known for less than a product of the rows

    def bound(self) -> Tensor:
        return torch.tensor(torch.inf, dtype=torch.float64)  # not known for less than the rows cost
