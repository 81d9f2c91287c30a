"""Named sites: where they are, how wide, and that a write there reaches everything behind it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import reference_hooks as reference
import torch
from builders import ARCHITECTURES, BOS, CONTEXT, LAYERS, build_lm, byte_tokenizer, identity_sae, random_ids, tiny_sae

from saehook.editing import ReplaceAction
from saehook.edits import scale, steer
from saehook.errors import ShapeError, SiteError
from saehook.hooked_model import HookedModel
from saehook.sites import KINDS, named_sites, resolve, same_site
from saehook.where import tokens

IDS = random_ids(7, seed=2, bos=True)
BATCH = torch.tensor([IDS])
SOME = range(10, 30)
PARALLEL = {"gpt_neox"}


def kinds_of(name: str) -> list[str]:
    return [kind for kind in KINDS if kind != "resid_mid" or name not in PARALLEL]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_named_sites_are_complete_and_their_widths_right(models_by_name, name):
    model, _ = models_by_name(name)
    sites = model.sites()
    assert [site.name for site in sites] == [f"layers.{i}.{kind}" for i in range(LAYERS) for kind in kinds_of(name)]
    values = model.activations(IDS, [site.name for site in sites])
    assert list(values) == [site.name for site in sites]
    for site in sites:
        assert values[site.name].shape == (1, len(IDS), site.width), site.name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reading_a_site_equals_a_plain_hook(models_by_name, name):
    model, lm = models_by_name(name)
    values = model.activations(IDS, "layers.*")
    for site, value in values.items():
        expected = reference.read(lm, site, BATCH)
        if site.endswith("resid_mid"):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(value, expected), site


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_fit_together_as_the_residual_stream_does(models_by_name, name):
    """Which module a kind is, from the arithmetic of a transformer and not from the table."""
    model, _ = models_by_name(name)
    values = model.activations(IDS, "layers.*")
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    for i in range(LAYERS):
        at = {kind: values[f"layers.{i}.{kind}"] for kind in kinds_of(name)}
        if name in PARALLEL:
            close(at["resid_post"], at["resid_pre"] + at["attn_out"] + at["mlp_out"])
        else:
            close(at["resid_mid"], at["resid_pre"] + at["attn_out"])
            close(at["resid_post"], at["resid_mid"] + at["mlp_out"])
        if i:
            assert torch.equal(at["resid_pre"], values[f"layers.{i - 1}.resid_post"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox_sequential", "gemma2"])
def test_inner_kinds_are_before_their_projections(models_by_name, name):
    model, lm = models_by_name(name)
    layers = lm.get_submodule(reference._PARTS[lm.config.model_type][0])
    layer = layers[1]
    names = dict(layer.named_children())
    norms = [child for child in names.values() if "norm" in type(child).__name__.lower()]
    attn_norm = norms[0]
    values = model.activations(IDS, "layers.1.*")
    at = {kind: values[f"layers.1.{kind}"] for kind in KINDS}
    with torch.no_grad():
        torch.testing.assert_close(at["attn_in"], attn_norm(at["resid_pre"]))
        mlp_norm = {"llama": 1, "gpt2": 1, "gpt_neox_sequential": 1, "gemma2": 2}[name]
        torch.testing.assert_close(at["mlp_in"], norms[mlp_norm](at["resid_mid"]), rtol=1e-4, atol=1e-4)
        down = layer.get_submodule(reference._PARTS[lm.config.model_type][1]["down"])
        up = layer.get_submodule(reference._PARTS[lm.config.model_type][1]["mlp"])
        torch.testing.assert_close(down(at["mlp_act"]), up(at["mlp_in"]), rtol=1e-4, atol=1e-4)
        projection = layer.get_submodule(reference._PARTS[lm.config.model_type][1]["o_proj"])
        attention = projection(at["attn_z"])
        if name == "gemma2":
            attention = norms[1](attention)
        torch.testing.assert_close(attention, at["attn_out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_write_reaches_everything_behind_it(models_by_name, name, grad):
    model, lm = models_by_name(name)
    with torch.no_grad():
        clean = lm(BATCH, use_cache=False).logits
    for kind in kinds_of(name):
        (site,) = model.sites(f"layers.1.{kind}")
        sae = tiny_sae(site.width)
        hooked = model.attach({site.name: sae})
        shift = torch.tensor(3.0) * sae.W_dec[5].detach()

        def write(x: torch.Tensor, shift: torch.Tensor = shift) -> torch.Tensor:
            x = x.clone()
            x[:, 1:] += shift
            return x

        with torch.no_grad(), reference.written(lm, site.name, write):
            expected = lm(BATCH, use_cache=False).logits
        with torch.set_grad_enabled(grad):
            logits = hooked(IDS, [steer(5, 3.0)], use_cache=False).logits
        torch.testing.assert_close(logits.detach(), expected, rtol=0, atol=3e-5, msg=lambda m, k=kind: f"{k}: {m}")
        assert not torch.allclose(logits, clean, atol=1e-2), f"{kind}: the write was lost"
        hooked.detach()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replacing_a_site_equals_a_plain_hook(models_by_name, name):
    model, lm = models_by_name(name)
    for kind in kinds_of(name):
        (site,) = model.sites(f"layers.0.{kind}")
        vector = torch.linspace(-1, 1, site.width or 0)
        hooked = model.attach({site.name: identity_sae(site.width)})

        def write(x: torch.Tensor, vector: torch.Tensor = vector) -> torch.Tensor:
            x = x.clone()
            x[:, 1:] = vector
            return x

        with torch.no_grad(), reference.written(lm, site.name, write):
            expected = lm(BATCH, use_cache=False).logits
        put = ReplaceAction(BATCH != BOS, lambda x, vector=vector: vector.expand_as(x))
        logits = hooked.run(IDS, {site.name: put}).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5, msg=lambda m, k=kind: f"{k}: {m}")
        hooked.detach()


def test_a_write_to_resid_mid_reaches_the_mlp_and_the_residual_stream(models_by_name):
    model, _ = models_by_name("llama")
    hooked = model.attach({"layers.1.resid_mid": tiny_sae()})
    values: dict[str, torch.Tensor] = {}
    handles = []
    for kind in ("mlp_out", "resid_post"):
        module, _ = reference._place(model.lm, f"layers.1.{kind}")

        def keep(module: Any, args: Any, output: torch.Tensor, kind: str = kind) -> None:
            values[kind] = output.detach().clone()

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        hooked(IDS)
        before = dict(values)
        hooked(IDS, [steer(5, 3.0)])
    for handle in handles:
        handle.remove()
    shift = 3.0 * hooked.saes["layers.1.resid_mid"].W_dec[5].detach()
    assert not torch.allclose(values["mlp_out"][:, 1:], before["mlp_out"][:, 1:], atol=1e-3)
    moved = values["resid_post"] - before["resid_post"] - (values["mlp_out"] - before["mlp_out"])
    torch.testing.assert_close(moved[0, 1:], shift.expand(len(IDS) - 1, -1), rtol=1e-4, atol=1e-5)


def test_parallel_residual_has_no_resid_mid(models_by_name):
    model, _ = models_by_name("gpt_neox")
    for name in ("layers.1.resid_mid", "layers.*.resid_mid"):
        with pytest.raises(SiteError, match="same residual stream, so it has no resid_mid"):
            model.sites(name)
        with pytest.raises(SiteError, match="no resid_mid"):
            model.attach({name: tiny_sae()})
    assert len(models_by_name("gpt_neox_sequential")[0].sites("layers.*.resid_mid")) == LAYERS


def test_a_missing_layer_is_not_taken_for_a_parallel_block(models_by_name):
    model, _ = models_by_name("llama")
    with pytest.raises(SiteError, match=r"did you mean|Did you mean") as caught:
        model.sites("layers.7.resid_mid")
    assert "same residual stream" not in str(caught.value)


# --- module paths ----------------------------------------------------------------------------------------------------

PATHS = {
    "llama": ["model.layers.1.self_attn:output", "model.layers.1.mlp.gate_proj:output", "model.norm:output"],
    "gpt2": ["transformer.h.1.attn:output", "transformer.h.1.mlp.c_fc:input", "transformer.wte:output"],
    "gpt_neo": ["transformer.h.1:output", "transformer.h.1.attn:output", "transformer.h.1:input"],
    "opt": ["model.decoder.layers.1:output", "model.decoder.layers.1.fc2:output", "model.decoder.layers.1:input"],
}


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in PATHS.items() for path in paths])
def test_module_paths_are_read_and_written(models_by_name, name, path):
    model, lm = models_by_name(name)
    value = model.activations(IDS, path)[path]
    assert torch.equal(value[0], reference.read(lm, path, BATCH).view(len(IDS), -1))
    width = value.shape[-1]
    assert model.width(resolve(model.lm, path)[0]) == width
    sae = tiny_sae(width)
    hooked = model.attach({path: sae})

    def write(x: torch.Tensor) -> torch.Tensor:
        changed = x.clone().view(1, len(IDS), -1)  # OPT gives its fc layers all rows as one
        changed[:, 1:] += 3.0 * sae.W_dec[5].detach()
        return changed.view(x.shape)

    with torch.no_grad(), reference.written(lm, path, write):
        expected = lm(BATCH, use_cache=False).logits
    logits = hooked(IDS, [steer(5, 3.0)]).logits.detach()
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5)
    generated = hooked.generate(IDS, [steer(5, 3.0), scale(SOME, -1.0)], max_new_tokens=4)
    uncached = hooked.generate(IDS, [steer(5, 3.0), scale(SOME, -1.0)], max_new_tokens=4, use_cache=False)
    assert torch.equal(generated.ids, uncached.ids)
    hooked.detach()


def test_an_unknown_architecture_works_by_path_and_says_so_by_name(models_by_name):
    model, lm = models_by_name("opt")
    assert model.sites() == []
    for name in ("layers.1.resid_post", "layers.*.mlp_out"):
        with pytest.raises(SiteError, match="no row in the table of architectures.*module path"):
            model.sites(name)
    assert [s.name for s in model.sites("model.decoder.layers.*.fc2:output")] == [
        f"model.decoder.layers.{i}.fc2:output" for i in range(LAYERS)
    ]


def test_widths_of_module_paths_without_running(models_by_name):
    model, _ = models_by_name("gpt2")
    widths = {s.name: s.width for s in model.sites("transformer.h.0.mlp.*:input")}
    assert widths["transformer.h.0.mlp.c_fc:input"] == 32
    assert widths["transformer.h.0.mlp.c_proj:input"] == 48
    llama, _ = models_by_name("llama")
    assert llama.sites("model.layers.0.mlp.down_proj:input")[0].width == 48
    assert llama.sites("model.layers.0.mlp.down_proj:output")[0].width == 32
    assert llama.sites("model.embed_tokens:output")[0].width == 32
    assert llama.sites("lm_head:output")[0].width == 300


def test_a_model_output_keeps_its_type_when_it_is_written(models_by_name):
    model, lm = models_by_name("llama")
    assert torch.equal(
        model.activations(IDS, "model:output")["model:output"], reference.read(lm, "model:output", BATCH)
    )
    hooked = model.attach({"model:output": tiny_sae()})
    with torch.no_grad():
        expected = lm.lm_head(reference.read(lm, "model:output", BATCH) + 3.0 * hooked.saes["model:output"].W_dec[5])
        logits = hooked(IDS, [steer(5, 3.0)]).logits
    torch.testing.assert_close(logits[:, 1:], expected[:, 1:], rtol=0, atol=3e-5)
    hooked.detach()


@pytest.mark.parametrize("path", ["model.decoder.layers.1.fc2:output", "model.decoder.layers.1.fc1:input"])
def test_modules_that_get_all_rows_as_one_list_of_tokens(models_by_name, path):
    model, _ = models_by_name("opt")
    hooked = model.attach({path: tiny_sae()})
    edits = [steer(5, 3.0, where=tokens(-1))]
    rows = [IDS, IDS[:1] + IDS[3:]]
    with torch.no_grad():
        batch = hooked(rows, edits).logits
        for row, logits in zip(rows, batch, strict=True):
            alone = hooked(row, edits).logits[0]
            assert not torch.allclose(alone[-1], model(row).logits[0, -1], atol=1e-2)
            torch.testing.assert_close(logits[-len(row) :], alone, rtol=0, atol=1e-4)
    generated = hooked.generate(rows, [steer(5, 3.0)], max_new_tokens=4)
    for row, ours in zip(rows, generated, strict=True):
        assert torch.equal(ours.ids, hooked.generate(row, [steer(5, 3.0)], max_new_tokens=4).ids)
    assert hooked.latents(IDS).acts.shape == (len(IDS), 48)
    assert [r.acts.shape[0] for r in hooked.latents(rows)] == [len(r) for r in rows]
    hooked.detach()


def test_a_value_that_is_not_one_vector_per_token_is_not_edited(models_by_name):
    model, lm = models_by_name("llama")
    hooked = model.attach({"lm_head:input": tiny_sae()})
    with torch.no_grad():
        hooked(IDS, [steer(5, 3.0)])
    with pytest.raises(ShapeError, match=r"lm_head:input has shape \(1, 1, 32\) for 1 rows of 8 tokens"):
        hooked.generate(IDS, [steer(5, 3.0)], max_new_tokens=2)  # generation computes the last token's logits alone
    hooked.detach()


# --- the grammar of names --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Any:
    return build_lm("llama")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.1.mlp_out", ["layers.1.mlp_out"]),
        ("layers.*.mlp_out", [f"layers.{i}.mlp_out" for i in range(3)]),
        ("layers.{0..1}.mlp_out", ["layers.0.mlp_out", "layers.1.mlp_out"]),
        ("layers.{2..2}.mlp_out", ["layers.2.mlp_out"]),
        ("layers.{2,0}.mlp_out", ["layers.2.mlp_out", "layers.0.mlp_out"]),
        ("layers.{0..1}.{attn,mlp}_out", [f"layers.{i}.{k}_out" for i in range(2) for k in ("attn", "mlp")]),
        ("layers.1.resid_*", ["layers.1.resid_pre", "layers.1.resid_mid", "layers.1.resid_post"]),
        ("layers.[02].attn_z", ["layers.0.attn_z", "layers.2.attn_z"]),
        ("model.layers.{0..1}.mlp:input", ["model.layers.0.mlp:input", "model.layers.1.mlp:input"]),
        ("model.layers.?.mlp:output", [f"model.layers.{i}.mlp:output" for i in range(3)]),
    ],
)
def test_globs_ranges_and_lists(llama, pattern, expected):
    assert [site.name for site in resolve(llama, pattern)] == expected


def test_several_patterns_name_each_site_once_in_their_order(llama):
    names = [site.name for site in resolve(llama, ["layers.2.mlp_out", "layers.*.mlp_out"])]
    assert names == ["layers.2.mlp_out", "layers.0.mlp_out", "layers.1.mlp_out"]


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("layers.1.resid_pots", r"layers\.1\.resid_post"),
        ("layers.1.residpost", r"layers\.1\.resid_post"),
        ("layer.1.mlp_out", r"layers\.1\.mlp_out"),
        ("layers.3.mlp_out", r"layers\.\d\.mlp_out"),
        ("layers.-1.mlp_out", "matches no site"),
        ("layers.{1..3}.mlp_out", r"'layers\.3\.mlp_out' matches no site"),
        ("layers.{0,x}.mlp_out", r"'layers\.x\.mlp_out' matches no site"),
        ("layers.{2..1}.mlp_out", "empty"),
        ("layers.*.nothing", "matches no site"),
        ("", "is no site name"),
        ("LlamaForCausalLM", "27 sites"),
        ("model.layers.1.mpl:output", r"model\.layers\.1\.mlp"),
        ("model.layers.9.mlp:output", "matches no module"),
        ("model.layers.1.mlp:out", "':input' or ':output'"),
        ("model.layers.1.mlp:", "':input' or ':output'"),
        (":output", "matches no module"),
        (3, "3 is no site name"),
        (None, "None"),
    ],
)
def test_names_that_match_nothing(llama, pattern, match):
    with pytest.raises(SiteError, match=match):
        resolve(llama, [pattern])


def test_one_bad_pattern_among_good_ones_is_an_error(llama):
    with pytest.raises(SiteError, match="mlp_uot"):
        resolve(llama, ["layers.1.mlp_out", "layers.1.mlp_uot"])


def test_same_site_compares_places(llama):
    assert same_site(llama, "layers.1.resid_post", "model.layers.1:output")
    assert same_site(llama, "layers.1.mlp_out", "layers.1.mlp_out")
    assert not same_site(llama, "layers.1.resid_post", "layers.2.resid_pre")
    assert not same_site(llama, "layers.1.resid_post", "layers.*.resid_post")
    assert not same_site(llama, "layers.1.resid_post", "nonsense")


def test_named_sites_runs_nothing(llama):
    calls = []
    handle = llama.model.register_forward_hook(lambda *_: calls.append(1))
    assert len(named_sites(llama)) == 27
    handle.remove()
    assert not calls


def test_activations_of_a_padded_batch_and_of_duplicates(models_by_name):
    model, lm = models_by_name("gpt2")
    ids = torch.tensor([IDS, [77, 77, 77, *IDS[3:]]])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    value = model.activations(ids, "layers.1.resid_post", attention_mask=mask)["layers.1.resid_post"]
    alone = reference.read(lm, "layers.1.resid_post", torch.tensor([IDS[3:]]))
    torch.testing.assert_close(value[1, 3:], alone[0], rtol=0, atol=1e-4)
    both = model.activations(IDS, ["layers.1.resid_post", "transformer.h.1:output"])
    assert torch.equal(both["layers.1.resid_post"], both["transformer.h.1:output"])


def test_reading_stops_behind_the_deepest_site(models_by_name):
    model, _ = models_by_name("llama")
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.lm.model.layers)
    ]
    model.activations(IDS, ["layers.1.mlp_out", "layers.0.resid_post"])
    for handle in handles:
        handle.remove()
    assert ran in ([0], [0, 1])


def test_repeated_reads_leave_nothing_behind():
    model = HookedModel(build_lm("llama"), byte_tokenizer())
    for _ in range(3):
        model.activations(IDS, "layers.*.resid_post")
    once = len(list(model._nnsight.named_modules()))
    for _ in range(5):
        model.activations(IDS, "layers.*.resid_post")
    assert len(list(model._nnsight.named_modules())) == once
    assert model.context == CONTEXT


@pytest.mark.parametrize(
    "pattern",
    ["layers.{0..99999999}.mlp_out", "{a,b}" * 40, "layers.{0.." + "9" * 5000 + "}.mlp_out", "{" * 500 + "}" * 500],
)
def test_a_pattern_that_stands_for_too_many_names_is_refused(pattern):
    with pytest.raises(SiteError, match="stands for more than 10,000 names|matches no site"):
        resolve(build_lm("llama"), pattern)
