"""What a reader of a format finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saehook.config import SAEConfig
from saehook.formats.places import depends_on_the_model, inside_a_norm, our_site


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a file says, or its place tells, about the SAE in it."""

    format: str
    """`saelens`, `sparsify`, `gemma_scope`, ...: the name of the module in `saehook.formats`."""
    peer_site: str | None = None
    """Where x is read, as the peer spells it."""
    peer_site_out: str | None = None
    """Where a transcoder writes, as the peer spells it."""
    lm: str | None = None
    """The language model: an id on the hub where the file or its repository has one, else the peer's short name."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The peer's own configuration, as it stands in the file."""
    unknown: tuple[str, ...] = ()
    """Keys of that configuration that the reader does not know; they are kept in `config`."""
    notes: tuple[str, ...] = ()
    """What the reader decided or could not know, a sentence each."""
    in_our_grammar: bool = False
    """saehook wrote the names of the sites: they stay as they are."""

    @property
    def site(self) -> str | None:
        """`peer_site` in our grammar, where the name alone tells; as the peer spells it where only the model can."""
        return self._ours(self.peer_site)

    @property
    def site_out(self) -> str | None:
        """`peer_site_out` in our grammar."""
        return self._ours(self.peer_site_out)

    def _ours(self, name: str | None) -> str | None:
        return name if self.in_our_grammar else our_site(name, self.lm)

    def all_notes(self) -> tuple[str, ...]:
        """`notes`, and what the names of keys and sites give cause to say."""
        notes = list(self.notes)
        if self.unknown:
            notes.append(f"keys of its configuration that saehook does not know: {', '.join(self.unknown)}")
        for name in (self.peer_site, self.peer_site_out):
            if self.lm is None and not self.in_our_grammar and depends_on_the_model(name):
                notes.append(
                    f"nothing says which language model it is of, and {name} is taken to be {our_site(name)}; where a norm "
                    "follows (Gemma 2 and 3) that is another value: name the site when you attach it there"
                )
            if name is not None and inside_a_norm(name):
                notes.append(
                    f"{name} is the value inside the norm, before its gain: no site that can be read here. "
                    f"{name.replace('blocks', 'layers').rpartition('.ln')[0]}.mlp_in is that value times the gain"
                )
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, for the metadata of an SAE."""
        facts = {"format": self.format, "site": self.peer_site, "site_out": self.peer_site_out, "lm": self.lm}
        facts |= {"config": dict(self.config), "notes": list(self.all_notes())}
        return {name: value for name, value in facts.items() if value}


class Contents(NamedTuple):
    """What `read(files)` of a format returns."""

    config: SAEConfig
    tensors: dict[str, Tensor]
    """`W_enc` [d_in, d_sae], `W_dec` [d_sae, d_out], `b_enc`, `b_dec`, and as they are needed `threshold` [d_sae] and `W_skip`
    [d_out, d_in]."""
    provenance: Provenance


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a path is. No tensor was read for it."""

    path: Path
    """The file of the weights."""
    config: SAEConfig
    dtype: torch.dtype
    """Of the weights in the file."""
    provenance: Provenance

    @property
    def format(self) -> str:
        """Its name, `saelens` for ours."""
        return self.provenance.format

    @property
    def lm(self) -> str | None:
        """The language model that it was trained on, if anything says so."""
        return self.provenance.lm

    @property
    def site(self) -> str | None:
        """Where x is read, in our grammar."""
        return self.provenance.site

    @property
    def site_out(self) -> str | None:
        """Where a transcoder writes, in our grammar."""
        return self.provenance.site_out

    @property
    def peer_site(self) -> str | None:
        """Where x is read, as the peer spells it."""
        return self.provenance.peer_site

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader decided or could not know, and keys that it does not know."""
        return self.provenance.all_notes()


def with_notes(provenance: Provenance, *notes: str) -> Provenance:
    """The same with more to say."""
    return dataclasses.replace(provenance, notes=(*provenance.notes, *notes))
