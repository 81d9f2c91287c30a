"""Checkpoints that several processes write into one file, each its rows, so that none ever holds the whole.

The file is that of a run on one device (`run_state`): a run may go on with any other number of devices, or one. All processes
must see the same folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from saehook import run_state
from saehook.config import group_ends
from saehook.distributed.mesh import Mesh, stripes
from saehook.initial_rows import indices

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Of safetensors."""
T = TypeVar("T")
_BY_LATENT = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0, "r_mag": 0, "b_mag": 0}
"""The dimension of the parameters that goes over latents; of Adam's moments it is always the first."""


def latent_axis(name: str) -> int | None:
    """The dimension of a tensor of a checkpoint that goes over latents, by its name there; None: every process has it whole."""
    runs, _, rest = name.partition(".")
    if runs != "runs":
        return None
    _, part, rest = rest.split(".", 2)
    if part == "optimizer":
        parameter, _, key = rest.rpartition(".")
        return 0 if parameter in _BY_LATENT and key != "step" else None
    if part in ("parameters", "averages"):
        return _BY_LATENT.get(rest)
    return 0 if (part, rest) == ("run", "tokens_since_fired") else None


def _is_dead(name: str) -> bool:
    """The list of dead latents, whose entries are numbers of latents."""
    return name.startswith("runs.") and name.endswith(".run.dead")


def save(mesh: Mesh, folder: Path, step: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> Path:
    """See `run_state.save_state`; `tensors` are those of this process. Returns or raises the same on all processes."""
    tensors, ends = dict(tensors), _group_ends(data)
    for name in filter(_is_dead, list(tensors)):
        here = indices(_rows(mesh, name, ends)).to(tensors[name].device)
        tensors[name] = torch.cat(mesh.gather_some(here[tensors[name]], "latent", "checkpoint")).sort().values
    pieces = {name: _piece(mesh, name, x, ends) for name, x in tensors.items()}
    return together(mesh, pieces, lambda fill: run_state.save_state(folder, step, {}, data, lambda path, _: fill(path)))


def together(mesh: Mesh, pieces: Mapping[str, Piece], do: Callable[[Callable[[Path], None]], T]) -> T:
    """What `do` gives on the main process, on all; it gets a function that writes a safetensors file of the pieces that all
    processes have. An OSError or ValueError there, or an OSError of any while it writes, is raised on all."""
    begun = False

    def write(path: Path) -> None:
        nonlocal begun
        layout = allocate(path, pieces)
        begun = True
        mesh.from_main((path, layout))
        mesh.all_do(lambda: fill(mesh, path, layout, pieces))

    result: Any = None
    if mesh.rank == 0:
        try:
            result = (True, do(write))
        except (OSError, ValueError) as error:
            result = (False, error)
        if not begun:
            mesh.from_main(None)
    elif (place := mesh.from_main(None)) is not None:
        path, offsets = place
        with contextlib.suppress(OSError):  # the main process says it
            mesh.all_do(lambda: fill(mesh, path, offsets, pieces))
    well, value = mesh.from_main(result)
    if not well:
        raise value
    return value


def _run_of(name: str) -> int:
    return int(name.split(".")[1])


def _group_ends(data: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Where the groups of each run's latents end."""
    return [
        group_ends(config["d_sae"], config.get("activation", {}).get("fractions", (1.0,))) for config in data["configs"]
    ]


def _rows(mesh: Mesh, name: str, ends: Sequence[Sequence[int]]) -> tuple[slice, ...]:
    """The latents that this process has of the run that a tensor is of."""
    return stripes(ends[_run_of(name)], mesh.sizes["latent"], mesh.places["latent"])


class Piece(NamedTuple):
    """What a process has of a tensor in a file."""

    x: Tensor
    shape: list[int]
    """Of the whole."""
    axis: int | None
    """The dimension of which it has only the `rows`; None: every process has it whole."""
    rows: Sequence[slice] = ()


def _piece(mesh: Mesh, name: str, x: Tensor, ends: Sequence[Sequence[int]]) -> Piece:
    shape, axis = list(x.shape), latent_axis(name)
    if axis is None:
        return Piece(x, shape, None)
    shape[axis] = ends[_run_of(name)][-1]
    return Piece(x, shape, axis, _rows(mesh, name, ends))


def allocate(path: Path, pieces: Mapping[str, Piece]) -> dict[str, int]:
    """A safetensors file of the right size, whose tensors are yet to be written; returns the offset of each."""
    header, offsets, end = {}, {}, 0
    # The widest first, so that each lies at a multiple of its width.
    for name in sorted(pieces, key=lambda name: (-pieces[name].x.element_size(), name)):
        x, shape = pieces[name][:2]
        begin, end = end, end + math.prod(shape) * x.element_size()
        header[name] = {"dtype": _NAMES[x.dtype], "shape": shape, "data_offsets": [begin, end]}
        offsets[name] = begin
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        # A full disk is said here; while a map is written it would be a signal.
        size = getattr(os, "posix_fallocate", None)
        size(file.fileno(), 0, 8 + len(text) + end) if size else file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + begin for name, begin in offsets.items()}


def fill(mesh: Mesh, path: Path, offsets: Mapping[str, int], pieces: Mapping[str, Piece]) -> None:
    """Write what this process has: its latents, if it is the first of those that have them; the main one the rest."""
    file = np.memmap(path, dtype=np.uint8, mode="r+")
    for name, (x, shape, axis, rows) in pieces.items():
        if x.numel() == 0 or (mesh.places["data"] if axis is not None else mesh.rank) > 0:
            continue
        size = math.prod(shape) * x.element_size()
        whole = torch.from_numpy(file[offsets[name] : offsets[name] + size]).view(x.dtype).view(shape)
        if axis is None:
            whole.copy_(x.detach())
            continue
        first = 0
        for some in rows:
            n = some.stop - some.start
            whole.narrow(axis, some.start, n).copy_(x.detach().narrow(axis, first, n))
            first += n
    file.flush()


def load(mesh: Mesh, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """See `run_state.load_state`; of what goes over latents those of this process."""
    data, path = mesh.main_does(lambda: run_state.find_state(folder))
    ends, tensors = _group_ends(data), {}
    with safe_open(path / run_state.TENSORS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            axis = latent_axis(name)
            if axis is not None:
                part = file.get_slice(name)
                runs = _rows(mesh, name, ends)
                tensors[name] = torch.cat([part[rows] if axis == 0 else part[:, rows] for rows in runs], axis)
                continue
            tensors[name] = file.get_tensor(name)
            if _is_dead(name):
                tensors[name] = torch.isin(indices(_rows(mesh, name, ends)), tensors[name]).nonzero().view(-1)
    return tensors, data, path
