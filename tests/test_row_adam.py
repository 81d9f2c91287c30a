"""Training that keeps weights and moments in fewer bits and never holds a gradient of a whole matrix: against the usual step, and
against its curves."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import CONFIGS, SITE, assert_near, config, double_run, tokens
from torch import Tensor, nn

from saehook import kernels
from saehook.batches import InputFacts
from saehook.config import TopK, TrainConfig
from saehook.devices import OneDevice
from saehook.errors import ArgumentError
from saehook.kernels import RowsParameter, Selection, add_product, by_rows, row_sums, running, sparse
from saehook.kernels.row_sums import RowSums, gradient_bound, gradient_rows
from saehook.sae_run import SAERun

METHODS = [name for name in CONFIGS if not {"ema_decay", "decoder_norm_penalty"} & set(CONFIGS[name])]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_steps_by_rows_are_the_usual_steps(name, many, monkeypatch):
    """In float64, with small blocks of latents; with `many` the latents that fire are too many for lists of them."""
    for module in (by_rows, row_sums):
        monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", 60)  # five rows
    monkeypatch.setattr(running, "DENSE_ENTRIES", 7 * 54)
    monkeypatch.setattr(kernels, "SPARSE_SHARE", 0.0 if many else 1.0)
    settings = config(name)
    object.__setattr__(settings, "moments", "whole")  # by rows, with nothing rounded
    facts = InputFacts.measure(tokens(500, 0), SITE)
    a, b = (double_run(each, OneDevice(), facts) for each in (config(name), settings))
    assert b.optimizer.rows is not None
    for step in range(3):
        batch = {SITE: tokens(54, 100 + step)}
        with monkeypatch.context() as m:
            m.setattr(running, "DENSE_ENTRIES", 2**27)
            m.setattr(kernels, "SPARSE_SHARE", 1 / 16)
            a.step(batch)
        b.step(batch)
        assert_near(b.optimizer.state()["W_enc.exp_avg"], a.optimizer.state()["W_enc.exp_avg"], (name, step), 1e-9)
        for key, p in a.method.parameters.items():
            assert_near(b.method.parameters[key], p, (name, step, key), 1e-12 if step == 0 else 1e-9)
        found, expected = b.read_metrics(), a.read_metrics()
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-11)
    if "auxk" in name:
        assert b.metrics["auxk"] > 0


@pytest.mark.parametrize("clip_norm", [1e3, 0.02], ids=["free", "clipped"])
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_in_place_are_those_of_whole_matrices(name, kernel, clip_norm, monkeypatch):
    """What a CPU does by default, against dense gradients and torch's Adam over whole matrices, in float64."""
    monkeypatch.setattr(row_sums, "WEIGHTS_AT_ONCE", 60)
    monkeypatch.setattr(kernels, "ROWS_FROM", 0)
    settings, facts = config(name, clip_norm=clip_norm), InputFacts.measure(tokens(500, 0), SITE)
    monkeypatch.setenv("SAEHOOK_KERNELS", "reference")
    whole = double_run(settings, OneDevice(), facts)
    monkeypatch.setenv("SAEHOOK_KERNELS", kernel)
    run = double_run(settings, OneDevice(), facts)
    assert whole.optimizer.rows is None
    assert run.optimizer.rows is not None
    for step in range(4):
        batch = {SITE: tokens(54, 100 + step)}
        run.step(batch)
        with monkeypatch.context() as m:
            m.setenv("SAEHOOK_KERNELS", "reference")
            whole.step(batch)
        for key, value in whole.state()[0].items():
            if key != "run.dead":
                found = run.state()[0][key]
                assert_near(found.double(), value.double(), (step, key), 1e-12 if step == 0 else 1e-9)
    found, expected = run.finish(), whole.finish()
    assert type(found.W_enc) is type(found.W_dec) is nn.Parameter
    assert_near(found.W_enc.double(), expected.W_enc.double(), name, 1e-9)


