"""The bundled files: they are what their cards say."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import saehook
from saehook import corpus
from saehook.config import BatchTopK, MaskRule, TopK
from saehook.errors import ArgumentError
from saehook.evaluation import evaluate
from saehook.latent_notes import read_notes
from saehook.tokenization import window_size, windows

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"


@pytest.fixture(scope="module")
def model():
    return saehook.HookedModel.from_pretrained(saehook.bundled("lm"))


def test_sizes():
    files = [file for file in CHECKPOINTS.rglob("*") if file.is_file()]
    assert max(file.stat().st_size for file in files) < 15e6
    assert sum(file.stat().st_size for file in files) < 40e6


def test_unknown_name():
    with pytest.raises(ArgumentError, match="sae-mlp"):
        saehook.bundled("nothing")


def test_the_model_was_trained_on_the_text_that_its_card_names(model):
    card = (saehook.bundled("lm") / "README.md").read_text()
    assert all(module in card for module in corpus.HELD_OUT_MODULES)
    notes = json.loads((saehook.bundled("lm") / "training.json").read_text())
    text = windows(corpus.read_documents(corpus.held_out_files()), model.tokenizer, 256, max_tokens=10_000)
    loss = model.loss(text.ids[:16])
    assert loss == pytest.approx(notes["held_out"]["python"]["nats_per_token"], abs=0.4)


@pytest.mark.parametrize(
    ("name", "architecture", "activation"), [("sae", "topk", TopK(k=32)), ("sae-mlp", "jumprelu", BatchTopK(k=32))]
)
def test_sae_is_stored_in_bf16_with_all_its_facts(name, architecture, activation):
    sae = saehook.load_sae(saehook.bundled(name))
    config = json.loads((saehook.bundled(name) / "cfg.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architecture"] == architecture
    assert sae.config.activation == activation
    assert sae.d_sae == 16 * sae.d_in
    assert sae.site is not None
    assert sae.stats is not None
    assert {"fingerprint", "evaluation", "lm", "text"} <= set(sae.metadata)
    norms = torch.linalg.vector_norm(sae.W_dec, dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", ["sae", "sae-mlp"])
def test_the_mask_rule_is_read_in_words_or_fields(name):
    recorded = json.loads((saehook.bundled(name) / "cfg.json").read_text())["metadata"]["saehook"]["mask_rule"]
    sae = saehook.load_sae(saehook.bundled(name))
    if isinstance(recorded, str):
        assert sae.mask_rule == MaskRule()
        assert recorded == str(sae.mask_rule)
    else:
        assert dataclasses.asdict(sae.mask_rule) == recorded
    assert "mask_rule" not in sae.metadata


def test_fingerprints_fit_the_bundled_model(model):
    saes = [saehook.load_sae(saehook.bundled(name)) for name in ("sae", "sae-mlp")]
    hooked = model.attach({sae.site: sae for sae in saes}, check="fingerprint")
    hooked.detach()


@pytest.mark.slow
def test_the_recorded_evaluation_comes_out_again(model):
    """On fewer tokens; the same to a few hundredths where the standard library is the same."""
    recorded = {row["site"]: row for row in json.loads((CHECKPOINTS / "eval.json").read_text())["results"]}
    saes = [saehook.load_sae(saehook.bundled(name)) for name in ("sae", "sae-mlp")]
    hooked = model.attach({sae.site: sae for sae in saes})
    text = windows(
        corpus.read_documents(corpus.held_out_files()), model.tokenizer, window_size(model.context), max_tokens=6000
    )
    rows = evaluate(hooked, text, progress=False).results
    hooked.detach()
    assert {row.site for row in rows} == set(recorded)
    for row in rows:
        assert row.ce_recovered_zero == pytest.approx(recorded[row.site]["ce_recovered_zero"], abs=0.05)
        assert row.fvu == pytest.approx(recorded[row.site]["fvu"], abs=0.1)
        assert row.l0 == pytest.approx(recorded[row.site]["l0"], rel=0.3)


LABELLED = """class Stack:
    def __init__(self, path):
        with open(path) as file:
            self.items = load(file)
            file.read()

She looked out of the window, and down to the door. "Look at me," she said, standing beside the fire, and he sat.
"""


def test_labelled_latents_fire_most_on_what_their_labels_quote(model):
    sae = saehook.load_sae(saehook.bundled("sae"))
    latents = model.attach(sae).latents(LABELLED)
    notes = read_notes(sae)
    assert notes
    for latent, note in notes.items():
        most = max(range(len(latents.tokens)), key=lambda i: float(latents.acts[i, latent]))
        assert latents.tokens[most].strip().casefold() in re.findall("“(.+?)”", note.label), latent
