"""The least time that a TopK training step can take on an accelerator, counted part by part; nothing is measured here.

Floating-point operations over the rate of products, and bytes over that of memory: of those that no step can do without.
Rates are parameters; the defaults are those of an H200 (measured there: 790 TFLOP/s in bfloat16, 4.3 TB/s; its L2 is taken to
give 6 TB/s).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What an accelerator can do."""

    flops: float = 790e12
    """Operations of bfloat16 products a second."""
    bandwidth: float = 4.3e12
    """Bytes a second from and to memory."""
    cache_bandwidth: float = 6e12
    """Bytes a second from the cache that all share."""
    cache_bytes: float = 60e6
    """Its size."""
    near_bytes: float = 200e3
    """What a program can keep next to its arithmetic."""


H200 = Machine()


@dataclass(frozen=True)
class Setting:
    """The sizes of a step."""

    d_in: int
    d_sae: int
    k: int
    batch: int


SETTINGS = {
    "gpt2": Setting(768, 24576, 32, 8192),
    "gemma-2-2b, 16k": Setting(2304, 16384, 64, 8192),
    "gemma-2-2b, 65k": Setting(2304, 65536, 64, 8192),
    "llama-8b, 131k": Setting(4096, 131072, 64, 8192),
    "llama-8b, 131k, 32k tokens": Setting(4096, 131072, 64, 32768),
}
OTHER_TRAFFIC = 1.02
"""Inputs, reconstructions and gradients of the tokens themselves: two per cent."""


def limits(s: Setting, machine: Machine = H200) -> dict[str, float]:
    """Seconds of each part, and `total`. Rows of weights, tokens and gradients are read as bfloat16."""
    row = 2 * s.d_in
    gathered = s.batch * s.k * row
    parameters = 2 * s.d_in * s.d_sae
    kept_near = (
        s.k * row <= machine.near_bytes
    )  # else a token's rows are read once for the sum, and again for its gradient
    tokens_cached = s.batch * row <= machine.cache_bytes
    parts = {
        "encoder's product": 2 * s.batch * s.d_sae * s.d_in / machine.flops,
        "selection": 2 * 2 * s.batch * s.d_sae / machine.bandwidth,  # pre-activations written and read once
        "decoding": gathered / machine.cache_bandwidth if kept_near else 1.5 * gathered / machine.bandwidth,
        "gradients": 2 * gathered / (machine.cache_bandwidth if tokens_cached else machine.bandwidth),
        "optimiser": 26 * parameters / machine.bandwidth,  # three float32 read and written, and a bfloat16 copy
    }
    return parts | {"total": OTHER_TRAFFIC * sum(parts.values())}
