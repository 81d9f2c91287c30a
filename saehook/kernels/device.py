"""What depends on the kind of device."""

from __future__ import annotations

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
