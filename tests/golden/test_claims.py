"""What the papers claim, on planted data: absolute statements that need no recording."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden.runs import best_cosines
from planted import D_IN, SITE, planted
from torch import Tensor

from saehook import activation_fns
from saehook.config import BatchTopK, JumpReLU, Method, MultiTopK, ReLU, TopK, TrainConfig
from saehook.sae import SAE
from saehook.trainer import Trainer


def fit(*configs: tuple[Method, dict[str, Any]], steps: int, counts: str = "poisson", d_sae: int = 96) -> list[SAE]:
    """SAEs trained on the same planted tokens, 256 a step."""
    tokens = 256 * steps
    made = [
        TrainConfig(
            site=SITE,
            activation=activation,
            **{"d_sae": d_sae, "tokens": tokens, "batch_tokens": 256, "calibration_tokens": 8192, **settings},
        )
        for activation, settings in configs
    ]
    x = planted(tokens + 8192, counts=counts)[0]
    return Trainer(made, iter(x.split(4096)), d_in=D_IN, progress=False).fit()


def fvu(x: Tensor, x_hat: Tensor) -> float:
    """Fraction of variance unexplained."""
    return float((x_hat - x).square().sum() / (x - x.mean(0)).square().sum())


@torch.no_grad()
def measured(sae: SAE, counts: str = "poisson") -> tuple[float, Tensor]:
    """FVU and every token's L0 on fresh tokens."""
    x = planted(8192, seed=7, counts=counts)[0]
    out = sae(x)
    return fvu(x, out.x_hat), (out.acts > 0).sum(-1).double()


@pytest.mark.parametrize("seed", range(5))
def test_with_orthonormal_directions_the_batch_rule_never_loses(seed):
    """The error is then ‖x‖² less the squares of what is kept, and the batch rule keeps the largest."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    x = x * torch.rand(40, 1, generator=generator, dtype=torch.float64) * 3
    error = {}
    for rule in (activation_fns.topk, activation_fns.batch_topk):
        acts = rule(x @ basis.T, 3)
        error[rule.__name__] = float((acts @ basis - x).square().sum())
        assert error[rule.__name__] == pytest.approx(float(x.square().sum() - acts.square().sum()))
    assert error["batch_topk"] < error["topk"]


@pytest.mark.slow
def test_batchtopk_beats_topk_where_tokens_need_different_numbers_of_latents():
    """It keeps as many as it was told on average, but not on every token. Where all need the same number it does not win.
    TopK finds all directions."""
    top, batch = fit((TopK(k=3), {}), (BatchTopK(k=3), {}), steps=1200, counts="geometric")
    (top_fvu, top_l0), (batch_fvu, batch_l0) = (measured(sae, "geometric") for sae in (top, batch))
    assert batch_fvu < 0.9 * top_fvu
    assert float(top_l0.mean()) == pytest.approx(3, rel=0.01)
    assert float(batch_l0.mean()) == pytest.approx(3, rel=0.05)  # by the threshold, on fresh tokens
    assert float(batch_l0.min()) <= 1
    assert float(batch_l0.max()) > 6
    assert float(best_cosines(top, planted(1)[1]).mean()) > 0.98
    top, batch = fit((TopK(k=3), {}), (BatchTopK(k=3), {}), steps=1200, counts="constant")
    assert measured(top, "constant")[0] < measured(batch, "constant")[0]
    assert float(best_cosines(top, planted(1)[1]).mean()) > 0.98


@pytest.mark.slow
def test_more_weight_of_the_l0_penalty_means_fewer_latents_and_more_error():
    saes = fit(*((JumpReLU(), {"sparsity_coefficient": c}) for c in (0.003, 0.01, 0.03, 0.1)), steps=300)
    results = [measured(sae) for sae in saes]
    l0 = [float(latents.mean()) for _, latents in results]
    error = [e for e, _ in results]
    assert l0 == sorted(l0, reverse=True)
    assert error == sorted(error)
    assert l0[0] > 2 * l0[-1]


@pytest.mark.slow
def test_a_wider_bandwidth_means_fewer_latents():
    settings: list[dict[str, Any]] = [{"sparsity_coefficient": 0.03, "bandwidth": b} for b in (1e-4, 0.05, 0.3)]
    results = [measured(sae) for sae in fit(*((JumpReLU(), s) for s in settings), steps=300)]
    l0 = [float(latents.mean()) for _, latents in results]
    assert l0 == sorted(l0, reverse=True)
    assert l0[0] > 1.2 * l0[1]
    assert results[2][0] > results[1][0]  # too wide: worse reconstruction, too


@pytest.mark.slow
def test_topk_beats_relu_at_equal_l0():
    relu, top = fit((ReLU(), {"target_l0": 3.0}), (TopK(k=3), {}), steps=600)
    assert float(measured(relu)[1].mean()) == pytest.approx(3, rel=0.15)
    assert measured(top)[0] < 0.7 * measured(relu)[0]


@pytest.mark.slow
def test_multitopk_is_good_with_more_latents_than_k():
    """A TopK gets worse beyond its k; with the second loss at 4 k more latents help."""
    saes = fit((TopK(k=3), {}), (MultiTopK(k=3), {}), steps=600)
    x = planted(8192, seed=7)[0]
    at: list[list[float]] = []
    for sae in saes:
        with torch.no_grad():
            pre = sae.pre_acts(x)
            at.append([fvu(x, sae.decode(activation_fns.topk(pre, k))) for k in (3, 12)])
    plain, multi = at
    assert plain[1] > 1.4 * plain[0]
    assert multi[1] < 0.9 * multi[0]
    assert multi[1] < 0.7 * plain[1]
