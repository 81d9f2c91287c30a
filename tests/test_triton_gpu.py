"""The kernels on a GPU, and that a step there waits for nothing: `pytest -m gpu -n 0 tests/test_triton_gpu.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import SITE, planted
from torch import Tensor

from saehook import kernels
from saehook.batches import InputFacts
from saehook.config import BatchTopK, JumpReLU, Matryoshka, Method, MultiTopK, ReLU, TopK, TrainConfig
from saehook.kernels.device import fetch
from saehook.sae_run import SAERun

pytestmark = pytest.mark.gpu
METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    "topk": (TopK(k=8), {"dead_after_tokens": 2000}),
    "multitopk": (MultiTopK(k=8), {}),
    "batchtopk": (BatchTopK(k=8), {"ema_decay": 0.9}),
    "matryoshka": (Matryoshka(k=8), {}),
    "relu": (ReLU(), {"target_l0": 8.0}),
    "jumprelu": (JumpReLU(), {"target_l0": 8.0}),
}


def run_of(name: str, **more: Any) -> tuple[SAERun, list[Tensor]]:
    method, settings = METHODS[name]
    x = planted(20_000)[0].cuda()
    config = TrainConfig(
        site=SITE, activation=method, d_sae=2048, tokens=10**6, batch_tokens=500, lr=3e-3, **(settings | more)
    )
    return SAERun(config, name, InputFacts.measure(x, SITE)), list(x.split(500))


def test_kernels_agree_with_the_definition():
    import bench_gpu_step

    for d_in, d_sae, k in ((768, 8192, 32), (301, 4100, 5), (2304, 4096, 64)):
        found = bench_gpu_step.check(bench_gpu_step.Setting(d_in, d_sae, k, 512), torch.device("cuda"))
        assert found["agrees"], found


@pytest.mark.parametrize("d_sae", [4096, 24576, 65536, 131072])
@pytest.mark.parametrize("k", [1, 32, 64])
def test_the_largest_of_each_token(d_sae, k):
    from saehook.kernels.triton import block_topk

    pre = torch.randn(300, d_sae, device="cuda", dtype=torch.bfloat16)  # many ties
    pre[7] = 0.0
    pre[8, : d_sae // 2] = float("-inf")
    assert block_topk.applies(pre, k)
    latents = block_topk.block_topk(pre, k)
    assert torch.equal(pre.gather(1, latents).sort(1, descending=True).values, pre.topk(k).values)
    assert all(row.unique().numel() == k for row in latents)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing(monkeypatch, name):
    monkeypatch.setattr("saehook.sae_run.DEVICE_REFRESH_STEPS", 1000)
    run, batches = run_of(name)
    scratch = kernels.Scratch()
    for batch in batches[:5]:
        run.step({SITE: batch}, scratch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[5:10]:
            run.step({SITE: batch}, scratch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.read_metrics()  # raises where something was not finite


def test_the_same_bits_again():
    """Of our own kernels; torch's `topk`, with which AuxK selects, leaves open which of equals it takes."""
    results = []
    for _ in range(2):
        run, batches = run_of("topk", dead_after_tokens=10**9)
        for batch in batches[:10]:
            run.step({SITE: batch}, kernels.Scratch())
        results.append(dict(run.method.parameters))
    for name, one in results[0].items():
        assert torch.equal(one, results[1][name]), name


@pytest.mark.parametrize("name", METHODS)
def test_a_run_learns_as_well_as_with_plain_kernels(monkeypatch, name):
    found = []
    for version in ("sparse", "triton"):
        monkeypatch.setenv("SAEHOOK_KERNELS", version)
        run, batches = run_of(name)
        for _ in range(5):
            for batch in batches:
                run.step({SITE: batch}, kernels.Scratch())
        run.read_metrics()
        for batch in batches:
            run.step({SITE: batch}, kernels.Scratch())
        found.append(run.read_metrics())
    assert found[1]["fvu"] == pytest.approx(found[0]["fvu"], rel=0.05)
    assert found[1]["l0"] == pytest.approx(found[0]["l0"], rel=0.1)


def test_host_and_device_exchange_without_waiting():
    from saehook.kernels.device import send

    x = torch.arange(1000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = send(x, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.cpu(), x)


def test_what_is_fetched_is_what_was_there_when_it_was_asked_for():
    x = torch.ones(1000, 1000, device="cuda")
    wait = fetch(x > 0)
    x.zero_()
    assert wait().all()
    assert wait().device.type == "cpu"
