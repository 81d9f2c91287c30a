"""Arrays of a NumPy `.npz` file: no pickles, and sizes are checked before anything is unpacked."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saehook.errors import FormatError

MAX_HEADER_BYTES = 10_000
MAX_RATIO, ALWAYS_BYTES = 20, 64 * 2**20
"""A compressed member may unpack to so many times its size, or to so many bytes: weights hardly compress, zeros do."""


def is_npz(path: Path) -> bool:
    """Whether a zip file holds arrays."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(".npy") for name in archive.namelist())


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays by name. Those that are stored as they are become maps of the file and are read when they are used.

    Raises:
        FormatError: an object array, a member whose size is not that of its shape, or one that unpacks to far too much.
    """
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
        return {info.filename.removesuffix(".npy"): _array(path, archive, info) for info in members}


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    what = f"{path}: the array {info.filename.removesuffix('.npy')}"
    stored = info.compress_type == zipfile.ZIP_STORED
    if not stored and info.file_size > max(ALWAYS_BYTES, MAX_RATIO * info.compress_size):
        raise FormatError(f"{what} would unpack from {info.compress_size:,} to {info.file_size:,} bytes; not read.")
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header: Any = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            shape, fortran, dtype = read_header(file, max_header_size=MAX_HEADER_BYTES)
        except (ValueError, AttributeError) as error:
            raise FormatError(f"{what} has a header that is none ({error}).") from None
        if dtype.kind not in "fiu" or dtype.fields is not None:
            raise FormatError(f"{what} is of dtype {dtype}; numbers are expected (pickled objects are never read).")
        header = file.tell()
        declared = header + math.prod(shape) * dtype.itemsize
        if declared != info.file_size:
            raise FormatError(
                f"{what} has the shape {shape}, which is {declared:,} bytes, and the file holds {info.file_size:,}."
            )
        order = "F" if fortran else "C"
        if stored:
            start = _data_offset(path, info) + header
            array = np.memmap(path, dtype, "c", start, shape, order) if math.prod(shape) else np.empty(shape, dtype)
        else:
            array = np.frombuffer(bytearray(file.read()), dtype).reshape(shape, order=order)
    return torch.from_numpy(_usable(array))


def _usable(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In the byte order of this machine and aligned, as torch needs it: a copy where the file has it otherwise."""
    if array.dtype.newbyteorder("=") == array.dtype and array.flags.aligned:
        return array
    return array.astype(array.dtype.newbyteorder("="), order="K")


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        head = file.read(30)
    return info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
