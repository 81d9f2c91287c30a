"""Labels and notes about latents, in a file beside the SAE: `latents.json`, `{"schema": 1, "latents": {"123": {"label": ...}}}`."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from saehook.errors import ArgumentError, FormatError
from saehook.fields import check_fields, from_json
from saehook.files import atomic_write
from saehook.sae import SAE

FILE = "latents.json"
SCHEMA = 1
MAX_LABEL, MAX_NOTES = 200, 4000
"""Characters."""
_writing = threading.Lock()


@dataclass(frozen=True)
class LatentNote:
    """What somebody wrote about a latent."""

    label: str = ""
    """A few words: what it stands for."""
    notes: str = ""

    def __post_init__(self) -> None:
        for name, most in (("label", MAX_LABEL), ("notes", MAX_NOTES)):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > most:
                raise ArgumentError(
                    f"the {name} of a latent has {len(str(text))} characters; a text of at most {most} is expected."
                )


def read_notes(sae: SAE) -> dict[int, LatentNote]:
    """Labels and notes by latent; none where the SAE came from no folder or nobody has written any.

    Raises:
        FormatError: the file is none of these.
    """
    path = None if sae.source is None else sae.source / FILE
    if path is None or not path.is_file():
        return {}
    data = from_json(path.read_text(encoding="utf-8"), FILE)
    check_fields(data, FILE, {"schema", "latents"}, {"schema", "latents"})
    if data["schema"] != SCHEMA or not isinstance(data["latents"], dict):
        raise FormatError(
            f"{path} has the schema {data['schema']!r}; this version reads schema {SCHEMA}, with an object of latents."
        )
    notes = {}
    for key, fields in data["latents"].items():
        check_fields(fields, f"{FILE}: latent {key}", {"label", "notes"})
        if not key.isdecimal():
            raise FormatError(f"{path} names the latent {key[:20]!r}; a number is expected.")
        notes[int(key)] = LatentNote(**fields)
    return notes


def write_note(sae: SAE, latent: int, note: LatentNote) -> Path:
    """Keep what is said about a latent beside its SAE; an empty note forgets it. The file's path is returned.

    Raises:
        LatentError: the SAE does not have it. ArgumentError: the SAE came from no folder. FileError: it cannot be written there.
    """
    sae.check_latents((latent,))
    if sae.source is None:
        raise ArgumentError(
            "this SAE came from no folder, so nothing can be kept beside it. Save it and load it from there."
        )
    path = sae.source / FILE
    with _writing:
        notes = read_notes(sae)
        notes.pop(latent, None)
        if note != LatentNote():
            notes[latent] = note
        latents = {str(key): asdict(notes[key]) for key in sorted(notes)}
        atomic_write(path, json.dumps({"schema": SCHEMA, "latents": latents}, indent=1, ensure_ascii=False) + "\n")
    return path
