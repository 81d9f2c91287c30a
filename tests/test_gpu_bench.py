"""The benchmark for accelerators in small sizes, so that it runs when there is one, and the limits that it compares with."""

from __future__ import annotations

import json

import bench_gpu_step
import gpu_end_to_end
import pytest
import torch
from step_limits import SETTINGS, Machine, limits


def test_limits_are_those_that_were_counted():
    """In milliseconds, rounded: the table of the reference on trainers."""
    counted = {
        "gpt2": (0.39, 0.19, 0.07, 0.13, 0.23, 1.03),
        "gemma-2-2b, 16k": (0.78, 0.12, 0.84, 0.81, 0.46, 3.06),
        "gemma-2-2b, 65k": (3.13, 0.50, 0.84, 0.81, 1.83, 7.2),
        "llama-8b, 131k": (11.1, 1.0, 1.5, 2.0, 6.5, 22.2),
        "llama-8b, 131k, 32k tokens": (44.5, 4.0, 6.0, 8.0, 6.5, 69.4),
    }
    assert counted.keys() == SETTINGS.keys()
    for name, milliseconds in counted.items():
        assert [1e3 * x for x in limits(SETTINGS[name]).values()] == pytest.approx(milliseconds, rel=0.05), name
    slower = limits(SETTINGS["gpt2"], Machine(flops=395e12, bandwidth=4.3e12))
    assert slower["encoder's product"] == 2 * limits(SETTINGS["gpt2"])["encoder's product"]


def test_the_benchmark_runs(tmp_path):
    file = tmp_path / "out.json"
    entries = bench_gpu_step.main(["--tiny", "--repeats", "1", "--parts", "--peers", "--json", str(file)])
    steps = {entry["what"]: entry for entry in entries}
    assert {"product", "triton", "sparse"} <= steps.keys()
    assert steps["sparsify"] == steps["sparsify"] | {"missing": True}
    for part in limits(SETTINGS["gpt2"]):
        assert part == "total" or steps[part]["times_limit"] > 0
    assert steps["check"]["agrees"]
    assert max(steps["check"][name] for name in ("x_hat", "d_W_enc", "d_b_enc", "d_W_dec", "d_b_dec")) < 1e-5
    recorded = json.loads(file.read_text())
    assert len(recorded) == len(entries)
    assert recorded[0]["torch"] == torch.__version__


@pytest.mark.slow
def test_end_to_end_runs():
    rows = {row["what"]: row for row in gpu_end_to_end.measure(torch.device("cpu"), Machine(), tiny=True)}
    assert rows["model alone"]["tokens_per_second"] > 0
    for path in ("hooks", "harvest"):
        assert 0 < rows[f"training, {path}"]["share_of_limit"] < 1.5
