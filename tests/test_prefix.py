"""Runs that leave out the layers below a site give the bits of whole runs."""

from __future__ import annotations

import pytest
import torch
from builders import ARCHITECTURES, CONFIGS, LAYERS, build_lm, byte_tokenizer, random_ids, tiny_sae

from saehook.editing import ReadAction
from saehook.errors import SiteNotExecutedError
from saehook.hooked_model import HookedModel
from saehook.prefix import Prefix
from saehook.sites import KINDS, layers_before, resolve

IDS = torch.tensor([random_ids(12, seed=seed, bos=True) for seed in (1, 2)])


def halved(x, view):
    return 0.5 * x + 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_kind_of_site_in_every_architecture_bit_for_bit(models_by_name, name):
    model, lm = models_by_name(name)
    hooked = model.attach({"layers.2.resid_post": tiny_sae()})
    sites = [site for site in model.sites("layers.{1,2}.*") if site.width]
    assert len(sites) >= 2 * (len(KINDS) - 1)
    depths = {site.name: layers_before(model.lm, site) for site in sites}
    assert depths["layers.2.resid_post"] == LAYERS
    assert depths["layers.2.resid_pre"] == depths["layers.2.mlp_out"] == depths["layers.1.resid_post"] == 2
    prefix = Prefix(depths.values())
    clean = hooked.run(IDS, {}, prefix=prefix).logits
    with torch.no_grad():
        assert torch.equal(clean, lm(IDS, use_cache=False).logits)
    for site, depth in depths.items():
        whole = hooked.run(IDS, {site: halved}).logits
        assert not torch.equal(whole, clean), site
        assert torch.equal(hooked.run(IDS, {site: halved}, prefix=prefix.skipping(depth)).logits, whole), site
    assert torch.equal(hooked.run(IDS, {}).logits, clean), "nothing stays behind"
    hooked.detach()


def test_the_layers_are_really_left_out():
    model = HookedModel(build_lm("llama"), byte_tokenizer())
    hooked = model.attach({"layers.1.resid_post": tiny_sae()})
    ran: list[int] = []
    for i, layer in enumerate(model.lm.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    prefix = Prefix([2])
    hooked.run(IDS, {}, prefix=prefix)
    assert ran == [0, 1, 2]
    hooked.run(IDS, {"layers.1.resid_post": halved}, prefix=prefix.skipping(2))
    assert ran == [0, 1, 2, 2]
    with pytest.raises(SiteNotExecutedError, match=r"layers\.0\.mlp_out"):
        hooked.run(IDS, {"layers.0.mlp_out": halved}, prefix=prefix.skipping(2))
    late = {"layers.0.mlp_out": halved, "layers.2.resid_post": ReadAction([], stop=True)}
    with pytest.raises(SiteNotExecutedError, match=r"layers\.0\.mlp_out"):
        hooked.run(IDS, late, prefix=prefix.skipping(2))


def test_an_architecture_without_a_row_runs_whole(models_by_name):
    model, _ = models_by_name("opt")
    assert "opt" in CONFIGS
    assert layers_before(model.lm, resolve(model.lm, "model.decoder.layers.1:output")[0]) == 0
    assert Prefix([0, 0]).skipping(0) is None


def test_places_outside_the_layers_share_none(models_by_name):
    model, _ = models_by_name("llama")
    for path in ("model.embed_tokens:output", "model.norm:output", "lm_head:input", "model:output"):
        assert layers_before(model.lm, resolve(model.lm, path)[0]) == 0
    assert layers_before(model.lm, resolve(model.lm, "model.layers.1.mlp.down_proj:input")[0]) == 1
