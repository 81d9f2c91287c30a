"""Memory that training steps share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Named buffers that live on between steps, since fresh memory costs a CPU as much as a third of a product.

    One object serves the SAEs of a run in turn. What is taken is valid until the same name is taken again: the
    pre-activations during one step, forward and backward, and the gradients until the optimiser has used them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._taken: dict[str, tuple[int, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Size of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised, contiguous, of the dtype and device of `like`; the buffer grows to the largest size asked for."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or (buffer.dtype, buffer.device) != (like.dtype, like.device):
            self._buffers[name] = buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        self._taken[name] = shape
        return buffer[:size].view(shape)

    def taken(self, name: str) -> Tensor | None:
        """What was last taken under that name since `forget`; None where nothing was."""
        shape = self._taken.get(name)
        return None if shape is None else self._buffers[name][: math.prod(shape)].view(shape)

    def forget(self) -> None:
        """From here on what was taken is not valid any more."""
        self._taken.clear()


def take(scratch: Scratch | None, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """From `scratch`, or fresh memory without one."""
    return like.new_empty(shape) if scratch is None else scratch.take(name, shape, like)
