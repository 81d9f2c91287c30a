"""Every training method: its loss and gradients against dense autograd or the paper's formula, and what becomes of it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import gradients
from planted import D_IN, SITE, planted
from torch import Tensor

from saehook import activation_fns, kernels
from saehook.activation_fns import jumprelu_ste
from saehook.batches import InputFacts
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
from saehook.errors import ArgumentError
from saehook.methods import GatedMethod, MatryoshkaMethod, make_method, warm
from saehook.sae_run import SAERun
from saehook.trainer import Trainer

D_SAE = 64
FRACTIONS = (0.25, 0.25, 0.5)


@pytest.fixture(autouse=True)
def _as_in_large_saes(monkeypatch):
    """Gradients by rows, and optimiser steps in place."""
    monkeypatch.setattr(kernels, "ROWS_FROM", 0)


def config(activation: Method, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"d_sae": D_SAE, "tokens": 4096, "batch_tokens": 128, "calibration_tokens": 1000}
    return TrainConfig(site=SITE, activation=activation, **settings | changes)


def method_of(config: TrainConfig, seed: int = 0):
    """A method in float64 with random weights, and scaled tokens for it."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    method = make_method(config, InputFacts(1.0, random(D_IN).float(), torch.tensor(0.7)))
    for name, parameter in method.parameters.items():
        parameter.data = parameter.data.double() + (0 if name == "threshold" else 0.3 * random(*parameter.shape))
    method.variance = method.variance.double()
    return method, random(50, D_IN)


# --- losses and gradients ---------------------------------------------------------------------------------------------


