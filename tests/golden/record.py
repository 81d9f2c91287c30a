"""Records golden.json: `PYTHONPATH=tests python tests/golden/record.py [CASE ...]`.

A tolerance is five times the largest deviation between runs whose data differ in float32's last bits and whose kernels
are the dense or the sparse ones; it is at least 5e-5 of the value, and ten pairs of token and latent for an L0 or one
and a half latents for a share of latents.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import torch
from golden.runs import CASES, D_SAE, FILE, LENGTHS, run
from planted import TRUE

JITTERS = {"short": 5, "long": 5}  # what stands there of long runs, but of multitopk, was taken with 3
LEAST = {"l0": 2e-3, "dead_share": 1.5 / D_SAE, "recall": 1.5 / TRUE}


def record(case: str, length: str) -> dict[str, dict[str, list[float]]]:
    """When -> name -> [value, tolerance]."""
    golden = run(case, length)
    others = []
    for jitter in range(1, JITTERS[length] + 1):
        os.environ["SAEHOOK_KERNELS"] = ("sparse", "reference")[jitter % 2]
        others.append(run(case, length, jitter))
    del os.environ["SAEHOOK_KERNELS"]
    return {
        when: {name: with_tolerance(name, value, [o[when][name] for o in others]) for name, value in numbers.items()}
        for when, numbers in golden.items()
    }


def with_tolerance(name: str, value: float, others: list[float]) -> list[float]:
    """The value, and how far another machine may be off."""
    tolerance = max(5 * max(abs(other - value) for other in others), 5e-5 * abs(value), LEAST.get(name, 1e-6))
    return [float(f"{value:.7g}"), float(f"{tolerance:.2g}")]


def as_text(recorded: dict[str, dict[str, Any]]) -> str:
    """JSON with one line for each number."""
    return re.sub(r"\[\s+(\S+)\s+(\S+)\s+\]", r"[\1 \2]", json.dumps(recorded, indent=1)) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    for length in LENGTHS:
        for case in sys.argv[1:] or CASES:
            recorded.setdefault(length, {})[case] = record(case, length)
            sys.stderr.write(f"{length} {case}\n")
    FILE.write_text(as_text(recorded))
