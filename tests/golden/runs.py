"""The golden runs: every training method on planted data, and the numbers that a run is known by."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from planted import D_IN, SITE, planted
from torch import Tensor

from saehook.config import (
    BatchTopK,
    Gated,
    JumpReLU,
    Matryoshka,
    Method,
    MultiTopK,
    ReLU,
    TopK,
    TrainConfig,
)
from saehook.metrics import Firing, Reconstruction
from saehook.sae import SAE
from saehook.trainer import Trainer

FILE = Path(__file__).with_name("golden.json")
D_SAE = 96
Numbers = dict[str, dict[str, float]]
"""When (`step 20`, ..., `end`) -> name -> value."""

CASES: dict[str, tuple[Method, dict[str, Any]]] = {
    "relu": (ReLU(), {"sparsity_coefficient": 0.3}),
    "relu-target": (ReLU(), {"target_l0": 4.0}),
    "relu-april": (ReLU(), {"sparsity_coefficient": 0.1, "decoder_norm_penalty": True}),
    "topk": (TopK(k=3), {}),
    "topk-annealed-averaged": (TopK(k=3), {"k_anneal_steps": 40, "ema_decay": 0.95}),
    "multitopk": (MultiTopK(k=3), {}),
    "batchtopk": (BatchTopK(k=3), {}),
    "matryoshka": (Matryoshka(k=3, fractions=(0.25, 0.25, 0.5)), {}),
    "jumprelu": (JumpReLU(), {"sparsity_coefficient": 0.02}),
    "jumprelu-target": (JumpReLU(), {"target_l0": 4.0}),
    "gated": (Gated(), {"sparsity_coefficient": 0.3}),
}
LENGTHS = {"short": (80, (20, 40, 80)), "long": (600, (20, 100, 300, 600))}
"""Steps of 256 tokens, and those whose metrics are kept."""


def run(case: str, length: str, jitter: int = 0) -> Numbers:
    """Train, and measure on fresh tokens. With a `jitter` the data are off by a few of float32's last bits, as the
    arithmetic of another machine would be."""
    activation, settings = CASES[case]
    steps, kept = LENGTHS[length]
    config = TrainConfig(
        site=SITE,
        activation=activation,
        d_sae=D_SAE,
        tokens=256 * steps,
        batch_tokens=256,
        calibration_tokens=4096,
        **settings,
    )
    x = planted(config.tokens + 4096)[0]
    if jitter:
        x = x * (1 + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(jitter)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer([config], iter(x.split(4096)), d_in=D_IN, log_dir=folder, progress=False)
        (sae,) = trainer.fit()
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "fvu", "l0", "auxk", "dead_share", "threshold")
    numbers = {
        f"step {line['step']}": {n: line[n] for n in names if n in line} for line in lines if line["step"] in kept
    }
    return numbers | {"end": measure(sae)}


@torch.no_grad()
def measure(sae: SAE) -> dict[str, float]:
    """The finished SAE on fresh tokens, against the planted directions."""
    x, true = planted(4096, seed=7)
    reconstruction, firing = Reconstruction(), Firing()
    out = sae(x)
    reconstruction.update(x, out.x_hat)
    firing.update(out.acts)
    best = best_cosines(sae, true)
    numbers = {
        "fvu": reconstruction.fvu,
        "l0": firing.l0,
        "mean_max_cosine": float(best.mean()),
        "recall": float((best > 0.9).double().mean()),
        "shrinkage": float(out.x_hat.square().sum() / (x * out.x_hat).sum()),
        "b_enc": float(sae.b_enc.double().square().mean().sqrt()),
        "b_dec": float(sae.b_dec.double().norm()),
    }
    if sae.threshold is not None:
        numbers["threshold"] = float(sae.threshold.double().mean())
    return numbers


def best_cosines(sae: SAE, true: Tensor) -> Tensor:
    """For each planted direction the cosine of the decoder row that is closest to it."""
    return (true @ sae.W_dec.detach().T).amax(-1)