@pytest.mark.parametrize("columns", [False, True])
def test_rows_of_a_gradient_and_what_its_norm_is_at_most(columns):
    """Lists of pairs, some of them of one latent; then with rows of some latents, too; then with a whole gradient beside both."""
    draw = torch.Generator().manual_seed(0)
    matrix = RowsParameter.of(torch.zeros(*((6, 50) if columns else (50, 6))).double(), streamed=False)
    source, weights = torch.randn(20, 6, generator=draw).double(), torch.randn(300, generator=draw).double()
    tokens, latents = torch.randint(20, (300,), generator=draw), torch.randint(40, (300,), generator=draw)
    expected = torch.zeros(50, 6).double().index_add_(0, latents, weights[:, None] * source[tokens])

    def check() -> None:
        blocks = (slice(0, 7), slice(7, 45), slice(45, 50))
        found = torch.cat([row_sums.gradient_rows(matrix, block, columns=columns)[0] for block in blocks])
        torch.testing.assert_close(found, expected)
        assert float(expected.norm()) <= float(row_sums.gradient_bound(matrix)) <= 10 * float(expected.norm())

    matrix.pending.append(RowSums.of(source, Selection(tokens, latents, 20, 50), weights))
    check()
    some, acts = torch.tensor([3, 44]), torch.randn(2, 20, generator=draw).double()
    for half in (slice(10), slice(10, 20)):
        row_sums.add_product(matrix, some, acts[:, half], source[half], columns=columns)
    assert len(matrix.pending) == 2
    expected[some] += acts @ source
    check()
    whole = torch.randn(50, 6, generator=draw).double()
    matrix.grad = whole.T.clone() if columns else whole.clone()
    expected += whole
    check()
    torch.testing.assert_close(matrix.grad, whole.T if columns else whole)


def test_the_bound_is_the_norm_where_all_vectors_of_a_latent_are_one():
    pairs = Selection(torch.arange(6), torch.tensor([0, 0, 0, 2, 2, 3]), 6, 4)
    sums = RowSums.of(torch.full((6, 5), 0.3), pairs, torch.full((6,), 2.0))
    assert float(sums.bound()) == pytest.approx(float(sums.rows(slice(0, 4)).norm()), rel=1e-6)
    assert math.isnan(float(RowSums.of(torch.full((6, 5), math.nan), pairs, torch.ones(6)).bound()))


