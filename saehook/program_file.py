"""A program of edits as it is sent to a colleague: the edits, what they were made for, and what they gave.

`program.json` holds the program, the language model and each SAE that it uses with the hashes of their files, and a
replay vector: a prompt, and the log-probabilities of the tokens behind it, edited. Data only: nothing in it is imported or
run. Running it again is in `replay.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saehook import hub
from saehook.errors import FileError, FormatError
from saehook.fields import check_fields, from_json
from saehook.files import atomic_write
from saehook.interventions import Program

SCHEMA = 1
FILE, CARD, TAG = "program.json", "README.md", "saehook-program"
MAX_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """Which language model."""

    id: str
    """Hub id, or the last name of a folder."""
    kind: str
    """`model_type` of its config."""
    layers: int
    width: int
    """Of the residual stream."""
    revision: str | None = None
    """Commit on the hub, where it came from there."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Hash by weight file; empty where it came from no folder."""


@dataclass(frozen=True, kw_only=True)
class SAERef:
    """Which SAE stands at a site."""

    site: str
    """The site that it reads."""
    sha256: Mapping[str, str]
    """Hash by file."""
    site_out: str | None = None
    """The site that a transcoder writes."""
    repo: str | None = None
    """`owner/name` on the hub, where it came from there."""
    path: str | None = None
    """Folder in that repository, else the folder's last name."""
    revision: str | None = None
    """Commit on the hub."""


@dataclass(frozen=True, kw_only=True)
class ReplayVector:
    """What the edited model says behind a prompt."""

    prompt: str
    ids: tuple[int, ...]
    """Tokens of the prompt, BOS included."""
    new_ids: tuple[int, ...]
    """The tokens that follow, greedily chosen."""
    top5: tuple[tuple[tuple[int, float], ...], ...]
    """For each new token the five likeliest ids with their log-probabilities (nats), likeliest first."""
    dtype: str
    """Of the language model, for example `float32`."""
    tolerance: float
    """Log-probabilities that differ by no more are the same."""


