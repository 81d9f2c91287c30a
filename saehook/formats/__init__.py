"""The formats in which SAEs are published: what a path is, and its tensors in our layout.

Each file here reads one: `matches(files)` says whether it is that format, by the names and shapes of its tensors and the
configuration beside them, never by a file's name alone; `read(files)` gives (config, tensors, provenance).
"""

from __future__ import annotations

from pathlib import Path

from saehook.formats.found import Found, Provenance

__all__ = ["Found", "Provenance", "identify"]


def identify(path: str | Path, sub: str | None = None) -> Found:
    """What a file, a folder or a place on the hub is: its format, configuration, LM and site. No tensor is read.

    Args:
        path: a file of weights, a folder that holds one, or `owner/name` on the hub.
        sub: folder or file in it, where it holds several SAEs.

    Raises:
        FileError: nothing is there, or several SAEs are; they are named.
        FormatError: damaged, unsafe, or of no known format.
    """
    raise NotImplementedError
