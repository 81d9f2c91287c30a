"""Latents, pre-activations, reconstruction and error as nnsight sites: in a trace and at every step of a generation."""

from __future__ import annotations

import contextlib
import re
import runpy
from pathlib import Path
from typing import Any

import nnsight
import pytest
import reference_hooks as reference
import torch
from builders import SPECIAL, WIDTH, build_lm, byte_tokenizer, footprint, random_ids, tiny_sae
from torch import Tensor

from saehook import Program, Where, ablate, clamp, generation, prompt, scale, steer, tokens
from saehook.config import ReLU, SAEConfig
from saehook.errors import ArgumentError, SiteError
from saehook.hooked_model import HookedModel
from saehook.sae import SAE

FEW = ["llama", "gpt2", "gpt_neox", "gemma2"]
SITE = "layers.1.resid_post"
PLACES = {
    "output": SITE,
    "tuple": "layers.1.attn_out",
    "input": "layers.1.attn_z",
    "in place": "layers.1.resid_mid",
}
PARTS = ("pre_acts", "latents", "reconstruction", "error")
IDS = random_ids(9, seed=5, bos=True)
OTHER = random_ids(5, seed=6, bos=True)
NEW = 6


def attach(models_by_name: Any, name: str, site: str = SITE, **sae: Any) -> tuple[Any, Any]:
    """(handle with one SAE, plain torch model with the same weights)."""
    model, lm = models_by_name(name)
    return model.attach({site: tiny_sae(model.sites(site)[0].width, **sae)}), lm


