"""What depends on the kind of device."""

from __future__ import annotations

import torch


def queued(device: torch.device) -> bool:
    """Whether operations on the device are queued, so that reading a result on the host would wait for all of them.

    Where it is True no step may read a result: sizes must not depend on data.
    """
    return device.type != "cpu"
