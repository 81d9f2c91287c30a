"""The loss terms: values against independent arithmetic, and where gradients may go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saehook import losses
from saehook.auxk import Weights, add_auxk_gradient


def weights(d_in: int = 6, d_sae: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    return random(d_in, d_sae), random(d_sae), random(d_sae, d_in), random(d_in)


def test_reconstruction_is_the_fraction_of_variance_unexplained():
    x = torch.randn(50, 7, dtype=torch.float64) + 3
    assert losses.reconstruction(x, x) == 0
    mean = x.mean(0).expand_as(x)
    torch.testing.assert_close(losses.reconstruction(x, mean), torch.tensor(1.0, dtype=torch.float64))
    x_hat = x + 0.1
    expected = 7 * 0.01 * 50 / sum(float((row - x.mean(0)).square().sum()) for row in x)
    assert float(losses.reconstruction(x, x_hat)) == pytest.approx(expected)
    assert float(losses.reconstruction(x, x_hat, torch.tensor(0.5))) == pytest.approx(0.07 / 0.5)


def auxk_by_hand(x: Tensor, residual: Tensor, params: tuple[Tensor, ...], dead: list[int], k_aux: int) -> float:
    """Token by token and latent by latent, in Python."""
    W_enc, b_enc, W_dec, b_dec = (p.tolist() for p in params)
    rows, targets = x.tolist(), residual.tolist()
    d_in = len(b_dec)
    error = 0.0
    for row, target in zip(rows, targets, strict=True):
        pre = {j: b_enc[j] + sum((row[i] - b_dec[i]) * W_enc[i][j] for i in range(d_in)) for j in dead}
        kept = sorted(pre, key=lambda j: -pre[j])[:k_aux]
        for i in range(d_in):
            error += (sum(max(0.0, pre[j]) * W_dec[j][i] for j in kept) - target[i]) ** 2
    mean = [sum(t[i] for t in targets) / len(targets) for i in range(d_in)]
    return error / sum((t[i] - mean[i]) ** 2 for t in targets for i in range(d_in))


def auxk(
    params: tuple[Tensor, Tensor, Tensor, Tensor],
    x: Tensor,
    residual: Tensor,
    dead: list[int],
    k_aux: int,
    pre_acts: Tensor | None = None,
) -> float:
    """The loss; the gradients of four times it are left in the parameters, on top of ones."""
    for p in params:
        p.grad = torch.ones_like(p)
    which = torch.tensor(dead, dtype=torch.int64)
    return float(add_auxk_gradient(x, residual, Weights(*params), which, k_aux, 4.0, pre_acts=pre_acts))


CASES = [([1, 4, 5, 17], 2), ([3], 5), (list(range(20)), 20), ([0, 19], 1)]


@pytest.mark.parametrize("known", [False, True], ids=["", "known pre-activations"])
@pytest.mark.parametrize("at_once", [512, 4], ids=["", "in blocks"])
@pytest.mark.parametrize(("dead", "k_aux"), CASES)
def test_auxk_value_and_gradient(monkeypatch, dead, k_aux, at_once, known):
    monkeypatch.setattr("saehook.auxk.TOKENS_AT_ONCE", at_once)
    W_enc, b_enc, W_dec, b_dec = params = weights()
    x, residual = torch.randn(2, 9, 6, dtype=torch.float64)
    pre_acts = torch.addmm(b_enc, x - b_dec, W_enc).T.contiguous() if known else None
    value = auxk(params, x, residual, dead, k_aux, pre_acts)
    assert value == pytest.approx(auxk_by_hand(x, residual, params, dead, k_aux), rel=1e-9)
    pre = ((x - b_dec) @ W_enc + b_enc)[:, dead]
    kept = pre.topk(min(k_aux, len(dead)), dim=-1)
    acts = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
    loss = (acts @ W_dec[dead] - residual).square().sum() / (residual - residual.mean(0)).square().sum()
    for p, gradient in zip(params, torch.autograd.grad(4 * loss, params), strict=True):
        torch.testing.assert_close(p.grad, 1 + gradient, rtol=1e-9, atol=1e-9)


def test_auxk_gradient_reaches_selected_dead_latents_only():
    W_enc, b_enc, W_dec, b_dec = params = weights()
    x = torch.randn(3, 6, dtype=torch.float64)
    dead = torch.tensor([2, 7, 11, 13])
    auxk(params, x, torch.randn(3, 6, dtype=torch.float64), dead.tolist(), 1)
    pre = ((x - b_dec) @ W_enc + b_enc)[:, dead]
    best = pre.argmax(-1)
    selected = {int(dead[j]) for i, j in enumerate(best) if pre[i, j] > 0}
    for grad in (b_enc.grad, W_dec.grad, W_enc.grad.T if W_enc.grad is not None else None):
        assert grad is not None
        touched = (grad.reshape(20, -1) - 1).abs().sum(1).nonzero().view(-1).tolist()
        assert set(touched) == selected


def test_auxk_of_nothing():
    params = weights()
    x = torch.randn(3, 6, dtype=torch.float64)
    assert auxk(params, x, x, [], 4) == 0
    assert auxk(params, x, torch.ones_like(x), [1, 2], 4) == 0  # a residual without variance
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params if p.grad is not None)
