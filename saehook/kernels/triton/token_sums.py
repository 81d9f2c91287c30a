"""Decoding: of each token the sum of the rows of its latents, times their activations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saehook.kernels.selection import Selection
from saehook.kernels.triton.tiles import LAUNCH, columns_at_once, constexpr, on, parts, rows_at_once, sum_dtype


def token_sums(values: Tensor, rows: Tensor, selection: Selection) -> Tensor:
    """Σ values · rows[latent] over each token's pairs, [n_tokens, width], in the dtype of `values` [m]; `rows` is
    [d_sae, width]. A token without pairs gets zeros."""
    rows, width = rows.contiguous(), rows.shape[1]
    order, starts = selection.by_token
    ordered = not isinstance(order, slice)
    out = torch.empty(selection.n_tokens, width, dtype=values.dtype, device=values.device)
    columns = columns_at_once(width)
    with on(out):
        _token_sums[(selection.n_tokens, parts(width, columns))](
            out,
            rows,
            values.contiguous(),
            selection.latents,
            order if ordered else starts,
            starts,
            width,
            ORDERED=ordered,
            COLUMNS=columns,
            ROWS=rows_at_once(columns),
            SUM=sum_dtype(values, rows),
            **LAUNCH,
        )
    return out


@triton.jit
def _token_sums(
    out,
    rows,
    values,
    latents,
    order,
    starts,
    width,
    ORDERED: constexpr,
    COLUMNS: constexpr,
    ROWS: constexpr,
    SUM: constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    begin = tl.load(starts + token)
    end = tl.load(starts + token + 1)
    total = tl.zeros([ROWS, COLUMNS], SUM)
    for first in range(begin, end, ROWS):
        pair = first + tl.arange(0, ROWS)
        here = pair < end
        if ORDERED:
            pair = tl.load(order + pair, mask=here, other=0)
        latent = tl.load(latents + pair, mask=here, other=0)
        value = tl.load(values + pair, mask=here, other=0.0).to(SUM)
        place = rows + latent[:, None] * width + column[None, :]
        total += value[:, None] * tl.load(place, mask=here[:, None] & inside[None, :], other=0.0).to(SUM)
    tl.store(out + token * width + column, tl.sum(total, 0), mask=inside)
