"""Programs as plain weights: a checkpoint loaded plainly, and a control vector, do what the program does while it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import build_lm, byte_tokenizer, random_ids, tiny_sae
from gguf_reader import read_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from saehook.checkpoint import save_sae
from saehook.cli import main
from saehook.conditions import latent
from saehook.config import MaskRule, SAEConfig, TopK
from saehook.edits import ablate, clamp, keep_only, scale, steer
from saehook.errors import ExportError, FileError, LatentError, MissingStatError, ShapeError
from saehook.export import export_checkpoint, export_control_vector
from saehook.hooked_model import HookedModel
from saehook.interventions import Edit, Program, VectorEdit
from saehook.program_file import program_id
from saehook.sae import SAE
from saehook.schedules import Schedule
from saehook.sites import KINDS, named_sites
from saehook.where import Where, generation, prompt, span, token_ids, tokens

ALL = Where(special=True)
ATTENTION = {"attn_in", "attn_z", "attn_out", "resid_mid"}
FOLDED = {
    "llama": set(KINDS),
    "mistral": set(),
    "mistral_unwindowed": set(KINDS),
    "qwen2": set(KINDS),
    "qwen2_windowed": {"attn_in"},
    "qwen3": ATTENTION,
    "gemma": ATTENTION,
    "phi3": set(),
    "gemma2": {"attn_in", "attn_z"},
    "gemma3_text": {"attn_in", "attn_z"},
    "gpt2": set(KINDS),
    "gpt_neo": set(KINDS),
    "gpt_neox": set(KINDS) - {"resid_mid"},
    "gpt_neox_sequential": set(KINDS),
}
"""Which kinds of sites of a layer can be folded; `resid_pre` is that of a layer behind another."""
AS_LLAMA = {"mistral_unwindowed", "qwen2"}


def build(name: str) -> Any:
    """The tiny model of that name, with other attention where the name says so."""
    kind, _, window = name.partition("_")
    if kind not in {"mistral", "qwen2"} or not window:
        return build_lm(name)
    base = build_lm(kind)
    config = base.config
    if window == "unwindowed":
        config.sliding_window = None
        config.layer_types = None
    else:
        config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
        config.use_sliding_window, config.sliding_window = True, 4
    lm = type(base)(config)
    lm.load_state_dict(base.state_dict())
    return lm.eval()


def everything(sites: list[str]) -> Program:
    """Adds at all sites, several at each, in both units."""
    return Program(
        edits=[
            edit
            for i, site in enumerate(sites)
            for edit in (
                steer([3, 5], 0.4 + 0.1 * i, site=site, where=ALL),
                steer(7, -0.3, unit="max", site=site, where=ALL),
                steer(3, 0.1, site=site, where=ALL),
            )
        ]
    )


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return HookedModel(build_lm("gpt2"), byte_tokenizer()).attach(tiny_sae(site="layers.1.resid_post"))


def ids() -> torch.Tensor:
    return torch.tensor([random_ids(12, bos=True), [0, *random_ids(5, seed=1), 0, *random_ids(6, seed=2)]])


@torch.no_grad()
def logits(lm: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return lm(x, **options).logits


QUICK = ("llama", "qwen2", "gemma2", "gpt2", "gpt_neox")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name, kinds in FOLDED.items() if kinds],
)
def test_a_checkpoint_loaded_plainly_is_the_edited_model(name, tmp_path):
    lm = build(name)
    sites = {
        s.name: s.width
        for s in named_sites(lm)
        if s.name.startswith("layers.1.") and s.name.split(".")[2] in FOLDED[name]
    }
    assert {site.split(".")[2] for site in sites} == FOLDED[name]
    hooked = HookedModel(lm, byte_tokenizer()).attach(
        {s: tiny_sae(w or 0, site=s, seed=i) for i, (s, w) in enumerate(sites.items())}
    )
    program = everything(list(sites))
    before = {key: value.clone() for key, value in lm.state_dict().items()}
    export_checkpoint(hooked, program, tmp_path / "out")
    assert all(torch.equal(value, before[key]) for key, value in lm.state_dict().items())
    assert lm.config.to_dict() == build(name).config.to_dict()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__name__ == ("LlamaForCausalLM" if name in AS_LLAMA else type(lm).__name__)
    expected = logits(hooked, ids(), edits=program)
    torch.testing.assert_close(logits(plain, ids()), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(lm, ids())).abs().max() > 0.3
    one = Program(edits=program.edits[:1])  # none of the others makes up for a mistake
    export_checkpoint(hooked, one, tmp_path / "one")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    torch.testing.assert_close(logits(plain, ids()), logits(hooked, ids(), edits=one), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in FOLDED if FOLDED[name] != set(KINDS)])
def test_where_no_bias_can_stand_the_site_is_refused(name, tmp_path):
    lm = build(name)
    model = HookedModel(lm, byte_tokenizer())
    for site in named_sites(lm):
        if not site.name.startswith("layers.1.") or site.name.split(".")[2] in FOLDED[name]:
            continue
        hooked = model.attach(tiny_sae(site.width or 0, site=site.name))
        with pytest.raises(
            ExportError, match="no setting of its config gives it one|a norm without bias stands before"
        ):
            export_checkpoint(hooked, steer(3, 1.0, where=ALL), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_architecture_without_a_row_works_by_module_path(tmp_path):
    site = "model.decoder.layers.1.fc2:output"
    hooked = HookedModel(build_lm("opt"), byte_tokenizer()).attach(tiny_sae(site=site))
    export_checkpoint(hooked, steer(3, 2.0, where=ALL), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits(hooked, ids(), edits=steer(3, 2.0, where=ALL))
    torch.testing.assert_close(logits(plain, ids()), expected, atol=1e-5, rtol=1e-5)
    hooked = hooked.model.attach(tiny_sae(site="model.decoder.layers.1:output"))
    with pytest.raises(ExportError, match="is a OPTDecoderLayer: no bias"):
        export_checkpoint(hooked, steer(3, 2.0, where=ALL), tmp_path / "other")


def test_it_generates_what_the_program_generates(tmp_path):
    hooked = HookedModel(build_lm("llama"), byte_tokenizer()).attach(tiny_sae(site="model.layers.1:output"))
    edit = steer(3, 30.0, where=ALL)
    export_checkpoint(hooked, edit, tmp_path / "out")
    plain = HookedModel.from_pretrained(tmp_path / "out")
    for prompts in ("the cat", ["a", "the red house"]):  # the second is padded on the left
        expected = hooked.generate(prompts, edits=edit, max_new_tokens=12)
        found = plain.generate(prompts, max_new_tokens=12)
        for one, other in zip(*(x if isinstance(x, list) else [x] for x in (expected, found)), strict=True):
            assert one.new_ids.tolist() == other.new_ids.tolist()
    assert (
        hooked.generate("the cat", max_new_tokens=12).text
        != hooked.generate("the cat", edits=edit, max_new_tokens=12).text
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("a cat")["input_ids"] == byte_tokenizer()("a cat")["input_ids"]
    )
    assert program_id(Program(edits=[edit])) in (tmp_path / "out" / "README.md").read_text()


def test_tied_embeddings_and_half_precision_stay(tmp_path):
    lm = build_lm("llama")
    lm.config.tie_word_embeddings = True
    lm.lm_head.weight = lm.model.embed_tokens.weight
    lm = lm.to(torch.bfloat16)
    hooked = HookedModel(lm, byte_tokenizer()).attach(tiny_sae(site="layers.1.resid_post"))
    edit = steer(3, 30.0, where=ALL)
    export_checkpoint(hooked, edit, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    difference = (logits(plain, ids()) - logits(hooked, ids(), edits=edit)).abs().max()
    assert difference < 0.1 * (logits(lm, ids()) - logits(hooked, ids(), edits=edit)).abs().max()


def test_a_transcoder_is_folded_where_it_writes(tmp_path):
    config = SAEConfig(d_in=32, d_sae=48, activation=TopK(k=4), d_out=32, subtract_b_dec=False)
    sae = SAE(config, site="layers.1.mlp_in", site_out="layers.1.mlp_out")
    hooked = HookedModel(build_lm("gpt2"), byte_tokenizer()).attach(sae)
    edit = steer(3, 2.0, where=ALL)
    export_checkpoint(hooked, edit, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain, ids()), logits(hooked, ids(), edits=edit), atol=1e-5, rtol=1e-5)


def test_a_vector_needs_no_sae_where_it_is_added(gpt2, tmp_path):
    draw = torch.randn(32, generator=torch.Generator().manual_seed(1)).tolist()
    vector = VectorEdit(op="add", vector=tuple(draw), value=0.7, site="layers.2.attn_out", where=ALL)
    program = Program(edits=[vector, steer(3, 2.0, where=ALL)], parallel=True)
    export_checkpoint(gpt2, program, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain, ids()), logits(gpt2, ids(), edits=program), atol=1e-5, rtol=1e-5)
    with pytest.raises(ShapeError, match="a vector of 3 numbers; layers.2.attn_out has width 32"):
        export_checkpoint(
            gpt2, VectorEdit(op="add", vector=(1, 2, 3), value=1.0, site="layers.2.attn_out", where=ALL), "x"
        )


# --- what depends on the token ----------------------------------------------------------------------------------------


REFUSED: list[tuple[Any, str]] = [
    (clamp(3, 1.0, where=ALL), r"edit 1 \(set 3 1 .*only 'add' writes the same at every token"),
    (scale(3, 2.0, where=ALL), "only 'add'"),
    (ablate(3, where=ALL), "only 'add'"),
    (keep_only(3, where=ALL), "only 'add'"),
    (Edit(op="mean", latents=(3,), where=ALL), "only 'add'"),
    (Edit(op="max", latents=(3,), value=1.0, where=ALL), "only 'add'"),
    (steer(3, 1.0, unit="norm", where=ALL), "its unit 'norm' is relative to each token's norm"),
    (steer(3, 1.0), r"leaves special tokens such as BOS out, and a bias cannot. Say where=Where\(special=True\)"),
    (steer(3, 1.0, where=prompt()), "has a condition"),
    (steer(3, 1.0, where=generation()), "has a condition"),
    (steer(3, 1.0, where=tokens(0)), "has a condition"),
    (steer(3, 1.0, where=span(1)), "has a condition"),
    (steer(3, 1.0, where=token_ids(7)), "has a condition"),
    (steer(3, 1.0, where=Where(rows=(0,), special=True)), "has a condition"),
    (steer(3, 1.0, where=ALL, active_only=True), "has a condition"),
    (steer(3, 1.0, where=ALL, when=latent(4) > 0.5), "has a condition"),
    (steer(3, 1.0, where=ALL, schedule=Schedule.linear(1, 0, 20)), "has a condition"),
    (steer(3, 1.0, where=ALL, mode="readback"), "has a condition"),
    (steer(3, 1.0, where=ALL, unit="kl"), "a KL is no amount yet"),
    (VectorEdit(op="cap", vector=(1.0,) * 32, value=1.0, where=ALL), "only 'add'"),
    (VectorEdit(op="add", vector=(1.0,) * 32, value=1.0, unit="norm", where=ALL), "its unit 'norm'"),
    (Program(edits=[steer(3, 1.0, where=ALL), ablate(4, where=ALL)]), r"edit 2 \(ablate 4"),
    (Program(edits=[steer(3, 1.0, where=ALL)], error="drop"), "the program has error='drop'"),
    (Program(edits=[steer(3, 1.0, where=ALL)], norm="preserve"), "the program has norm='preserve'"),
    (Program(edits=[steer(3, 1.0, where=ALL)], splice=True), "the program has splice=True"),
    (Program(), "has no edit"),
]


@pytest.mark.parametrize(("program", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_depends_on_the_token_is_refused(gpt2, program, message, tmp_path):
    for write in (export_checkpoint, export_control_vector):
        with pytest.raises(ExportError, match=message):
            write(gpt2, program, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_error_keep_is_what_an_add_does(gpt2, tmp_path):
    export_control_vector(gpt2, Program(edits=[steer(3, 1.0, where=ALL)], error="keep"), tmp_path / "v.gguf")


def test_an_sae_that_looks_at_the_token_is_refused(tmp_path):
    model = HookedModel(build_lm("gpt2"), byte_tokenizer())
    edit = steer(3, 1.0, where=ALL)
    hooked = model.attach(tiny_sae(site="layers.1.resid_post", normalize="layer_norm"))
    with pytest.raises(ExportError, match="its SAE normalises each token"):
        export_checkpoint(hooked, edit, tmp_path / "out")
    sae = tiny_sae(site="layers.1.resid_post")
    sae.mask_rule = MaskRule(skip_first_tokens=2)
    hooked = model.attach(sae)
    with pytest.raises(ExportError, match="its SAE leaves tokens out .* not the first 2 of a row"):
        export_checkpoint(hooked, edit, tmp_path / "out")
    export_checkpoint(hooked, steer(3, 1.0), tmp_path / "out", every_token=True)
    sae.mask_rule = MaskRule()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain, ids()), logits(hooked, ids(), edits=edit), atol=1e-5, rtol=1e-5)
    with pytest.raises(ExportError, match="has a condition"):
        export_checkpoint(hooked, steer(3, 1.0, where=prompt()), tmp_path / "other", every_token=True)


def test_other_mistakes(gpt2, tmp_path):
    with pytest.raises(LatentError, match=r"outside 0..47"):
        export_checkpoint(gpt2, steer(48, 1.0, where=ALL), tmp_path / "out")
    bare = gpt2.model.attach(tiny_sae(site="layers.1.resid_post", stats=False))
    with pytest.raises(MissingStatError, match="recorded maximum"):
        export_checkpoint(bare, steer(3, 1.0, unit="max", where=ALL), tmp_path / "out")
    first = gpt2.model.attach(tiny_sae(site="layers.0.resid_pre"))
    with pytest.raises(ExportError, match="before layers.0.resid_pre no layer stands"):
        export_checkpoint(first, steer(3, 1.0, where=ALL), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FileError, match="is there already"):
        export_checkpoint(gpt2, steer(3, 1.0, where=ALL), tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


# --- control vectors --------------------------------------------------------------------------------------------------


def test_a_control_vector_added_behind_its_layers_is_the_program(tmp_path):
    lm = build_lm("mistral")
    sites = ["layers.1.resid_post", "layers.2.mlp_out", "layers.2.resid_pre"]
    hooked = HookedModel(lm, byte_tokenizer()).attach({s: tiny_sae(site=s, seed=i) for i, s in enumerate(sites)})
    program = everything(sites)
    facts, tensors = read_gguf(export_control_vector(hooked, program, tmp_path / "v.gguf"))
    assert facts == {
        "general.architecture": "controlvector",
        "general.description": f"saehook program {program_id(program)}",
        "controlvector.model_hint": "mistral",
        "controlvector.layer_count": 2,
    }
    assert list(tensors) == ["direction.1", "direction.2"]
    expected = logits(hooked, ids(), edits=program)
    for name, vector in tensors.items():
        layer = lm.model.layers[int(name.split(".")[1])]
        layer.register_forward_hook(lambda module, inputs, output, vector=vector: output + vector)
    torch.testing.assert_close(logits(lm, ids()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("layers.0.resid_post", "behind layer 0 or before it"),
        ("layers.0.resid_pre", "behind layer 0 or before it"),
        ("layers.1.resid_pre", "behind layer 0 or before it"),
        ("layers.1.attn_out", "is not the residual stream behind a layer"),
        ("layers.1.resid_mid", "is not the residual stream behind a layer"),
        ("transformer.h.1.ln_1:output", "is not the residual stream behind a layer"),
    ],
)
def test_what_a_control_vector_cannot_hold(site, message, tmp_path, gpt2):
    hooked = gpt2.model.attach(tiny_sae(site=site))
    with pytest.raises(ExportError, match=message):
        export_control_vector(hooked, steer(3, 1.0, where=ALL), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_both(tmp_path, capsys):
    build_lm("gpt2").save_pretrained(tmp_path / "lm")
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    save_sae(tiny_sae(site="layers.1.resid_post"), tmp_path / "sae")
    options = ["--lm", str(tmp_path / "lm"), "--sae", str(tmp_path / "sae")]
    program = str(tmp_path / "p.json")
    assert (
        main(["generate", "a cat", *options, "--steer", "3=2", "--max-new-tokens", "1", "--save-program", program]) == 0
    )
    capsys.readouterr()
    assert main(["export", program, *options, "--out", str(tmp_path / "v.gguf")]) == 2
    assert "--every-token" in capsys.readouterr().err
    assert main(["export", program, *options, "--out", str(tmp_path / "v.gguf"), "--every-token"]) == 0
    assert main(["export", program, *options, "--out", str(tmp_path / "plain"), "--every-token"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'v.gguf'}\nwrote {tmp_path / 'plain'}\n"
    _, tensors = read_gguf(tmp_path / "v.gguf")
    assert torch.allclose(tensors["direction.1"], 2 * tiny_sae(site="layers.1.resid_post").W_dec[3])
    assert (
        main(
            [
                "generate",
                "a cat",
                "--lm",
                str(tmp_path / "plain"),
                "--sae",
                str(tmp_path / "sae"),
                "--max-new-tokens",
                "1",
            ]
        )
        == 0
    )
