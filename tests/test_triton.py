"""The kernels in Triton against the definition, in its interpreter; `test_triton_gpu.py` does so on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import SITE, planted
from test_kernels import SELECTS, gradients, problem
from test_synchronisation import Recorder
from torch import Tensor, nn
from triton.runtime import interpreter

from saehook import kernels, losses
from saehook.batches import InputFacts
from saehook.config import BatchTopK, JumpReLU, Matryoshka, Method, MultiTopK, TopK, TrainConfig
from saehook.kernels import block_maxima, reference, selection
from saehook.kernels.triton import adam, block_topk, sparse
from saehook.kernels.triton.latent_sums import latent_sums
from saehook.kernels.triton.tiles import columns_at_once
from saehook.kernels.triton.token_sums import token_sums
from saehook.sae_run import SAERun


def agree(tensors: list[Tensor], select: Callable[[Tensor], kernels.Selection]) -> None:
    expected, expected_gradients = gradients(reference, tensors, select)
    got, got_gradients = gradients(sparse, tensors, select)
    torch.testing.assert_close([got, *got_gradients], [expected, *expected_gradients], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", SELECTS)
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "k", "shift"),
    [
        (7, 5, 33, 3, 0.0),
        (1, 1, 1, 1, 0.0),
        (9, 17, 40, 1, 0.0),
        (4, 12, 12, 12, -1.0),  # k = d_sae
        (5, 3, 9, 2, -1e3),  # nothing fires
    ],
)
def test_decoding_and_gradients_agree_with_the_definition(rule, n, d_in, d_sae, k, shift):
    agree(problem(n, d_in, d_sae, shift), lambda pre: SELECTS[rule](pre, k))


def test_rows_of_several_tiles():
    assert columns_at_once(1100) < 1100
    agree(problem(3, 1100, 20), lambda pre: kernels.topk(pre, 3))
    assert [columns_at_once(width) for width in (1, 16, 300, 768, 2304, 4096)] == [16, 16, 512, 256, 256, 512]


def test_tokens_and_latents_without_pairs():
    agree(
        problem(5, 4, 8),
        lambda _: selection.Selection(torch.tensor([1, 1, 3]), torch.tensor([1, 6, 6]), 5, 8, order="token"),
    )


@pytest.mark.parametrize("pairs", [7, 16])
def test_latents_that_fire_on_many_tokens(monkeypatch, pairs):
    """Their pairs are cut into segments, which several programs sum."""
    monkeypatch.setattr(selection, "SEGMENT", pairs)
    monkeypatch.setattr("saehook.kernels.triton.latent_sums.SEGMENT", pairs)
    n, d_sae = 30, 6
    counts = [0, n, 1, 15, 16, 0]
    latents = torch.cat([torch.full((count,), latent) for latent, count in enumerate(counts)])
    tokens = torch.cat([torch.randperm(n)[:count] for count in counts])
    mixed = torch.randperm(len(tokens))
    found = [
        selection.Selection(tokens, latents, n, d_sae, order="latent"),
        selection.Selection(tokens[mixed], latents[mixed], n, d_sae),
    ]
    for chosen in found:
        agree(problem(n, 5, d_sae), lambda _, chosen=chosen: chosen)
        weights, rows = torch.randn(len(tokens)), torch.randn(n, 5)
        first, again = (latent_sums(weights, rows, chosen, torch.empty(d_sae, 5)) for _ in range(2))
        assert torch.equal(first.weights, again.weights)


def test_segments_of_the_lists_by_latent():
    latents = torch.tensor([3] * 600 + [1] * 256 + [0] * 257)
    chosen = selection.Selection(torch.arange(len(latents)), latents, len(latents), 5)
    owners, ends, spare = chosen.segments
    assert ends.tolist() == [2, 3, 4, 7, 8], "one at least"
    assert owners.tolist() == [0, 0, 1, 2, 3, 3, 3, 4, *[5] * (5 + len(latents) // 256 - 8)]
    assert spare.tolist() == [0, 3, 3, *[5] * (len(latents) // 256 - 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_narrow_numbers_are_summed_in_float32(dtype):
    n, d_sae, width, k = 6, 20, 24, 4
    chosen = kernels.topk(torch.randn(n, d_sae), k)
    values, rows, inputs = torch.randn(n * k), torch.randn(d_sae, width).to(dtype), torch.randn(n, width).to(dtype)
    acts = torch.zeros(n, d_sae).index_put_((chosen.tokens, chosen.latents), values)
    got = token_sums(values, rows, chosen)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, acts @ rows.float(), rtol=1e-5, atol=1e-5)
    out = torch.empty(d_sae, width)
    found = latent_sums(values, inputs, chosen, out, against=rows)
    assert found.dots is not None
    torch.testing.assert_close(out, acts.T @ inputs.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.weights, acts.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.dots, (inputs.float() @ rows.float().T)[chosen.tokens, chosen.latents], rtol=1e-5, atol=1e-5
    )
    only = latent_sums(values, inputs, chosen, None, against=rows)
    assert only.dots is not None
    assert torch.equal(only.dots, found.dots), "where the decoder is frozen"


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "k"), [((3, 33), 1), ((2, 1000), 5), ((2, 4097), 32), ((1, 20000), 8), ((2, 16), 1)])
def test_the_largest_of_each_token(dtype, shape, k):
    pre = (torch.randn(shape) * torch.linspace(0.1, 3, shape[0])[:, None] - 1).to(dtype)
    assert block_topk.applies(pre, k)
    assert_largest(pre, k)


def assert_largest(pre: Tensor, k: int) -> None:
    latents = block_topk.block_topk(pre, k)
    assert all(row.unique().numel() == k for row in latents)
    assert torch.equal(pre.gather(1, latents).sort(1, descending=True).values, pre.topk(k).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_zeros_and_numbers_that_are_none(dtype):
    n, k = 300, 4
    odd = torch.zeros(8, n)
    odd[1] = torch.arange(n) % 3  # many equal ones at the cut
    odd[2, 290:] = 1.0
    odd[3] = -1.0
    odd[3, 7] = 0.0
    odd[4] = -0.0
    odd[5, 100], odd[5, 200] = float("inf"), float("-inf")
    odd[6, 11] = float("nan")
    odd[7] = float("-inf")
    odd = odd.to(dtype)
    assert_largest(odd[[0, 1, 2, 3, 5, 7]], k)
    latents = block_topk.block_topk(odd, k)
    assert all(row.unique().numel() == k for row in latents)
    assert 11 in latents[6], "a NaN is seen"


def test_sizes_that_the_kernel_is_not_for():
    assert block_topk.block_size(24576, 32) == 32
    assert block_topk.block_size(131072, 64) == 64
    assert not block_topk.applies(torch.zeros(1, 40), 8), "too few blocks"
    assert not block_topk.applies(torch.zeros(1, 2**18), 512), "too many candidates"
    assert not block_topk.applies(torch.zeros(1, 4096, dtype=torch.float64), 8)


def test_the_largest_first(monkeypatch):
    monkeypatch.setenv("SAEHOOK_KERNELS", "triton")
    pre = torch.randn(4, 512)
    assert torch.equal(kernels.topk(pre, 4, descending=True).values(pre).view(4, 4), pre.topk(4).values)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_the_largest_of_all(n):
    entries = torch.randn(6400).round(decimals=1)
    places = block_maxima.largest_of_flat(entries, n)
    assert places.unique().numel() == n
    assert torch.equal(entries[places].sort(descending=True).values, entries.topk(n).values)
    assert block_maxima.largest_of_flat(entries[:65], 3).unique().numel() == 3, "blocks that do not fit"


# --- the optimiser ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_the_same_steps_as_torchs_adam(beta1):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(7, 20, generator=generator), torch.randn(3, 1, generator=generator), torch.randn(4)]
    start[0][3] = 0.0
    results = []
    for by_rows in (False, True):
        parameters = [nn.Parameter(x.clone()) for x in start]
        optimizer = torch.optim.Adam(parameters, lr=1e-2, betas=(beta1, 0.999), eps=6.25e-10, fused=True)
        generator.manual_seed(1)
        for step in range(4):
            taken = torch.tensor(step != 2)
            for parameter in parameters:
                grad = torch.randn(parameter.shape, generator=generator) * 10.0**-step
                parameter.grad = torch.where(parameter == 0, 0, grad)
            if by_rows:
                assert adam.adam_rows_(optimizer, taken, torch.tensor(0.5), unit=parameters[0])
                assert [p.grad is None for p in parameters] == [True, True, False], "vectors are torch's"
            for parameter in parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad / 2
            optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]
            optimizer.step()
            if not by_rows and bool(taken):
                norm = parameters[0].data.norm(dim=1, keepdim=True)
                parameters[0].data /= torch.where(norm > 0, norm, 1)
        state = [optimizer.state[p][key] for p in parameters for key in ("step", "exp_avg", "exp_avg_sq")]
        results.append([p.detach() for p in parameters] + state)
    torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=1e-7)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squared_error_and_variance(monkeypatch, dtype):
    x = torch.randn(7, 21, dtype=dtype)
    x_hat = torch.randn(7, 42, dtype=dtype)[:, :21].requires_grad_()  # rows that are not neighbours
    expected = [losses.squared_error(x, x_hat) * 3, losses.total_variance(x)]
    expected += torch.autograd.grad(expected[0], x_hat)
    monkeypatch.setenv("SAEHOOK_KERNELS", "triton")
    monkeypatch.setattr(Tensor, "square", None)  # a call would fail
    got = [losses.squared_error(x, x_hat) * 3, losses.total_variance(x)]
    got += torch.autograd.grad(got[0], x_hat)
    torch.testing.assert_close(got, expected)
    x[3, 2] = float("nan")
    assert losses.squared_error(x, x_hat.detach()).isnan()


# --- whole steps -----------------------------------------------------------------------------------------------------


STEPS: dict[str, tuple[Method, dict[str, Any]]] = {
    "topk": (TopK(k=2), {"dead_after_tokens": 12}),
    "batchtopk": (BatchTopK(k=2), {"ema_decay": 0.9}),
    "multitopk": (MultiTopK(k=1), {}),
    "matryoshka": (Matryoshka(k=2, fractions=(0.25, 0.75)), {}),
    "jumprelu": (JumpReLU(), {"target_l0": 4.0}),
}


@pytest.mark.parametrize(
    "name", ["topk", *(pytest.param(name, marks=pytest.mark.slow) for name in STEPS if name != "topk")]
)
def test_a_run_trains_the_same(monkeypatch, name):
    """On the branches of a GPU: selection, kernels and optimiser of our own, dead latents, AuxK, clipping, averages."""
    monkeypatch.setattr("saehook.kernels.device.ALWAYS_QUEUED", True)
    monkeypatch.setattr("saehook.sae_run.DEVICE_REFRESH_STEPS", 1)
    method, settings = STEPS[name]
    x = planted(100)[0][:, :9]
    config = TrainConfig(
        site=SITE, activation=method, d_sae=16, tokens=1000, batch_tokens=10, lr=3e-3, adam_eps=1e-3, **settings
    )
    results = []
    for version in ("reference", "triton"):
        monkeypatch.setenv("SAEHOOK_KERNELS", version)
        run = SAERun(config, name, InputFacts.measure(x, SITE))
        run.sae.b_enc.data[:3] -= 5  # these never fire
        for batch in x.split(10)[:3]:
            run.step({SITE: batch}, kernels.Scratch())
        assert len(run.dead) >= 3 * (name == "topk")
        results.append((run.read_metrics(), dict(run.method.parameters), run.optimizer.state()))
    (metrics, *tensors), (other_metrics, *others) = results
    assert metrics == pytest.approx(other_metrics, rel=1e-5)
    torch.testing.assert_close(others, tensors, rtol=1e-4, atol=1e-6)


class Launches(Recorder):
    """Operations of a step that would wait on a GPU, and those that launch something; kernels in Triton by their names."""

    FREE = frozenset(
        "alias as_strided detach empty empty_like empty_strided expand lift_fresh new_empty permute _reshape_alias select slice "
        "split squeeze t transpose unsqueeze _unsafe_view view".split()
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.launched: list[str] = []
        self.interpreting = False
        run = interpreter.GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.kernels.append(executor.fn.__name__)
            self.interpreting = True
            run(executor, *args, **kwargs)
            self.interpreting = False

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.interpreting:
            return func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name not in self.FREE:
            self.launched.append(name)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_a_step_waits_for_nothing_and_launches_little(monkeypatch, name):
    monkeypatch.setattr("saehook.kernels.device.ALWAYS_QUEUED", True)
    x = planted(100)[0][:, :9]
    config = TrainConfig(
        site=SITE, activation=STEPS[name][0], d_sae=32, tokens=1000, batch_tokens=5, dead_after_tokens=10**6
    )
    run, scratch = SAERun(config, name, InputFacts.measure(x, SITE)), kernels.Scratch()
    run.step({SITE: x[:5]}, scratch)  # now what the optimiser keeps is there
    monkeypatch.setenv("SAEHOOK_KERNELS", "triton")
    with Launches(monkeypatch) as found:
        run.step({SITE: x[5:10]}, scratch)
    assert found.waits == []
    sums = ["_token_sums", "_segments", "_segments"]
    chosen = ["_best_blocks", "_best_entries"] if name == "topk" else []
    errors = ["_token_errors", "_differences", "_token_errors", "_token_errors"]
    assert sorted(found.kernels) == sorted(sums + chosen + errors + ["_remove_parallel", "_adam_rows", "_adam_rows"])
    assert len(found.launched) <= 140, found.launched


def test_what_is_parallel_is_removed():
    rows, grad = torch.randn(5, 20, dtype=torch.float64), torch.randn(5, 20, dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    expected = grad - (grad * rows).sum(1, keepdim=True) * rows
    adam.remove_parallel_(grad, rows)
    torch.testing.assert_close(grad, expected)


# --- for a GPU that is not there -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h200_and_spills_no_registers():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in compiled} == {
        "_token_errors", "_differences", "_best_blocks", "_best_entries", "_token_sums", "_segments", "_add_spare",
        "_remove_parallel", "_adam_rows",
    }  # fmt: skip
    assert [line for line in compiled if line["spilled"] or line["registers"] > 128] == []
