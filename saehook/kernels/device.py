"""What depends on the kind of device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALWAYS_QUEUED = False
"""Take the branches of a GPU on a CPU, too; for tests."""


def queued(device: torch.device) -> bool:
    """Whether operations on the device are queued, so that reading a result on the host would wait for all of them.

    Where it is True no step may read a result: sizes must not depend on data.
    """
    return ALWAYS_QUEUED or device.type != "cpu"


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`. From the host to a GPU it goes through pinned memory, so that the host does not wait for what is queued
    there."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def fetch(x: Tensor) -> Callable[[], Tensor]:
    """Begin to bring `x` to the host; what is returned waits for that, and for nothing that is queued on the device afterwards."""
    if x.device.type != "cuda":
        return x.cpu
    on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    on_host.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        copied.synchronize()
        return on_host

    return wait
