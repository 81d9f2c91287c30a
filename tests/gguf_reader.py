"""A reader of GGUF, version 3, by the words of its specification; it shares nothing with `saehook.gguf`."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Facts and tensors of a GGUF file of version 3, read by the words of its specification."""
    data, place = path.read_bytes(), 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal place
        values = struct.unpack_from("<" + form, data, place)
        place += struct.calcsize("<" + form)
        return values

    def text() -> str:
        nonlocal place
        (length,) = take("Q")
        place += length
        return data[place - length : place].decode()

    assert take("4sI") == (b"GGUF", 3)
    n_tensors, n_facts = take("QQ")
    facts: dict[str, Any] = {}
    for _ in range(n_facts):
        key, (kind,) = text(), take("I")
        facts[key] = {8: text, 4: lambda: take("I")[0]}[kind]()
    infos = [(text(), take("I"), take("QIQ")) for _ in range(n_tensors)]
    start = place + -place % facts.get("general.alignment", 32)
    tensors = {}
    for name, n_dimensions, (size, kind, offset) in infos:
        assert (n_dimensions, kind, offset % 32) == ((1,), 0, 0)
        tensors[name] = torch.tensor(struct.unpack_from(f"<{size}f", data, start + offset))
        assert start + offset + 4 * size <= len(data)
    assert len(data) % 32 == 0
    return facts, tensors
