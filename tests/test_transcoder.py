"""Transcoders: one site reconstructed from another, in every method, and files of them; and training from a finished SAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import WIDTH, random_ids, tiny_sae
from planted import D_IN, planted
from torch import Tensor

from saehook import clamp, generation, steer
from saehook.batches import InputFacts
from saehook.checkpoint import load_sae, save_sae
from saehook.config import (
    Activation,
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    Method,
    MultiTopK,
    ReLU,
    SAEConfig,
    TopK,
    TrainConfig,
)
from saehook.errors import ArgumentError, ShapeError, SiteError
from saehook.evaluation import evaluate
from saehook.metrics import Reconstruction
from saehook.sae import SAE
from saehook.sae_run import SAERun
from saehook.trainer import Trainer

IN, OUT = "layers.0.mlp_in", "layers.0.mlp_out"
D_OUT, D_SAE = 16, 64
METHODS: list[tuple[Method, dict[str, Any]]] = [
    (ReLU(), {"target_l0": 4}),
    (TopK(k=4), {}),
    (MultiTopK(k=4), {}),
    (BatchTopK(k=4), {}),
    (Matryoshka(k=4, fractions=(0.5, 0.5)), {}),
    (JumpReLU(), {"target_l0": 4}),
    (Gated(), {"target_l0": 4}),
]


def pairs(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs made of planted directions; outputs with a direction of their own for each, a linear part and an offset."""
    x, directions = planted(n, seed)
    draw = torch.Generator().manual_seed(5)
    out = F.normalize(torch.randn(len(directions), D_OUT, generator=draw), dim=-1)
    linear = torch.randn(D_IN, D_OUT, generator=draw) / 10
    strengths = (x / 7 - 0.5) @ torch.linalg.pinv(directions)
    return {IN: x, OUT: 3 * ((strengths - 0.4).relu() @ out) + x @ linear - 2}


def config(activation: Method, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "site": IN,
        "site_out": OUT,
        "d_sae": D_SAE,
        "tokens": 12_800,
        "batch_tokens": 256,
        "lr": 3e-3,
        "calibration_tokens": 4000,
    }
    return TrainConfig(activation=activation, **settings | changes)


def fvu(sae: SAE, seed: int = 77) -> float:
    data, measured = pairs(4000, seed), Reconstruction()
    with torch.no_grad():
        measured.update(data[OUT], sae(data[IN]).x_hat)
    return measured.fvu


@pytest.mark.parametrize(("activation", "settings"), METHODS, ids=lambda v: type(v).__name__)
def test_every_method_trains_a_transcoder(activation, settings):
    batches = (pairs(2048, seed) for seed in range(9))
    configs = [config(activation, **settings), config(activation, skip=True, **settings)]
    plain, skip = Trainer(configs, batches, d_in={IN: D_IN, OUT: D_OUT}, progress=False).fit()
    assert (plain.site, plain.site_out, plain.d_out) == (IN, OUT, D_OUT)
    assert fvu(plain) < 0.8
    assert fvu(skip) < 0.8 * fvu(plain), "the linear part is what a skip map can take over"
    assert skip.metadata["output_scale"] != skip.metadata["input_scale"]
    torch.testing.assert_close(plain.W_dec.norm(dim=-1), torch.ones(D_SAE))
    seen = [pairs(2048, seed) for seed in range(9)]
    x, y = (torch.cat([part[site] for part in seen])[12_800:16_800] for site in (IN, OUT))
    for sae in (plain, skip):
        error = (y.double() - sae(x).x_hat).mean(0).detach().float()
        torch.testing.assert_close(sae.mean_error(), error, rtol=1e-3, atol=1e-4)


