"""Numbers kept in fewer bits, rounded up or down at random so that on average nothing is lost: bfloat16, and 8-bit codes.

A weight in bfloat16 has 8 significant bits: steps of less than 1/512 of it would all be lost if it were rounded to the nearest.
Rounded stochastically (Gupta et al. 2015) it moves by one unit as often as the step's size says. The random bits follow from
seed, step and place of a number in its matrix alone: they are the same on any layout of the devices.

A code of 8 bits holds the fourth root of a number as a share of the largest of its block, with a sign where there are any: at
the top numbers lie 1.6 % apart (3 % with signs), and the smallest is 2e-10 (4e-9) of the largest. Its blocks are parts of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Neighbours in a row that share a largest number."""
BITS = 62
"""Random bits of a number; of these a weight takes the lowest 16, and a moment 23."""
_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47)  # the odd constants of splitmix64


def random_bits(seed: int, step: Tensor, rows: Tensor, width: int) -> Tensor:
    """Numbers of `BITS` random bits, [len(rows), width] int64, of the rows `rows` [n] in step `step` (0-dim int64)."""
    columns = torch.arange(width, device=rows.device)
    row = _mixed(_mixed(rows.long() + seed % 2**62) ^ (step.long() * _MIX[0]))
    column = _mixed(columns * _MIX[1] + 1)
    return _mixed(row[:, None] + column).bitwise_and_(2**BITS - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ (x >> 30)) * _MIX[1]
    x = (x ^ (x >> 27)) * _MIX[0]
    return x ^ (x >> 31)


def to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 [...] as bfloat16: one of both neighbours, the nearer one more often. By the lowest 16 of the random `bits`."""
    raised = x.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    rounded = (raised & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


class Codes(NamedTuple):
    """A matrix in 8 bits a number."""

    codes: Tensor
    """[rows, d] uint8."""
    largest: Tensor
    """Of each block of a row, [rows, blocks] float32."""

    @classmethod
    def zeros(cls, rows: int, width: int, device: torch.device, *, signed: bool) -> Codes:
        """That many zeros."""
        codes = torch.full((rows, width), 128 if signed else 0, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(rows, -(-width // BLOCK), device=device))


def encode(x: Tensor, bits: Tensor, *, signed: bool) -> Codes:
    """`x` [rows, d] float32 in 8 bits a number; without `signed` it is at least 0. By the lowest 23 of the random `bits`."""
    rows, width = x.shape
    padded = torch.nn.functional.pad(x, (0, -width % BLOCK)).view(rows, -1, BLOCK)
    largest = padded.abs().amax(-1)
    share = (padded.abs() / largest.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).view(rows, -1)[:, :width]
    top = 127 if signed else 255
    lower = (share.sqrt().sqrt() * top).floor_().clamp_(max=top - 1)
    below, above = (lower / top).square_().square_(), ((lower + 1) / top).square_().square_()
    chance = (share - below) / (above - below)
    code = lower + ((bits & 0x7FFFFF).float() / 2**23 < chance)
    if signed:
        code = 128 + torch.where(x < 0, -code, code)
    return Codes(code.to(torch.uint8), largest)


def decode(kept: Codes, *, signed: bool) -> Tensor:
    """The numbers, [rows, d] float32."""
    code = kept.codes.float()
    if signed:
        code = code - 128
    magnitude = (code / (127 if signed else 255)).square().square_()
    width = code.shape[1]
    found = magnitude * kept.largest.repeat_interleave(BLOCK, 1)[:, :width]
    return torch.where(code < 0, -found, found) if signed else found
