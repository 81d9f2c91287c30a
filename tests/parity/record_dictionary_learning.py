"""Records dictionary_learning.safetensors from the trainers of the package `dictionary_learning` (0.1.0).

In an environment of its own: `pip install torch==2.13.0 dictionary-learning safetensors`, then
`PYTHONPATH=tests python tests/parity/record_dictionary_learning.py`. Nothing of that package is in this repository but
numbers that it computed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # pyright: ignore[reportMissingImports]
from dictionary_learning.trainers.gdm import GatedSAETrainer  # pyright: ignore[reportMissingImports]
from dictionary_learning.trainers.matryoshka_batch_top_k import (  # pyright: ignore[reportMissingImports]
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.standard import (  # pyright: ignore[reportMissingImports]
    StandardTrainer,
    StandardTrainerAprilUpdate,
)
from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]
from planted import D_IN, planted
from safetensors.torch import save_file
from torch import Tensor

FILE = Path(__file__).with_name("dictionary_learning.safetensors")
D_SAE, K, STEPS, BATCH = 64, 4, 50, 128
KEPT = (1, 2, 3, 5, 10, 20, 30, 40, 50)
"""The weights after these many steps are recorded."""
LOW = 20
"""So many latents start with a small encoder, so that they are dead soon."""
SETTINGS: dict[str, Any] = {
    "d_sae": D_SAE,
    "k": K,
    "steps": STEPS,
    "batch_tokens": BATCH,
    "kept": KEPT,
    "lr": 3e-3,
    "decay_start": 40,
    "auxk_alpha": 1 / 32,
    "top_k_aux": 6,
    "dead_after_tokens": 512,
    "threshold_beta": 0.5,
    "threshold_start_step": 9,
    "mean_square": 6.0,
    "fractions": (0.25, 0.25, 0.5),
    "l1_penalty": 0.3,
    "seed": 5,
}


def record(kind: Any, name: str) -> dict[str, Tensor]:
    """Every step of one trainer."""
    trainer = kind(
        steps=STEPS,
        activation_dim=D_IN,
        dict_size=D_SAE,
        k=K,
        layer=0,
        lm_name="",
        lr=SETTINGS["lr"],
        auxk_alpha=SETTINGS["auxk_alpha"],
        warmup_steps=0,
        decay_start=SETTINGS["decay_start"],
        threshold_beta=SETTINGS["threshold_beta"],
        threshold_start_step=SETTINGS["threshold_start_step"],
        seed=SETTINGS["seed"],
        device="cpu",
    )
    trainer.dead_feature_threshold = SETTINGS["dead_after_tokens"]
    trainer.top_k_aux = SETTINGS["top_k_aux"]
    trainer.ae.encoder.weight.data[:LOW] *= 0.05
    recorded = {f"{name}.start.{key}": value.clone() for key, value in weights(trainer.ae).items()}
    curves: dict[str, list[float]] = {key: [] for key in ("error", "aux", "threshold", "dead")}
    inner = trainer.get_auxiliary_loss

    def auxiliary(residual: Tensor, acts: Tensor) -> Tensor:
        loss = inner(residual, acts)
        if not curves["error"]:
            recorded[f"{name}.median"] = trainer.ae.b_dec.detach().clone()
        curves["error"].append(float(residual.detach().pow(2).sum(-1).mean()))
        curves["aux"].append(float(loss.detach()))
        curves["dead"].append(trainer.dead_features)
        return loss

    trainer.get_auxiliary_loss = auxiliary
    for step, batch in enumerate(batches()):
        trainer.update(step, batch)
        curves["threshold"].append(float(trainer.ae.threshold))
        if step == 0:
            recorded[f"{name}.since_fired"] = trainer.num_tokens_since_fired.clone()
        if step + 1 in KEPT:
            recorded |= {f"{name}.{step + 1}.{key}": value.clone() for key, value in weights(trainer.ae).items()}
    return recorded | {f"{name}.{key}": torch.tensor(curve) for key, curve in curves.items()}


NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "gate_bias": "b_enc",
    "decoder.weight": "W_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "mag_bias": "b_mag",
}
"""Our names of their parameters; the others have the same."""


def one_loss(kind: Any, name: str, **settings: Any) -> dict[str, Tensor]:
    """Random weights, and the loss of one batch with its gradients."""
    x = batches()[0]
    trainer = kind(
        steps=10,
        activation_dim=x.shape[1],
        dict_size=D_SAE,
        layer=0,
        lm_name="",
        warmup_steps=0,
        device="cpu",
        **settings,
    )
    generator = torch.Generator().manual_seed(3)
    parameters = dict(trainer.ae.named_parameters())
    for parameter in parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    loss = trainer.loss(x, step=0)
    loss.backward()
    recorded = {f"{name}.loss": loss.detach()}
    for theirs, parameter in parameters.items():
        assert parameter.grad is not None
        ours = NAMES.get(theirs, theirs)
        for what, value in (("start", parameter.data), ("grad", parameter.grad)):
            recorded[f"{name}.{what}.{ours}"] = (value.T if theirs.endswith(".weight") else value).contiguous().clone()
    return recorded


def batches() -> tuple[Tensor, ...]:
    """The tokens that are trained on."""
    x = planted(STEPS * BATCH, counts="geometric")[0]
    return (x * (SETTINGS["mean_square"] / x.square().sum(-1).mean()).sqrt()).split(BATCH)


def weights(ae: Any) -> dict[str, Tensor]:
    """Its weights under our names."""
    return {
        "W_enc": ae.encoder.weight.data.T.contiguous(),
        "W_dec": ae.decoder.weight.data.T.contiguous(),
        "b_enc": ae.encoder.bias.data,
        "b_dec": ae.b_dec.data,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    tensors = record(TopKTrainer, "topk") | record(BatchTopKTrainer, "batchtopk")
    fractions = SETTINGS["fractions"]
    tensors |= one_loss(MatryoshkaBatchTopKTrainer, "matryoshka", k=K, group_fractions=fractions, auxk_alpha=0.0)
    for kind, name in (
        (StandardTrainer, "relu"),
        (StandardTrainerAprilUpdate, "relu-april"),
        (GatedSAETrainer, "gated"),
    ):
        tensors |= one_loss(kind, name, l1_penalty=SETTINGS["l1_penalty"], sparsity_warmup_steps=None)
    save_file(tensors, FILE, metadata={"package": "dictionary_learning 0.1.0", "settings": json.dumps(SETTINGS)})
