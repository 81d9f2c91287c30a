"""Sites under the names of other tools: each is understood, comes back as ours, and is refused where it may mean two places."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from builders import ARCHITECTURES, build_lm, byte_tokenizer, random_ids, tiny_sae

from saehook.cli import main
from saehook.config import TopK, TrainConfig
from saehook.corpus import Document
from saehook.edits import add_vector, steer
from saehook.errors import ArgumentError, SiteError
from saehook.hooked_model import HookedModel
from saehook.site_spellings import TOOLS
from saehook.sites import named_sites, resolve, same_site, spelling
from saehook.training_run import train_saes

IDS = random_ids(6, seed=3, bos=True)


@pytest.fixture(scope="module")
def lms() -> dict[str, Any]:
    return {name: build_lm(name) for name in ("llama", "gemma2", "gpt2", "gpt_neox", "opt")}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_tool_calls_a_site_is_read_as_that_site(name):
    lm = build_lm(name)
    for site in named_sites(lm):
        written = {tool: spelling(lm, site, tool) for tool in TOOLS}
        assert written["transformerlens"]
        assert written["interp-engine"]
        assert written["huggingface"]
        for tool, text in written.items():
            if text is None or (tool == "huggingface" and site.in_place):
                continue  # a write to the module's input alone does not reach the residual stream: another site
            assert resolve(lm, text) == [site], (tool, text)


BOTH = {
    "blocks.1.hook_resid_pre": "layers.1.resid_pre",
    "blocks.1.hook_resid_post": "layers.1.resid_post",
    "blocks.1.hook_out": "layers.1.resid_post",
    "blocks.1.hook_in": "layers.1.resid_pre",
    "blocks.1.hook_resid_mid": "layers.1.resid_mid",
    "blocks.1.attn.hook_z": "layers.1.attn_z",
    "blocks.1.hook_attn_out": "layers.1.attn_out",
    "blocks.1.hook_mlp_out": "layers.1.mlp_out",
    "blocks.1.mlp.hook_in": "layers.1.mlp_in",
    "blocks.1.mlp.hook_post": "layers.1.mlp_act",
    "resid_post.1": "layers.1.resid_post",
    "resid_mid.1": "layers.1.resid_mid",
    "z.1": "layers.1.attn_z",
    "mlp_in.1": "layers.1.mlp_in",
    "mlp_out_post.1": "layers.1.mlp_out",
    "attn_out_post.1": "layers.1.attn_out",
    "layers_input[1]": "layers.1.resid_pre",
    "layers_output[1]": "layers.1.resid_post",
    "mlps_input[1]": "layers.1.mlp_in",
    "attentions_input[1]": "layers.1.attn_in",
    "resid_post_layer_1": "layers.1.resid_post",
}
LLAMA = {
    "layers.1": "layers.1.resid_post",
    "model.layers.1": "layers.1.resid_post",
    "model.layers.1.output": "layers.1.resid_post",
    "model.layers.1.input": "layers.1.resid_pre",
    "model.layers.1.self_attn.o_proj.input": "layers.1.attn_z",
    "layers.1.mlp.down_proj.input": "layers.1.mlp_act",
    "path.model.layers.1": "layers.1.resid_post",
    "embed_tokens": "model.embed_tokens:output",
    "lm_head": "lm_head:output",
}
CASES = {
    "llama": BOTH
    | LLAMA
    | {
        "layers.1.mlp": "layers.1.mlp_out",
        "layers.1.self_attn": "layers.1.attn_out",
        "mlp_out.1": "layers.1.mlp_out",
        "attn_out.1": "layers.1.attn_out",
        "mlps_output[1]": "layers.1.mlp_out",
        "blocks.1.mlp.hook_out": "layers.1.mlp_out",
        "model.layers.1.post_attention_layernorm.output": "layers.1.mlp_in",
    },
    "gemma2": BOTH
    | LLAMA
    | {  # a module's own output is not what is added to the residual stream
        "layers.1.mlp": "model.layers.1.mlp:output",
        "mlps_output[1]": "model.layers.1.mlp:output",
        "blocks.1.mlp.hook_out": "model.layers.1.mlp:output",
        "blocks.1.attn.hook_out": "model.layers.1.self_attn:output",
        "model.layers.1.post_feedforward_layernorm.output": "layers.1.mlp_out",
        "model.layers.1.pre_feedforward_layernorm.output": "layers.1.mlp_in",
    },
    "gpt2": BOTH
    | {
        "h.1": "layers.1.resid_post",
        "h.1.mlp": "layers.1.mlp_out",
        "transformer.h.1.attn": "layers.1.attn_out",
        "h.1.mlp.c_proj.input": "layers.1.mlp_act",
        "h.1.ln_2.output": "layers.1.mlp_in",
        "wte": "transformer.wte:output",
    },
    "gpt_neox": {
        "layers.1": "layers.1.resid_post",
        "gpt_neox.layers.1.attention": "layers.1.attn_out",
        "blocks.1.hook_mlp_out": "layers.1.mlp_out",
    },
    "opt": {  # no row in the table of architectures
        "decoder.layers.1": "model.decoder.layers.1:output",
        "model.decoder.layers.1.fc2.input": "model.decoder.layers.1.fc2:input",
    },
}


@pytest.mark.parametrize(
    ("architecture", "name", "ours"),
    [(architecture, name, ours) for architecture, cases in CASES.items() for name, ours in cases.items()],
)
def test_names_of_other_tools_are_shown_as_ours(lms, architecture, name, ours):
    assert [site.name for site in resolve(lms[architecture], name)] == [ours]
    assert same_site(lms[architecture], name, ours)


@pytest.mark.parametrize(
    ("architecture", "pattern", "ours"),
    [
        ("llama", "blocks.*.hook_mlp_out", [f"layers.{i}.mlp_out" for i in range(3)]),
        ("llama", "blocks.{1..2}.hook_resid_post", ["layers.1.resid_post", "layers.2.resid_post"]),
        ("llama", "resid_{pre,post}.0", ["layers.0.resid_pre", "layers.0.resid_post"]),
        ("llama", "resid_post.[02]", ["layers.0.resid_post", "layers.2.resid_post"]),
        ("llama", "layers.*.mlp", [f"layers.{i}.mlp_out" for i in range(3)]),
        ("llama", "model.layers.*.self_attn.o_proj.input", [f"layers.{i}.attn_z" for i in range(3)]),
        ("gpt2", "h.*", [f"layers.{i}.resid_post" for i in range(3)]),
        ("gemma2", "mlps_output[*]", [f"model.layers.{i}.mlp:output" for i in range(3)]),
        ("llama", "layers.*", [f"layers.{i}.{k}" for i in range(3) for k in "pre mid post".split()]),  # ours go first
    ],
)
def test_patterns_of_names_of_other_tools(lms, architecture, pattern, ours):
    found = [site.name for site in resolve(lms[architecture], pattern)]
    if pattern == "layers.*":
        found = [name.replace("resid_", "") for name in found if "resid" in name]
    assert found == ours


@pytest.mark.parametrize(
    ("architecture", "name", "match"),
    [
        ("gemma2", "mlp_out.1", r"model\.layers\.1\.mlp:output \(interp-engine\) or layers\.1\.mlp_out \(saehook"),
        ("gemma2", "attn_out.1", r"model\.layers\.1\.self_attn:output .* or layers\.1\.attn_out"),
        ("llama", "blocks.1.hook_mlp_in", r"'layers\.1\.resid_mid', .*'layers\.1\.mlp_in'.*say which"),
        ("llama", "blocks.1.hook_attn_in", r"'layers\.1\.resid_pre', .*'layers\.1\.attn_in'"),
        ("gemma2", "blocks.1.ln2.hook_normalized", r"before its gain.*'layers\.1\.mlp_in'"),
        ("llama", "blocks.1.attn.hook_pattern", "hook of TransformerLens that is no site here; understood are"),
        ("llama", "unembed.hook_in", "lm_head:input"),
        ("llama", "blocks.7.hook_resid_post", r"'layers\.7\.resid_post' matches no site.*layers\.\d\.resid_post"),
        ("llama", "resid_post.7", r"'layers\.7\.resid_post' matches no site"),
        ("llama", "h.1.mlp", "'h.1.mlp' matches no site"),
        ("gpt_neox", "blocks.1.hook_resid_mid", "same residual stream, so it has no resid_mid"),
        ("llama", "resid_post.1.stream-2", "matches no site"),
        ("opt", "blocks.1.hook_resid_post", "no row in the table of architectures"),
        ("opt", "mlps_output[1]", "no row in the table of architectures"),
    ],
)
def test_what_may_mean_two_places_or_none(lms, architecture, name, match):
    with pytest.raises(SiteError, match=match):
        resolve(lms[architecture], name)


def test_a_module_called_output_may_mean_itself_or_a_side():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=9)
    lm = BertModel(config)
    with pytest.raises(SiteError, match=r"encoder\.layer\.0\.output:output .* or layers\.0\.resid_post"):
        resolve(lm, "encoder.layer.0.output")
    assert resolve(lm, "encoder.layer.0")[0].name == "layers.0.resid_post"


def test_edits_attach_and_reads_take_them(models_by_name):
    model, _ = models_by_name("llama")
    sae = tiny_sae(site="blocks.1.hook_resid_post")
    hooked = model.attach(sae)
    assert hooked.sites == ["layers.1.resid_post"]
    vector = torch.ones(32)
    for name in ("layers.1.resid_post", "resid_post.1", "layers.1", "model.layers.1:output"):
        with torch.no_grad():
            logits = hooked(IDS, [steer(3, 2.0, site=name), add_vector(vector, 0.5, site=name)]).logits
            expected = hooked(IDS, [steer(3, 2.0), add_vector(vector, 0.5)]).logits
        assert torch.equal(logits, expected)
    assert list(model.activations(IDS, ["blocks.0.hook_mlp_out", "layers.1"])) == [
        "layers.0.mlp_out",
        "layers.1.resid_post",
    ]
    report = hooked.report(IDS, [steer(3, 2.0, site="resid_post.1")])
    assert "layers.1.resid_post" in str(report)
    with pytest.raises(SiteError, match=r"trained on blocks\.1\.hook_resid_post, not on layers\.0"):
        model.attach({"resid_post.0": sae})
    hooked.detach()


def test_training_on_a_name_of_another_tool_records_ours(tmp_path):
    model = HookedModel(build_lm("llama"), byte_tokenizer())
    config = TrainConfig(
        site="blocks.1.hook_resid_post",
        activation=TopK(k=4),
        d_sae=32,
        tokens=256,
        batch_tokens=64,
        buffer_tokens=256,
        calibration_tokens=64,
    )
    text = [Document("a.txt", "words and numbers 12345 " * 40)]
    (trained,) = train_saes(model, [config], text, tmp_path, progress=False).saes
    assert trained.sae.site == "layers.1.resid_post"
    assert trained.folder == tmp_path / "layers.1.resid_post"


def test_the_command_lists_sites_as_another_tool_names_them(capsys, tmp_path):
    file = tmp_path / "sites.json"
    assert main(["sites", "blocks.1.hook_mlp_out", "--as", "interp-engine", "--json", str(file)]) == 0
    line = capsys.readouterr().out.split()
    assert line[0] == "layers.1.mlp_out"
    assert line[-1] == "mlp_out.1"
    assert json.loads(file.read_text())[0]["interp-engine"] == "mlp_out.1"
    assert main(["sites", "layers.1.mlp_in", "--as", "sparsify"]) == 0
    assert capsys.readouterr().out.split()[-1] == "-"


def test_an_unknown_tool(lms):
    site = resolve(lms["llama"], "layers.0")[0]
    with pytest.raises(ArgumentError, match="transformerlens, interp-engine"):
        spelling(lms["llama"], site, "tensorflow")
