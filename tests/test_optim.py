"""The decoder constraint, clipping and the schedule."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saehook.decoder_rows import normalize_rows_, remove_parallel_
from saehook.optim import DecoderConstrainedAdam, lr_factor


def test_schedule():
    factors = [lr_factor(step, 100, warmup_steps=4, decay_share=0.2) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(factors[4:81]) == {1.0}
    assert factors[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
    assert lr_factor(100, 100, warmup_steps=4, decay_share=0.2) == 0


def test_schedule_corners():
    assert lr_factor(0, 1, warmup_steps=0, decay_share=0.0) == 1
    assert lr_factor(9, 10, warmup_steps=0, decay_share=0.0) == 1
    assert [lr_factor(s, 4, warmup_steps=0, decay_share=1.0) for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert all(0 < lr_factor(s, 10, warmup_steps=10, decay_share=1.0) <= 1 for s in range(10))


def test_remove_parallel_leaves_an_orthogonal_gradient():
    rows = F.normalize(torch.randn(3000, 5, dtype=torch.float64), dim=-1)  # more than one block of rows
    grad = torch.randn_like(rows)
    expected = grad - (grad * rows).sum(-1, keepdim=True) * rows
    remove_parallel_(grad, rows)
    torch.testing.assert_close(grad, expected)
    assert float((grad * rows).sum(-1).abs().max()) < 1e-12


def test_normalize_rows():
    rows = torch.randn(2500, 4)
    rows[7] = 0
    direction = F.normalize(rows, dim=-1)
    normalize_rows_(rows)
    torch.testing.assert_close(rows, direction)
    assert not rows[7].any()


def parameters() -> dict[str, nn.Parameter]:
    W_dec = F.normalize(torch.randn(12, 4), dim=-1)
    return {
        "W_enc": nn.Parameter(W_dec.clone().T),
        "W_dec": nn.Parameter(W_dec),
        "b_enc": nn.Parameter(torch.zeros(12)),
    }


def test_step_keeps_unit_rows_and_ignores_the_parallel_gradient():
    params = parameters()
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = DecoderConstrainedAdam(params, lr=0.1, steps=10)
    for p in params.values():
        p.grad = torch.randn_like(p)
    tangent = torch.randn(12, 4)
    tangent -= (tangent * before["W_dec"]).sum(-1, keepdim=True) * before["W_dec"]
    params["W_dec"].grad = tangent + 5 * before["W_dec"]
    optimizer.step()
    moved = before["W_dec"] - 0.1 * tangent.sign()  # Adam's first step
    torch.testing.assert_close(params["W_dec"].detach(), F.normalize(moved, dim=-1), rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in params.values())
    assert not torch.equal(params["W_enc"], before["W_enc"])


def test_latent_major_weights_take_the_same_step_as_contiguous_ones():
    results = []
    for contiguous in (True, False):
        torch.manual_seed(0)
        params = parameters()
        if contiguous:
            params["W_enc"] = nn.Parameter(params["W_enc"].detach().contiguous())
        optimizer = DecoderConstrainedAdam(params, lr=0.01, steps=10)
        for _ in range(3):
            ((params["W_enc"].T * torch.arange(4.0)).square().sum() + params["W_dec"].pow(3).sum()).backward()
            optimizer.step()
        results.append(params["W_enc"].detach().clone())
    torch.testing.assert_close(results[0], results[1])


def test_clipping_and_learning_rate():
    """Adam's second moment remembers the clipped gradient."""
    params = parameters()
    optimizer = DecoderConstrainedAdam(params, lr=1.0, steps=4, warmup_steps=1, decay_share=0.5, clip_norm=2.0)
    rates = []
    for _ in range(4):
        rates.append(optimizer.lr)
        params["b_enc"].grad = torch.full((12,), 100.0)
        optimizer.step()
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert optimizer.lr == 0
    second = optimizer.adam.state[params["b_enc"]]["exp_avg_sq"] / (1 - 0.999**4)
    torch.testing.assert_close(second, torch.full((12,), 4.0 / 12), rtol=1e-4, atol=0)
    assert math.sqrt(12 * float(second[0])) == pytest.approx(2.0, rel=1e-4)