def test_steps_in_place_go_on_from_a_checkpoint_bit_for_bit(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS_FROM", 0)
    facts = InputFacts.measure(tokens(500, 0).float(), SITE)
    first, second = (SAERun(config("topk, auxk", tokens=54 * 100), "run", facts) for _ in range(2))
    for step in range(3):
        first.step({SITE: tokens(54, step).float()})
    tensors, data = first.state()
    second.load_state({name: x.clone() for name, x in tensors.items()}, data)
    for step in range(3, 6):
        for run in (first, second):
            run.step({SITE: tokens(54, step).float()})
    for name, x in first.state()[0].items():
        assert torch.equal(second.state()[0][name], x), name


@pytest.mark.parametrize("rows_first", [True, False])
def test_a_checkpoint_of_one_way_goes_on_in_the_other(rows_first, monkeypatch):
    """As where a run of one CPU goes on on several, or on a GPU."""
    facts, runs = InputFacts.measure(tokens(500, 0), SITE), []
    for rows_from in (0, 2**22) if rows_first else (2**22, 0):
        monkeypatch.setattr(kernels, "ROWS_FROM", rows_from)
        runs.append(double_run(config("batchtopk, auxk"), OneDevice(), facts))
    first, second = runs
    assert (first.optimizer.rows is None) != (second.optimizer.rows is None)
    for step in range(3):
        first.step({SITE: tokens(54, step)})
    tensors, data = first.state()
    second.load_state({name: x.clone() for name, x in tensors.items()}, data)
    for step in range(3, 6):
        for run in (first, second):
            run.step({SITE: tokens(54, step)})
    for name, x in first.state()[0].items():
        assert_near(second.state()[0][name].double(), x.double(), name, 1e-9)


@pytest.mark.parametrize("kept", [{"weights": "bfloat16", "moments": "8-bit"}, {}], ids=["fewer bits", "in place"])
def test_nothing_changes_where_something_is_not_finite(kept, monkeypatch):
    monkeypatch.setattr(kernels, "ROWS_FROM", 0)
    settings = config("topk, auxk", **kept)
    run = SAERun(settings, "run", InputFacts.measure(tokens(500, 0).float(), SITE))
    run.step({SITE: tokens(54, 1).float()})
    before = {name: x.clone() for name, x in run.state()[0].items() if not name.startswith(("run.bad", "sums"))}
    wrong = tokens(54, 2).float()
    wrong[3, 0] = torch.nan
    run.step({SITE: wrong})
    for name, x in before.items():
        if name != "run.dead":
            assert torch.equal(run.state()[0][name], x), name
    assert all(not p.pending for p in run.method.parameters.values() if isinstance(p, kernels.RowsParameter))


def test_what_is_kept_is_as_small_as_it_says():
    settings: dict[str, Any] = {"site": "s", "activation": TopK(k=4), "d_sae": 64, "tokens": 1000}
    x = torch.randn(300, 512)
    held = {}
    for weights, moments in (
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float32", "8-bit"),
        ("bfloat16", "8-bit"),
    ):
        run = SAERun(TrainConfig(weights=weights, moments=moments, **settings), "run", InputFacts.measure(x, "s"))
        run.step({"s": x})
        tensors = run.state()[0]
        named = [
            t.nbytes for name, t in tensors.items() if name.split(".")[1] in ("W_enc", "W_dec") and "step" not in name
        ]
        held[weights, moments] = sum(named) / (2 * 512 * 64)
    assert held["float32", "float32"] == 12
    assert held["bfloat16", "float32"] == 10
    assert held["float32", "8-bit"] == 6 + 2 * 4 / 256
    assert held["bfloat16", "8-bit"] == 4 + 2 * 4 / 256


def test_settings_that_do_not_go_together():
    for wrong in ({"weights": "float16"}, {"moments": "4-bit"}, {"weights": "bfloat16", "ema_decay": 0.9}):
        with pytest.raises(ArgumentError):
            config("topk", **wrong)
    with pytest.raises(ArgumentError, match="decoder_norm_penalty needs whole matrices"):
        config("relu, decoder norm", moments="8-bit")


BENCH = Path(__file__).parent / "bench"


def test_the_recorded_runs_reached_the_curve_of_float32():
    """Of tests/bench/RESULTS: held-out FVU of every method with every option within 1 %."""
    rows = json.loads((BENCH / "RESULTS" / "fewer_bits_2026-11.json").read_text())["rows"]
    assert len(rows) == 12
    for row in rows:
        assert row["against_float32"] == pytest.approx(1, abs=0.01), row


@pytest.mark.slow
def test_fewer_bits_reach_the_curve_of_float32():
    """Both options together, 312 steps on the bundled model, held-out FVU within 1 % of the same steps in float32."""
    spec = importlib.util.spec_from_file_location("bench_fewer_bits", BENCH / "bench_fewer_bits.py")
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    full, small = bench.measure(20_000, 2_000, bench.METHODS[:1], (bench.KEPT[0], bench.KEPT[-1]))
    assert small["held_out_fvu"] == pytest.approx(full["held_out_fvu"], rel=0.01)
    assert full["held_out_fvu"] < 0.3, "and that is a trained SAE"


# --- rows of gradients ------------------------------------------------------------------------------------------------


def test_what_is_known_of_rows_and_their_products():
    """From a decoder's backward pass and from AuxK, each by itself and together; with one that does not know, nothing is."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    matrix = RowsParameter.of(random(20, 6), streamed=False)
    grad, tokens, latents, values = random(9, 6), torch.arange(9), torch.arange(9) * 2, random(9)
    whole = torch.zeros(20, 6, dtype=torch.float64).index_add_(0, latents, grad * values[:, None])
    pairs = Selection(tokens, latents, 9, 20, order="latent")
    x_hat = sparse.decode(values.requires_grad_(), matrix, pairs)
    x_hat.backward(grad)
    dead = torch.tensor([1, 4, 5, 17])
    for tokens in (slice(0, 5), slice(5, 9)):
        acts = random(4, 9)[:, tokens]
        along = ((acts @ grad[tokens]) * matrix.detach()[dead]).sum(1)
        add_product(matrix, dead, acts, grad[tokens], along=along)
        whole.index_add_(0, dead, acts @ grad[tokens])
    assert len(matrix.pending) == 2
    for block in (slice(0, 20), slice(3, 11), slice(18, 20)):
        rows, products = gradient_rows(matrix, block, columns=False)
        torch.testing.assert_close(rows, whole[block])
        assert products is not None
        torch.testing.assert_close(products, (whole * matrix.detach()).sum(1)[block])
    assert gradient_bound(matrix) >= whole.norm()
    add_product(matrix, dead + 1, random(4, 9), grad)
    assert gradient_rows(matrix, slice(0, 20), columns=False)[1] is None


def test_a_matrix_without_gradient_has_rows_of_zeros():
    matrix = RowsParameter.of(torch.randn(20, 6), streamed=False)
    assert gradient_bound(matrix) == 0
    rows, products = gradient_rows(matrix, slice(2, 5), columns=False)
    assert torch.equal(rows, torch.zeros(3, 6))
    assert products is None
