"""Reconstruction and sparsity of SAEs that do a known thing."""

from __future__ import annotations

import math

import pytest
import torch
from builders import identity_sae, tiny_sae
from torch import Tensor

from saehook.config import ReLU, SAEConfig
from saehook.reconstruction import RATIOS, Fidelity, reconstruct
from saehook.sae import SAE

WIDTH = 6
X = 3 * torch.randn(4, 9, WIDTH, generator=torch.Generator().manual_seed(0)) + 1
MASK = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) < 0.7


def measured(
    sae: SAE, x: Tensor = X, mask: Tensor = MASK, y: Tensor | None = None
) -> tuple[Fidelity, dict[str, float]]:
    target = x if y is None else y
    fidelity = Fidelity(sae, target[mask].double().mean(0))
    with torch.no_grad():
        for i in range(0, len(x), 3):  # in two batches
            fidelity.update(x[i : i + 3], target[i : i + 3], mask[i : i + 3])
    totals = fidelity.sums.totals()
    return fidelity, {name: float(ratio(totals)) for name, ratio in RATIOS.items()}


def test_the_identity_is_perfect():
    fidelity, found = measured(identity_sae(WIDTH))
    assert found["fvu"] == 0
    for name in ("cosine", "norm_ratio", "gamma"):
        assert found[name] == pytest.approx(1, abs=1e-7)
    assert found["l0"] == WIDTH, "one sign of each coordinate"
    assert fidelity.sums.totals()["n"] == MASK.sum()


def test_a_shrunken_reconstruction_is_found_out():
    """x_hat = x / 2: gamma = ¼‖x‖² / ½‖x‖²; the mean of x is not taken for 0."""
    sae = identity_sae(WIDTH)
    with torch.no_grad():
        sae.W_dec.mul_(0.5)
    _, found = measured(sae)
    x = X[MASK].double()
    assert found["gamma"] == pytest.approx(0.5, abs=1e-7)
    assert found["norm_ratio"] == pytest.approx(0.5, abs=1e-7)
    assert found["cosine"] == pytest.approx(1, abs=1e-7)
    fvu = (0.25 * x.square().sum() / (x - x.mean(0)).square().sum()).item()
    assert found["fvu"] == pytest.approx(fvu, rel=1e-6)
    about_zero = (0.25 * x.square().sum() / x.square().sum()).item()
    assert abs(fvu - about_zero) > 0.01


def test_the_mean_explains_nothing():
    sae = SAE(SAEConfig(d_in=WIDTH, d_sae=5, activation=ReLU()))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_dec.copy_(X[MASK].mean(0))
    fidelity, found = measured(sae)
    assert found["fvu"] == pytest.approx(1, abs=1e-6)
    assert found["l0"] == 0
    assert fidelity.dead_share == 1
    assert fidelity.blocks()["density"]["never"] == 5


def planted(counts: list[int], d_sae: int) -> tuple[SAE, Tensor]:
    """Latent i fires exactly where coordinate i is positive; on token t the first `counts[t]` coordinates are."""
    sae = SAE(SAEConfig(d_in=d_sae, d_sae=d_sae, activation=ReLU(), subtract_b_dec=False))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d_sae))
        sae.W_dec.copy_(torch.eye(d_sae))
    x = torch.zeros(1, len(counts), d_sae)
    for token, n in enumerate(counts):
        x[0, token, :n] = 1.0 + token
    return sae, x


def test_l0_and_densities_of_planted_latents():
    counts = [1] * 50 + [2] * 30 + [5] * 20
    sae, x = planted(counts, 8)
    fidelity, found = measured(sae, x, torch.ones(1, 100, dtype=torch.bool))
    l0 = fidelity.blocks()["l0"]
    assert found["l0"] == l0["mean"] == 2.1
    assert l0["sd"] == pytest.approx(math.sqrt((50 + 4 * 30 + 25 * 20) / 100 - 2.1**2))
    assert l0["quantiles"] == {"0.05": 1, "0.25": 1, "0.5": 1, "0.75": 2, "0.95": 5}
    assert l0["edges"] == [1, 2, 3, 4, 5, 6]
    assert l0["counts"] == [50, 30, 0, 0, 20]
    assert fidelity.fired.tolist() == [100, 50, 20, 20, 20, 0, 0, 0]
    assert fidelity.dead_share == 3 / 8
    density = fidelity.blocks()["density"]
    assert (density["tokens"], density["low"], density["never"]) == (100, -2, 3)
    bins = [0] * 10
    for share in (1, 0.5, 0.2, 0.2, 0.2):
        bins[min(9, int((math.log10(share) + 2) * 5))] += 1
    assert density["counts"] == bins


def test_tokens_that_do_not_count_are_measured_apart():
    sae = tiny_sae(WIDTH)
    huge = torch.where(MASK[..., None], X, 1000 * X)
    results = []
    for x in (X, huge):
        fidelity, found = measured(sae, x)
        results.append(found)
        special = fidelity.blocks()["special"]
        with torch.no_grad():
            x_hat = sae(x[~MASK]).x_hat
        assert special["tokens"] == int((~MASK).sum())
        ratio = (x_hat - x[~MASK]).square().sum() / x[~MASK].square().sum()
        assert special["error_over_square"] == pytest.approx(float(ratio), rel=1e-4)
    assert results[0] == results[1], "no number sees them"


def test_tokens_that_are_not_finite_are_nowhere():
    broken = X.clone()
    broken[0, 2] = float("nan")
    broken[1, 3, 0] = float("inf")
    mask = MASK.clone()
    mask[0, 2] = mask[1, 3] = False  # who calls takes them out of the mask
    sae = tiny_sae(WIDTH)
    a, b = measured(sae, broken, mask), measured(sae, X, mask)
    assert a[1] == b[1]
    assert a[0].blocks()["special"]["tokens"] == b[0].blocks()["special"]["tokens"] - 2
    assert math.isfinite(a[0].blocks()["special"]["cosine"])


def test_a_token_of_zeros_has_no_direction():
    x = X.clone()
    x[0] = 0
    _, found = measured(identity_sae(WIDTH), x, torch.ones(4, 9, dtype=torch.bool))
    assert found["cosine"] == found["norm_ratio"] == pytest.approx(0.75, abs=1e-7)


def test_few_activations_at_a_time_change_nothing(monkeypatch):
    sae = tiny_sae(WIDTH)
    fidelity, found = measured(sae)
    whole = reconstruct(sae, X[MASK])
    monkeypatch.setattr("saehook.reconstruction.MAX_ACTS", 100)
    again, same = measured(sae)
    assert same == pytest.approx(found, rel=1e-6)
    assert torch.equal(again.fired, fidelity.fired)
    torch.testing.assert_close(reconstruct(sae, X[MASK]), whole)


def test_a_transcoder_is_measured_against_what_it_reconstructs():
    config = SAEConfig(d_in=WIDTH, d_out=4, d_sae=20, activation=ReLU(), subtract_b_dec=False)
    sae = SAE(config, generator=torch.Generator().manual_seed(3))
    y = torch.randn(4, 9, 4, generator=torch.Generator().manual_seed(4))
    _, found = measured(sae, y=y)
    with torch.no_grad():
        error = (sae(X[MASK]).x_hat - y[MASK]).square().sum()
    assert found["fvu"] == pytest.approx(float(error / (y[MASK] - y[MASK].mean(0)).square().sum()), rel=1e-5)
