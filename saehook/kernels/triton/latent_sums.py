"""The backward pass: of each latent the sum of rows of its tokens, written once, without atomics, in one order.

A latent that fires on many tokens is cut into segments of `Selection.SEGMENT` pairs, so that no program has more than its
share. The first segment of a latent writes its row; the others write rows of a small buffer, which a second kernel adds.
The number of segments is bounded by the sizes, so nothing is read on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saehook.kernels.selection import SEGMENT, Selection
from saehook.kernels.triton.tiles import LAUNCH, columns_at_once, constexpr, on, parts, rows_at_once, sum_dtype


class LatentSums(NamedTuple):
    """Sums over the pairs of each latent."""

    weights: Tensor
    """Σ weights, [d_sae]."""
    dots: Tensor | None
    """⟨row of the pair's token, row of `against` of its latent⟩ of each pair, [m], in the order of the selection."""


def latent_sums(
    weights: Tensor, rows: Tensor, selection: Selection, out: Tensor | None, against: Tensor | None = None
) -> LatentSums:
    """out[latent] = Σ weights · rows[token] over each latent's pairs; `weights` [m], `rows` [n_tokens, width].

    `out` [d_sae, width], contiguous, is written whole; without it the rows are not summed. With `against` [d_sae, width]
    the dot products come back, too, from the same reading of `rows`.
    """
    rows, weights = rows.contiguous(), weights.contiguous()
    width, n_pairs, device = rows.shape[1], weights.numel(), weights.device
    order, starts = selection.by_latent
    segment_latents, segment_ends, spare_latents = selection.segments
    ordered = not isinstance(order, slice)
    columns = columns_at_once(width)
    tiles = parts(width, columns)
    n_spare = len(spare_latents)
    total = torch.empty(selection.d_sae, dtype=weights.dtype, device=device)
    spare_total = torch.empty(n_spare, dtype=weights.dtype, device=device)
    spare = torch.empty(n_spare, width, dtype=torch.promote_types(weights.dtype, torch.float32), device=device)
    spare = spare if out is not None else spare[:0]
    dots = weights.new_empty(tiles if against is not None else 0, n_pairs)
    sizes = {"SEGMENT": SEGMENT, "COLUMNS": columns, "SUM": sum_dtype(weights, rows), **LAUNCH}
    with on(total):
        _segments[(len(segment_latents), tiles)](
            total if out is None else out,
            spare,
            total,
            spare_total,
            dots,
            rows,
            weights,
            rows if against is None else against.contiguous(),
            selection.tokens,
            order if ordered else starts,
            starts,
            segment_latents,
            segment_ends,
            width,
            selection.d_sae,
            n_pairs,
            ORDERED=ordered,
            SUMMED=out is not None,
            DOTS=against is not None,
            ROWS=rows_at_once(columns),
            **sizes,
        )
    if n_spare:
        with on(total):
            _add_spare[(n_spare, tiles)](
                total if out is None else out,
                spare,
                total,
                spare_total,
                segment_ends,
                spare_latents,
                width,
                selection.d_sae,
                SUMMED=out is not None,
                **sizes,
            )
    return LatentSums(total, None if against is None else dots[0] if tiles == 1 else dots.sum(0))


@triton.jit
def _segments(
    out,
    spare,
    total,
    spare_total,
    dots,
    rows,
    weights,
    against,
    tokens,
    order,
    starts,
    segment_latents,
    segment_ends,
    width,
    d_sae,
    n_pairs,
    ORDERED: constexpr,
    SUMMED: constexpr,
    DOTS: constexpr,
    SEGMENT: constexpr,
    COLUMNS: constexpr,
    ROWS: constexpr,
    SUM: constexpr,
):
    """One segment of a latent: its sum goes to the latent's row, or to a spare row where it is not the first."""
    segment = tl.program_id(0).to(tl.int64)
    latent = tl.load(segment_latents + segment)
    if latent < d_sae:  # there are fewer segments than there is room for
        number = segment - tl.load(segment_ends + latent - 1, mask=latent > 0, other=0)
        begin = tl.load(starts + latent) + number * SEGMENT
        end = tl.minimum(begin + SEGMENT, tl.load(starts + latent + 1))
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        direction = tl.zeros([COLUMNS], SUM)
        if DOTS:
            direction = tl.load(against + latent * width + column, mask=inside, other=0.0).to(SUM)
        row_sum = tl.zeros([ROWS, COLUMNS], SUM)
        weight_sum = tl.zeros([ROWS], SUM)
        for first in range(begin, end, ROWS):
            pair = first + tl.arange(0, ROWS)
            here = pair < end
            if ORDERED:
                pair = tl.load(order + pair, mask=here, other=0)
            token = tl.load(tokens + pair, mask=here, other=0)
            weight = tl.load(weights + pair, mask=here, other=0.0).to(SUM)
            place = rows + token[:, None] * width + column[None, :]
            row = tl.load(place, mask=here[:, None] & inside[None, :], other=0.0).to(SUM)
            weight_sum += weight
            if SUMMED:
                row_sum += weight[:, None] * row
            if DOTS:
                place = dots + tl.program_id(1).to(tl.int64) * n_pairs + pair
                tl.store(place, tl.sum(row * direction[None, :], 1), mask=here)
        target = tl.where(number == 0, latent, segment - latent - 1)
        row_target = target * width + column
        if number == 0:
            if SUMMED:
                tl.store(out + row_target, tl.sum(row_sum, 0), mask=inside)
            if tl.program_id(1) == 0:
                tl.store(total + target, tl.sum(weight_sum, 0))
        else:
            if SUMMED:
                tl.store(spare + row_target, tl.sum(row_sum, 0), mask=inside)
            if tl.program_id(1) == 0:
                tl.store(spare_total + target, tl.sum(weight_sum, 0))


@triton.jit
def _add_spare(
    out,
    spare,
    total,
    spare_total,
    segment_ends,
    spare_latents,
    width,
    d_sae,
    SUMMED: constexpr,
    SEGMENT: constexpr,
    COLUMNS: constexpr,
    SUM: constexpr,
):
    """The program at the first spare row of a latent adds all of its spare rows, in their order."""
    first = tl.program_id(0).to(tl.int64)
    latent = tl.load(spare_latents + first)
    if latent < d_sae:
        begin = tl.load(segment_ends + latent - 1, mask=latent > 0, other=0) - latent
        end = tl.load(segment_ends + latent) - latent - 1
        if first == begin:
            column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            inside = column < width
            if SUMMED:
                place = out + latent * width + column
                row_sum = tl.load(place, mask=inside, other=0.0).to(SUM)
                for row in range(begin, end):
                    row_sum += tl.load(spare + row * width + column, mask=inside, other=0.0).to(SUM)
                tl.store(place, row_sum, mask=inside)
            if tl.program_id(1) == 0:
                weight_sum = tl.load(total + latent).to(SUM)
                for row in range(begin, end):
                    weight_sum += tl.load(spare_total + row).to(SUM)
                tl.store(total + latent, weight_sum)
