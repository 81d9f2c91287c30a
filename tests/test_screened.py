"""Pairs that are looked for in bfloat16 are those that products in full precision give."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from work_counter import Work

from saehook import kernels
from saehook.batches import InputFacts
from saehook.config import BatchTopK, Gated, JumpReLU, Matryoshka, Method, MultiTopK, ReLU, TopK, TrainConfig
from saehook.kernels import screened, selection
from saehook.sae_run import SAERun

SITE = "layers.0.resid_post"


@pytest.fixture
def always(monkeypatch) -> None:
    """However many are computed again."""
    for share in ("CANDIDATES_SHARE", "MORE_CANDIDATES_SHARE", "WIDEST_SHARE"):
        monkeypatch.setattr(screened, share, 1.0)


def problem(n: int, d_in: int, d_sae: int, *, positive: str = "half", k: int = 1) -> list[Tensor]:
    """Centred inputs, W_enc with rows of many lengths, and b_enc, such that about half of the pre-activations are positive, or a
    few: some tokens then have less than k, others more."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    rows = F.normalize(random(d_sae, d_in), dim=1) * (1 + random(d_sae, 1).abs())
    x, b_enc = random(n, d_in) * (1 + random(n, 1).abs()), random(d_sae) * 0.3
    if positive == "few":
        b_enc -= (x @ rows.T + b_enc).flatten().topk(-(-n * k // 2)).values.min() - 1e-6
    return [x, rows.T, b_enc - 1e3 if positive == "none" else b_enc]


def pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    return x @ W_enc + b_enc


SIZES = [(40, 30, 2048, 4), (7, 13, 1088, 3), (64, 8, 520, 2), (5, 40, 33, 3), (1, 1, 1, 1), (30, 768, 4096, 32)]


def found_positions(found: screened.Found | None) -> Tensor:
    assert found is not None
    return found[1].positions


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("positive", ["half", "few", "none"])
@pytest.mark.parametrize(("n", "d_in", "d_sae", "k"), SIZES)
class TestFound:
    def test_largest_of_each_token(self, n, d_in, d_sae, k, positive):
        x, W_enc, b_enc = problem(n, d_in, d_sae, positive=positive, k=k)
        pre = pre_acts(x, W_enc, b_enc)
        expected = selection.topk(pre, k)
        expected = expected.positions[expected.values(pre) > 0].sort().values
        found = screened.largest_of_each_token(x, W_enc, b_enc, k, None)
        if found is None:
            assert len(expected) == 0
            return
        values, pairs = found
        assert pairs.order == "latent"
        assert torch.equal(pairs.latents, pairs.latents.sort().values)
        assert torch.equal(pairs.positions.sort().values, expected)
        torch.testing.assert_close(values, pairs.values(pre))

    def test_largest_of_each_token_first(self, n, d_in, d_sae, k, positive):
        x, W_enc, b_enc = problem(n, d_in, d_sae, positive=positive, k=k)
        pre = pre_acts(x, W_enc, b_enc)
        found = screened.largest_of_each_token(x, W_enc, b_enc, k, None, descending=True)
        if found is None:
            assert not (pre > 0).any()
            return
        values, pairs = found
        assert pairs.order == "token"
        assert torch.equal(pairs.tokens, torch.arange(n).repeat_interleave(k))
        torch.testing.assert_close(values.view(n, k), pre.topk(k).values.relu())
        torch.testing.assert_close(values[values > 0], pairs.values(pre)[values > 0])

    def test_largest_of_batch(self, n, d_in, d_sae, k, positive):
        x, W_enc, b_enc = problem(n, d_in, d_sae, positive=positive, k=k)
        pre = pre_acts(x, W_enc, b_enc)
        expected = selection.batch_topk(pre, k)
        expected = expected.positions[expected.values(pre) > 0].sort().values
        found = screened.largest_of_batch(x, W_enc, b_enc, k, None)
        assert torch.equal(found_positions(found).sort().values, expected)

    def test_above(self, n, d_in, d_sae, k, positive):
        x, W_enc, b_enc = problem(n, d_in, d_sae, positive=positive, k=k)
        lower = torch.randn(d_sae, dtype=x.dtype) + 0.5
        pre = pre_acts(x, W_enc, b_enc)
        found = screened.above(x, W_enc, b_enc, lower, None)
        assert found is not None
        assert torch.equal(found[1].positions.sort().values, (pre > lower).view(-1).nonzero().view(-1))
        torch.testing.assert_close(found[0], found[1].values(pre))


def against(of: str) -> list[Tensor]:
    """Numbers of the inputs or weights are rounded such that the first half of the latents, which are the smaller, gain as much by
    it as the bound allows, and the others lose as much."""
    half, d_in = 512, 256
    up, down = 1 + 2.0**-8 * 1.02, 1 + 2.0**-8 * 0.98  # rounded to the ends of 1 ... 1 + 2^-7
    rounded = torch.tensor([up, down], dtype=torch.float64).repeat(d_in // 2)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(d_in // 2)
    x, row = (rounded, signs) if of == "inputs" else (signs, rounded)
    rows = torch.cat([row.expand(half, -1), -row.expand(half, -1)])
    b_enc = torch.cat([torch.zeros(half), 0.045 + 1e-5 * torch.arange(half)]).double()
    return [x.expand(4, -1), rows.T, b_enc]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("of", ["inputs", "weights"])
def test_where_bfloat16_gives_another_order(of):
    x, W_enc, b_enc = against(of)
    assert (pre_acts(x, W_enc, b_enc).topk(8).indices >= 1016).all()
    narrow = torch.addmm(b_enc.bfloat16(), x.bfloat16(), W_enc.bfloat16())
    assert narrow[:, :512].min() > narrow[:, 512:].max() + 1.9
    for find in (screened.largest_of_each_token, screened.largest_of_batch):
        found = find(x, W_enc, b_enc, 8, None)
        assert found is not None
        assert found[1].latents.unique().tolist() == list(range(1016, 1024))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("seed", range(10))
def test_where_rounding_the_bias_gives_another_order(seed):
    """Products are exact, and nearly as large as the bias is negative."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.ones(3, 2, dtype=torch.float64)
    W_enc = torch.randint(64, 128, (2, 1024), generator=draw).double() / torch.tensor([[64], [2**14]])
    b_enc = 0.02 * torch.rand(1024, generator=draw, dtype=torch.float64) - W_enc.sum(0)
    expected = pre_acts(x, W_enc, b_enc)[0].topk(8).indices.sort().values
    found = screened.largest_of_each_token(x, W_enc, b_enc, 8, None)
    assert found is not None
    assert torch.equal(found[1].latents.unique(), expected)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("of", ["inputs", "weights"])
def test_where_squares_of_what_is_rounded_off_are_too_small_for_float32(of):
    x, W_enc, b_enc = (each.float() * 2.0**-38 for each in against(of))
    b_enc *= 2.0**-38
    for find in (screened.largest_of_each_token, screened.largest_of_batch):
        found = find(x, W_enc, b_enc, 8, None)
        assert found is not None
        assert found[1].latents.unique().tolist() == list(range(1016, 1024))


def test_one_extreme_token_or_bias_is_a_matter_of_its_own():
    """Of the others no more pairs are candidates."""
    x, W_enc, b_enc = problem(40, 300, 4096)
    usual = screened._Screen(x, W_enc, None).candidates(b_enc, 4)
    assert usual is not None
    x[7] *= 1e3
    b_enc[100] = -50
    found = screened._Screen(x, W_enc, None).candidates(b_enc, 4)
    assert found is not None
    assert (found.tokens != 7).sum() <= 1.1 * len(usual.tokens)
    for find in (screened.largest_of_each_token, screened.largest_of_batch):
        assert find(x, W_enc, b_enc, 4, None) is not None


@pytest.mark.usefixtures("always")
def test_rows_that_are_equal_and_tokens_of_zeros():
    """Exactly k survive a tie; float32, and W_enc as it comes from a file."""
    x, W_enc, b_enc = (each.float() for each in problem(40, 30, 2048))
    W_enc = W_enc.repeat_interleave(2, 1)[:, :2048].contiguous()
    b_enc = b_enc.repeat_interleave(2)[:2048]
    x[3:5] = 0
    pre = pre_acts(x, W_enc, b_enc)
    found = screened.largest_of_each_token(x, W_enc, b_enc, 5, None)
    assert found is not None
    assert torch.bincount(found[1].tokens, minlength=40).tolist() == [5] * 40
    expected = pre.topk(5).values.sort(1).values
    torch.testing.assert_close(found[0][found[1].tokens.sort(stable=True).indices].view(40, 5).sort(1).values, expected)


def test_one_token_with_too_many_candidates(monkeypatch):
    for share in ("CANDIDATES_SHARE", "MORE_CANDIDATES_SHARE"):
        monkeypatch.setattr(screened, share, 1.0)
    x, W_enc, b_enc = problem(40, 30, 2048)
    x[3] = 0
    assert screened.largest_of_each_token(x, W_enc, b_enc, 4, None) is not None
    assert screened.largest_of_each_token(x, W_enc, b_enc * 0 + 1, 4, None) is None, "all are equal on it"


def test_where_less_than_k_are_positive():
    x, W_enc, b_enc = problem(40, 30, 2048)
    b_enc -= 1e3
    b_enc[[5, 900]] = 1e3
    for descending in (False, True):
        found = screened.largest_of_each_token(x, W_enc, b_enc, 4, None, descending=descending)
        assert found is not None
        assert (found[0] > 0).sum() == 80
        assert found[1].latents[found[0] > 0].unique().tolist() == [5, 900]
        assert len(found[0]) == (160 if descending else 80)


@pytest.mark.parametrize("scale", [2.0**-75, 2.0**-40, 1.0, 2.0**40])
@pytest.mark.parametrize("kind", ["random", "of one sign", "whole numbers", "inputs", "weights"])
def test_no_pre_activation_is_farther_from_bfloat16_than_the_bound(kind, scale):
    x, W_enc, b_enc = against(kind) if kind in {"inputs", "weights"} else problem(40, 300, 640)
    if kind == "of one sign":
        x, W_enc = x.abs(), W_enc.abs()
    if kind == "whole numbers":
        x, W_enc, b_enc = (each.mul(4).round() for each in (x, W_enc, b_enc))
    x, b_enc = x * scale, b_enc * scale
    x, W_enc, b_enc = (each.float() for each in (x, W_enc, b_enc))
    screen = screened._Screen(x, W_enc, None)
    raised, slack = screen._add(b_enc)
    narrow = (screen.inputs @ screen.rows.T).double()
    off = (pre_acts(x.double(), W_enc.double(), b_enc.double()) + raised[:, None].double() - narrow).abs()
    bound = slack[:, None].double() + screened.ROUNDING * narrow.abs()
    assert (slack < raised).all()
    assert (off <= bound).all()
    if kind in {"inputs", "weights"} and scale > 1e-20:
        assert off.max() > 0.9 * bound.max(), "here it is as far"


def test_the_answer_is_none_where_it_would_not_pay():
    x, W_enc, b_enc = problem(40, 30, 2048)
    alike = W_enc[:, :1].expand(-1, 2048)
    assert screened.largest_of_each_token(x, alike, b_enc * 0, 4, None) is None
    assert screened.above(x, W_enc, b_enc, torch.full_like(b_enc, -10), None) is None
    for bad in (torch.nan, torch.inf, 1e300):
        broken = x.clone()
        broken[3, 5] = bad
        assert screened.largest_of_batch(broken, W_enc, b_enc, 4, None) is None
        assert screened.largest_of_batch(x, W_enc, b_enc.index_fill(0, torch.tensor([3]), bad), 4, None) is None


def test_tokens_on_which_less_than_k_are_positive_do_not_make_all_latents_candidates():
    x, W_enc, b_enc = problem(40, 300, 2048)
    W_enc[0] = W_enc[0].abs() + 1
    x[::2], x[::2, 0] = 0.0, -50.0  # nothing is positive on them
    found = screened.largest_of_each_token(x, W_enc, b_enc, 4, None)
    assert found is not None
    assert found[1].tokens.unique().tolist() == list(range(1, 40, 2))


def test_a_few_latents_tell_that_it_would_not_pay(monkeypatch):
    products: list[int] = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **b: products.append(len(a[0])) or product(*a, **b))
    x, W_enc, b_enc = problem(40, 30, 2048)
    assert screened.above(x, W_enc, b_enc, torch.full_like(b_enc, -10), None) is None
    assert products == [128]


METHODS: dict[str, Method] = {
    "topk": TopK(k=4),
    "multitopk": MultiTopK(k=2),
    "batchtopk": BatchTopK(k=4),
    "matryoshka": Matryoshka(k=4),
    "relu": ReLU(),
    "jumprelu": JumpReLU(),
    "gated": Gated(),
}


def make_run(name: str, x: Tensor, d_sae: int) -> SAERun:
    """A run of that method; penalised ones fire on some four latents a token."""
    method = METHODS[name]
    target = None if hasattr(method, "k") else 4.0
    config = TrainConfig(
        site=SITE, activation=method, d_sae=d_sae, tokens=10**6, batch_tokens=len(x), target_l0=target, lr=1e-3
    )
    run = SAERun(config, name, InputFacts.measure(x, SITE))
    if target is not None:
        with torch.no_grad():
            cut = float((x * run.facts.scale @ run.sae.W_enc).flatten().topk(4 * len(x)).values.min())
            if isinstance(method, JumpReLU):
                run.method.parameters["threshold"].fill_(cut)
            else:
                run.sae.b_enc.sub_(cut)
    return run


@pytest.mark.parametrize("name", METHODS)
def test_runs_are_those_in_full_precision(monkeypatch, name):
    asked: list[bool] = []
    candidates = screened._Screen.candidates

    def counted(*args: Any, **options: Any) -> selection.Selection | None:
        found = candidates(*args, **options)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(screened._Screen, "candidates", counted)
    batches = [torch.randn(64, 48, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    runs = []
    for version in ("sparse", "screened", "screened"):
        monkeypatch.setenv("SAEHOOK_KERNELS", version)
        runs.append(make_run(name, batches[0], 2048))
        scratch = kernels.Scratch()
        for batch in batches:
            runs[-1].step({SITE: batch}, scratch)
    assert asked == [True] * 16
    usual, other, again = runs
    assert other.read_metrics() == again.read_metrics()
    assert other.metrics == pytest.approx(usual.read_metrics(), rel=1e-4)
    for name, parameter in usual.method.parameters.items():
        torch.testing.assert_close(other.method.parameters[name], parameter, rtol=1e-4, atol=1e-4)
        assert torch.equal(other.method.parameters[name], again.method.parameters[name])


@pytest.mark.parametrize("name", METHODS)
def test_nothing_of_the_size_of_all_pre_activations_is_in_float32(monkeypatch, name):
    monkeypatch.setenv("SAEHOOK_KERNELS", "screened")
    n, d_in, d_sae = 64, 48, 2048
    x = torch.randn(n, d_in)
    run, scratch = make_run(name, x, d_sae), kernels.Scratch()
    run.step({SITE: x}, scratch)
    with Work() as work:
        run.step({SITE: x}, scratch)
    assert work.products[torch.bfloat16] == 2 * n * (d_in + 3) * d_sae, "and three columns for the bias"
    assert work.products[torch.float32] <= 2 * d_in * d_sae, "the gradient of b_dec, and no more"
    assert max(work.allocated) < n * d_sae
    assert scratch.taken("pre_acts") is None


def test_where_it_is_taken_and_what_the_log_says(monkeypatch, caplog):
    monkeypatch.delenv("SAEHOOK_KERNELS", raising=False)
    kernels._log_once.cache_clear()
    x, W = torch.empty(1024, 8), torch.empty(8, 4096)
    monkeypatch.setattr(screened, "is_fast", lambda: False)
    assert not kernels.screens(x, W, 32)
    monkeypatch.setattr(screened, "is_fast", lambda: True)
    with caplog.at_level(logging.INFO, logger="saehook"):
        assert kernels.screens(x, W, 64)
        assert kernels.screens(x.double(), W.double(), 64)
    assert caplog.text.count("screened kernels, because this CPU multiplies bfloat16") == 1
    assert not kernels.screens(x, W, 65), "too many are kept"
    assert not kernels.screens(x[:-1], W, 32), "too small"
    assert not kernels.screens(x[:0], W, 32)
    assert not kernels.screens(x.bfloat16(), W.bfloat16(), 32)
    assert not kernels.screens(x, kernels.RowsParameter.of(W, streamed=True), 32)
    for version in ("reference", "sparse", "dense", "triton"):
        monkeypatch.setenv("SAEHOOK_KERNELS", version)
        assert not kernels.screens(x, W, 32)
    monkeypatch.setenv("SAEHOOK_KERNELS", "screened")
    assert kernels.screens(x[:-1], W, 65)
    monkeypatch.setattr("saehook.kernels.device.ALWAYS_QUEUED", True)
    assert not kernels.screens(x, W, 32)


def test_what_the_log_says_where_it_does_not_pay(monkeypatch, caplog):
    monkeypatch.setenv("SAEHOOK_KERNELS", "screened")
    kernels._log_once.cache_clear()
    x, W_enc, b_enc = problem(40, 30, 2048)
    zero = torch.zeros(30, dtype=x.dtype)
    args = x, W_enc[:, :1].expand(-1, 2048), b_enc * 0, zero, lambda pre: kernels.topk(pre, 4)
    with caplog.at_level(logging.INFO, logger="saehook"):
        for _ in range(2):
            pairs = kernels.encode(*args, k=4, screen=screened.largest_of_each_token).selection
            assert len(pairs.tokens) == 160
    assert caplog.text.count("products in bfloat16 tell too little") == 1
    assert caplog.text.count("sparse kernels, because SAEHOOK_KERNELS=screened") == 1


def test_a_cpu_of_which_nothing_is_known_has_none(monkeypatch):
    known = {"avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    screened.is_fast.cache_clear()
    assert not screened.is_fast()
    known["amx_bf16"] = True
    assert not screened.is_fast(), "asked once"
    screened.is_fast.cache_clear()
    assert screened.is_fast() == torch.backends.mkldnn.is_available()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    screened.is_fast.cache_clear()
    assert not screened.is_fast()
    screened.is_fast.cache_clear()
