"""What says which model, SAEs and text numbers are of."""

import hashlib

import torch
from builders import build_lm, byte_tokenizer, tiny_sae

from saehook import HookedModel, load_sae, save_sae
from saehook.provenance import lm_facts, sae_facts, text_facts, versions

SITE = "layers.1.resid_post"


def test_a_model_is_known_by_its_commit_or_its_weights():
    lm = build_lm("llama")
    hooked = HookedModel(lm, byte_tokenizer()).attach({SITE: tiny_sae()})
    first = lm_facts(hooked)
    assert first == lm_facts(HookedModel(build_lm("llama"), byte_tokenizer()).attach({SITE: tiny_sae()}))
    with torch.no_grad():
        lm.lm_head.weight[0, 0] += 1e-3
    assert lm_facts(hooked)["weights_sha256"] != first["weights_sha256"]
    lm.config._commit_hash = "abc"
    assert (lm_facts(hooked)["revision"], lm_facts(hooked)["weights_sha256"]) == ("abc", None)


def test_an_sae_is_known_by_its_files(tmp_path):
    model = HookedModel(build_lm("llama"), byte_tokenizer())
    made = model.attach({SITE: tiny_sae()})
    assert sae_facts(made, checked=False)[SITE]["files"] == {}
    made.detach()
    save_sae(tiny_sae(site=SITE), tmp_path / "sae")
    hooked = model.attach(load_sae(tmp_path / "sae"))
    facts = sae_facts(hooked, checked=True)[SITE]
    weights = (tmp_path / "sae" / "sae_weights.safetensors").read_bytes()
    assert facts["files"]["sae_weights.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert (facts["site"], facts["site_out"], facts["fingerprint"]) == (SITE, SITE, "none in the file")


def test_a_text_is_known_by_its_ids():
    ids = torch.arange(12).reshape(3, 4)
    facts = text_facts(ids)
    assert (facts["ids"], facts["windows"], facts["window"]) == (12, 3, 4)
    assert facts == text_facts(ids.int())
    assert facts["ids_sha256"] != text_facts(ids.flip(0))["ids_sha256"]


def test_versions_are_of_what_computes():
    assert {"python", "torch", "nnsight"} <= set(versions())
