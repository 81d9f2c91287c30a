"""Other tools' layouts: what is folded, what is refused; the commands that convert and say what a file is. What the tools
themselves make of these files is in parity/test_written.py."""

from __future__ import annotations

import json

import pytest
import torch
from builders import build_lm, byte_tokenizer, random_ids, tiny_sae
from safetensors.torch import load_file

from saehook.bundle import bundled
from saehook.checkpoint import load_sae, save_sae
from saehook.cli import main
from saehook.config import BatchTopK, JumpReLU, SAEConfig, TopK
from saehook.errors import ArgumentError, MissingStatError
from saehook.sae import SAE
from saehook.writers import write_sae

X = torch.randn(7, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("layout", ["dictionary_learning", "sparsify"])
def test_b_dec_is_folded_where_the_tool_subtracts_it(layout, tmp_path):
    sae = tiny_sae(activation=TopK(k=6), subtract_b_dec=False)
    back = load_sae(write_sae(sae, tmp_path / "layers.1", layout))
    assert back.config.subtract_b_dec
    assert not torch.equal(back.b_enc, sae.b_enc)
    with torch.no_grad():
        torch.testing.assert_close(back(X).acts, sae(X).acts, rtol=1e-5, atol=1e-5)


def test_one_threshold_or_many_decide_the_class(tmp_path):
    sae = tiny_sae(activation=BatchTopK(k=6))
    for value, kind in ((0.5, "BatchTopKSAE"), (torch.linspace(0.1, 0.9, 48), "JumpReluAutoEncoder")):
        sae.set_threshold(value)
        write_sae(sae, tmp_path / kind, "dictionary_learning")
        assert json.loads((tmp_path / kind / "config.json").read_text())["trainer"]["dict_class"] == kind
        with torch.no_grad():
            torch.testing.assert_close(load_sae(tmp_path / kind)(X).x_hat, sae(X).x_hat, rtol=1e-5, atol=1e-5)


def test_the_site_and_lm_are_written_where_the_layout_has_a_place(tmp_path):
    sae = tiny_sae(activation=TopK(k=6), site="layers.3.resid_post")
    sae.metadata["lm"] = {"id": "me/lm"}
    write_sae(sae, tmp_path, "dictionary_learning")
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert (trainer["layer"], trainer["submodule_name"], trainer["lm_name"]) == (3, "resid_post_layer_3", "me/lm")
    back = load_sae(tmp_path)
    assert back.site == "layers.3.resid_post"
    save_sae(sae, tmp_path / "ours")
    metadata = json.loads((tmp_path / "ours" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == "blocks.3.hook_resid_post"
    again = load_sae(tmp_path / "ours")
    assert "saelens" not in again.metadata
    assert again.metadata == sae.metadata


def test_what_a_layout_has_no_place_for_is_refused(tmp_path):
    transcoder = SAE(
        SAEConfig(d_in=32, d_sae=48, d_out=16, subtract_b_dec=False, activation=TopK(k=4)),
        site="a:input",
        site_out="b:output",
    )
    layer_norm = tiny_sae(activation=TopK(k=6), normalize="layer_norm")
    unset = tiny_sae(activation=BatchTopK(k=6))
    unset.register_parameter("threshold", None)
    broken = tiny_sae()
    with torch.no_grad():
        broken.W_enc[0, 0] = torch.nan
    cases = [
        (transcoder, "dictionary_learning", "no place for transcoders"),
        (layer_norm, "dictionary_learning", r"normalise each token \(layer_norm\)"),
        (broken, "dictionary_learning", "W_enc holds NaN"),
        (transcoder, "sparsify", "not 16 from 32"),
        (layer_norm, "sparsify", "normalise each token"),
        (tiny_sae(activation=JumpReLU()), "sparsify", "no place for the activation JumpReLU"),
        (tiny_sae(), "onnx", "layout 'onnx' is unknown; expected saehook, dictionary_learning, sparsify"),
    ]
    for sae, layout, match in cases:
        with pytest.raises(ArgumentError, match=match):
            write_sae(sae, tmp_path / "x", layout)
    with pytest.raises(MissingStatError, match="no threshold"):
        write_sae(unset, tmp_path / "x", "dictionary_learning")
    assert not (tmp_path / "x").exists()


def test_convert_there_and_back(tmp_path, capsys):
    sae = tiny_sae(activation=TopK(k=6), site="layers.1.resid_post")
    save_sae(sae, tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "layers.1"), "--to", "sparsify"]) == 0
    assert set(load_file(tmp_path / "layers.1" / "sae.safetensors")) == {
        "encoder.weight",
        "encoder.bias",
        "W_dec",
        "b_dec",
    }
    assert (
        main(["convert", str(tmp_path / "layers.1"), str(tmp_path / "back"), "--site", "blocks.1.hook_resid_post"]) == 0
    )
    back = load_sae(tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(back(X).acts, sae(X).acts)
    assert "wrote" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "back")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_info_says_what_a_file_is_and_whether_it_fits(tmp_path, capsys):
    lm = build_lm("llama")
    lm.save_pretrained(tmp_path / "lm")
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    write_sae(tiny_sae(activation=TopK(k=6), site="layers.1.resid_post"), tmp_path / "dl", "dictionary_learning")
    file = tmp_path / "info.json"
    assert main(["info", str(tmp_path / "dl"), "--lm", str(tmp_path / "lm"), "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "dictionary_learning" in said
    assert "layers.1.resid_post (resid_post_layer_1 there)" in said
    assert "fits         yes, lm" in said
    data = json.loads(file.read_text())
    assert (data["d_in"], data["d_sae"], data["misfits"]) == (32, 48, [])
    save_sae(tiny_sae(24, site="layers.7.resid_post"), tmp_path / "wrong")
    assert main(["info", str(tmp_path / "wrong"), "--lm", str(tmp_path / "lm")]) == 1
    assert "'layers.7.resid_post' matches no site" in capsys.readouterr().out
    save_sae(tiny_sae(24, site="layers.1.resid_post"), tmp_path / "narrow")
    assert main(["info", str(tmp_path / "narrow"), "--lm", str(tmp_path / "lm")]) == 1
    assert "reads 24 values a token, and layers.1.resid_post has 32" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "narrow")]) == 0
    assert "not tried: name a model with --lm" in capsys.readouterr().out
    assert main(["info", str(bundled("sae"))]) == 0
    assert "fits         yes, lm" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "wrong"), "--lm", str(tmp_path / "dl")]) == 2


def test_a_published_site_name_attaches_after_conversion(models_by_name, tmp_path):
    model, _ = models_by_name("llama")
    sae = tiny_sae(activation=TopK(k=6), site="blocks.1.hook_resid_post")
    back = load_sae(write_sae(sae, tmp_path, "saehook"))
    hooked = model.attach(back)
    assert hooked.sites == ["layers.1.resid_post"]
    assert hooked.latents(random_ids(5)).acts.shape == (5, 48)
    hooked.detach()
