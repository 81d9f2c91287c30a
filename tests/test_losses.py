"""The loss terms: values against independent arithmetic, and where gradients may go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saehook import losses


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


@pytest.mark.parametrize("kernel", ["reference", "sparse"])
@pytest.mark.parametrize(("dead", "k_aux"), [([1, 4, 5, 17], 2), ([3], 5), (list(range(20)), 20), ([0, 19], 1)])
def test_auxk_value(monkeypatch, kernel, dead, k_aux):
    monkeypatch.setenv("SAEHOOK_KERNELS", kernel)
    params = weights()
    x, residual = torch.randn(2, 9, 6, dtype=torch.float64)
    value = losses.auxk(x, residual, *params, torch.tensor(dead), k_aux)
    assert float(value.detach()) == pytest.approx(auxk_by_hand(x, residual, params, dead, k_aux), rel=1e-9)


@pytest.mark.parametrize("kernel", ["reference", "sparse"])
def test_auxk_gradient_reaches_selected_dead_latents_only(monkeypatch, kernel):
    monkeypatch.setenv("SAEHOOK_KERNELS", kernel)
    W_enc, b_enc, W_dec, b_dec = params = weights()
    x = torch.randn(3, 6, dtype=torch.float64)
    residual = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    dead = torch.tensor([2, 7, 11, 13])
    losses.auxk(x, residual, *params, dead, 1).backward()
    pre = ((x - b_dec) @ W_enc + b_enc)[:, dead]
    best = pre.argmax(-1)
    selected = {int(dead[j]) for i, j in enumerate(best) if pre[i, j] > 0}
    assert residual.grad is None
    for grad in (b_enc.grad, W_dec.grad, W_enc.grad.T if W_enc.grad is not None else None):
        assert grad is not None
        touched = grad.reshape(20, -1).abs().sum(1).nonzero().view(-1).tolist()
        assert set(touched) == selected


def test_auxk_of_nothing():
    params = weights()
    x = torch.randn(3, 6, dtype=torch.float64)
    none = losses.auxk(x, x, *params, torch.empty(0, dtype=torch.int64), 4)
    assert none == 0
    assert not none.requires_grad
    flat = torch.ones_like(x)  # a residual without variance
    loss = losses.auxk(x, flat, *params, torch.tensor([1, 2]), 4)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in params)
