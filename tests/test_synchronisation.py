"""A step reads nothing back from the device, and what it does there instead gives the same results.

There is no GPU here: the CPU takes the branches of one, and the operations at which a GPU would have to wait are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from planted import SITE, planted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saehook.batches import InputFacts
from saehook.config import BatchTopK, Gated, JumpReLU, Matryoshka, Method, MultiTopK, ReLU, TopK, TrainConfig
from saehook.kernels import Scratch
from saehook.sae_run import SAERun

METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    "topk": (TopK(k=3), {"dead_after_tokens": 300}),
    "topk, dense": (TopK(k=20), {"dead_after_tokens": 300}),
    "multitopk": (MultiTopK(k=2), {"dead_after_tokens": 300}),
    "batchtopk": (BatchTopK(k=3), {"dead_after_tokens": 300, "ema_decay": 0.9}),
    "matryoshka": (Matryoshka(k=3), {"dead_after_tokens": 300}),
    "relu": (
        ReLU(),
        {"target_l0": 4.0, "decoder_norm_penalty": True, "auxk_coefficient": 0.1, "dead_after_tokens": 300},
    ),
    "jumprelu": (JumpReLU(), {"target_l0": 4.0, "dead_after_tokens": 300}),
    "gated": (Gated(), {"target_l0": 4.0, "dead_after_tokens": 300}),
}
WAITS = {
    "_local_scalar_dense",  # item(), float(), bool(), tolist()
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
    "repeat_interleave",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "lift_fresh",  # torch.tensor(...) of numbers of the host
}


class Recorder(TorchDispatchMode):
    """Which of the operations would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.operations += 1
        if name in WAITS or (name.startswith("index") and any(map(_is_mask, args))):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def _is_mask(indices: object) -> bool:
    """Whether these are the indices of `x[mask]`: how many there are is found out on the device."""
    return isinstance(indices, (list, tuple)) and any(
        isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices
    )


def run_of(name: str) -> tuple[SAERun, list[Tensor]]:
    method, settings = METHODS[name]
    x = planted(6000)[0]
    config = TrainConfig(site=SITE, activation=method, d_sae=128, tokens=6000, batch_tokens=100, lr=3e-3, **settings)
    run = SAERun(config, name, InputFacts.measure(x, SITE))
    run.sae.b_enc.data[:10] -= 5  # these never fire
    return run, list(x.split(100))


READS: dict[str, Callable[[Tensor], object]] = {
    "_local_scalar_dense": lambda x: x.sum().item(),
    "is_nonzero": lambda x: torch.is_nonzero(x.sum()),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "bincount": lambda x: torch.arange(8).bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.arange(8)),
    "_unique2": lambda x: x.unique(),
    "unique_dim": lambda x: x[:, None].unique(dim=0),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "lift_fresh": lambda x: torch.tensor([1.0, 2.0]),
    "index": lambda x: x[x > 0],
    "index_put_": lambda x: x.index_put_((x > 0,), x.sum()),
}


def test_the_recorder_sees_what_waits():
    assert set(READS) > WAITS
    x = torch.randn(8)
    for name, read in READS.items():
        with Recorder() as recorder:
            read(x)
        assert name in recorder.waits or (name == "is_nonzero" and "_local_scalar_dense" in recorder.waits)
    with Recorder() as recorder:
        torch.where(x > 0, x, 0).sum().sqrt().add_(torch.zeros(()))
        x[torch.arange(3)] += x.topk(3).values
    assert recorder.waits == []


@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing(monkeypatch, name):
    monkeypatch.setattr("saehook.kernels.device.ALWAYS_QUEUED", True)
    monkeypatch.setattr("saehook.sae_run.DEVICE_REFRESH_STEPS", 5)
    run, batches = run_of(name)
    scratch = Scratch()
    for batch in batches[:6]:  # now optimiser and buffers are there, and dead latents
        run.step({SITE: batch}, scratch)
    assert 10 <= len(run.dead) < 128
    with Recorder() as recorder:
        for batch in batches[6:10]:
            run.step({SITE: batch}, scratch)
    assert recorder.operations > 200
    assert recorder.waits == []
    with Recorder() as recorder:
        run.step({SITE: batches[10]}, scratch)
    assert recorder.waits == ["nonzero"], "the list of dead latents, renewed in one step of many"
    run.read_metrics()


@pytest.mark.parametrize("name", METHODS)
def test_both_kinds_of_device_train_the_same(monkeypatch, name):
    results = []
    for always in (False, True):
        monkeypatch.setattr("saehook.kernels.device.ALWAYS_QUEUED", always)
        monkeypatch.setattr("saehook.sae_run.DEVICE_REFRESH_STEPS", 1)
        run, batches = run_of(name)
        for batch in batches[:12]:
            run.step({SITE: batch}, Scratch())
        results.append((run.read_metrics(), run.method.parameters))
    (metrics, parameters), (other_metrics, others) = results
    assert metrics == pytest.approx(other_metrics, rel=1e-3)
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter, others[key], rtol=1e-3, atol=2e-4, msg=key)
