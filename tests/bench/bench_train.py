"""What a training step costs: time against the encoder's product, and memory above model, gradients and optimiser.

    python tests/bench/bench_train.py [--json out.json] [--repeats 9] [--d-in 256] [--d-sae 4096] [--batch 2048]

The one product that no method can do without is x W_enc. Times are medians of ratios within interleaved rounds. Memory is
what torch's allocator holds at most during one step above what it held before, in units of batch x d_sae x 4 bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from bench_splice import interleaved, peak_bytes, ratio

from saehook.batches import InputFacts
from saehook.config import BatchTopK, Gated, JumpReLU, Matryoshka, Method, MultiTopK, ReLU, TopK, TrainConfig
from saehook.trainer import Run

SITE = "layers.0.resid_post"
METHODS: dict[str, Method] = {
    "topk": TopK(k=32),
    "multitopk": MultiTopK(k=32),
    "batchtopk": BatchTopK(k=32),
    "matryoshka": Matryoshka(k=32),
    "relu": ReLU(),
    "jumprelu": JumpReLU(),
    "gated": Gated(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2048)
    a = parser.parse_args()
    x = torch.randn(a.batch, a.d_in, generator=torch.Generator().manual_seed(0))
    facts = InputFacts.measure(x, SITE)
    scratch = Scratch()
    runs = {}
    for name, method in METHODS.items():
        target = None if hasattr(method, "k") else 32.0
        config = TrainConfig(
            site=SITE, activation=method, d_sae=a.d_sae, tokens=10**9, batch_tokens=a.batch, target_l0=target
        )
        runs[name] = Run(config, name, facts)
    product = torch.randn(a.d_in, a.d_sae)

    def step(run: Run) -> Callable[[], object]:
        return lambda: run.step(x, scratch)

    variants = {name: step(run) for name, run in runs.items()}
    seconds = interleaved(
        {"product": lambda: torch.mm(x, product, out=scratch.view(a.batch, -1)), **variants}, a.repeats
    )
    unit = 4 * a.batch * a.d_sae
    results = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "sizes": {"d_in": a.d_in, "d_sae": a.d_sae, "batch": a.batch},
        "steps": {
            name: {
                "milliseconds": 1000 * sorted(seconds[name])[len(seconds[name]) // 2],
                "time_over_encoder_product": ratio(seconds, name, "product"),
                "memory_over_pre_activations": (peak_bytes(variants[name]) - 4 * gradients(runs[name])) / unit
                + hasattr(METHODS[name], "k"),  # `scratch`, which is one of them and lives on between steps
            }
            for name in variants
        },
    }
    text = json.dumps(results, indent=1)
    print(text)
    if a.json:
        a.json.write_text(text + "\n")


def gradients(run: Run) -> int:
    """Numbers in the gradients, which a step makes and drops."""
    return sum(p.numel() for p in run.method.parameters.values())


if __name__ == "__main__":
    main()
