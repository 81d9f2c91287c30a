"""Checkpoints of a training run: everything that is needed to go on as if it had never stopped.

A checkpoint is a folder `step-000001234` with `state.safetensors` and `state.json`, which holds the hash of the former. It is
written under another name, flushed and renamed, so it is whole or absent; the one before it is kept, in case the disk
damages the newest.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saehook.errors import FileError, FormatError
from saehook.files import error_number, flush, sha256

SCHEMA = 1
KEPT = 2
"""Checkpoints that are kept."""
TENSORS, DATA = "state.safetensors", "state.json"
_PARTIAL = "partial-"


Write = Callable[[Path, Mapping[str, Tensor]], None]
"""Writes tensors into a file."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """As safetensors, which writes contiguous tensors that share no memory."""
    save_file(
        {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}, path
    )


def save_state(
    folder: Path, step: int, tensors: Mapping[str, Tensor], data: Mapping[str, Any], write: Write = write_tensors
) -> Path:
    """Write a checkpoint below `folder` and remove those before the last two; returns its folder.

    Raises:
        FileError: it cannot be written; nothing of it is left, and `error.errno` says why.
    """
    target, partial = folder / f"step-{step:09d}", folder / f"{_PARTIAL}{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial / TENSORS, tensors)
        text = json.dumps({"schema": SCHEMA, "sha256": sha256(partial / TENSORS), **data})
        (partial / DATA).write_text(text, encoding="utf-8")
        for file in (partial / TENSORS, partial / DATA, partial):
            flush(file)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (number := error_number(error)) is None:
            raise
        raise FileError(number, f"cannot write the checkpoint {target}: {os.strerror(number)}") from error
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints below `folder`, oldest first; whether they are whole is not looked at."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """The newest checkpoint that is whole: tensors (on the CPU), data, and its folder; see `find_state`."""
    data, path = find_state(folder)
    return load_file(path / TENSORS), data, path


def find_state(folder: Path) -> tuple[dict[str, Any], Path]:
    """The data of the newest checkpoint that is whole, and its folder.

    Warns (UserWarning) of each damaged one that was passed over.

    Raises:
        FileError: there is none at all.
        FormatError: all of them are damaged.
    """
    found = checkpoints(folder)
    if not found:
        raise FileError(f"{folder} holds no checkpoint to resume from. Start the run anew, or name another folder.")
    for path in reversed(found):
        try:
            data = json.loads((path / DATA).read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise FormatError(f"schema {data['schema']!r} is unknown; this version reads {SCHEMA}")
            if sha256(path / TENSORS) != data["sha256"]:
                raise FormatError(f"{TENSORS} has changed since it was written")
            return data, path
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"the checkpoint {path} is damaged and is passed over: {error}", UserWarning, stacklevel=3)
    raise FormatError(f"every checkpoint in {folder} is damaged ({len(found)} tried). Start the run anew.")