@dataclass(frozen=True, kw_only=True)
class ProgramFile:
    """A program, and what it was made for."""

    program: Program
    model: ModelRef
    saes: tuple[SAERef, ...]
    replay: ReplayVector
    saehook: str
    """Version that wrote it."""

    @property
    def id(self) -> str:
        """`program_id` of the program."""
        return program_id(self.program)

    def to_json(self) -> str:
        """The file's text; `from_json` gives an equal one back."""
        data = {
            "schema": SCHEMA,
            "id": self.id,
            "saehook": self.saehook,
            "program": json.loads(self.program.to_json()),
            "model": dataclasses.asdict(self.model),
            "saes": [dataclasses.asdict(sae) for sae in self.saes],
            "replay": dataclasses.asdict(self.replay),
        }
        return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> ProgramFile:
        """A program file from its text.

        Raises:
            FormatError: not JSON, an unknown schema or field, a value of the wrong kind, or a program that does not have
                the file's id; the message says where.
        """
        data, fields = from_json(text, "file"), {"schema", "id", "saehook", "program", "model", "saes", "replay"}
        check_fields(data, "the file", fields, fields)
        if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
            raise FormatError(
                f"schema is {data['schema']!r}; this version reads program files of schema {SCHEMA}. Update saehook."
            )
        if not isinstance(data["saes"], list):
            raise FormatError(f"saes is {data['saes']!r}; a list is expected.")
        try:
            program = Program.from_data(data["program"])
        except FormatError as error:
            raise FormatError(f"within program: {error}") from None
        file = ProgramFile(
            program=program,
            model=_record(ModelRef, data["model"], "model"),
            saes=tuple(_record(SAERef, sae, f"saes[{i}]") for i, sae in enumerate(data["saes"])),
            replay=_record(ReplayVector, data["replay"], "replay"),
            saehook=_text(data["saehook"], "saehook"),
        )
        for i, sae in enumerate(file.saes):
            if sae.path is not None and (sae.path.startswith("/") or ".." in sae.path.split("/")):
                raise FormatError(f"saes[{i}].path is {sae.path!r}; a folder below the repository's top is expected.")
        if not file.replay.ids or not file.replay.new_ids or len(file.replay.new_ids) != len(file.replay.top5):
            raise FormatError(
                f"replay has {len(file.replay.ids)} ids, {len(file.replay.new_ids)} new_ids and {len(file.replay.top5)} top5; "
                "at least one of each, and as many top5 as new_ids are expected."
            )
        if data["id"] != file.id:
            raise FormatError(
                f"id is {data['id']!r}, but the program in the file has {file.id}: it was changed after it was written. Ask for "
                "the file again, or make a new one with save_program."
            )
        return file

    def card(self) -> str:
        """The README.md of its repository: what it does edit by edit, on which model, how to use it, what it gives."""
        program = self.program
        edits = [f"{i}. `{edit}`" for i, edit in enumerate(program.edits, 1)]
        more = [f"`splice`: every token becomes {'its' if self.saes else 'the'} reconstruction"] * program.splice
        more += [f"`error`: {program.error}"] * (program.error is not None)
        more += [f"`norm`: {program.norm}"] * (program.norm is not None)
        base = [f"base_model: {json.dumps(self.model.id)}"] * ("/" in self.model.id)
        revision = f", revision `{self.model.revision}`" if self.model.revision else ""
        lines = [
            *("---", "library_name: saehook", *base, "tags:", f"- {TAG}", "---", ""),
            *("# A program of edits for a language model", ""),
            f"Program `{self.id}`, written by saehook {self.saehook}. Each edit acts on "
            "latents of a sparse autoencoder while the model runs; no weight is changed.",
            *("", "## What it does", "", *(edits or ["No edit of a latent."]), *(f"- {text}" for text in more), ""),
            *("## On what", ""),
            f"- Language model `{self.model.id}`{revision}: {self.model.kind}, {self.model.layers} layers of width "
            f"{self.model.width}.",
            *(f"- SAE at `{sae.site}`: {_origin(sae)}." for sae in self.saes),
            *(
                "",
                "## How to use it",
                "",
                "```sh",
                "saehook replay hf:OWNER/NAME  # same, or drifted, and what differs",
            ),
            'saehook generate "your prompt" --edits hf:OWNER/NAME',
            *("```", "", "## What it gives", ""),
            f"After the prompt `{json.dumps(self.replay.prompt)}`, in {self.replay.dtype}, the five likeliest tokens with their "
            f"log-probabilities (to be met within {self.replay.tolerance:g}):",
            *("", "| token | five likeliest ids |", "|---|---|"),
        ]
        for new, top in zip(self.replay.new_ids, self.replay.top5, strict=True):
            lines.append(f"| {new} | " + ", ".join(f"{token} ({value:.4f})" for token, value in top) + " |")
        return "\n".join(lines) + "\n"


def canonical(program: Program) -> str:
    """The program as canonical JSON: ASCII, keys sorted, no spaces, floats in their shortest form that reads back."""
    return json.dumps(json.loads(program.to_json()), sort_keys=True, separators=(",", ":"), allow_nan=False)


def program_id(program: Program) -> str:
    """sha256 of the canonical JSON, hexadecimal: the same for the same program, wherever it was made."""
    return hashlib.sha256(canonical(program).encode()).hexdigest()


def write_program(file: ProgramFile, path: str | Path) -> Path:
    """Write a program file, whole or not at all.

    Raises:
        FileError: the folder cannot be written.
    """
    path = Path(path)
    atomic_write(path, file.to_json())
    return path


def load_program(path: str | Path) -> ProgramFile:
    """Read a program file, or that of a repository on the hub: `hf:owner/name[,revision=..]`.

    Raises:
        FileError: it is missing or cannot be read. FormatError: it is no whole program file; the message says where.
    """
    return _within(path, ProgramFile.from_json)


