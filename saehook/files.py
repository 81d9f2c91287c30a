"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from saehook.errors import FileError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers that mean: no room, but there may be some later."""


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write; it takes the name `path` when the block ends well, else it goes away.

    Raises:
        FileError: the folder cannot be written, or the disk is full; `errno` says which.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise FileError(
            error.errno, f"cannot write {path}: {error.strerror}. Choose a folder that can be written."
        ) from None
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        flush(partial)
        partial.chmod(0o644)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        if (number := error_number(error)) is None:
            raise
        hint = "The disk is full." if number in DISK_FULL else "Choose a folder that can be written."
        raise FileError(number, f"cannot write {path}: {os.strerror(number)}. {hint}") from error
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    with atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; it takes the name `path` when the block ends well, else it goes away.

    Raises:
        FileError: `path` is there and not empty, or cannot be written.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileError(f"{path} is there already. Name a new folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield partial
            for file in partial.iterdir():
                flush(file)
                file.chmod(0o644)
            partial.chmod(0o755)
            partial.replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileError) or (number := error_number(error)) is None:
            raise
        raise FileError(number, f"cannot write {path}: {os.strerror(number)}.") from error


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hash of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def error_number(error: BaseException) -> int | None:
    """`errno` of an error of the operating system, also of one that safetensors met; None for other errors."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None
