"""Labels beside an SAE."""

from __future__ import annotations

import pytest

from saehook import SAE, SAEConfig, TopK, load_sae, save_sae
from saehook.errors import ArgumentError, FormatError, LatentError
from saehook.latent_notes import FILE, LatentNote, read_notes, write_note


@pytest.fixture
def sae(tmp_path) -> SAE:
    save_sae(SAE(SAEConfig(d_in=4, d_sae=8, activation=TopK(k=2)), site="x"), tmp_path / "sae")
    return load_sae(tmp_path / "sae")


def test_notes_come_back(sae):
    assert read_notes(sae) == {}
    write_note(sae, 7, LatentNote("<b>é</b>", "line\nline"))
    path = write_note(sae, 3, LatentNote("three"))
    assert path.parent == sae.source
    assert read_notes(sae) == {3: LatentNote("three"), 7: LatentNote("<b>é</b>", "line\nline")}
    write_note(sae, 7, LatentNote())
    assert read_notes(load_sae(path.parent)) == {3: LatentNote("three")}


def test_what_cannot_be_kept_is_said(sae):
    with pytest.raises(LatentError, match="8 is outside"):
        write_note(sae, 8, LatentNote("x"))
    with pytest.raises(ArgumentError, match="201 characters"):
        LatentNote("x" * 201)
    with pytest.raises(ArgumentError, match="came from no folder"):
        write_note(SAE(sae.config), 1, LatentNote("x"))
    for text in ("{", "[]", '{"schema": 2, "latents": {}}', '{"schema": 1, "latents": {"x": {"label": ""}}}'):
        (sae.source / FILE).write_text(text)
        with pytest.raises(FormatError):
            read_notes(sae)
