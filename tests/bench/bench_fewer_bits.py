"""Weights in bfloat16 and moments in 8 bits against float32: the FVU that each reaches, on the same tokens of the bundled model.

Run: python tests/bench/bench_fewer_bits.py. Writes RESULTS/fewer_bits_2026-11.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import saehook
from saehook import corpus
from saehook.config import BatchTopK, JumpReLU, TopK, TrainConfig, method_to_dict
from saehook.harvest import Shuffled, TextStream, activations_of
from saehook.losses import reconstruction
from saehook.tokenization import window_size
from saehook.trainer import Trainer

SITE, D_SAE, L0 = "layers.2.resid_post", 2048, 32
KEPT = (("float32", "float32"), ("bfloat16", "float32"), ("float32", "8-bit"), ("bfloat16", "8-bit"))
METHODS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (TopK(k=L0), {}),
    (BatchTopK(k=L0), {}),
    (JumpReLU(), {"target_l0": float(L0)}),
)


def measure(tokens: int, held_out: int, methods: Any = METHODS, kept: Any = KEPT) -> list[dict[str, Any]]:
    """One row for each method and each way of keeping weights and moments, the usual one first."""
    model = saehook.HookedModel.from_pretrained(saehook.bundled("lm"))
    window = window_size(model.context)

    def activations(documents: Any) -> Any:
        return activations_of(model, [SITE], TextStream(documents, model.tokenizer, window, repeat=False, seed=0))

    common: dict[str, Any] = {"site": SITE, "d_sae": D_SAE, "tokens": tokens, "calibration_tokens": 10_000}
    configs = [
        TrainConfig(activation=method, weights=weights, moments=moments, **more, **common)
        for method, more in methods
        for weights, moments in kept
    ]
    batches = Shuffled(
        activations(list(corpus.read_documents(corpus.python_files()))),
        buffer_tokens=configs[0].resolved_buffer_tokens,
        batch_tokens=configs[0].resolved_batch_tokens,
        seed=0,
    )
    trainer = Trainer(configs, batches, d_in=model.width(model.sites(SITE)[0]), progress=False)
    saes = trainer.fit()
    parts, n = [], 0
    for chunk in activations(list(corpus.read_documents(corpus.held_out_files()))):
        parts.append(chunk[SITE].float())
        n += len(parts[-1])
        if n >= held_out:
            break
    x = torch.cat(parts)[:held_out]
    rows: list[dict[str, Any]] = []
    for config, sae, run in zip(configs, saes, trainer.runs, strict=True):
        with torch.no_grad():
            x_hat = torch.cat([sae(part).x_hat for part in x.split(2048)])
        fvu = float(reconstruction(x, x_hat))
        method = method_to_dict(config.activation)["name"]
        full = next((row["held_out_fvu"] for row in rows if row["method"] == method), fvu)
        row = {"method": method, "weights": config.weights, "moments": config.moments, "held_out_fvu": fvu}
        rows.append(row | {"against_float32": fvu / full, "training_fvu": run.metrics["fvu"], "l0": run.metrics["l0"]})
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--held-out", type=int, default=20_000)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "RESULTS" / "fewer_bits_2026-11.json")
    arguments = parser.parse_args()
    began = time.monotonic()
    rows = measure(arguments.tokens, arguments.held_out)
    print("| method | weights | moments | held-out FVU | against float32 |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['method']} | {row['weights']} | {row['moments']} | {row['held_out_fvu']:.4f} | {row['against_float32']:.4f} |"
        )
    settings = {"site": SITE, "d_sae": D_SAE, "l0": L0, "tokens": arguments.tokens, "held_out": arguments.held_out}
    facts = {"settings": settings, "torch": torch.__version__, "python": platform.python_version(), "rows": rows}
    arguments.json.write_text(json.dumps(facts | {"seconds": round(time.monotonic() - began)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
