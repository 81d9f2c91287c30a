"""The sparse kernels against the dense definition, in float64, and the selections against `activation_fns`."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saehook import activation_fns, kernels
from saehook.kernels import reference, selection, sparse


def problem(n: int, d_in: int, d_sae: int, shift: float = 0.0) -> list[Tensor]:
    """x, W_enc, b_enc, W_dec, b_dec in float64; `shift` moves all pre-activations."""
    generator = torch.Generator().manual_seed(n * d_in + d_sae)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weights = [random(d_in, d_sae), random(d_sae) * 0.3 + shift, random(d_sae, d_in), random(d_in)]
    return [random(n, d_in), *(w.requires_grad_() for w in weights)]


def gradients(kernel, tensors: list[Tensor], select) -> tuple[Tensor, list[Tensor]]:
    """A loss that uses both outputs, and its gradients."""
    x, *weights = tensors
    decoded, values = autoencode(kernel, x, weights, select)
    target = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    loss = (decoded + weights[3] - target).square().sum() + values.pow(3).sum()
    return decoded, list(torch.autograd.grad(loss, weights))


def autoencode(kernel, x: Tensor, weights: list[Tensor], select) -> tuple[Tensor, Tensor]:
    """Decoded batch and the selected activations."""
    W_enc, b_enc, W_dec, b_dec = weights
    pre, selection = kernel.encode(x, W_enc, b_enc, b_dec, select)
    values = pre.relu()
    return kernel.decode(values, W_dec, selection), values


SELECTS = {"topk": kernels.topk, "batch_topk": kernels.batch_topk}


@pytest.mark.parametrize("rule", SELECTS)
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k", "shift"),
    [
        (7, 5, 33, 3, 0.0),
        (1, 1, 1, 1, 0.0),
        (300, 17, 64, 5, 0.0),  # batch_topk estimates its bound from some of the tokens
        (300, 17, 64, 5, -8.0),  # few positive pre-activations: k is larger than their number
        (6, 4, 12, 12, -1.0),  # k = d_sae
        (5, 3, 9, 2, -1e3),  # nothing fires
    ],
)
def test_sparse_agrees_with_the_definition(rule, n, d_in, d_sae, k, shift):
    def select(pre_acts: Tensor) -> kernels.Selection:
        return SELECTS[rule](pre_acts, k)

    tensors = problem(n, d_in, d_sae, shift)
    dense_out, dense_grads = gradients(reference, tensors, select)
    sparse_out, sparse_grads = gradients(sparse, tensors, select)
    torch.testing.assert_close(sparse_out, dense_out, rtol=1e-9, atol=1e-9)
    for got, expected in zip(sparse_grads, dense_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_rows_without_pairs_and_latents_without_pairs():
    tensors = problem(5, 4, 8)

    def select(pre_acts: Tensor) -> kernels.Selection:
        return selection.Selection(torch.tensor([1, 1, 3]), torch.tensor([1, 6, 6]), 5, 8, order="token")  # tokens 0, 2, 4 keep nothing

    dense_out, dense_grads = gradients(reference, tensors, select)
    sparse_out, sparse_grads = gradients(sparse, tensors, select)
    torch.testing.assert_close(sparse_out, dense_out)
    assert not sparse_out[[0, 2, 4]].any()
    for got, expected in zip(sparse_grads, dense_grads, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rule", SELECTS)
@pytest.mark.parametrize("kernel", [reference, sparse])
def test_ties_and_zeros(rule, kernel):
    """Equal pre-activations: exactly k survive. Those at 0 or below get no gradient, even when selected."""
    x = torch.ones(4, 2, dtype=torch.float64)
    weights = [torch.ones(2, 6), torch.zeros(6), torch.randn(6, 2), torch.zeros(2)]
    weights = [w.double().requires_grad_() for w in weights]
    _, values = autoencode(kernel, x, weights, lambda pre: SELECTS[rule](pre, 2))
    assert int((values > 0).sum()) == 8
    with torch.no_grad():
        weights[0].zero_()  # all pre-activations are exactly 0
    decoded, _ = autoencode(kernel, x, weights, lambda pre: SELECTS[rule](pre, 2))
    decoded.sum().backward()
    assert not decoded.any()
    assert not any(w.grad is not None and w.grad.any() for w in weights)


@pytest.mark.parametrize("shape", [(300, 40), (64, 50), (3, 7), (1, 5), (1000, 16)])
@pytest.mark.parametrize("shift", [0.0, -2.5, -9.0])
def test_batch_topk_selects_what_the_definition_selects(shape, shift):
    for seed in range(3):
        pre = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift
        pre = pre * torch.linspace(0.1, 3, shape[0])[:, None]  # tokens differ much: the sampled bound is often wrong
        for k in (1, 4, shape[1]):
            chosen = kernels.batch_topk(pre, k)
            dense = torch.zeros_like(pre).view(-1)
            dense[chosen.positions] = chosen.values(pre).relu()
            assert torch.equal(dense.view_as(pre), activation_fns.batch_topk(pre, k))
            assert chosen.positions.unique().numel() == chosen.positions.numel()


def test_batch_topk_where_the_sampled_tokens_are_the_loudest():
    """The bound from every n-th token lies above everything else: the rest must still be found."""
    pre = torch.rand(640, 32)
    pre[::10] += 10
    dense = torch.zeros_like(pre).view(-1)
    chosen = kernels.batch_topk(pre, 16)
    dense[chosen.positions] = chosen.values(pre)
    assert torch.equal(dense.view_as(pre), activation_fns.batch_topk(pre, 16))


def test_topk_selects_what_the_definition_selects():
    pre = torch.randn(50, 30)
    chosen = kernels.topk(pre, 6)
    dense = torch.zeros_like(pre).view(-1)
    dense[chosen.positions] = chosen.values(pre).relu()
    assert torch.equal(dense.view_as(pre), activation_fns.topk(pre, 6))
    assert torch.equal(chosen.by_token[1], torch.arange(0, 301, 6))


def test_transposed_lists():
    chosen = kernels.batch_topk(torch.randn(40, 11), 3)
    order, offsets = chosen.by_latent
    for latent in range(11):
        pairs = order[offsets[latent] : offsets[latent + 1]]
        assert (chosen.latents[pairs] == latent).all()
    assert int(offsets[-1]) == chosen.positions.numel() == order.unique().numel()


def test_gradient_layout_matches_latent_major_weights():
    """The gradient of a latent-major W_enc has its memory layout, so nothing is copied."""
    x, W_enc, b_enc, W_dec, b_dec = problem(20, 8, 64)
    W_enc = F.normalize(W_enc.detach().T.contiguous(), dim=-1).T.requires_grad_()
    autoencode(sparse, x, [W_enc, b_enc, W_dec, b_dec], lambda pre: kernels.topk(pre, 2))[0].sum().backward()
    assert W_enc.grad is not None
    assert W_enc.grad.stride() == W_enc.stride() == (1, 8)


def test_choice_and_its_reason(monkeypatch, caplog):
    monkeypatch.delenv("SAEHOOK_KERNELS", raising=False)
    kernels._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="saehook"):
        assert [kernels.choose(4096, 32), kernels.choose(4096, 32), kernels.choose(64, 32)] == [
            "sparse",
            "sparse",
            "reference",
        ]
        monkeypatch.setenv("SAEHOOK_KERNELS", "reference")
        assert kernels.choose(4096, 32) == "reference"
    assert len(caplog.records) == 3
    assert "d_sae / k >= 8" in caplog.text