def tensor(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@torch.no_grad()
def clean(lm: Any, ids: list[int]) -> Tensor:
    return lm(input_ids=tensor(ids)).logits


@pytest.fixture(params=[(name, place) for name in FEW for place in PLACES if (name, place) != ("gpt_neox", "in place")])
def everywhere(request: Any, models_by_name: Any) -> Any:
    """(handle, plain model, site), for every architecture and kind of site."""
    name, place = request.param
    hooked, lm = attach(models_by_name, name, PLACES[place], activation="topk")
    yield hooked, lm, PLACES[place]
    hooked.detach()


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_all_that_an_sae_computes_can_be_read_and_nothing_changes(everywhere, grad):
    hooked, lm, site = everywhere
    sae, here = hooked.saes[site], hooked.at(site)
    with torch.set_grad_enabled(grad), hooked.trace(tensor(IDS)):
        x = nnsight.save(here.input)
        pre_acts = nnsight.save(here.pre_acts.output)
        acts = nnsight.save(here.latents.output)
        x_hat = nnsight.save(here.reconstruction.output)
        error = nnsight.save(here.error.output)
        after = nnsight.save(here.output)
        logits = nnsight.save(hooked.nnsight.output.logits)
    plain = reference.read(lm, site, tensor(IDS))
    expected = sae(plain)
    for value, wanted in [
        (x, plain),
        (pre_acts, expected.pre_acts),
        (acts, expected.acts),
        (x_hat, expected.x_hat),
        (error, plain - expected.x_hat),
        (after, plain),
        (logits, clean(lm, IDS)),
    ]:
        assert torch.equal(value, wanted)
    assert torch.equal(acts[0], hooked.latents(IDS).acts)


@pytest.mark.parametrize("name", FEW)
def test_every_step_of_a_generation_can_be_read(models_by_name, name):
    hooked, lm = attach(models_by_name, name)
    read: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    with hooked.generating(tensor(IDS), max_new_tokens=NEW) as tracer:
        for _ in tracer.iter[:NEW]:
            for part, values in read.items():
                values.append(getattr(hooked.at(SITE), part).output)
        ids = nnsight.save(tracer.result)
    assert torch.equal(ids[0], hooked.generate(IDS, max_new_tokens=NEW).ids)
    assert torch.equal(ids, lm.generate(tensor(IDS), max_new_tokens=NEW, do_sample=False))
    assert [acts.shape[1] for acts in read["latents"]] == [len(IDS)] + [1] * (NEW - 1)
    x = reference.read(lm, SITE, ids[:, :-1])  # the last token is never read by the model
    out = hooked.saes[SITE](x)
    whole = {"pre_acts": out.pre_acts, "latents": out.acts, "reconstruction": out.x_hat, "error": x - out.x_hat}
    for part, values in read.items():
        torch.testing.assert_close(torch.cat(values, 1), whole[part].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FEW)
def test_the_clean_model_can_be_traced_in_generation(models_by_name, name):
    model, lm = models_by_name(name)
    read = []
    with model.generating(tensor(IDS), max_new_tokens=NEW) as tracer:
        for step in tracer.iter[:NEW]:
            read.append(model.envoy(SITE).output)
            if step == 2:
                model.envoy(SITE).output[:] = 0.0
        ids = nnsight.save(tracer.result)
    unwritten = lm.generate(tensor(IDS), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ids[:, : len(IDS) + 2], unwritten[:, : len(IDS) + 2])
    assert not torch.equal(ids, unwritten)
    plain = reference.read(lm, SITE, ids[:, :-1])[:, : len(IDS) + 1]
    torch.testing.assert_close(torch.cat(read[:2], 1), plain, rtol=1e-4, atol=1e-4)


def test_a_generation_has_the_same_defaults_as_generate(models_by_name):
    model, _ = models_by_name("llama")
    with model.generating("hello") as tracer:
        ids = nnsight.save(tracer.result)
    assert torch.equal(ids[0], model.generate("hello").ids)


def test_nnsights_cache_keeps_latents(models_by_name):
    hooked, _ = attach(models_by_name, "llama")
    with torch.no_grad(), hooked.trace(tensor(IDS)) as tracer:
        cache = tracer.cache(modules=[hooked.at(SITE).latents])
    assert torch.equal(cache[hooked.at(SITE).latents.path].output[0], hooked.latents(IDS).acts)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_writing_latents_is_the_edit(everywhere):
    hooked, _, site = everywhere
    rows = torch.arange(len(IDS)).tolist()
    with torch.no_grad():
        expected = hooked(IDS, [clamp(9, 3.0, where=tokens(*rows)), scale(range(48), 0.5, where=tokens(4))]).logits
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        hooked.at(site).latents.output[..., 9] = 3.0
        hooked.at(site).latents.output[:, 4] *= 0.5
        in_place = nnsight.save(hooked.nnsight.output.logits)
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        acts = hooked.at(site).latents.output.clone()
        acts[..., 9] = 3.0
        acts[:, 4] *= 0.5
        hooked.at(site).latents.output = acts
        assigned = nnsight.save(hooked.nnsight.output.logits)
    torch.testing.assert_close(in_place, expected, rtol=0, atol=1e-4)
    assert torch.equal(in_place, assigned)


def test_without_its_error_a_token_is_its_reconstruction(everywhere):
    hooked, lm, site = everywhere
    with torch.no_grad():
        spliced = hooked(IDS, splice=True).logits
        dropped = hooked(IDS, [clamp(9, 3.0, where=tokens(3))], error="drop").logits
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        hooked.at(site).error.output[:, 1:] = 0.0  # BOS is not on the mask
        without = nnsight.save(hooked.nnsight.output.logits)
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        hooked.at(site).latents.output[:, 3, 9] = 3.0
        hooked.at(site).error.output[:, 3] = 0.0
        both = nnsight.save(hooked.nnsight.output.logits)
    torch.testing.assert_close(without, spliced, rtol=0, atol=1e-4)
    torch.testing.assert_close(both, dropped, rtol=0, atol=1e-4)
    assert not torch.allclose(without, clean(lm, IDS), atol=1e-2)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_x_is_the_reconstruction_and_the_error_as_they_were_left(models_by_name, activation, normalize):
    hooked, lm = attach(models_by_name, "llama", activation=activation, normalize=normalize)
    plain = reference.read(lm, SITE, tensor(IDS))
    sae, here = hooked.saes[SITE], hooked.at(SITE)
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        here.pre_acts.output[:, 5, 7] = 2.0
        here.latents.output[:, 4, 9] = -3.0
        here.reconstruction.output[:, 3] *= 2.0
        here.error.output[:, 2:4] *= 0.5
        after = nnsight.save(here.output)
    z = sae.encode(plain)
    z[:, 5, 7], z[:, 4, 9] = 2.0, -3.0
    x_hat, error = sae.decode(z, plain), plain - sae(plain).x_hat
    x_hat[:, 3] *= 2.0
    error[:, 2:4] *= 0.5
    torch.testing.assert_close(after[:, 2:6], (x_hat + error)[:, 2:6].detach(), rtol=1e-5, atol=1e-5)
    untouched = [0, 1, 6, 7, 8, 9]
    assert torch.equal(after[:, untouched], plain[:, untouched])


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("name", FEW)
def test_writing_at_one_step_is_an_edit_at_that_position(models_by_name, name, step):
    hooked, _ = attach(models_by_name, name)
    n = len(IDS)
    logits = []
    with hooked.generating(tensor(IDS), max_new_tokens=NEW) as tracer:
        for now in tracer.iter[:NEW]:
            if now == step:
                hooked.at(SITE).latents.output[:, -1, 9] = 8.0
            logits.append(hooked.nnsight.output.logits[:, -1])
        ids = nnsight.save(tracer.result)
    edits = [clamp(9, 8.0, where=Where(positions=(n - 1 + step, n + step)))]
    run = hooked.generate(IDS, edits, max_new_tokens=NEW)
    assert torch.equal(ids[0], run.ids)
    full = Program(edits=edits)
    expected = reference.logits(hooked.lm, run.ids[:-1].tolist(), full, hooked.saes, special=SPECIAL, prompt=n)
    torch.testing.assert_close(torch.cat(logits), expected[n - 1 :], rtol=0, atol=1e-4)
    assert not torch.allclose(
        expected[n - 1 + step], clean(hooked.lm, run.ids[:-1].tolist())[0, n - 1 + step], atol=1e-2
    )


@pytest.mark.parametrize("where", [prompt(), Where(prompt=False, special=True)], ids=["prompt", "generation"])
@pytest.mark.parametrize("name", FEW)
def test_writing_at_many_steps_is_an_edit_of_prompt_or_generation(models_by_name, name, where):
    hooked, _ = attach(models_by_name, name)
    steps = slice(0, 1) if where.prompt else slice(1, NEW)
    with hooked.generating(tensor(IDS), max_new_tokens=NEW) as tracer:
        for step in tracer.iter[steps]:
            ordinary = slice(1, None) if step == 0 else slice(None)  # without BOS
            hooked.at(SITE).latents.output[:, ordinary, 9] += 3.0
            hooked.at(SITE).error.output[:, ordinary] = 0.0
        ids = nnsight.save(tracer.result)
    expected = hooked.generate(IDS, [steer(9, 3.0, where=where)], error="drop", max_new_tokens=NEW)
    assert torch.equal(ids[0], expected.ids)


def test_what_was_saved_before_a_write_stays(models_by_name):
    """Where the residual stream is changed in place, too."""
    hooked, lm = attach(models_by_name, "llama", PLACES["in place"])
    here = hooked.at(PLACES["in place"])
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        before = nnsight.save(here.input)
        here.latents.output[..., 9] = 30.0
        after = nnsight.save(here.output)
    assert torch.equal(before, reference.read(lm, PLACES["in place"], tensor(IDS)))
    assert not torch.allclose(before, after)


def test_writing_x_itself_comes_before_the_sae(models_by_name):
    hooked, lm = attach(models_by_name, "llama")
    x = reference.read(lm, SITE, tensor(IDS))
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        hooked.at(SITE).input = x * 0.5
        acts = nnsight.save(hooked.at(SITE).latents.output)
        after = nnsight.save(hooked.at(SITE).output)
        following = nnsight.save(hooked.model.envoy("layers.2.resid_pre").input)
    assert torch.equal(acts, hooked.saes[SITE].encode(x * 0.5).detach())
    assert torch.equal(after, x * 0.5)
    assert torch.equal(following, x * 0.5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_bf16_model_keeps_its_bits_and_gets_its_change_in_float32(grad):
    lm, plain = (build_lm("llama", dtype=torch.bfloat16) for _ in range(2))
    sae = tiny_sae(site=SITE)
    hooked = HookedModel(lm, byte_tokenizer()).attach(sae)
    x = reference.read(plain, SITE, tensor(IDS))
    with torch.set_grad_enabled(grad), hooked.trace(tensor(IDS)):
        error = nnsight.save(hooked.at(SITE).error.output)
        logits = nnsight.save(hooked.nnsight.output.logits)
    assert torch.equal(logits, clean(plain, IDS))
    assert error.dtype == torch.float32
    with torch.set_grad_enabled(grad), hooked.trace(tensor(IDS)):
        hooked.at(SITE).error.output = torch.zeros_like(error)
        after = nnsight.save(hooked.at(SITE).output)
    torch.testing.assert_close(after, sae(x).x_hat.to(torch.bfloat16), rtol=8e-3, atol=1e-3)


# --- several prompts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
def test_each_prompt_of_a_trace_has_its_own_writes(models_by_name, name):
    hooked, lm = attach(models_by_name, name)
    here = hooked.at(SITE)
    with torch.no_grad():
        solo = [hooked(OTHER, [clamp(9, 3.0)]).logits, hooked(IDS, [ablate(5)]).logits, clean(lm, OTHER)]
        errors = [hooked(OTHER, splice=True).logits]
    with torch.no_grad(), hooked.trace() as tracer:
        with tracer.invoke(tensor(OTHER)):
            here.latents.output[:, -5:, 9] = 3.0  # counted from the end: the shorter prompt is padded on the left
            first = nnsight.save(hooked.nnsight.output.logits)
        with tracer.invoke(tensor(IDS)):
            acts = nnsight.save(here.latents.output.clone())
            here.latents.output[:, 1:, 5] = 0.0
            second = nnsight.save(hooked.nnsight.output.logits)
        with tracer.invoke(tensor(OTHER)):
            third = nnsight.save(hooked.nnsight.output.logits)
        with tracer.invoke(tensor(OTHER)):
            here.error.output[:, -5:] = 0.0
            fourth = nnsight.save(hooked.nnsight.output.logits)
        with tracer.invoke():
            everything = nnsight.save(hooked.nnsight.output.logits)
    for got, expected in zip([first, second, third, fourth], solo + errors, strict=True):
        torch.testing.assert_close(got[:, -expected.shape[1] :], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(acts[0], hooked.latents(IDS).acts, rtol=0, atol=1e-4)
    assert torch.equal(everything, torch.cat([first, second, third, fourth]))


@pytest.mark.parametrize("name", FEW)
def test_each_prompt_of_a_generation_has_its_own_writes(models_by_name, name):
    hooked, _ = attach(models_by_name, name)
    here = hooked.at(SITE)
    with hooked.generating(max_new_tokens=NEW) as tracer:
        with tracer.invoke(tensor(OTHER)):
            for step in tracer.iter[:NEW]:
                if step >= 1:
                    here.latents.output[..., 9] = 3.0
        with tracer.invoke(tensor(IDS)):
            for step in tracer.iter[:NEW]:
                here.latents.output[:, 1 if step == 0 else 0 :, 5] += 2.0
        with tracer.invoke(tensor(IDS)):
            for _ in tracer.iter[:1]:
                here.error.output[:, 1:] = 0.0
        with tracer.invoke():
            ids = nnsight.save(tracer.result)
    rows = [
        hooked.generate(OTHER, [clamp(9, 3.0, where=generation())], max_new_tokens=NEW),
        hooked.generate(IDS, [steer(5, 2.0)], max_new_tokens=NEW),
        hooked.generate(IDS, [steer(5, 1e-6, where=prompt())], error="drop", max_new_tokens=NEW),
    ]
    for row, expected in zip(ids, rows, strict=True):
        assert torch.equal(row[-NEW:], expected.new_ids)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_each_prompt_has_all_its_beams(models_by_name, options):
    hooked, _ = attach(models_by_name, "llama")
    here, returned = hooked.at(SITE), options.get("num_return_sequences", 1)
    with hooked.generating(max_new_tokens=NEW, **options) as tracer:
        with tracer.invoke(tensor(OTHER)):
            shapes = nnsight.save([])
            for _ in tracer.iter[:NEW]:
                shapes.append(here.latents.output.shape)
            first = nnsight.save(tracer.result)
        with tracer.invoke(tensor(IDS)):
            for _ in tracer.iter[1:NEW]:
                here.latents.output = here.latents.output * 2.0
            second = nnsight.save(tracer.result)
    assert {shape[0] for shape in shapes} == {options["num_beams"]}
    doubled = [scale(range(48), 2.0, where=Where(prompt=False, special=True))]
    alone = [hooked.generate(OTHER, max_new_tokens=NEW, **options)]
    alone.append(hooked.generate(IDS, doubled, max_new_tokens=NEW, **options))
    for rows, expected in zip([first, second], alone, strict=True):
        expected = expected if returned > 1 else [expected]
        assert [row[-NEW:].tolist() for row in rows] == [one.new_ids.tolist() for one in expected]


def test_each_prompt_has_its_rows_where_a_module_gets_all_tokens_in_one_list(models_by_name):
    site = "model.decoder.layers.1.fc2:output"
    model, lm = models_by_name("opt")
    hooked = model.attach({site: tiny_sae()})
    with torch.no_grad(), hooked.trace() as tracer:
        with tracer.invoke(tensor(OTHER)):
            acts = nnsight.save(hooked.at(site).latents.output)
            first = nnsight.save(hooked.nnsight.output.logits)
        with tracer.invoke(tensor(IDS)):
            hooked.at(site).latents.output[:, 1:, 9] = 3.0
            second = nnsight.save(hooked.nnsight.output.logits)
    n = len(OTHER)
    torch.testing.assert_close(acts[0, -n:], hooked.latents(OTHER).acts, rtol=0, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(first[:, -n:], lm(tensor(OTHER)).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(second, hooked(IDS, [clamp(9, 3.0)]).logits, rtol=0, atol=1e-4)
    hooked.detach()


def test_a_latent_goes_from_one_prompt_into_another(models_by_name):
    hooked, _ = attach(models_by_name, "llama")
    here = hooked.at(SITE)
    with torch.no_grad(), hooked.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(tensor(IDS)):
            taken = here.latents.output[:, -1, 9]
            barrier()
        with tracer.invoke(tensor(OTHER)):
            barrier()
            here.latents.output[:, -1, 9] = taken + 1.0
            logits = nnsight.save(hooked.nnsight.output.logits)
    value = float(hooked.latents(IDS).acts[-1, 9]) + 1.0
    with torch.no_grad():
        expected = hooked(OTHER, [clamp(9, value, where=tokens(-1))]).logits
    torch.testing.assert_close(logits[:, -len(OTHER) :], expected, rtol=0, atol=1e-4)


# --- gradients -------------------------------------------------------------------------------------------------------


def by_hand(lm: Any, sae: SAE, site: str, *, through: str) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of a loss with respect to each part, and to a weight below, where x' is put together from the parts by a
    plain hook. `through`: `all`, or the only one of `sae` and `error` that passes gradients on to x."""
    parts: dict[str, Tensor] = {}

    def write(x: Tensor) -> Tensor:
        parts["pre_acts"] = sae.pre_acts(x)
        parts["latents"] = sae.activate(parts["pre_acts"])
        parts["reconstruction"] = sae.decode(parts["latents"], x)
        parts["error"] = x - sae.decode(sae.encode(x), x)
        x_hat = parts["reconstruction"] if through != "error" else parts["reconstruction"].detach()
        return x_hat + (parts["error"] if through != "sae" else parts["error"].detach())

    with reference.written(lm, site, write):
        loss = lm(input_ids=tensor(IDS), use_cache=False).logits.square().mean()
    weight = next(p for name, p in lm.named_parameters() if "embed" in name or "wte" in name)
    wanted = [part for part in PARTS if through == "all" or (part == "error") == (through == "error")]
    *gradients, below = torch.autograd.grad(loss, [*(parts[part] for part in wanted), weight])
    return dict(zip(wanted, gradients, strict=True)), below


@pytest.mark.parametrize("through", ["all", "sae", "error"])
@pytest.mark.parametrize(("name", "place"), [("llama", "output"), ("gpt2", "in place"), ("gemma2", "input")])
def test_gradients_of_all_parts_are_those_of_plain_autograd(models_by_name, name, place, through):
    site = PLACES[place]
    hooked, lm = attach(models_by_name, name, site, normalize="layer_norm" if place == "output" else "none")
    sae, here = hooked.saes[site], hooked.at(site)
    expected, expected_below = by_hand(lm, sae, site, through=through)
    saved = {}
    with hooked.trace(tensor(IDS)):
        for part in PARTS:
            saved[part] = getattr(here, part).output
            if through == {"reconstruction": "error", "error": "sae"}.get(part):
                getattr(here, part).output = saved[part].detach()
        loss = nnsight.save(hooked.nnsight.output.logits.square().mean())
    weight = next(p for key, p in hooked.lm.named_parameters() if "embed" in key or "wte" in key)
    *gradients, below = torch.autograd.grad(loss, [*(saved[part] for part in expected), weight])
    for part, gradient in zip(expected, gradients, strict=True):
        torch.testing.assert_close(
            gradient, expected[part], rtol=1e-4, atol=1e-6, msg=lambda m, part=part: f"{part}: {m}"
        )
    torch.testing.assert_close(below, expected_below, rtol=1e-4, atol=1e-6)


def test_the_sae_can_be_trained_through_the_model(models_by_name):
    """With the error taken as a constant, the gradient of its parameters is that of a splice."""
    hooked, lm = attach(models_by_name, "llama")
    sae = hooked.saes[SITE]
    with hooked.trace(tensor(IDS)):
        hooked.at(SITE).error.output = hooked.at(SITE).error.output.detach()
        loss = nnsight.save(hooked.nnsight.output.logits.square().mean())
    got = torch.autograd.grad(loss, [sae.W_enc, sae.W_dec, sae.b_dec])

    with reference.written(lm, SITE, lambda x: (out := sae(x).x_hat) + (x - out).detach()):
        plain = lm(input_ids=tensor(IDS), use_cache=False).logits.square().mean()
    for gradient, expected in zip(got, torch.autograd.grad(plain, [sae.W_enc, sae.W_dec, sae.b_dec]), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


# --- transcoders -----------------------------------------------------------------------------------------------------


def transcoder(read: str, written: str, *, skip: bool) -> SAE:
    shape = SAEConfig(d_in=WIDTH, d_sae=48, activation=ReLU(), subtract_b_dec=False, d_out=WIDTH, skip=skip)
    sae = SAE(shape, site=read, site_out=written)
    draw = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) / WIDTH**0.5
    return sae


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_parts_of_a_transcoder(models_by_name, name, skip):
    read, written = "layers.1.mlp_in", "layers.1.mlp_out"
    model, lm = models_by_name(name)
    sae = transcoder(read, written, skip=skip)
    hooked = model.attach(sae)
    here = hooked.at(read)
    x, y = reference.read(lm, read, tensor(IDS)), reference.read(lm, written, tensor(IDS))
    out = sae(x)
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        acts = nnsight.save(here.latents.output)
        y_hat = nnsight.save(here.reconstruction.output)
        error = nnsight.save(here.error.output)
        logits = nnsight.save(hooked.nnsight.output.logits)
    assert torch.equal(acts, out.acts)
    assert torch.equal(y_hat, out.x_hat)
    assert torch.equal(error, y - out.x_hat)
    assert torch.equal(logits, clean(lm, IDS))
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        here.latents.output[:, 1:, 9] = 3.0
        here.error.output[:, 1:] = 0.0
        logits = nnsight.save(hooked.nnsight.output.logits)
    with torch.no_grad():
        expected = hooked(IDS, [clamp(9, 3.0)], splice=True).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    with hooked.generating(tensor(IDS), max_new_tokens=NEW) as tracer:
        for step in tracer.iter[:NEW]:
            here.latents.output[:, 1 if step == 0 else 0 :, 9] = 3.0
            here.error.output[:, 1 if step == 0 else 0 :] = 0.0
        ids = nnsight.save(tracer.result)
    assert torch.equal(ids[0], hooked.generate(IDS, [clamp(9, 3.0)], splice=True, max_new_tokens=NEW).ids)
    hooked.detach()


def test_two_transcoders_that_write_at_one_site(models_by_name):
    """Their changes add up, whatever is written into either."""
    model, lm = models_by_name("llama")
    reads, written = ["layers.1.mlp_in", "layers.1.resid_mid"], "layers.1.mlp_out"
    saes = {(read, written): transcoder(read, written, skip=False) for read in reads}
    hooked = model.attach(saes)
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        hooked.at(reads[1]).latents.output[:, 3, 9] += 2.0
        hooked.at(reads[0]).latents.output[:, 3, 4] += 3.0
        after = nnsight.save(model.envoy(written).output)
    rows = [sae.W_dec.detach() for sae in saes.values()]
    y = reference.read(lm, written, tensor(IDS))
    torch.testing.assert_close(after[:, 3], y[:, 3] + 3.0 * rows[0][4] + 2.0 * rows[1][9])
    rest = [i for i in range(len(IDS)) if i != 3]
    assert torch.equal(after[:, rest], y[:, rest])
    hooked.detach()


def test_each_of_two_saes_at_one_site_sees_what_the_first_left(models_by_name):
    model, lm = models_by_name("llama")
    first, second = tiny_sae(seed=1), tiny_sae(seed=2)
    hooked = model.attach({SITE: [first, second]})
    x = reference.read(lm, SITE, tensor(IDS))
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        hooked.at(f"{SITE}#0").error.output[:] = 0.0
        error = nnsight.save(hooked.at(f"{SITE}#1").error.output)
        after = nnsight.save(hooked.nnsight.model.layers[1].output)
    x_hat = first(x).x_hat.detach()
    torch.testing.assert_close(after, x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(error, (x_hat - second(x_hat).x_hat).detach(), rtol=1e-4, atol=1e-4)
    hooked.detach()


def test_a_transcoder_that_writes_before_it_reads_is_an_error(models_by_name):
    model, _ = models_by_name("llama")
    sae = transcoder("layers.1.mlp_in", "layers.0.mlp_out", skip=False)
    hooked = model.attach(sae, check="off")
    with pytest.raises(SiteError, match="has not come to the site that it reads"), hooked.trace(tensor(IDS)):
        nnsight.save(hooked.nnsight.output.logits)
    hooked.detach()


# --- what is not asked for is not computed ---------------------------------------------------------------------------


class Counting(SAE):
    """Counts how often it encodes."""

    encoded = 0

    def pre_acts(self, x: Tensor) -> Tensor:
        self.encoded += 1
        return super().pre_acts(x)


def counting_sae() -> Counting:
    sae = Counting(tiny_sae().config, site=SITE)
    sae.load_state_dict(tiny_sae(site=SITE).state_dict())
    return sae


def test_an_sae_that_a_trace_does_not_touch_computes_nothing(models_by_name):
    model, lm = models_by_name("llama")
    sae = counting_sae()
    hooked = model.attach({SITE: sae, "layers.0.mlp_out": tiny_sae()})
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        hooked.at("layers.0.mlp_out").latents.output[..., 3] += 0.0
        x = nnsight.save(hooked.at(SITE).input)
        after = nnsight.save(hooked.at(SITE).output)
        logits = nnsight.save(hooked.nnsight.output.logits)
    assert sae.encoded == 0
    assert torch.equal(logits, clean(lm, IDS))
    assert torch.equal(x, after)
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        nnsight.save(hooked.at(SITE).error.output)
    assert sae.encoded == 1
    hooked.detach()


def test_steps_are_counted_where_nothing_is_computed(models_by_name):
    """At some steps the latents are asked for, at others only what comes before or behind them."""
    model, _ = models_by_name("llama")
    sae = counting_sae()
    hooked = model.attach(sae)
    early, late = model.envoy("layers.0.resid_post"), model.envoy("layers.2.resid_post")
    asked = {1, 4}
    read = []
    with hooked.generating(tensor(IDS), max_new_tokens=NEW) as tracer:
        for step in tracer.iter[:NEW]:
            if step in {0, 3}:
                early.output.sum()
            if step in asked:
                read.append(hooked.at(SITE).latents.output)
            late.output.sum()
        ids = nnsight.save(tracer.result)
    assert sae.encoded == len(asked)
    for step, acts in zip(sorted(asked), read, strict=True):
        row = hooked.latents(ids[0, : len(IDS) + step]).acts[-1]
        torch.testing.assert_close(acts[0, 0], row, rtol=0, atol=1e-4)
    hooked.detach()


# --- what cannot be meant, and what is left --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h(IDS),
        lambda h: h(IDS, [steer(3, 1.0)]),
        lambda h: h.generate(IDS, max_new_tokens=2),
        lambda h: h.latents(IDS),
        lambda h: h.model.loss(IDS),
        lambda h: h.model.attach(tiny_sae(site=SITE)),
    ],
    ids=["call", "edit", "generate", "latents", "clean loss", "attach"],
)
def test_the_model_cannot_be_called_in_a_block(models_by_name, use):
    hooked, lm = attach(models_by_name, "llama")
    with pytest.raises(ArgumentError, match="running already"), torch.no_grad(), hooked.trace(tensor(IDS)):
        use(hooked)
    with torch.no_grad():
        assert torch.equal(hooked(IDS).logits, clean(lm, IDS))


@pytest.mark.parametrize("trace", ["trace", "generating"])
def test_a_trace_takes_no_edits(models_by_name, trace):
    hooked, _ = attach(models_by_name, "llama")
    for handle, ours in (
        (hooked, {"edits": [steer(3, 1.0)]}),
        (hooked, {"error": "drop"}),
        (hooked.model, {"splice": True}),
    ):
        with pytest.raises(ArgumentError, match=f"takes no {next(iter(ours))}"):
            getattr(handle, trace)(tensor(IDS), **ours)


def test_a_stopped_trace_leaves_nothing(models_by_name):
    read, written = "layers.0.mlp_in", "layers.1.mlp_out"
    model, lm = models_by_name("llama")
    hooked = model.attach(transcoder(read, written, skip=False), check="off")
    with torch.no_grad(), hooked.trace(tensor(IDS)) as tracer:
        hooked.at(read).latents.output[:] = 5.0
        tracer.stop()
    layer = hooked.nnsight.model.layers[0]
    # The next pass does not come by the site that is read: what the stopped one left there is not taken for its own.
    with pytest.raises(SiteError, match="has not come to the site"), torch.no_grad(), hooked.trace(tensor(IDS)):  # noqa: PT012
        layer.skip(layer.input)
        nnsight.save(hooked.nnsight.output.logits)
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        logits = nnsight.save(hooked.nnsight.output.logits)
    assert torch.equal(logits, clean(lm, IDS))
    hooked.detach()


@pytest.mark.parametrize("name", FEW)
def test_nothing_is_left_after_detach(name):
    lm = build_lm(name)
    untouched = footprint(lm)
    model = HookedModel(lm, byte_tokenizer())
    envoys = [path for path, _ in model.nnsight.named_modules()]
    hooked = model.attach(tiny_sae(site=SITE))
    with hooked.generating(tensor(IDS), max_new_tokens=3) as tracer:
        for _ in tracer.iter[:3]:
            hooked.at(SITE).latents.output[..., 9] = 5.0
            hooked.at(SITE).error.output[:] = 0.0
    with contextlib.suppress(ZeroDivisionError), hooked.generating(tensor(IDS), max_new_tokens=3):
        hooked.at(SITE).error.output[:] = 1 / 0
    hooked.detach()
    assert footprint(lm) == untouched
    assert [path for path, _ in model.nnsight.named_modules()] == envoys
    plain = build_lm(name)
    expected = plain.generate(tensor(IDS), max_new_tokens=5, do_sample=False)
    with model.generating(tensor(IDS), max_new_tokens=5) as tracer:
        ids = nnsight.save(tracer.result)
    assert torch.equal(ids, expected)
    for use in (lambda: hooked.generating(tensor(IDS)), lambda: hooked.nnsight):
        with pytest.raises(SiteError, match="detached"):
            use()


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_for_users_of_nnsight_runs(tmp_path):
    page = (Path(__file__).resolve().parents[1] / "demos" / "nnsight.md").read_text(encoding="utf-8")
    script = tmp_path / "page.py"  # nnsight reads a `with` block back from its file
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    runpy.run_path(str(script))
