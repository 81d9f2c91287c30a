"""Mistakes that other trainers of SAEs make, one test each, beside those that the other test files exclude already."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import gradients, taken_gradients
from planted import D_IN, SITE, planted
from torch import Tensor

from saehook.auxk import Weights, add_auxk_gradient
from saehook.batches import InputFacts, geometric_median
from saehook.config import (
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    Method,
    MultiTopK,
    ReLU,
    TopK,
    TrainConfig,
)
from saehook.metrics import Reconstruction
from saehook.optim import DecoderConstrainedAdam
from saehook.sae import SAE
from saehook.sae_run import SAERun
from saehook.trainer import Trainer

D_SAE, BATCH = 64, 128
METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    "relu": (ReLU(), {"sparsity_coefficient": 0.1}),
    "relu-april": (ReLU(), {"sparsity_coefficient": 0.1, "decoder_norm_penalty": True}),
    "topk": (TopK(k=4), {}),
    "multitopk": (MultiTopK(k=4), {}),
    "batchtopk": (BatchTopK(k=4), {}),
    "matryoshka": (Matryoshka(k=4, fractions=(0.5, 0.5)), {}),
    "jumprelu": (JumpReLU(), {"sparsity_coefficient": 0.02}),
    "gated": (Gated(), {"sparsity_coefficient": 0.1}),
}


def config(name: str, **changes: Any) -> TrainConfig:
    activation, own = METHODS[name]
    settings = {"d_sae": D_SAE, "tokens": 16 * BATCH, "batch_tokens": BATCH, "calibration_tokens": 256, "lr": 5e-3}
    return TrainConfig(site=SITE, activation=activation, **settings | own | changes)


def run_of(name: str, **changes: Any) -> tuple[SAERun, tuple[Tensor, ...]]:
    """A run and its batches."""
    x = planted(16 * BATCH)[0]
    return SAERun(config(name, **changes), name, InputFacts.measure(x, SITE)), x.split(BATCH)


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_tied_and_at_the_median(name):
    run, batches = run_of(name)
    sae = run.sae
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    expected = torch.full((D_SAE,), 0.1 if name == "relu-april" else 1.0)
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=-1), expected)
    assert torch.equal(sae.b_dec, geometric_median(torch.cat(batches) * run.facts.scale))


def test_the_tokens_that_set_the_scale_are_trained_on():
    x = planted(6 * BATCH)[0]
    settings = config("topk", tokens=4 * BATCH)
    (sae,) = Trainer([settings], iter([x]), d_in=D_IN, progress=False).fit()
    run = SAERun(settings, "by hand", InputFacts.measure(x, SITE))
    for batch in x.split(BATCH)[:4]:
        run.step({SITE: batch})
    assert torch.equal(sae.W_dec, run.finish().W_dec)


def test_seeds_in_one_run_are_those_of_runs_alone():
    x = planted(6 * BATCH)[0]
    configs = [config("topk", tokens=4 * BATCH, seed=seed) for seed in (0, 1)]
    together = Trainer(configs, iter([x]), d_in=D_IN, progress=False).fit()
    alone = [Trainer([c], iter([x]), d_in=D_IN, progress=False).fit()[0] for c in configs]
    assert [torch.equal(a.W_enc, b.W_enc) for a, b in zip(together, alone, strict=True)] == [True, True]
    assert not torch.equal(together[0].W_enc, together[1].W_enc)


def test_defaults_of_a_long_run_are_those_of_the_paper():
    long = TrainConfig(site=SITE, activation=TopK(k=32), d_sae=2**16, tokens=10**9)
    assert long.resolved_lr == pytest.approx(1e-4)  # 2e-4 / sqrt(d_sae / 2**14)
    assert long.resolved_dead_after_tokens == 10_000_000
    assert long.adam_eps == 6.25e-10


# --- what is minimised ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_the_gradient_is_that_of_the_loss_and_once_the_auxiliary_loss_of_the_whole_residual(name, monkeypatch):
    run, batches = run_of(name, auxk_coefficient=0.3, dead_after_tokens=BATCH, k_aux=3)
    run.sae.W_enc.data[:, :20] *= 0.01  # not among the largest
    x = batches[0] * run.facts.scale
    sae, parameters = run.sae, run.method.parameters
    terms = run.method.terms(x, x, 0)
    dead = (terms.fired == 0).nonzero().view(-1)
    assert dead.numel() >= 15
    without = gradients(terms.loss, parameters)
    terms.loss.backward(retain_graph=True)
    weights = Weights(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    add_auxk_gradient(x, (x - terms.x_hat).detach(), weights, dead, 3, 0.3)
    expected = taken_gradients(parameters)
    seen: dict[str, Tensor] = {}

    def look(*_: Any) -> Tensor:
        seen.update(taken_gradients(parameters))
        return torch.tensor(True)

    monkeypatch.setattr(run.optimizer, "step", look)
    run.step({SITE: batches[0]})
    assert torch.equal(run.dead, dead)
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-7)
    for name, less in without.items():
        assert not torch.allclose(seen[name], less, rtol=1e-3, atol=1e-5), name


def test_the_batch_does_not_set_the_loss_of_its_tokens():
    """The error is divided by one variance for the whole run, not by that of each batch."""
    run, batches = run_of("topk")
    x = batches[0] * run.facts.scale
    parts = [float(run.method.terms(part, part, 0).loss.detach()) for part in x.split(32)]
    assert float(run.method.terms(x, x, 0).loss.detach()) == pytest.approx(sum(parts) / 4, rel=1e-5)


def test_theta_itself_is_trained():
    """Adam moves a threshold by the learning rate, however small it is; its logarithm would hardly move it."""
    run, batches = run_of("jumprelu", initial_threshold=1e-3, bandwidth=0.05, warmup_steps=0)
    assert run.sae.threshold is not None
    before = run.sae.threshold.detach().clone()
    run.step({SITE: batches[0]})
    moved = (run.sae.threshold.detach() - before).abs()
    assert float(moved.median()) > 0.2 * 5e-3 or float(run.sae.threshold.detach().median()) == 0


# --- which latents are dead -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method_counts_tokens_since_a_latent_fired(name):
    run, batches = run_of(name, dead_after_tokens=3 * BATCH)
    run.sae.b_enc.data[:5] = -100
    for batch in batches[:3]:
        run.step({SITE: batch})
    assert run.tokens_since_fired[:5].tolist() == [3 * BATCH] * 5
    assert (run.tokens_since_fired == 0).any()
    assert run.read_metrics()["dead_share"] * D_SAE == run.dead.numel() >= 5, "the loss and the metric mean the same"


@pytest.mark.parametrize("name", ["topk", "multitopk", "batchtopk", "matryoshka"])
def test_what_is_kept_at_zero_does_not_fire_and_the_faintest_does(name):
    run, batches = run_of(name)
    run.sae.W_enc.data.zero_()
    run.sae.b_enc.data.fill_(-1.0)
    run.sae.b_enc.data[7] = 1e-6  # the one positive pre-activation of every token
    run.step({SITE: batches[0]})
    assert (run.tokens_since_fired == 0).nonzero().view(-1).tolist() == [7]
    assert float(run.sums["l0"]) == 1


# --- the threshold of a BatchTopK -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
def test_there_is_a_threshold_from_the_first_step_on(name):
    run, batches = run_of(name)
    run.step({SITE: batches[0]})
    sae = run.finish()
    with torch.no_grad():
        l0 = float((sae.encode(batches[1]) > 0).sum(-1).double().mean())
    assert l0 == pytest.approx(4, abs=1.5)  # not the 32 of a ReLU


def test_a_batch_in_which_nothing_fires_leaves_the_threshold():
    run, batches = run_of("batchtopk", lr=0.0)
    run.step({SITE: batches[0]})
    before = float(run.threshold)
    run.sae.b_enc.data -= 100
    run.step({SITE: batches[1]})
    assert float(run.threshold) == before > 0


def test_small_moves_of_the_threshold_are_kept():
    """In bfloat16 a step of a thousandth of the difference would be rounded away."""
    run, batches = run_of("batchtopk", lr=0.0)
    run.steps = 10**6  # the running mean is as slow as it gets
    run.threshold.fill_(0.2)
    x = batches[0] * run.facts.scale
    smallest = run.method.terms(x, x, 0).smallest
    assert smallest is not None
    run.step({SITE: batches[0]})
    assert float(run.threshold) == pytest.approx(0.999 * 0.2 + 0.001 * float(smallest), abs=1e-7)
    assert abs(float(run.threshold) - 0.2) > 1e-6


# --- the optimiser ----------------------------------------------------------------------------------------------------


def test_rare_latents_with_tiny_gradients_learn():
    """With Adam's usual epsilon, 1e-8, a gradient of 1e-9 would move a weight by a tenth of the learning rate."""
    run, _ = run_of("topk", warmup_steps=0)
    for parameter in run.method.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    assert run.sae.b_enc.grad is not None
    run.sae.b_enc.grad[3] = 1e-9
    run.optimizer.step()
    assert float(run.sae.b_enc.detach()[3]) == pytest.approx(-5e-3 / 1.625, rel=1e-3)
    assert not run.sae.b_enc.detach()[4]


