"""Our TopK and BatchTopK trainers against those of `dictionary_learning` 0.1.0, step for step, from a recording; of
Matryoshka, ReLU, its April-2024 variant and Gated one loss and its gradients.

Both start from the same weights and see the same batches; dead latents exist and come back, the gradient is clipped in
some steps, the learning rate decays in the end. What differs by design is set so that both do the same:
- Ours divides the squared error by the variance: theirs is v times ours where v is that variance, so Adam's epsilon
  (1e-8 there) and the norm that is clipped to (1 there) are divided by v here, and the weight of AuxK, too.
- Ours takes b_dec and the input scale from a sample, theirs b_dec from the first batch: given here.
- Warm-up starts at 1 / (n + 1) here and at a learning rate of 0 there: there is none.
- The threshold's running mean starts at once here, faster at first, and late there: compared where both have
  forgotten that.
- TopK has a running threshold there, too, and latents that are kept at 0 count as firing there: not compared.
- Matryoshka is divided by the number of groups twice there.
- Their JumpReLU takes the L0 from what is above the threshold, which loses half of the estimator's window: not compared.
- The unit norm and the projection have an epsilon there (1e-6): within the tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import gradients
from planted import D_IN, SITE, planted
from safetensors import safe_open
from torch import Tensor

from saehook.batches import InputFacts, geometric_median
from saehook.config import BatchTopK, Gated, Matryoshka, ReLU, TopK, TrainConfig
from saehook.losses import total_variance
from saehook.methods import make_method
from saehook.sae_run import SAERun

FILE = Path(__file__).with_name("dictionary_learning.safetensors")
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings, and tensors by name."""
    with safe_open(FILE, framework="pt") as file:
        return json.loads(file.metadata()["settings"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def batches(settings: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tokens of the recording; E‖x‖² is such that the gradient is clipped in the first steps only."""
    x = planted(settings["steps"] * settings["batch_tokens"], counts="geometric")[0]
    return (x * (settings["mean_square"] / x.square().sum(-1).mean()).sqrt()).split(settings["batch_tokens"])


def run_like(settings: dict[str, Any], tensors: dict[str, Tensor], name: str) -> SAERun:
    """Ours, with the settings and the start of the recording."""
    variance = total_variance(torch.cat(batches(settings)))
    v = float(variance)
    steps = settings["steps"]
    config = TrainConfig(
        site=SITE,
        activation={"topk": TopK, "batchtopk": BatchTopK}[name](k=settings["k"]),
        d_sae=settings["d_sae"],
        tokens=steps * settings["batch_tokens"],
        batch_tokens=settings["batch_tokens"],
        lr=settings["lr"],
        warmup_steps=0,
        decay_share=1 - settings["decay_start"] / steps,
        adam_eps=1e-8 / v,
        clip_norm=1 / v,
        auxk_coefficient=settings["auxk_alpha"] / v,
        k_aux=settings["top_k_aux"],
        dead_after_tokens=settings["dead_after_tokens"],
        **({"threshold_beta": settings["threshold_beta"]} if name == "batchtopk" else {}),
    )
    run = SAERun(config, name, InputFacts(1.0, tensors[f"{name}.median"], variance))
    for key in ("W_enc", "W_dec", "b_enc"):
        run.sae.get_parameter(key).data.copy_(tensors[f"{name}.start.{key}"])
    return run


@pytest.mark.parametrize(("name", "kernel"), [("topk", "sparse"), ("batchtopk", "reference")])
def test_every_step_is_theirs(recorded, monkeypatch, name, kernel):
    """Float32 over 50 steps of 0.003: losses to 1e-5 of their size, weights to 3e-7 on average and to 5e-5 where a
    gradient is about 0."""
    monkeypatch.setenv("SAEHOOK_KERNELS", kernel)
    settings, tensors = recorded
    run = run_like(settings, tensors, name)
    seen: dict[str, list[float]] = {"error": [], "aux": []}
    dead, thresholds = [], []
    for step, batch in enumerate(batches(settings)):
        run.step({SITE: batch})
        for key, values in seen.items():
            values.append(float(run.sums[key]) - sum(values))
        dead.append(int(run.dead.numel()))
        thresholds.append(float(run.threshold))
        if step == 0:
            assert torch.equal(run.tokens_since_fired, tensors[f"{name}.since_fired"])
        if step + 1 in settings["kept"]:
            for key in WEIGHTS:
                expected = tensors[f"{name}.{step + 1}.{key}"]
                off = (run.sae.get_parameter(key).detach() - expected).abs()
                assert float(off.mean()) < 3e-7, (step + 1, key)
                assert float(off.max()) < 5e-5, (step + 1, key)
    for key, values in seen.items():
        torch.testing.assert_close(torch.tensor(values), tensors[f"{name}.{key}"], rtol=1e-5, atol=1e-6)
    assert dead == tensors[f"{name}.dead"].int().tolist()
    if name == "batchtopk":
        torch.testing.assert_close(
            torch.tensor(thresholds[35:]), tensors["batchtopk.threshold"][35:], rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("name", ["matryoshka", "relu", "relu-april", "gated"])
def test_the_loss_and_its_gradients_are_theirs(recorded, name):
    """Float32, to 1e-5 of the largest gradient."""
    settings, tensors = recorded
    activation, own = {
        "matryoshka": (Matryoshka(k=settings["k"], fractions=settings["fractions"]), {}),
        "relu": (ReLU(), {"sparsity_coefficient": settings["l1_penalty"]}),
        "relu-april": (ReLU(), {"sparsity_coefficient": settings["l1_penalty"], "decoder_norm_penalty": True}),
        "gated": (Gated(), {"sparsity_coefficient": settings["l1_penalty"]}),
    }[name]
    config = TrainConfig(site=SITE, activation=activation, d_sae=settings["d_sae"], tokens=1000, **own)
    method = make_method(config, InputFacts(1.0, torch.zeros(D_IN), torch.tensor(1.0)))
    for key, parameter in method.parameters.items():
        parameter.data.copy_(tensors[f"{name}.start.{key}"])
    x = batches(settings)[0]
    loss = method.terms(x, x, config.steps).loss  # at full penalty
    if name == "matryoshka":
        loss = loss / len(settings["fractions"])
    torch.testing.assert_close(loss.detach(), tensors[f"{name}.loss"], rtol=1e-5, atol=0)
    found = gradients(loss, method.parameters)
    assert {f"{name}.grad.{key}" for key in method.parameters} == {n for n in tensors if n.startswith(f"{name}.grad.")}
    for key, gradient in found.items():
        expected = tensors[f"{name}.grad.{key}"]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_recording_exercises_what_it_is_for(recorded):
    settings, tensors = recorded
    for name in ("topk", "batchtopk"):
        dead = tensors[f"{name}.dead"]
        assert dead.max() > 15, "latents die"
        assert dead[-1] < 5, "and most come back"
        assert (tensors[f"{name}.aux"] > 0.5).sum() > 30
        assert not tensors[f"{name}.{settings['steps']}.b_enc"].eq(0).any()


def test_the_start_of_b_dec_is_theirs(recorded):
    settings, tensors = recorded
    first = batches(settings)[0]
    assert first.shape[1] == D_IN
    for name in ("topk", "batchtopk"):
        torch.testing.assert_close(geometric_median(first), tensors[f"{name}.median"], rtol=0, atol=2e-5)
        assert float((first.mean(0) - tensors[f"{name}.median"]).norm()) > 1e-3, "it is not the mean"
