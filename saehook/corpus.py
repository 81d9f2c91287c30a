"""Text that is on the machine anyway: Python source, split into training files and held-out modules.

No download is needed to train or to evaluate: the standard library is installed wherever saehook runs. The split is
fixed by module name, so that every language model and SAE of this repository leaves the same files out. The text of a
module differs between Python versions, so results carry a hash of the text they were measured on.

Standard library only; imported by scripts that run where saehook's own dependencies are not installed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from saehook.errors import FileError

HELD_OUT_MODULES = (
    "argparse bisect calendar cmd configparser contextlib csv dataclasses difflib fractions functools getpass glob "
    "graphlib gzip heapq html.parser imaplib json.decoder mailbox random sched statistics textwrap zipapp"
).split()
"""Standard-library modules that no bundled model or SAE was trained on."""

HELD_OUT_NOVEL = "Conrad_Nostromo_1904.txt"
"""The novel that the bundled language model was not trained on."""

PACKAGES = (
    "torch transformers nnsight gradio accelerate numpy pandas huggingface_hub networkx pydantic httpx rich typer "
    "fastapi starlette"
).split()
"""Packages whose Python source is used for training where they are installed."""

MIN_FILE_BYTES, MAX_FILE_BYTES = 400, 200_000
JSON_LINES = (".jsonl", ".jsonl.gz")
SUFFIXES = (".txt", ".py", ".md", *JSON_LINES)
"""Names of the files that are read in a folder."""


class Document(NamedTuple):
    """One document: a text file, or one line of a JSON-lines file."""

    name: str
    """File name, with the line number for JSON-lines."""
    text: str


def held_out_files() -> list[Path]:
    """The source files of `HELD_OUT_MODULES` on this machine, in the order of that list.

    Raises:
        FileError: the standard library lies in a zip file or was installed without sources.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [stdlib / (name.replace(".", "/") + ".py") for name in HELD_OUT_MODULES]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise FileError(
            f"the held-out text is the source of {len(files)} standard-library modules below {stdlib}, but "
            f"{', '.join(missing)} is not there. Use a Python that was installed with sources, or name text files."
        )
    return files


def python_files() -> list[Path]:
    """Python source to train on: the standard library without the held-out modules, and `PACKAGES` where installed.

    Files of 400 B to 200 kB; the standard library's own tests and exact duplicates (of held-out files, too) are left
    out. Sorted by their path below the library, so the order is the same on every machine with the same packages.
    """
    paths = sysconfig.get_paths()
    stdlib, site = Path(paths["stdlib"]), Path(paths["purelib"])
    held_out = held_out_files()
    candidates = [
        file
        for file in sorted(stdlib.rglob("*.py"))
        if not {"site-packages", "dist-packages", "test", "tests"} & set(file.relative_to(stdlib).parts)
    ]
    for package in PACKAGES:
        candidates += sorted((site / package).rglob("*.py"))
    seen = {hashlib.sha256(file.read_bytes()).digest() for file in held_out}
    kept = []
    for file in candidates:
        if not MIN_FILE_BYTES <= file.stat().st_size <= MAX_FILE_BYTES:
            continue
        digest = hashlib.sha256(file.read_bytes()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(file)
    return kept


def text_files(paths: Iterable[str | Path]) -> list[Path]:
    """Files named by `paths`: files as they are, folders as what lies below them with a name in `SUFFIXES`, sorted.

    Raises:
        FileError: a path does not exist, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(f for f in path.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file())
            if not inside:
                raise FileError(
                    f"the folder {path} holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file. Name a folder that does; "
                    f"hf:{path} reads a folder of parquet or other files of a dataset."
                )
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileError(f"there is no text file or folder {path}. Check the path.")
    return files


def read_documents(paths: Iterable[str | Path]) -> Iterator[Document]:
    """Documents in the order of `paths`: a text file is one, each line of a `JSON_LINES` file is one (its `"text"`).

    Bytes that are not UTF-8 are replaced by U+FFFD. Empty documents are left out.

    Raises:
        FileError: a file cannot be read, or a line of a `.jsonl` file is not an object with a string `"text"`.
    """
    for path in map(Path, paths):
        opened = gzip.open if path.suffix == ".gz" else open
        try:
            with opened(path, "rt", encoding="utf-8", errors="replace") as file:
                if path.name.endswith(JSON_LINES):
                    # Lines end with \n alone: str.splitlines would also cut at U+2028, which JSON allows in a string.
                    yield from _json_lines(path, file)
                elif (content := file.read()).strip():
                    yield Document(path.name, content)
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"cannot read the text file {path}: {error}. Check the path and its permissions.") from None


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields: Any = json.loads(line.removeprefix("\ufeff"))
        except ValueError:
            fields = None
        text = fields.get("text") if isinstance(fields, dict) else None
        if not isinstance(text, str):
            found = f"; its fields are {', '.join(fields)}" if isinstance(fields, dict) and fields else ""
            raise FileError(
                f'line {number} of {path} is not a JSON object with a string under "text"{found}. One document a line is '
                'expected: {"text": "..."}. A folder whose files have another field is read with hf:FOLDER,column=FIELD.'
            )
        if text.strip():
            yield Document(f"{path.name}:{number}", text)


def text_hash(documents: Iterable[Document]) -> str:
    """sha256 over the documents' texts in order, as hexadecimal; names do not count."""
    digest = hashlib.sha256()
    for document in documents:
        update_text_hash(digest, document)
    return digest.hexdigest()


def update_text_hash(digest: hashlib._Hash, document: Document) -> None:
    """Add one document to a `text_hash`."""
    digest.update(document.text.encode("utf-8", "surrogatepass"))
    digest.update(b"\0")
