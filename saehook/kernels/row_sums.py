"""Gradients of matrices with a row for each latent that need not be there whole: what a backward pass finds out is left as lists of
pairs, from which an optimiser makes some rows when it comes to them (`row_adam`). Where most latents fire, and so every row is a
product anyway, a matrix that is not `streamed` has an ordinary gradient instead.

A whole gradient would be written to memory and read again, once for its norm and once for Adam; its rows, where they are used at
once, stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saehook.kernels.product import mm
from saehook.kernels.selection import Selection

WEIGHTS_AT_ONCE = 2**22
"""Numbers of a matrix that are treated together: 16 MiB in float32. With fewer, starting the operations costs more than memory
saves."""


class RowsParameter(nn.Parameter):
    """A matrix with a row or, as W_enc, a column for each latent, whose gradient is `grad`, if any, and all that is `pending`."""

    pending: list[RowGradient]
    streamed: bool
    """Whether it is read some latents at a time only, in the dtype of the tokens, and no gradient may be whole."""

    @classmethod
    def of(cls, matrix: Tensor, *, streamed: bool) -> RowsParameter:
        """On the memory of `matrix`, with no gradient yet."""
        made = cls(matrix.detach())  # pyright: ignore[reportCallIssue]
        made.pending = []
        made.streamed = streamed
        return made


def is_streamed(matrix: Tensor) -> bool:
    """Whether it is a `RowsParameter` to be read some latents at a time."""
    return isinstance(matrix, RowsParameter) and matrix.streamed


class RowGradient(Protocol):
    """A part of the gradient of a matrix with a row for each latent."""

    def add_to(self, rows: Tensor, latents: slice) -> None:
        """Add the rows of some latents to `rows` [latents, d]."""
        ...

    def along(self, latents: slice) -> Tensor | None:
        """The products of these rows with those of the matrix whose gradient this is, [latents], where they are known."""
        ...

    def bound(self) -> Tensor:
        """At least the norm of all rows together, a scalar in float64."""
        ...


class RowSums(NamedTuple):
    """Row i: Σ weight · source[token] over the pairs of latent i."""

    source: Tensor
    """[n_tokens, d]."""
    tokens: Tensor
    """[m], of the pairs in the order of their latents."""
    weights: Tensor
    """[m]."""
    offsets: Tensor
    """Where each latent's pairs begin, [latents + 1], on the host."""
    products: Tensor | None = None
    """Of each row with that of the matrix whose gradient this is, [latents], where they are known."""

    @classmethod
    def of(cls, source: Tensor, selection: Selection, weights: Tensor) -> RowSums:
        """`weights` [m] of the pairs in the order of the selection."""
        order, offsets = selection.by_latent
        return cls(source, selection.tokens[order], weights[order], offsets.cpu())

    def rows(self, latents: slice) -> Tensor:
        """Those of some latents, [latents, d]."""
        first, last = int(self.offsets[latents.start]), int(self.offsets[latents.stop])
        starts = (self.offsets[latents.start : latents.stop + 1] - first).to(self.source.device)
        return sum_rows(self.source, self.tokens[first:last], starts, self.weights[first:last])

    def add_to(self, rows: Tensor, latents: slice) -> None:
        """Add those of some latents to `rows` [latents, d]."""
        if self.offsets[latents.start] < self.offsets[latents.stop]:
            rows += self.rows(latents)

    def along(self, latents: slice) -> Tensor | None:
        return None if self.products is None else self.products[latents]

    def bound(self) -> Tensor:
        """At least the norm of all rows together, float64: (Σ of n vectors)² <= n · Σ of their squares."""
        lengths = torch.linalg.vector_norm(self.source, dim=1)[self.tokens] * self.weights
        number = self.offsets.diff().to(lengths.device)
        return (lengths.square() * number.repeat_interleave(number)).sum(dtype=torch.float64).sqrt()


