"""The sparse kernels against the dense definition, in float64, and the selections against `activation_fns`."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saehook import activation_fns, kernels
from saehook.errors import ArgumentError
from saehook.kernels import block_maxima, dense_pairs, reference, selection, sparse


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


@pytest.mark.parametrize("version", [sparse, dense_pairs])
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
def test_sums_over_pairs_agree_with_the_definition(version, rule, n, d_in, d_sae, k, shift):
    def select(pre_acts: Tensor) -> kernels.Selection:
        return SELECTS[rule](pre_acts, k)

    tensors = problem(n, d_in, d_sae, shift)
    dense_out, dense_grads = gradients(reference, tensors, select)
    sparse_out, sparse_grads = gradients(version, tensors, select)
    torch.testing.assert_close(sparse_out, dense_out, rtol=1e-9, atol=1e-9)
    for got, expected in zip(sparse_grads, dense_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_products_of_pairs_with_and_without_what_is_not_public(monkeypatch):
    monkeypatch.setattr(sparse, "PAIRS_AT_ONCE", 7)
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 13, generator=draw, dtype=torch.float64) for n in (9, 30))
    for n in (0, 1, 50):
        i, j = torch.randint(9, (n,), generator=draw), torch.randint(30, (n,), generator=draw)
        expected = (a @ b.T)[i, j]
        torch.testing.assert_close(sparse.pair_products(a, i, b, j), expected)
        torch.testing.assert_close(sparse.pair_products_in_public(a, i, b, j), expected)
    assert sparse._products_of_rows is not None, "the faster one is there"


def test_rows_without_pairs_and_latents_without_pairs():
    tensors = problem(5, 4, 8)

    def select(pre_acts: Tensor) -> kernels.Selection:
        # Tokens 0, 2 and 4 keep nothing.
        return selection.Selection(torch.tensor([1, 1, 3]), torch.tensor([1, 6, 6]), 5, 8, order="token")

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


LAYOUTS = {"token-major": lambda pre: pre, "latent-major": lambda pre: pre.T.contiguous().T}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(300, 40), (64, 50), (3, 7), (1, 5), (300, 256), (3, 640), (1, 128), (70, 104)])
@pytest.mark.parametrize("shift", [0.0, -2.5, -9.0])
def test_selections_are_those_of_the_definition(monkeypatch, layout, shape, shift):
    """Also by descent through the maxima of blocks of 8 and of 64, which is taken where these divide d_sae and k is small."""
    monkeypatch.setattr(block_maxima, "ENTRIES_FROM", 0)
    for seed in range(2):
        pre = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift
        pre = LAYOUTS[layout](pre * torch.linspace(0.1, 3, shape[0])[:, None])  # tokens differ much
        for k in (1, 2, 4, shape[1]):
            for rule in SELECTS:
                chosen = SELECTS[rule](pre, k)
                dense = torch.zeros(pre.numel())
                dense[chosen.positions] = chosen.values(pre).relu()
                assert torch.equal(dense.view_as(pre), getattr(activation_fns, rule)(pre, k)), (rule, k)
                assert chosen.positions.unique().numel() == chosen.positions.numel() == k * shape[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_largest_first_and_only_the_first(monkeypatch, layout):
    monkeypatch.setattr(block_maxima, "ENTRIES_FROM", 0)
    pre = LAYOUTS[layout](torch.randn(20, 512))
    wide = kernels.topk(pre, 4, descending=True)
    values = wide.values(pre).view(20, 4)
    assert torch.equal(values, pre.topk(4).values)
    first = wide.first_of_each_token(2)
    assert torch.equal(first.values(pre).view(20, 2), values[:, :2])


def test_how_many_levels_are_looked_at():
    levels = [
        block_maxima.depth(torch.empty(d_sae, n, device="meta"), k)
        for d_sae, n, k in (
            (16384, 1024, 32),
            (1536, 300, 32),
            (1536, 300, 12),
            (1536, 300, 97),
            (1540, 300, 2),
            (64, 64, 1),
        )
    ]
    assert levels == [2, 1, 2, 0, 0, 0]


def test_ties_within_and_between_blocks(monkeypatch):
    monkeypatch.setattr(block_maxima, "ENTRIES_FROM", 0)
    pre = torch.zeros(128, 5).T  # every block and every part of one is as good as any other
    for k in (1, 2):
        assert kernels.topk(pre + 1, k).positions.unique().numel() == 5 * k
        assert kernels.batch_topk(pre + 1, k).positions.unique().numel() == 5 * k


def test_pairs_above_bounds():
    pre, lower = torch.randn(1100, 6), torch.randn(1100)  # more latents than one block has
    expected = (pre > lower[:, None]).T
    n = int(expected.sum())
    chosen = selection.above(pre, lower, n)
    assert chosen is not None
    found = torch.zeros(6 * 1100, dtype=torch.bool)
    found[chosen.positions] = True
    assert torch.equal(found.view(6, 1100), expected)
    assert torch.equal(chosen.values(pre.T), pre[chosen.latents, chosen.tokens])
    assert torch.equal(chosen.latents, chosen.latents.sort().values)
    assert chosen.order == "latent"
    assert selection.above(pre, lower, n - 1) is None


@pytest.mark.parametrize("rule", SELECTS)
def test_lists_by_token_and_by_latent(rule):
    chosen = SELECTS[rule](torch.randn(40, 11), 3)
    for keys, (order, offsets), n in (
        (chosen.latents, chosen.by_latent, 11),
        (chosen.tokens, chosen.by_token, 40),
    ):
        ordered = keys[order]
        for key in range(n):
            assert (ordered[offsets[key] : offsets[key + 1]] == key).all()
        assert int(offsets[-1]) == keys.numel() == 120


@pytest.mark.parametrize("part", ["decoded", "cost", "frozen"])
def test_each_result_of_autoencode_may_be_used_alone(monkeypatch, part):
    results = []
    for version in ("reference", "dense", "sparse"):
        monkeypatch.setenv("SAEHOOK_KERNELS", version)
        x, *weights = problem(9, 4, 20)
        W_enc, b_enc, W_dec, b_dec = weights

        def rule(pre: Tensor, gain: Tensor) -> kernels.Activated:
            return kernels.Activated(pre.relu() * gain, pre.relu(), pre.relu().square())

        gain = torch.linspace(1, 2, 20, dtype=x.dtype, requires_grad=True)
        found = kernels.autoencode(x, W_enc, b_enc, b_dec, W_dec, rule, [gain], torch.zeros(20))
        loss = getattr(found, part).sum()
        got = torch.autograd.grad(loss, (*weights, gain), allow_unused=True, materialize_grads=True)
        results.append((loss, *got))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_gradients_lie_in_the_shared_memory():
    """And autograd takes them as they are, without a copy."""
    x, *weights = problem(20, 8, 64)
    W_enc, b_enc, W_dec, b_dec = weights
    W_enc = W_enc.detach().T.contiguous().T.requires_grad_()
    scratch = kernels.Scratch()
    pre, chosen = kernels.encode(x, W_enc, b_enc, b_dec, lambda pre: kernels.topk(pre, 2), k=2, scratch=scratch)
    kernels.decode(pre.relu(), W_dec, chosen, k=2, scratch=scratch).sum().backward()
    kept = scratch.nbytes
    assert kept == 8 * (20 * 64 + 2 * 64 * 8)
    for weight, name in ((W_enc, "W_enc"), (W_dec, "W_dec")):
        assert weight.grad is not None
        assert weight.grad.data_ptr() == scratch.take(name, (64, 8), x).data_ptr()
    assert scratch.nbytes == kept
    assert scratch.take("W_dec", (64, 9), x).shape == (64, 9)
    assert scratch.take("W_dec", (2, 2), x.float()).dtype == torch.float32


def test_what_was_taken_is_known_until_it_is_forgotten():
    scratch, like = kernels.Scratch(), torch.zeros(1)
    assert scratch.taken("pre_acts") is None
    scratch.take("pre_acts", (3, 4), like).fill_(2.0)
    scratch.take("W_enc", (5,), like).fill_(3.0)
    known = scratch.taken("pre_acts")
    assert known is not None
    assert known.tolist() == [[2.0] * 4] * 3
    scratch.forget()
    assert scratch.taken("pre_acts") is None
    assert scratch.nbytes == 4 * (12 + 5), "the memory stays"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ones_above(dtype):
    x = torch.tensor([[-1.0, 0.0, 0.5, math.inf], [math.nan, 2.0, -math.inf, 1.0]], dtype=dtype)
    bound = torch.tensor([[0.0], [1.0]], dtype=dtype)
    for to in (bound, 0.0):
        ones = kernels.ones_above(x.requires_grad_(), to)
        assert ones.dtype == dtype
        assert not ones.requires_grad
        assert torch.equal(ones, (x > to).to(dtype))


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
        cpu, gpu = torch.device("cpu"), torch.device("cuda")
        assert [kernels.choose(d_sae, 32, cpu) for d_sae in (4096, 4096, 64)] == ["sparse", "sparse", "reference"]
        assert [kernels.choose(d_sae, 32, gpu) for d_sae in (4096, 8192)] == ["dense", "triton"]
        monkeypatch.setenv("SAEHOOK_KERNELS", "reference")
        assert kernels.choose(4096, 32, gpu) == "reference"
        monkeypatch.setenv("SAEHOOK_KERNELS", "triton")
        assert kernels.choose(64, 32, gpu) == "triton"
    assert len(caplog.records) == 6
    assert "sparse kernels, because d_sae / k >= 8\n" in caplog.text
    assert "triton kernels, because d_sae / k >= 132 on a GPU" in caplog.text


def test_what_cannot_be_had_is_an_error(monkeypatch):
    monkeypatch.setenv("SAEHOOK_KERNELS", "cuda")
    with pytest.raises(ArgumentError, match="reference, screened, sparse, dense, triton"):
        kernels.choose(4096, 32, torch.device("cpu"))
    monkeypatch.setenv("SAEHOOK_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ArgumentError, match="TRITON_INTERPRET=1"):
        kernels.topk(torch.randn(2, 4096), 4)