def test_a_transcoder_of_raw_activations_is_that_of_scaled_ones():
    data = pairs(600)
    facts = {site: InputFacts.measure(x, site) for site, x in data.items()}
    run = SAERun(config(TopK(k=4), skip=True), "name", facts[IN], facts[OUT])
    draw = torch.Generator().manual_seed(1)
    for parameter in run.method.parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    run.sae.W_dec.data = F.normalize(run.sae.W_dec, dim=-1)
    scaled = run.method.terms(data[IN] * facts[IN].scale, data[OUT] * facts[OUT].scale, 0).x_hat.detach()
    out = run.finish()(data[IN])
    torch.testing.assert_close(out.x_hat.detach() * facts[OUT].scale, scaled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [ReLU(), TopK(k=5), BatchTopK(k=5), JumpReLU()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_comes_back_from_its_file(tmp_path, activation: Activation, skip):
    settings = SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, subtract_b_dec=False, d_out=D_OUT, skip=skip)
    sae = SAE(settings, site=IN, site_out=OUT)
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if isinstance(activation, BatchTopK):
        sae.set_threshold(0.3)
    again = load_sae(save_sae(sae, tmp_path / "sae"))
    assert (again.config, again.site, again.site_out) == (settings, IN, OUT)
    x = torch.randn(30, D_IN)
    assert torch.equal(again(x).x_hat, sae(x).x_hat)
    expected = sae.encode(x) @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if skip else 0)
    torch.testing.assert_close(again(x).x_hat, expected)
    if skip:
        with pytest.raises(ArgumentError, match="skip map"):
            sae.decode(sae.encode(x))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"d_out": 3}, "subtract_b_dec=False"),
        ({"skip": True}, "Give d_out"),
        ({"d_out": 3, "subtract_b_dec": False, "normalize": "layer_norm"}, "not supported"),
        ({"d_out": 0, "subtract_b_dec": False}, "d_out is 0"),
    ],
)
def test_impossible_transcoders(changes, match):
    with pytest.raises(ArgumentError, match=match):
        SAEConfig(d_in=4, d_sae=8, activation=ReLU(), **changes)


def test_impossible_training():
    with pytest.raises(ArgumentError, match="at most as many"):
        config(TopK(k=4), kl_tokens=20_000)
    with pytest.raises(ArgumentError, match="Give site_out"):
        config(TopK(k=4), site_out=None, skip=True)
    with pytest.raises(ArgumentError, match="leave it out"):
        config(TopK(k=4), site_out=IN)


# --- from a finished SAE ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "settings"), METHODS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("kind", ["sae", "no b_dec", "transcoder"])
def test_training_starts_from_the_very_function_of_an_sae(activation, settings, kind):
    """Without a step the finished SAE is the one that training began with."""
    transcoder = kind == "transcoder"
    of_methods = {MultiTopK: TopK(k=4), Matryoshka: BatchTopK(k=4), Gated: JumpReLU()}
    shape = SAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        activation=of_methods.get(type(activation), activation),
        subtract_b_dec=kind == "sae",
        d_out=D_OUT if transcoder else None,
        skip=transcoder,
    )
    start = SAE(shape, site=IN)
    draw = torch.Generator().manual_seed(2)
    for parameter in start.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    if start.config.activation in (JumpReLU(), BatchTopK(k=4)):
        start.set_threshold(torch.rand(D_SAE, generator=draw))
    data = pairs(500)
    facts = {site: InputFacts.measure(x, site) for site, x in data.items()}
    where = {"site_out": OUT, "skip": True} if transcoder else {"site_out": None}
    run = SAERun(config(activation, **settings, **where), "name", facts[IN], facts[OUT] if transcoder else None)
    run.start_from(start)
    run.optimizer.taken = run.steps = 1
    finished = run.finish()
    x = data[IN] / 7
    pre_acts = start.pre_acts(x) * start.W_dec.norm(dim=-1)
    torch.testing.assert_close(finished.pre_acts(x), pre_acts, rtol=1e-4, atol=1e-4)
    if not isinstance(activation, (BatchTopK, Matryoshka, TopK, MultiTopK)):
        torch.testing.assert_close(finished(x).x_hat, start(x).x_hat, rtol=1e-4, atol=1e-3)
    assert finished.metadata["started_from"]["site"] == IN


