"""How kernels cut rows of numbers, and in which precision they add them up."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    constexpr = Any  # callers pass plain numbers
else:
    constexpr = tl.constexpr

WIDEST = 512
"""Columns of a row that one program treats at most, where it sums many rows."""
LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}
"""What every launch says: a · b + c may be rounded once. Triton's default is to change."""


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches within go to the device of `x`; Triton's go to the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def parts(width: int, size: int) -> int:
    """How many parts of `size` cover `width`."""
    return -(-width // size)


def power_of_two(n: int) -> int:
    """The least one that is not less than `n`, at least 1."""
    return 1 << (n - 1).bit_length()


def columns_at_once(width: int) -> int:
    """Columns of rows of `width` in one program: the power of two that leaves the fewest lanes idle, rather a large one."""
    if width <= WIDEST:
        return max(16, power_of_two(width))
    return min((WIDEST, WIDEST // 2), key=lambda size: parts(width, size) * size)


def rows_at_once(columns: int) -> int:
    """Rows that are loaded together: enough loads in flight, few enough registers."""
    return max(4, min(16, 4096 // columns))


def sum_dtype(*tensors: Tensor) -> tl.dtype:
    """In which numbers are added up: float64 where one of them is float64, else float32."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32