class SomeRows(NamedTuple):
    """Rows of some latents; those of all others are zeros."""

    latents: Tensor
    """[some], ascending, on the host."""
    values: Tensor
    """[some, d]."""
    products: Tensor | None = None
    """Of each of these rows with that of the matrix whose gradient this is, [some], where they are known."""

    def add_to(self, rows: Tensor, latents: slice) -> None:
        """Add those of some latents to `rows` [latents, d]."""
        places, some = self._of(latents)
        rows.index_add_(0, places, self.values[some])

    def along(self, latents: slice) -> Tensor | None:
        if self.products is None:
            return None
        places, some = self._of(latents)
        return self.products.new_zeros(latents.stop - latents.start).index_copy_(0, places, self.products[some])

    def _of(self, latents: slice) -> tuple[Tensor, slice]:
        """Which of `latents` are among these, and which of these they are."""
        first, last = torch.searchsorted(self.latents, torch.tensor([latents.start, latents.stop])).tolist()
        return self.latents[first:last] - latents.start, slice(first, last)

    def bound(self) -> Tensor:
        """The norm of all rows together, float64."""
        return torch.linalg.vector_norm(self.values).double()


def sum_rows(matrix: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Row i: Σ weights[j] · matrix[indices[j]] over offsets[i] <= j < offsets[i + 1]."""
    return F.embedding_bag(indices, matrix, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def row_blocks(d_sae: int, width: int) -> Iterator[slice]:
    """Latents whose rows are there together."""
    size = max(1, WEIGHTS_AT_ONCE // max(1, width))
    return (slice(first, min(first + size, d_sae)) for first in range(0, d_sae, size))


def gradient_rows(matrix: RowsParameter, latents: slice, *, columns: bool) -> tuple[Tensor, Tensor | None]:
    """Some rows of the gradient [latents, d], which the caller may change, and what is known of their products with the rows of the
    matrix, [latents]. `columns`: of W_enc, which has a column for each latent."""
    sums = [part for part in matrix.pending if isinstance(part, RowSums)]
    others = [part for part in matrix.pending if not isinstance(part, RowSums)]
    along = [part.along(latents) for part in matrix.pending]
    if matrix.grad is not None:
        rows = (matrix.grad.T if columns else matrix.grad)[latents].clone()
    elif sums:
        rows = sums.pop(0).rows(latents)
    else:
        width = matrix.shape[0] if columns else matrix.shape[1]
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        rows = torch.zeros(latents.stop - latents.start, width, device=matrix.device, dtype=dtype)
    for part in (*sums, *others):
        part.add_to(rows, latents)
    known = [each for each in along if each is not None]
    all_known = matrix.grad is None and len(known) == len(along) > 0
    return rows, torch.stack(known).sum(0) if all_known else None


def gradient_bound(matrix: RowsParameter) -> Tensor:
    """At least the norm of the whole gradient, a scalar in float64, for much less than its rows cost."""
    whole = matrix.new_zeros((), dtype=torch.float64)
    if matrix.grad is not None:
        whole = torch.linalg.vector_norm(matrix.grad).double()
    return torch.stack([whole, *(part.bound() for part in matrix.pending)]).sum()


def add_product(
    parameter: Tensor,
    latents: Tensor,
    by_latent: Tensor,
    source: Tensor,
    *,
    columns: bool = False,
    along: Tensor | None = None,
) -> None:
    """Add `by_latent` [some, n] @ `source` [n, d] to the gradient of the rows `latents` [some], ascending, of a matrix with a row
    for each latent; `columns`: of W_enc, which has columns. `along` [some]: the products of what is added with the rows, where
    they are known."""
    if isinstance(parameter, RowsParameter) and parameter.streamed:
        places, tokens = by_latent.nonzero(as_tuple=True)
        pairs = Selection(tokens, latents[places], len(source), parameter.shape[columns], order="latent")
        parameter.pending.append(RowSums.of(source, pairs, by_latent[places, tokens]))
    elif parameter.grad is not None:
        grad = parameter.grad.T if columns else parameter.grad
        grad.index_add_(0, latents, mm(by_latent, source))
    else:
        assert isinstance(parameter, RowsParameter), "a gradient"
        last = parameter.pending[-1] if parameter.pending else None
        if isinstance(last, SomeRows) and last.latents is latents:
            last.values.addmm_(by_latent, source)
            if last.products is not None:
                assert along is not None, "known of the first tokens, so of these"
                last.products.add_(along)
        else:
            parameter.pending.append(SomeRows(latents, mm(by_latent, source), along))