def load_edits(path: str | Path) -> tuple[Program, ProgramFile | None]:
    """The program of a program file, and that file; or of a file with the bare program (`Program.to_json`).

    Raises:
        FileError, FormatError: as `load_program` says.
    """

    def read(text: str) -> tuple[Program, ProgramFile | None]:
        data = from_json(text, "file")
        if isinstance(data, dict) and "program" in data:
            file = ProgramFile.from_json(text)
            return file.program, file
        return Program.from_data(data), None

    return _within(path, read)


def push_program(file: ProgramFile, repo: str, *, private: bool = False) -> hub.HubPlace:
    """Upload a program file with its card to the repository `owner/name` on the hub; `load_program(place.name)` reads it.

    Raises:
        ArgumentError: no such name. FileError: it cannot be written there.
    """
    files = {FILE: file.to_json(), CARD: file.card().replace("OWNER/NAME", repo.removeprefix(hub.PREFIX))}
    return hub.upload(repo, files, message=f"Program {file.id[:12]}", private=private)


def _within(path: str | Path, read: Callable[[str], Any]) -> Any:
    """`read(text)` of a file here or on the hub; its errors begin with the path."""
    local = hub.download(hub.parse(str(path)), FILE, max_bytes=MAX_BYTES) if hub.is_hub_name(path) else Path(path)
    try:
        if (size := local.stat().st_size) > MAX_BYTES:
            raise FormatError(f"{path} has {size:,} bytes; a program has at most {MAX_BYTES:,}.")
        text = local.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path} is no text file; the JSON of a program is expected.") from None
    except OSError as error:
        raise FileError(error.errno, f"cannot read {path}: {error.strerror}. Name a program file.") from None
    try:
        return read(text)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _origin(sae: SAERef) -> str:
    """Where an SAE is from and how to know it, in words."""
    where = f"`{sae.repo}`" + (f", `{sae.path}`" if sae.path else "") if sae.repo else f"`{sae.path}`"
    revision = f", revision `{sae.revision}`" if sae.revision else ""
    return f"{where}{revision}; sha256 " + ", ".join(f"`{name}` {sha[:12]}" for name, sha in sae.sha256.items())


# --- reading: each check names the place in the JSON -----------------------------------------------------------------


def _record(kind: type, data: Any, path: str) -> Any:
    """An instance of the dataclass; its annotations say which check each field gets."""
    fields = dataclasses.fields(kind)
    missing = dataclasses.MISSING
    required = {f.name for f in fields if f.default is missing and f.default_factory is missing}
    check_fields(data, path, {f.name for f in fields}, required)
    checks = {f.name: _CHECKS[str(f.type)] for f in fields}
    return kind(**{name: checks[name](value, f"{path}.{name}") for name, value in data.items()})


def _refuse(value: Any, path: str, expected: str) -> FormatError:
    return FormatError(f"{path} is {value!r:.80}; {expected} is expected.")


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise _refuse(value, path, "a string")
    return value


def _whole(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise _refuse(value, path, "a whole number from 0")
    return value


def _finite(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise _refuse(value, path, "a finite number")
    return float(value)


def _hashes(value: Any, path: str) -> dict[str, str]:
    check_fields(value, path, value)
    for name, sha in value.items():
        if not re.fullmatch(r"\w[\w.-]*", name) or not isinstance(sha, str) or not re.fullmatch("[0-9a-f]{64}", sha):
            raise _refuse({name: sha}, path, "a sha256 by file name")
    return value


def _items(value: Any, path: str, check: Callable[[Any, str], Any]) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _refuse(value, path, "a list")
    return tuple(check(item, f"{path}[{i}]") for i, item in enumerate(value))


def _likely(value: Any, path: str) -> tuple[int, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise _refuse(value, path, "an id and its log-probability")
    return _whole(value[0], f"{path}[0]"), _finite(value[1], f"{path}[1]")


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "str": _text,
    "str | None": lambda value, path: None if value is None else _text(value, path),
    "int": _whole,
    "float": _finite,
    "Mapping[str, str]": _hashes,
    "tuple[int, ...]": lambda value, path: _items(value, path, _whole),
    "tuple[tuple[tuple[int, float], ...], ...]": lambda value, path: _items(
        value, path, lambda inner, place: _items(inner, place, _likely)
    ),
}
