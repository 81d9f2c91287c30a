"""The collectives that autograd goes through. A loss is the same on all devices; gradients are of its part on each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saehook.distributed.mesh import Mesh


class _Sum(torch.autograd.Function):
    """Forward the sum, backward the gradient as it is: what is made of the sum is made of it on all devices alike."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: Mesh, axis: str, what: str) -> Tensor:
        return mesh.reduce_(part.clone(), axis, what)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None, None, None


class _Read(torch.autograd.Function):
    """Forward the same, backward the sum of the gradients: each device knows those of its own latents."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, mesh: Mesh, axis: str, what: str) -> Tensor:
        ctx.mesh, ctx.axis, ctx.what = mesh, axis, what
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.mesh.reduce_(grad.clone(), ctx.axis, ctx.what), None, None, None


def add(part: Tensor, mesh: Mesh, axis: str, what: str) -> Tensor:
    """Σ of the parts over an axis; each part's gradient is that of the sum."""
    return _Sum.apply(part, mesh, axis, what)


def read(whole: Tensor, mesh: Mesh, axis: str, what: str) -> Tensor:
    """What all devices have; its gradient is the sum of theirs."""
    return _Read.apply(whole, mesh, axis, what)
