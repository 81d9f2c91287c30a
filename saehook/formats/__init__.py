"""The formats in which SAEs are published: what a path is, and its tensors in our layout.

Each file here reads one: `matches(files)` says whether it is that format, by the names and shapes of its tensors and the
configuration beside them, never by a file's name alone; `read(files)` gives (config, tensors, provenance).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saehook.errors import ArgumentError, FileError, FormatError, SaehookError
from saehook.formats import (
    batchtopk_repository,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    mwhanna,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)
from saehook.formats.checks import check_numbers, check_shapes
from saehook.formats.folder import Files
from saehook.formats.found import Contents, Found, Provenance
from saehook.formats.places import our_site
from saehook.formats.repository import BESIDE, USUAL, local_path

__all__ = ["FORMATS", "Found", "Provenance", "identify", "our_site", "read_sae"]

FORMATS = (
    saelens,
    gemma_scope,
    gemma_scope_2,
    sparsify,
    llama_scope,
    openai,
    batchtopk_repository,
    goodfire,
    dictionary_learning,
    qwen_scope,
    mwhanna,
)
"""In the order in which they are asked."""
SUFFIXES = {".safetensors", ".npz", ".pt", ".pth", ".bin", ".ckpt"}
MAX_FILES = 64
"""Looked into per folder."""


def identify(path: str | Path, sub: str | None = None, *, revision: str | None = None) -> Found:
    """What a file, a folder or a place on the hub is: its format, configuration, LM and site. No matrix is read.

    Args:
        path: a file of weights, a folder that holds one, or `owner/name` on the hub.
        sub: folder or file in it, where it holds several SAEs.
        revision: branch, tag or commit on the hub.

    Raises:
        FileError: nothing is there, or several SAEs are; they are named.
        FormatError: damaged, unsafe, or of no known format.
    """
    files, format = _open(local_path(path, sub, revision), {"shapes_only": True})
    contents = _read(files, format)
    check_shapes(contents.config, contents.tensors, files.path)
    dtype = next(v.dtype for v in files.entries.values() if isinstance(v, Tensor) and v.ndim == 2)
    return _found(files, contents, dtype)


def read_sae(
    path: str | Path,
    sub: str | None = None,
    *,
    revision: str | None = None,
    rows: Iterable[int] | None = None,
    known: Mapping[str, Any] | None = None,
    check: bool = True,
) -> tuple[Found, dict[str, Tensor]]:
    """What `identify` finds, and the tensors: `W_enc` [d_in, d_sae], `W_dec` [d_sae, d_out], `b_enc`, `b_dec`, maybe `threshold`
    and `W_skip`. They are maps of the file as long as nothing had to be computed.

    Args:
        rows: only these rows of the decoder; the other tensors are of the device `meta` then.
        known: what the file may not say: `k`, `input_scale`.
        check: look at all numbers; without it matrices stay in the file unread.

    Raises:
        ArgumentError: rows that are no whole numbers. FileError, FormatError: as `identify`; also NaN, a transposed matrix.
    """
    rows = None if rows is None else [_row(row) for row in rows]
    files, format = _open(local_path(path, sub, revision), {"rows": rows, "known": known})
    contents = _read(files, format)
    check_shapes(contents.config, contents.tensors, files.path, None if rows is None else len(rows))
    check_numbers(contents.tensors if check else _small(contents.tensors), files.path)
    dtype = next(v.dtype for v in files.entries.values() if isinstance(v, Tensor) and v.ndim == 2)
    return _found(files, contents, dtype), contents.tensors


def _small(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim < 2}


def _row(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArgumentError(f"rows has {value!r}; numbers of latents from 0 on are expected.")
    return value


def _found(files: Files, contents: Contents, dtype: Any) -> Found:
    return Found(path=files.path, config=contents.config, dtype=dtype, provenance=contents.provenance)


def _read(files: Files, format: Any) -> Contents:
    try:
        return format.read(files)
    except ArgumentError as error:
        raise FormatError(f"{files.path}: {error}") from None
    except (RuntimeError, TypeError, IndexError, OverflowError, AttributeError) as error:
        # Tensors of a rank or size that no rule expects.
        what = str(error).splitlines()[0][:200] if str(error) else ""
        raise FormatError(
            f"{files.path} looks like {format.__name__.rpartition('.')[2]}, and its tensors do not fit each other or its "
            f"configuration ({type(error).__name__}: {what})."
        ) from None


def _format_of(files: Files) -> Any:
    """The first format that matches, or None."""
    return next((format for format in FORMATS if format.matches(files)), None)


def _open(path: Path, options: dict[str, Any]) -> tuple[Files, Any]:
    """The weights that a path is or holds, and the format that they are.

    Raises:
        FileError, FormatError: as `identify`.
    """
    if path.is_file():
        files = Files(path, **options)
        format = _format_of(files)
        if format is None:
            raise FormatError(_no_format(files))
        return files, format
    usual = [path / name for name in USUAL if (path / name).exists()]
    found, failed = _matching(usual, options)
    if not found:
        others = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
        others = [p for p in others if p not in usual and p.name not in BESIDE]
        if len(others) > MAX_FILES:
            raise FileError(f"{path} holds {len(others)} files of weights. Name one of them with sub=.")
        more, failures = _matching(others, options)
        found, failed = more, failed or ([] if more else failures)
        if failed and not more:
            raise _nothing(path) if not usual and _below(path) else failed[0]
    if len(found) > 1:
        names = ", ".join(str(files.path.relative_to(path)) for files, _ in found[:20])
        raise FileError(f"{path} holds {len(found)} SAEs: {names}. Name one with sub=.")
    if not found:
        raise _nothing(path)
    return found[0]


def _matching(paths: list[Path], options: dict[str, Any]) -> tuple[list[tuple[Files, Any]], list[SaehookError]]:
    """Those that are of a format, and why others cannot be read."""
    found, failed = [], []
    for path in paths:
        try:
            files = Files(path, **options)
            format = _format_of(files)
        except (FileError, FormatError) as error:
            failed.append(error)
            continue
        if format is not None:
            found.append((files, format))
        elif path.name in USUAL or len(paths) == 1:
            failed.append(FormatError(_no_format(files)))
    return found, failed


def _no_format(files: Files) -> str:
    held = ", ".join(sorted(files.names)[:12]) or "nothing"
    beside = [path.name for path, _ in files.configs()]
    return (
        f"{files.path} is of no format that saehook reads: it holds {held}, with "
        f"{', '.join(beside) if beside else 'no configuration'} beside it. Read are "
        f"{', '.join(format.__name__.rpartition('.')[2] for format in FORMATS)}."
    )


def _below(path: Path) -> list[str]:
    """Folders in it that look like an SAE, by the names of their files."""
    depths = ("*", "*/*", "*/*/*")
    return sorted({str(p.parent.relative_to(path)) for name in USUAL for d in depths for p in path.glob(f"{d}/{name}")})


def _nothing(path: Path) -> FileError:
    """Why a folder holds no SAE: its parts that are there, or the SAEs below it."""
    if (path / "cfg.json").is_file():
        return FileError(f"{path} has cfg.json but no sae_weights.safetensors or other weights. Copy the whole folder.")
    below = _below(path)
    hint = f" Below it are {', '.join(below[:20])}: name one with sub=." if below else ""
    return FileError(
        f"{path} holds no cfg.json and no weights, so it is no SAE that saehook reads.{hint} Expected are cfg.json and "
        "sae_weights.safetensors, or the files of another format."
    )
