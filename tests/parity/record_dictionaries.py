"""Records formats/dictionary_learning/*: small dictionaries as the package `dictionary_learning` (0.1.0) writes them, and what it
computes with them.

In an environment of its own: `pip install torch==2.13.0 dictionary-learning`, then
`python tests/parity/record_dictionaries.py`. Each folder holds `ae.pt` and `config.json` in the layout of its `trainSAE`, and
`recorded.safetensors` (x, acts, x_hat). Nothing of that package is in this repository.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.dictionary import (  # pyright: ignore[reportMissingImports]
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # pyright: ignore[reportMissingImports]
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # pyright: ignore
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file

FOLDER = Path(__file__).with_name("formats") / "dictionary_learning"
D_IN, D_SAE, N, K, NORM = 10, 24, 8, 4, 2.5
CLASSES: dict[type, dict[str, Any]] = {
    AutoEncoder: {},
    AutoEncoderNew: {},
    GatedAutoEncoder: {},
    JumpReluAutoEncoder: {},
    AutoEncoderTopK: {"k": K},
    BatchTopKSAE: {"k": K},
    MatryoshkaBatchTopKSAE: {"k": K, "group_sizes": [8, 16]},
}


def new(kind: type, options: dict[str, Any]) -> Any:
    """All parameters random, the threshold set."""
    ae = kind(D_IN, D_SAE, **options)
    with torch.no_grad():
        for name, parameter in ae.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) * 0.4 if name == "threshold" else torch.randn_like(parameter) * 0.4
            )
        if kind is AutoEncoder:  # its from_pretrained makes the columns unit vectors
            ae.decoder.weight /= ae.decoder.weight.norm(dim=0)
        if "k" in options:
            ae.threshold.fill_(0.3)
    return ae


def record(folder: Path, ae: Any, stored: dict[str, Any], options: dict[str, Any], x_scale: float = 1.0) -> None:
    """Write what `trainSAE` writes, and what the dictionary makes of x."""
    folder.mkdir(parents=True)
    torch.save(stored, folder / "ae.pt")
    trainer = {
        "dict_class": type(ae).__name__, "trainer_class": "Trainer", "activation_dim": D_IN, "dict_size": D_SAE, "lr": 1e-4,
        "steps": 100, "layer": 8, "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_8",
        "seed": 0, "device": "cuda:0", **{name: value for name, value in options.items() if name == "k"},
    }  # fmt: skip
    buffer = {"d_submodule": D_IN, "io": "out", "n_ctxs": 3000, "ctx_len": 128, "refresh_batch_size": 32,
              "out_batch_size": 2048, "device": "cuda:0"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}, indent=4))
    x = (torch.randn(N, D_IN) * 2 + 0.5) * x_scale
    with torch.no_grad():
        acts, x_hat = ae.encode(x), ae(x)
    said = {"package": f"dictionary_learning {version('dictionary-learning')}"}
    save_file({"x": x, "acts": acts.contiguous(), "x_hat": x_hat}, folder / "recorded.safetensors", metadata=said)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(0)
    for kind, options in CLASSES.items():
        ae = new(kind, options)
        record(FOLDER / kind.__name__, ae, ae.state_dict(), options)
    for kind in (BatchTopKSAE, GatedAutoEncoder):
        ae = new(kind, CLASSES[kind])
        backup = {"step": 40, "ae": {name: value.clone() for name, value in ae.state_dict().items()}, "optimizer": {}}
        ae.scale_biases(NORM)  # as trainSAE does when it writes the finished dictionary
        backup |= {"config": {"dict_class": kind.__name__}, "norm_factor": NORM}
        record(FOLDER / f"{kind.__name__}_backup", ae, backup, CLASSES[kind], NORM)


if __name__ == "__main__":
    main()