def test_the_parallel_gradient_does_not_use_up_the_clipping():
    W_dec = F.normalize(torch.randn(8, 4), dim=-1)
    b_enc = torch.nn.Parameter(torch.zeros(8))
    parameters = {"W_dec": torch.nn.Parameter(W_dec.clone()), "b_enc": b_enc}
    optimizer = DecoderConstrainedAdam(parameters, lr=0.1, steps=5, clip_norm=1.0)
    parameters["W_dec"].grad = 1000 * W_dec
    b_enc.grad = torch.full((8,), 0.1)
    optimizer.step()
    torch.testing.assert_close(optimizer.adam.state[b_enc]["exp_avg"], torch.full((8,), 0.01), rtol=1e-3, atol=0)


# --- what is stored and measured --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "relu-april", "topk", "multitopk", "jumprelu", "gated"])
def test_the_stored_rule_is_that_of_training_in_raw_units(name):
    """Also where pre-activations are negative, and for thresholds, which have the unit of the activations."""
    run, batches = run_of(name, lr=2e-2, **({"initial_threshold": 0.0} if name == "jumprelu" else {}))
    for batch in batches[:10]:
        run.step({SITE: batch})
    x = batches[10]
    scaled = x * run.facts.scale
    terms = run.method.terms(scaled, scaled, 10**6)
    sae: SAE = run.finish()
    with torch.no_grad():
        out = sae(x)
    assert float(out.acts.min()) >= 0
    torch.testing.assert_close(out.x_hat * run.facts.scale, terms.x_hat.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((out.acts > 0).sum(0).float(), terms.fired, rtol=0, atol=1)


def test_fvu_knows_the_mean_and_is_no_mean_of_batches():
    """Inputs with mean 5 in every component, of which a quarter of the variance is explained."""
    x = 5 + torch.randn(4000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:1000] += 3  # batches differ
    x_hat = x + (x - x.mean(0)) * 0.75**0.5
    expected = float((x_hat - x).square().sum() / (x - x.mean(0)).square().sum())
    measured = Reconstruction()
    for part in zip(x.split(300), x_hat.split(300), strict=True):
        measured.update(*part)
    assert expected == pytest.approx(0.75)
    assert measured.fvu == pytest.approx(expected, rel=1e-9)
