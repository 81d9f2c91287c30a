"""What a device sends and holds as more of them share one SAE, from the training code's own counters: 2 to 512 devices.

The step is the real one; only the other devices are not there (`simulated_mesh`). Run: PYTHONPATH=tests python
tests/bench/bench_distributed.py. Writes the table and its environment to RESULTS/distributed_bytes_2026-11.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from simulated_mesh import simulated_step

from saehook.config import TopK, TrainConfig
from saehook.plan import DEVICES, STORAGES, Layout, Plan, Training

D_IN, D_SAE, K, BATCH = 128, 2**15, 32, 256


SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512)


def rows(sizes: Sequence[int] = SIZES) -> list[dict[str, object]]:
    """One of each number of devices, all latents shared; and with two replicas."""
    found = []
    for devices in sizes:
        for data in (1, 2):
            latent = devices // data
            config = TrainConfig(
                site="s",
                activation=TopK(k=K),
                d_sae=D_SAE,
                tokens=100 * BATCH,
                batch_tokens=BATCH,
                auxk_coefficient=0.0,
            )
            sent, held = simulated_step(config, D_IN, data, latent)
            training = Training(d_in=D_IN, d_sae=D_SAE, k=K, tokens=BATCH, batch_tokens=BATCH)
            plan = Plan(training, Layout(DEVICES["H200"], devices, data), STORAGES[0])
            large = {what: sent[what] for what in ("x_hat", "top-k", "gradients")}
            found.append(
                {
                    "devices": devices,
                    "data": data,
                    "latents": D_SAE // latent,
                    "held_bytes": held,
                    "sent_bytes": large | {"other": sum(sent.values()) - sum(large.values())},
                    # The plan counts bf16 on the wire, and x besides; float32 is what is sent here.
                    "planned_bytes": {
                        "x_hat": 2 * plan.activation_bytes * 2 / 3,
                        "top-k": plan.topk_bytes,
                        "gradients": 2 * plan.gradient_bytes,
                    },
                }
            )
    return found


def table(found: list[dict[str, object]]) -> str:
    """As Markdown."""
    lines = [
        "| devices | data | latents each | held, MB | x_hat, kB | top-k, kB | gradients, kB | other, kB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        sent = row["sent_bytes"]
        assert isinstance(sent, dict)
        cells = [f"{row['devices']}", f"{row['data']}", f"{row['latents']:,}", f"{row['held_bytes'] / 1e6:,.2f}"]  # type: ignore[operator]
        cells += [f"{sent[what] / 1e3:,.1f}" for what in ("x_hat", "top-k", "gradients", "other")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).parent / "RESULTS" / "distributed_bytes_2026-11.json"
    )
    arguments = parser.parse_args()
    found = rows()
    print(table(found))
    settings = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "batch_tokens": BATCH, "method": "topk", "dtype": "float32"}
    facts = {"settings": settings, "torch": torch.__version__, "python": platform.python_version(), "rows": found}
    arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