def test_further_training_begins_where_the_first_ended(tmp_path):
    def batches(seed: int):
        return (planted(2048, seed + i)[0] for i in range(18))

    def train(tokens: int, **changes: Any) -> tuple[SAE, list[SAERun]]:
        one = config(TopK(k=3), site_out=None, tokens=tokens, **changes)
        trainer = Trainer([one], batches(tokens), d_in=D_IN, progress=False, log_dir=tmp_path / f"{tokens}")
        return trainer.fit()[0], trainer.runs

    first, _ = train(30_000)
    save_sae(first, tmp_path / "first")
    _, runs = train(5120, init=str(tmp_path / "first"), lr=1e-4)
    _, fresh = train(5120, lr=1e-4)
    assert runs[0].metrics["fvu"] < 0.5 * fresh[0].metrics["fvu"]
    with pytest.raises(ShapeError, match="d_sae = 64"):
        train(5120, init=str(tmp_path / "first"), d_sae=32)


# --- in a model -------------------------------------------------------------------------------------------------------

READ, WRITTEN = "layers.1.mlp_in", "layers.1.mlp_out"


def transcoder(*, skip: bool = False, seed: int = 0) -> SAE:
    settings = SAEConfig(d_in=WIDTH, d_sae=48, activation=ReLU(), subtract_b_dec=False, d_out=WIDTH, skip=skip)
    sae = SAE(settings, site=READ, site_out=WRITTEN, generator=torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed + 1)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) / WIDTH**0.5
    return sae


