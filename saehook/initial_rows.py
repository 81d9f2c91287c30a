"""Random unit rows that an SAE begins with: any part of them can be made alone, so no device needs the whole.

The numbers are those of one draw of the whole matrix. Where there are so many latents that drawing those of others would take
minutes, each block of them has a generator of its own, whose seed follows from the run's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 2**12
"""Rows drawn together. A multiple of 16: `randn` draws 16 numbers at a time, so that blocks give the numbers of the whole."""
SEEDED_FROM = 2**18
"""d_sae from which each block has a seed of its own."""


def unit_rows(
    d_sae: int, width: int, generator: torch.Generator, rows: slice | Sequence[slice] | None = None
) -> Tensor:
    """The `rows` (None: all; several parts in ascending order) of a random [d_sae, width] with rows of length 1, float32, CPU.
    `generator` is advanced by all of them, whichever are asked for."""
    some = [slice(0, d_sae)] if rows is None else [rows] if isinstance(rows, slice) else list(rows)
    parts = [
        F.normalize(drawn, dim=-1)[max(0, part.start - start) : max(0, part.stop - start)]
        for start, drawn in _blocks(d_sae, width, generator, some)
        for part in some
        if start < part.stop and part.start < start + len(drawn)
    ]
    return torch.cat([torch.empty(0, width), *parts])


def _blocks(
    d_sae: int, width: int, generator: torch.Generator, wanted: Sequence[slice]
) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows [n, width] from a normal distribution, with the number of their first row."""
    starts = list(range(0, d_sae, ROWS_AT_ONCE))
    if len(starts) > 1 and (d_sae - starts[-1]) * width < 16:
        starts.pop()  # fewer than 16 numbers would be drawn in another way than at the end of the whole
    if d_sae < SEEDED_FROM:
        for start, end in zip(starts, [*starts[1:], d_sae], strict=True):
            yield start, torch.randn(end - start, width, generator=generator)
        return
    seed = int(torch.randint(2**62, (), generator=generator))
    for start, end in zip(starts, [*starts[1:], d_sae], strict=True):
        if any(start < part.stop and part.start < end for part in wanted):
            own = torch.Generator().manual_seed((seed + start) % 2**63)
            yield start, torch.randn(end - start, width, generator=own)


def indices(rows: Sequence[slice]) -> Tensor:
    """Numbers of the rows in those parts, [n] int64."""
    return torch.cat([torch.arange(part.start, part.stop) for part in rows])
