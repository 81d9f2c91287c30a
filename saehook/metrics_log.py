"""The log of a training run: a file of JSON lines that a resumed run goes on with."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from saehook.errors import FileError
from saehook.files import atomic_write

METRICS = "metrics.jsonl"
"""The log, in `log_dir`."""


def append(file: Path, text: str) -> None:
    """Append to a file, all of it or nothing."""
    data = text.encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as stream:  # a buffer would be written again when the file is closed
        end = stream.tell()
        try:
            while data:
                data = data[stream.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                stream.truncate(end)
            raise FileError(error.errno, f"cannot write {file}: {error.strerror}.") from error


def drop_lines_after(file: Path, step: int) -> None:
    """Take the lines of later steps out of a log: the steps will be taken again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # cut off by a kill
            continue
    atomic_write(file, "".join(line + "\n" for line in kept))