def dense_loss(method, x: Tensor, acts_of) -> Tensor:
    """mean ‖x - acts W_dec - b_dec‖² / variance with a dense activation function."""
    sae = method.sae
    acts = acts_of((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    return (acts @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean() / method.variance


def multi(method, x: Tensor) -> Tensor:
    narrow = dense_loss(method, x, lambda pre: activation_fns.topk(pre, 5))
    return narrow + dense_loss(method, x, lambda pre: activation_fns.topk(pre, 20)) / 8


def nested(method, x: Tensor) -> Tensor:
    """Prefixes of 16, 32 and 64 of the 64 latents, by one selection over all."""
    sae, total = method.sae, torch.zeros((), dtype=x.dtype)
    acts = activation_fns.batch_topk((x - sae.b_dec) @ sae.W_enc + sae.b_enc, 5)
    for end in (16, 32, 64):
        total = total + (acts[:, :end] @ sae.W_dec[:end] + sae.b_dec - x).square().sum(-1).mean() / method.variance
    return total / 3


DENSE = {
    "topk": (TopK(k=5), lambda m, x: dense_loss(m, x, lambda pre: activation_fns.topk(pre, 5))),
    "multitopk": (MultiTopK(k=5), multi),
    "batchtopk": (BatchTopK(k=5), lambda m, x: dense_loss(m, x, lambda pre: activation_fns.batch_topk(pre, 5))),
    "matryoshka": (Matryoshka(k=5, fractions=FRACTIONS), nested),
}


@pytest.mark.parametrize("kernel", ["reference", "sparse"])
@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("shift", [0.0, -4.0, -1e3], ids=["many", "few", "none"])
def test_loss_and_gradients_equal_dense_autograd(monkeypatch, kind, kernel, shift):
    monkeypatch.setenv("SAEHOOK_KERNELS", kernel)
    activation, dense = DENSE[kind]
    method, x = method_of(config(activation))
    method.sae.b_enc.data += shift
    terms = method.terms(x, x, step=0)
    loss = terms.loss
    got = gradients(loss, method.parameters)
    expected_loss = dense(method, x)
    expected = gradients(expected_loss, method.parameters)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_first_prefix_of_a_matryoshka_is_its_first_group():
    method, x = method_of(config(Matryoshka(k=5, fractions=FRACTIONS)))
    assert isinstance(method, MatryoshkaMethod)
    assert method.ends.tolist() == [16, 32, 64]
    assert Matryoshka(k=5).fractions == pytest.approx((1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32))
    terms = method.terms(x, x, 0)
    fired = activation_fns.batch_topk((x - method.sae.b_dec) @ method.sae.W_enc + method.sae.b_enc, 5) > 0
    torch.testing.assert_close(terms.fired, fired.sum(0).float())


VERSIONS = ["reference", "dense", "sparse"]


@pytest.fixture(params=VERSIONS)
def version(request, monkeypatch) -> str:
    """Each version of the kernels in turn."""
    monkeypatch.setenv("SAEHOOK_KERNELS", request.param)
    return request.param


@pytest.mark.parametrize("decoder_norm", [False, True])
def test_l1_loss(version, decoder_norm):
    method, x = method_of(
        config(ReLU(), sparsity_coefficient=0.3, sparsity_warmup_steps=4, decoder_norm_penalty=decoder_norm)
    )
    sae = method.sae
    acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    norms = sae.W_dec.norm(dim=-1) if decoder_norm else torch.ones(D_SAE, dtype=torch.float64)
    for step, share in ((0, 0.2), (3, 0.8), (4, 1.0), (100, 1.0)):
        error = (acts @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean()
        expected = error + share * 0.3 * (acts * norms).sum(-1).mean()
        torch.testing.assert_close(method.terms(x, x, step).loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("threshold", "bandwidth"), [(0.5, 0.4), (0.1, 0.5), (0.8, 0.01)])
def test_straight_through_estimators_equal_their_formula(threshold, bandwidth):
    """Pair by pair in Python: K is 1 within half a bandwidth on EITHER side of the threshold."""
    pre = torch.randn(40, 7, dtype=torch.float64)
    pre.requires_grad_()
    theta = torch.full((7,), threshold, dtype=torch.float64, requires_grad=True)
    acts, step = jumprelu_ste(pre, theta, bandwidth)
    l0 = step.sum(-1)
    g, h = torch.randn(40, 7, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    d_pre, d_theta = torch.autograd.grad((acts * g).sum() + (l0 * h).sum(), (pre, theta))
    pre, acts, l0 = pre.detach(), acts.detach(), l0.detach()
    for j in range(7):
        expected = 0.0
        for i in range(40):
            value = float(pre[i, j])
            fires = value > threshold
            assert float(acts[i, j]) == (value if fires else 0.0)
            assert float(d_pre[i, j]) == (float(g[i, j]) if fires else 0.0)
            if abs(value - threshold) < bandwidth / 2:
                expected -= threshold / bandwidth * float(g[i, j]) + float(h[i]) / bandwidth
        assert float(d_theta[j]) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert torch.equal(l0, (pre > threshold).sum(-1).double())
    below = ((pre > threshold - bandwidth / 2) & (pre < threshold)).any()
    assert below or bandwidth < 0.1, "the lower half of the window is among the checked pairs"


@pytest.mark.parametrize("target", [None, 3.0])
def test_jumprelu_loss(version, target):
    method, x = method_of(config(JumpReLU(), sparsity_coefficient=0.2, target_l0=target, sparsity_warmup_steps=0))
    sae = method.sae
    assert sae.threshold is not None
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    acts = pre * (pre > sae.threshold)
    l0 = (acts > 0).sum(-1).double().mean()
    penalty = 0.2 * l0 if target is None else 0.2 * (l0 / target - 1) ** 2
    terms = method.terms(x, x, 0)
    torch.testing.assert_close(terms.loss, (acts @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean() + penalty)
    got = gradients(terms.loss, method.parameters)["W_enc"]
    frozen = acts.detach() @ sae.W_dec + sae.b_dec  # the L0 penalty gives the encoder no gradient
    d_acts = 2 * (frozen - x) @ sae.W_dec.T / len(x)
    torch.testing.assert_close(got, (x - sae.b_dec).T @ (d_acts * (acts > 0)), rtol=1e-6, atol=1e-9)


def test_gated_loss_gradients_and_result(version):
    method, x = method_of(config(Gated(), sparsity_coefficient=0.2, sparsity_warmup_steps=0))
    assert isinstance(method, GatedMethod)
    sae = method.sae
    centred = x - sae.b_dec
    gate = centred @ sae.W_enc + sae.b_enc
    acts = (gate > 0) * (centred @ (sae.W_enc * method.r_mag.exp()) + method.b_mag).relu()
    loss = (acts @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean() + 0.2 * gate.relu().sum(-1).mean()
    frozen = gate.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
    loss = loss + (frozen - x).square().sum(-1).mean()
    terms = method.terms(x, x, 0)
    torch.testing.assert_close(terms.loss, loss, rtol=1e-6, atol=1e-6)
    got, expected = (gradients(each, method.parameters) for each in (terms.loss, loss))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    method.finish()
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), acts, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sae(x).x_hat, terms.x_hat, rtol=1e-5, atol=1e-6)


PENALTIES: dict[str, tuple[Method, dict[str, Any]]] = {
    "relu": (ReLU(), {"sparsity_coefficient": 0.3}),
    "relu, norms": (ReLU(), {"sparsity_coefficient": 0.3, "decoder_norm_penalty": True}),
    "jumprelu": (JumpReLU(), {"sparsity_coefficient": 0.2, "bandwidth": 0.7, "initial_threshold": 0.4}),
    "jumprelu, target": (JumpReLU(), {"target_l0": 3.0, "bandwidth": 0.7, "initial_threshold": 0.1}),
    "gated": (Gated(), {"sparsity_coefficient": 0.2}),
}


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("shift", [0.0, -4.0, -1e3], ids=["many", "few", "none"])
def test_versions_of_a_penalised_method_agree(monkeypatch, kind, shift):
    """Loss, reconstruction, firing and all gradients; with blocks that divide neither latents nor tokens, and shared memory."""
    monkeypatch.setattr("saehook.kernels.dense.ENTRIES_AT_ONCE", 20 * 9)
    monkeypatch.setattr("saehook.kernels.dense.TOKENS_AT_ONCE", 20)
    monkeypatch.setattr("saehook.kernels.selection.LATENTS_AT_ONCE", 7)
    monkeypatch.setattr("saehook.kernels.sparse.LATENTS_AT_ONCE", 5)
    activation, settings = PENALTIES[kind]
    results = []
    for version in VERSIONS:
        monkeypatch.setenv("SAEHOOK_KERNELS", version)
        method, x = method_of(config(activation, sparsity_warmup_steps=0, **settings))
        method.sae.b_enc.data += shift
        scratch = kernels.Scratch()
        scratch.take("pre_acts", (50, D_SAE), x).fill_(float("nan"))
        terms = method.terms(x, x, 0, scratch)
        results.append([terms.loss, terms.x_hat, terms.fired, *gradients(terms.loss, method.parameters).values()])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-10)
    assert bool(results[0][2].any()) == (shift > -1e3)


# --- whole runs -------------------------------------------------------------------------------------------------------

PENALISED: list[tuple[Method, dict[str, Any]]] = [
    (ReLU(), {}),
    (ReLU(), {"decoder_norm_penalty": True}),
    (JumpReLU(), {}),
    (Gated(), {}),
]


@pytest.mark.parametrize(("activation", "settings"), PENALISED, ids=["relu", "relu-norms", "jumprelu", "gated"])
def test_target_l0_is_reached_by_the_stored_rule(activation, settings):
    x = planted(64_000)[0]
    settings = {"tokens": 60_000, "batch_tokens": 150, "lr": 3e-3, "target_l0": 4.0, **settings}
    (sae,) = Trainer([config(activation, **settings)], iter(x.split(999)), d_in=D_IN, progress=False).fit()
    fresh = planted(5000, seed=8)[0]
    with torch.no_grad():
        out = sae(fresh)
    l0 = float((out.acts > 0).sum(-1).double().mean())
    fvu = float((out.x_hat - fresh).square().sum() / (fresh - fresh.mean(0)).square().sum())
    assert l0 == pytest.approx(4, rel=0.12)
    assert fvu < (0.5 if isinstance(activation, ReLU) else 0.25)  # ReLU shrinks
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=-1), torch.ones(D_SAE), rtol=1e-5, atol=1e-5)
    assert sae.config.activation == config(activation, **settings).inference
    assert sae.stats is not None
    assert sae.metadata["calibration"]["l0"] == pytest.approx(l0, rel=0.1)
    json.dumps(sae.metadata)


def test_relu_shrinks_and_topk_does_not():
    """γ = E‖x_hat‖² / E[x·x_hat] about the bias (papers.md, row 14): the L1 penalty pulls activations down."""
    x = planted(50_000)[0]
    configs = [
        config(ReLU(), tokens=48_000, batch_tokens=150, lr=3e-3, target_l0=4.0),
        config(TopK(k=4), tokens=48_000, batch_tokens=150, lr=3e-3),
    ]
    saes = Trainer(configs, iter(x.split(999)), d_in=D_IN, progress=False).fit()
    gamma = []
    for sae in saes:
        with torch.no_grad():
            centred, x_hat = x - sae.b_dec, sae(x).x_hat - sae.b_dec
            gamma.append(float(x_hat.square().sum() / (centred * x_hat).sum()))
    assert gamma[0] < 0.95
    assert gamma[1] == pytest.approx(1, abs=0.02)


def run_of(activation: Method, **changes: Any) -> tuple[SAERun, Tensor]:
    x = planted(4096)[0]
    return SAERun(config(activation, **changes), "name", InputFacts.measure(x, SITE)), x


def test_free_decoder_norms_are_folded():
    run, x = run_of(ReLU(), sparsity_coefficient=0.01, decoder_norm_penalty=True, lr=1e-2)
    for batch in x.split(128):
        run.step({SITE: batch})
    norms = run.sae.W_dec.detach().norm(dim=-1)
    assert norms.std() > 0.01, "the norms are free"
    with torch.no_grad():
        before = run.sae(x * run.facts.scale).x_hat / run.facts.scale
        sae = run.finish()
        torch.testing.assert_close(sae(x).x_hat, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=-1), torch.ones(D_SAE))


def test_threshold_never_becomes_negative():
    run, x = run_of(JumpReLU(), target_l0=60.0, lr=0.05)  # more latents than are positive: thresholds are pushed down
    for batch in x.split(128):
        run.step({SITE: batch})
        assert run.sae.threshold is not None
        assert float(run.sae.threshold.detach().min()) >= 0
    assert float(run.sae.threshold.detach().min()) == 0


def test_average_of_the_weights():
    run, x = run_of(TopK(k=4), ema_decay=0.9, lr=1e-2)
    history: dict[str, list[Tensor]] = {name: [] for name in run.method.parameters}
    for batch in x.split(128):
        run.step({SITE: batch})
        for name, parameter in run.method.parameters.items():
            history[name].append(parameter.detach().clone())
    n = len(history["b_enc"])
    weights = torch.tensor([0.9 ** (n - 1 - i) for i in range(n)])
    weights /= weights.sum()
    expected = {name: sum(w * p for w, p in zip(weights, ps, strict=True)) for name, ps in history.items()}
    sae = run.finish()
    torch.testing.assert_close(sae.W_enc.detach(), expected["W_enc"], rtol=1e-4, atol=1e-5)
    rows = F.normalize(torch.as_tensor(expected["W_dec"]), dim=-1)
    torch.testing.assert_close(sae.W_dec.detach(), rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.b_enc.detach() * run.facts.scale, expected["b_enc"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "activation", [TopK(k=4), BatchTopK(k=4), MultiTopK(k=4), Matryoshka(k=4, fractions=FRACTIONS)]
)
def test_k_is_annealed(activation):
    run, x = run_of(activation, k_anneal_steps=10)
    fired = []
    for batch in x.split(128)[:12]:
        run.step({SITE: batch})
        fired.append(float(run.sums["l0"]) - sum(fired))
    assert fired[0] > 18  # from d_in = 24
    assert fired[5] == pytest.approx(14, abs=2.5)
    assert fired[-1] == pytest.approx(4, abs=0.1)
    assert fired == sorted(fired, reverse=True) or max(fired[10:]) < 4.1


def test_warm_up_of_the_penalty():
    assert [warm(step, 3) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert warm(0, 0) == 1


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "settings", "match"),
    [
        (TopK(k=4), {"sparsity_coefficient": 0.1}, "sparsity_coefficient = 0.1 has no meaning for TopK"),
        (BatchTopK(k=4), {"bandwidth": 0.1}, "bandwidth"),
        (TopK(k=4), {"threshold_beta": 0.5}, "threshold_beta"),
        (JumpReLU(), {"target_l0": 4.0, "decoder_norm_penalty": True}, "decoder_norm_penalty"),
        (ReLU(), {"target_l0": 4.0, "k_anneal_steps": 3}, "k_anneal_steps"),
        (Gated(), {"target_l0": 4.0, "auxk_coefficient": 0.1}, "auxk_coefficient"),
        (ReLU(), {}, "target_l0"),
        (JumpReLU(), {}, "target_l0"),
        (ReLU(), {"target_l0": 4.0, "sparsity_coefficient": 0.1}, "cannot be given"),
        (ReLU(), {"target_l0": D_SAE + 1.0}, "target_l0"),
        (MultiTopK(k=17), {}, "more latents than d_sae"),
        (ReLU(), {"sparsity_coefficient": float("nan")}, "sparsity_coefficient"),
        (TopK(k=4), {"ema_decay": 1.5}, "ema_decay"),
    ],
)
def test_settings_that_cannot_be_meant(activation, settings, match):
    with pytest.raises(ArgumentError, match=match):
        config(activation, **settings)


@pytest.mark.parametrize("fractions", [(), (0.5, 0.6), (1.5, -0.5)])
def test_fractions_that_are_none(fractions):
    with pytest.raises(ArgumentError, match="sum to 1"):
        Matryoshka(k=4, fractions=fractions)


def test_defaults_follow_the_method():
    assert config(JumpReLU(), target_l0=4.0).resolved_adam_beta1 == 0
    assert config(TopK(k=4)).resolved_adam_beta1 == 0.9
    assert config(TopK(k=4)).resolved_auxk_coefficient == 1 / 32
    assert config(ReLU(), target_l0=4.0).resolved_auxk_coefficient == 0
    assert dataclasses.replace(config(TopK(k=4)), auxk_coefficient=0.0).resolved_auxk_coefficient == 0
