"""SAEs on a hub, here a small one on this machine; their card; the JSON of latents."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from builders import random_ids, tiny_sae
from fake_hub import FakeHub, fake_hub

from saehook.checkpoint import load_sae, save_sae
from saehook.cli import main
from saehook.config import MaskRule, TopK
from saehook.errors import ArgumentError, FileError, LatentError
from saehook.model_card import model_card, push_to_hub
from saehook.neuronpedia import neuronpedia_json


@pytest.fixture
def hub(monkeypatch) -> Iterator[FakeHub]:
    import huggingface_hub
    from huggingface_hub import constants

    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        yield hub


def sae(site: str = "layers.1.resid_post", **options: Any) -> Any:
    made = tiny_sae(activation=TopK(k=6), site=site, **options)
    made.metadata |= {
        "lm": {"id": "me/lm", "revision": "abc123"},
        "tokens_seen": 5000,
        "evaluation": {"ce_clean": 2.5, "delta_ce": 0.0762, "l0": 6.0, "dead_share": 0.25, "fvu": math.pi / 10},
    }
    return made


def test_saes_are_pushed_with_a_card_and_come_back(hub, tmp_path):
    one, other = sae(), sae("model.norm:output", seed=3)
    one.mask_rule = MaskRule(skip_first_tokens=1, max_norm_ratio=10.0, median_norm=2.0)
    place = push_to_hub([one, other], "me/saes", licence="mit")
    assert place.revision == hub.commit_id("me/saes", 0)
    files = hub.repos["me/saes"][-1]
    folders = ("layers.1.resid_post", "model.norm.output")
    names = ("cfg.json", "sae_weights.safetensors", "stats.safetensors", "density.svg")
    assert set(files) == {"README.md", *(f"{folder}/{name}" for folder in folders for name in names)}
    for folder, pushed in zip(folders, (one, other), strict=True):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(files[f"{folder}/{name}"])
        back = load_sae(tmp_path / folder)
        assert torch.equal(back.W_enc, pushed.W_enc)
        assert back.site == pushed.site
        assert ElementTree.fromstring(files[f"{folder}/density.svg"]).tag.endswith("svg")
    card = files["README.md"].decode()
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["license"], facts["base_model"], facts["library_name"]) == ("mit", "me/lm", "saehook")
    assert {"saelens", "sparse-autoencoder"} <= set(facts["tags"])
    assert (
        "| `layers.1.resid_post` | layers.1.resid_post | blocks.1.hook_resid_post | TopK(k=6) | 32 | 48 | 5,000 tokens |"
        in body
    )
    assert "| folder | loss clean | delta | FVU | L0 | dead |" in body
    assert "| `layers.1.resid_post` | 2.500 | 0.076 | 0.314 | 6.0 | 25.0% |" in body
    assert "![How often the latents of layers.1.resid_post fire](layers.1.resid_post/density.svg)" in body
    assert 'saehook.load_sae("me/saes", "layers.1.resid_post")' in body
    assert "the first 1 tokens of each text and tokens with a norm above 20, 10 × the median were left out" in body
    assert "commit abc123" in body
    assert "## Licence\n\nmit" in body
    assert card.count("Evaluation") == 1


def test_a_bare_sae_has_a_card_without_what_is_not_known():
    card = model_card({"layers.1.mlp_in": tiny_sae(site="layers.1.mlp_in", stats=False)}, "me/saes", "apache-2.0")
    for absent in ("Evaluation", "Notes", "![", "base_model"):
        assert absent not in card
    assert 'from_pretrained("the language model")' in card


def test_push_from_the_shell(hub, tmp_path, capsys):
    save_sae(sae(), tmp_path, dtype=torch.bfloat16)
    assert main(["push", "me/saes", str(tmp_path), "--licence", "mit", "--private"]) == 0
    assert hub.private == {"me/saes"}
    config = json.loads(hub.repos["me/saes"][-1]["layers.1.resid_post/cfg.json"])
    assert config["dtype"] == "bfloat16"
    assert "pushed 1 to hf:me/saes,revision=" in capsys.readouterr().out


def test_what_is_not_pushed(hub):
    for saes, repo, licence, match in [
        ([], "me/saes", "mit", "at least one"),
        ([sae(), sae()], "me/saes", "mit", "one for each site"),
        (tiny_sae(), "me/saes", "mit", "does not say which site"),
        (sae(), "me/saes", "MIT License", "as the hub spells it"),
        (sae(), "saes", "mit", "no name on the hub"),
    ]:
        with pytest.raises(ArgumentError, match=match):
            push_to_hub(saes, repo, licence=licence)
    assert not hub.repos


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(FileError, match="cannot write hf:me/saes"):
        push_to_hub(sae(), "me/saes", licence="mit")


# --- Neuronpedia -------------------------------------------------------------------------------------------------------


def test_latents_as_neuronpedia_imports_them(models_by_name):
    model, lm = models_by_name("llama")
    coder = tiny_sae(activation="relu", site="layers.1.resid_post")
    hooked = model.attach(coder)
    ids = torch.tensor([random_ids(11, seed=s, bos=True) for s in range(9)])
    batch = json.loads(neuronpedia_json(hooked, ids, [3, 40], examples=4, source_set="res-mine"))
    assert (batch["layer"], batch["sae_set"], batch["sae_id_suffix"]) == (1, "res-mine", None)
    with torch.no_grad():
        acts = coder.encode(model.activations(ids, "layers.1.resid_post")["layers.1.resid_post"])
    acts[:, 0] = 0  # BOS
    for feature in batch["features"]:
        values = acts[..., feature["feature_index"]]
        assert feature["frac_nonzero"] == pytest.approx(float((values[:, 1:] != 0).double().mean()))
        best = values.amax(1).topk(4)
        for example, row in zip(feature["activations"], best.indices.tolist(), strict=True):
            torch.testing.assert_close(torch.tensor(example["values"]), values[row], rtol=0, atol=1e-4)
            assert example["qualifying_token_index"] == int(values[row].argmax())
            assert len(example["tokens"]) == len(example["values"]) == 12
        effects = lm.lm_head.weight.detach() @ coder.W_dec[feature["feature_index"]].detach()
        assert feature["pos_values"] == pytest.approx(effects.topk(10).values.tolist(), abs=1e-3)
        assert feature["neg_values"] == pytest.approx((-(-effects).topk(10).values).tolist(), abs=1e-3)
        for name in ("freq", "logits"):
            heights, middles = (feature[f"{name}_hist_data_bar_{what}"] for what in ("heights", "values"))
            assert len(heights) == len(middles) == 50
        assert sum(feature["freq_hist_data_bar_heights"]) == int((values != 0).sum())
        assert sum(feature["logits_hist_data_bar_heights"]) == 300
    with pytest.raises(LatentError):
        neuronpedia_json(hooked, ids, [48])
    with pytest.raises(ArgumentError, match="at least one window"):
        neuronpedia_json(hooked, ids[0], [3])
    hooked.detach()
