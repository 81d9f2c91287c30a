"""One file of weights, read safely: safetensors, NumPy's npz or a torch pickle of plain tensors. What it is is found by its
first bytes, never by its name. Tensors are maps of the file wherever it holds them as they are, so that opening reads nothing.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from saehook.errors import FileError, FormatError, SaehookError
from saehook.formats.npz import is_npz, read_npz

SLACK_BYTES = 2**20
"""Stored beyond what the shapes need, that is no matter."""
ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"


def read_weights(path: Path) -> tuple[str, dict[str, Any]]:
    """Its kind, `safetensors`, `npz` or `torch`, and what the file holds by name: tensors; in a torch pickle also numbers,
    strings and dictionaries of them.

    Raises:
        FileError: it is not there or cannot be read.
        FormatError: it is none of these, damaged, compressed, or carries code, which is never run.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start.startswith(ZIP):
            return _zip(path)
        if start.startswith(PICKLE):
            return "torch", _torch(path, mapped=False)
        return "safetensors", _safetensors(path)
    except (SaehookError, MemoryError):
        raise
    except FileNotFoundError:
        raise FileError(f"{path} is not there.") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error}.") from None
    except Exception as error:  # what zipfile, zlib, numpy and torch raise for damaged files has no common base
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise FormatError(
            f"{path} is no whole file of weights ({said}): cut short or damaged. Copy it again."
        ) from None


def _zip(path: Path) -> tuple[str, dict[str, Any]]:
    if is_npz(path):
        return "npz", dict(read_npz(path))
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    if not any(info.filename.endswith("data.pkl") for info in infos):
        raise FormatError(f"{path} is a zip file without arrays or a torch pickle; it holds no weights.")
    packed = [info for info in infos if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise FormatError(
            f"{path}: {packed[0].filename} is compressed ({packed[0].compress_size:,} to {packed[0].file_size:,} bytes); "
            "torch.save does not do that, and it is not unpacked."
        )
    return "torch", _torch(path, mapped=True)


def _torch(path: Path, *, mapped: bool) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":  # torch.load would believe the name
            with path.open("rb") as file:
                data = torch.load(file, map_location="cpu", weights_only=True)
        else:
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        said = str(error).strip().splitlines()[-1]
        raise FormatError(
            f"{path} is a pickle that carries code or objects, not only tensors; such pickles are never read ({said[:200]})."
        ) from None
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise FormatError(f"{path} holds {type(data).__name__}; a state dict, tensors by name, is expected.")
    _check_size(path, data)
    return dict(data)


def _check_size(path: Path, data: dict[str, Any]) -> None:
    """Raises FormatError where much more is stored than the tensors need: a tensor may be a small part of its storage."""
    rest, storages, needed = list(data.values()), {}, 0
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            needed += value.numel() * value.element_size()
    if (held := sum(storages.values())) > 2 * needed + SLACK_BYTES:
        raise FormatError(f"{path} holds {held:,} bytes for tensors whose shapes need {needed:,}; it is not read.")


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(
            f"{path} is no whole file of weights (as safetensors: {error}): it is cut short, damaged, or of another kind. "
            "Read are safetensors, npz, and torch files of plain tensors. Copy it again."
        ) from None