def by_hand(lm: Any, ids: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Logits where the MLP of layer 1 gives `change(its input, its output)`, by a plain torch hook."""
    mlp = lm.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda module, inputs, output: change(inputs[0], output))
    try:
        with torch.no_grad():
            return lm(ids).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_stands_in_for_the_mlp(models_by_name, skip):
    model, lm = models_by_name("llama")
    sae = transcoder(skip=skip)
    hooked = model.attach(sae)
    ids = torch.tensor([random_ids(12)])
    with torch.no_grad():
        assert torch.equal(hooked(ids).logits, lm(ids).logits), "attached and idle"
        spliced = hooked(ids, splice=True).logits
        torch.testing.assert_close(spliced, by_hand(lm, ids, lambda x, y: sae(x).x_hat), rtol=1e-4, atol=1e-4)
        edited = hooked(ids, edits=[clamp(3, 2.0), steer(5, 1.5)]).logits

    def change(x: Tensor, y: Tensor) -> Tensor:
        return y + (2.0 - sae.encode(x)[..., 3:4]) * sae.W_dec[3] + 1.5 * sae.W_dec[5]

    torch.testing.assert_close(edited, by_hand(lm, ids, change), rtol=1e-4, atol=1e-4)
    hooked.detach()


def test_the_edits_of_a_transcoder_are_the_same_cached_and_padded(models_by_name):
    model, _ = models_by_name("llama")
    hooked = model.attach(transcoder())
    edits = [clamp([3, 4], 1.0), steer(5, 0.2, unit="norm", where=generation())]
    rows = [random_ids(9), random_ids(5, seed=1)]
    cached = [hooked.generate(row, edits=edits, max_new_tokens=8) for row in rows]
    for row, expected in zip(rows, cached, strict=True):
        uncached = hooked.generate(row, edits=edits, max_new_tokens=8, use_cache=False)
        assert torch.equal(uncached.ids, expected.ids)
    for padded, expected in zip(hooked.generate(rows, edits=edits, max_new_tokens=8), cached, strict=True):
        assert torch.equal(padded.ids, expected.ids)
    assert cached[0].report.edits[0].tokens == 9 + 7
    hooked.detach()


def test_latents_of_a_transcoder_are_sites_in_a_trace(models_by_name):
    model, lm = models_by_name("llama")
    sae = transcoder()
    hooked = model.attach(sae)
    ids = torch.tensor([random_ids(12)])
    with torch.no_grad():
        with hooked.trace(ids):
            clean = hooked.at(READ).latents.output.save()
            idle = hooked.model.envoy("lm_head:output").output.save()
        with hooked.trace(ids):
            hooked.at(READ).latents.output[:, :, 3] = 2.0
            changed = hooked.model.envoy("lm_head:output").output.save()
    hooked.detach()
    expected: list[Tensor] = []
    assert torch.equal(idle, by_hand(lm, ids, lambda x, y: (expected.append(sae.encode(x)), y)[1]))
    torch.testing.assert_close(clean, expected[0], rtol=1e-4, atol=1e-5)
    rewritten = by_hand(lm, ids, lambda x, y: y + (2.0 - sae.encode(x)[..., 3:4]) * sae.W_dec[3])
    torch.testing.assert_close(changed, rewritten, rtol=1e-4, atol=1e-4)


def test_evaluation_splices_a_transcoder_where_it_writes(models_by_name):
    model, lm = models_by_name("llama")
    sae = transcoder()
    hooked = model.attach({(READ, WRITTEN): sae, "layers.2.resid_post": tiny_sae(seed=4)})
    ids = torch.tensor([random_ids(20, seed=i) for i in range(4)])
    row = evaluate(hooked, ids, progress=False).results[0]

    def ce(change: Callable[[Tensor, Tensor], Tensor]) -> float:
        logits = by_hand(lm, ids, change)[:, :-1]
        return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    seen: list[tuple[Tensor, Tensor]] = []
    assert row.ce_clean == pytest.approx(ce(lambda x, y: (seen.append((x, y)), y)[1]), abs=1e-4)
    assert row.ce_spliced == pytest.approx(ce(lambda x, y: sae(x).x_hat), abs=1e-4)
    assert row.ce_zero == pytest.approx(ce(lambda x, y: 0 * y), abs=1e-4)
    x, y = (part.flatten(0, 1) for part in seen[0])
    measured = Reconstruction()
    measured.update(y, sae(x).x_hat.detach())
    assert row.fvu == pytest.approx(measured.fvu, rel=1e-4)
    hooked.detach()


def test_a_transcoder_that_does_not_fit(models_by_name):
    model, _ = models_by_name("llama")
    unknown = transcoder()
    unknown.site_out = None
    with pytest.raises(SiteError, match="does not say which site it writes"):
        model.attach(unknown)
    with pytest.raises(SiteError, match="is no transcoder"):
        model.attach({(READ, WRITTEN): tiny_sae()})
    with pytest.raises(SiteError, match=r"trained on layers.1.mlp_out, not on layers.2.mlp_out"):
        model.attach({(READ, "layers.2.mlp_out"): transcoder()})
    with pytest.raises(ShapeError, match="expects width 32, but"):
        model.attach({(READ, "layers.1.mlp_act"): transcoder()}, check="off")
    with pytest.raises(SiteError, match="two SAEs are given for"):
        model.attach({READ: transcoder(), (READ, "layers.0.mlp_out"): transcoder()}, check="off")
    beside = model.attach({READ: transcoder(), WRITTEN: tiny_sae()})
    with pytest.raises(ArgumentError, match="2 SAEs stand at one site"):
        beside(random_ids(5), splice=True)
    beside.detach()
    backwards = model.attach({(READ, "layers.0.mlp_out"): transcoder()}, check="off")
    with pytest.raises(SiteError, match="only after the site it writes"):
        backwards(random_ids(5), splice=True)
    backwards.detach()


def test_a_file_names_where_it_started_without_the_path_of_the_machine(tmp_path):
    def trained(**changes: Any) -> SAE:
        one = config(TopK(k=3), site_out=None, tokens=512, calibration_tokens=100, **changes)
        return Trainer([one], planted(1000)[0].split(100), d_in=D_IN, progress=False).fit()[0]

    save_sae(trained(), tmp_path / "first")
    metadata = trained(init=str(tmp_path / "first")).metadata
    assert metadata["training"]["init"] == "first"
    assert str(tmp_path) not in str(metadata)
