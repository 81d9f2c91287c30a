"""Writes GGUF, version 3: the files of llama.cpp, as far as a few vectors with a few facts need them.

Little-endian: magic, version, counts; each fact as key, type, value; each tensor as name, sizes, type, place; then the tensors,
each at a multiple of 32 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from saehook.files import atomically

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
UINT32, STRING, F32 = 4, 8, 0


def write_gguf(path: Path, facts: Mapping[str, str | int], vectors: Mapping[str, Tensor]) -> None:
    """Write strings and whole numbers (uint32) by key, and 1-D tensors by name, as float32.

    Raises:
        FileError: the folder cannot be written.
    """
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(vectors), len(facts))]
    for key, value in facts.items():
        kind = (
            struct.pack("<I", STRING) + _string(value) if isinstance(value, str) else struct.pack("<II", UINT32, value)
        )
        head.append(_string(key) + kind)
    data = [_little_endian(vector) for vector in vectors.values()]
    place = 0
    for (name, vector), raw in zip(vectors.items(), data, strict=True):
        head.append(_string(name) + struct.pack("<IQIQ", 1, vector.numel(), F32, place))
        place += len(_padded(raw))
    with atomically(path) as partial:
        partial.write_bytes(_padded(b"".join(head)) + b"".join(map(_padded, data)))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _little_endian(vector: Tensor) -> bytes:
    return vector.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes()


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % ALIGNMENT)
