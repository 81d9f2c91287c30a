"""The peers of `bench_train_step.py`: each installed in an environment of its own, and stepped beside us in one run.

Same data, same weights to begin with, same mathematics: TopK, Adam with eps 1e-8, no AuxK since nothing is dead. Where a peer
clips gradients or leaves the decoder's norms alone, the run of ours that it is compared with does so, too. The errors of the
first steps must agree; then one process steps at a time, in random order, and ratios are medians of paired ratios.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_splice import ratio
from peer_worker import MARK, PEERS

from saehook.batches import InputFacts
from saehook.config import TopK, TrainConfig
from saehook.errors import SaehookError
from saehook.kernels import Scratch
from saehook.sae_run import SAERun

PACKAGES = {
    "sparsify": "eai-sparsify==1.3.3",
    "dictionary_learning": "dictionary-learning==0.1.0",
    "saelens": "sae-lens==6.54.12",
}
SITE, LR = "layers.0.resid_post", 1e-4
FOLDER = Path.home() / ".cache" / "saehook" / "peers"
CHECKED_STEPS, TOLERANCE = 20, 1e-4
"""Steps whose errors are compared, each on a batch of its own as in training, and how far they may differ, as a share."""


class PeerError(SaehookError):
    """A peer that cannot be installed, does not run, or computes something else."""


def install(name: str, folder: Path) -> Path:
    """The Python of an environment with that peer and our version of torch; made once."""
    python, done = folder / name / "bin" / "python", folder / f"{name}.json"
    torch_version = torch.__version__.partition("+")[0]
    wanted = {"package": PACKAGES[name], "torch": torch_version}
    if done.is_file() and json.loads(done.read_text()) == wanted:
        return python
    folder.mkdir(parents=True, exist_ok=True)
    pinned = folder / f"{name}-constraints.txt"
    pinned.write_text(f"torch=={torch_version}\n")  # else some dependency takes the newest, and its CUDA packages
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / name)], check=True)
    for package in (f"torch=={torch_version}", PACKAGES[name]):
        command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(pinned), package]
        if subprocess.run(command).returncode:
            raise PeerError(f"{package} could not be installed in {folder / name}; see what pip says above.")
    # Dependencies of dependencies that no trainer needs: built for CUDA, torchvision cannot be imported beside a torch for
    # CPUs, and with Triton installed sparsify's decoder asks for a driver.
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "triton"], check=True)
    done.write_text(json.dumps(wanted))
    return python


class Peer:
    """A process that takes steps with a peer's code."""

    def __init__(self, name: str, python: Path, start: Path) -> None:
        self.name = name
        # Without a GPU sparsify's Triton decoder fails where Triton is installed.
        environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1", "PYTHONPATH": ""}
        command = [str(python), str(Path(__file__).with_name("peer_worker.py")), name, str(start)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def step(self, batch: int) -> dict[str, float]:
        """`seconds` and `error` of a step."""
        assert self.process.stdin is not None
        print("step", batch, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise PeerError(f"{self.name} ended with status {self.process.wait()}; see what it says above.")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Ours:
    """The run of ours with a peer's mathematics."""

    run: SAERun
    batches: torch.Tensor
    scratch: Scratch

    @classmethod
    def like(cls, peer: str, batches: torch.Tensor, d_sae: int, k: int) -> Ours:
        facts = replace(InputFacts.measure(batches[0], SITE), scale=1.0)
        variance = float(facts.variance)
        # The loss of ours, and of sparsify, is a share of the variance; that of the others is not.
        share = 1.0 if peer == "sparsify" else 1 / variance
        config = TrainConfig(
            site=SITE, activation=TopK(k=k), d_sae=d_sae, tokens=10**9, batch_tokens=batches.shape[1], lr=LR, warmup_steps=0,
            decay_share=0.0, adam_eps=1e-8 * share, clip_norm=0.0 if peer == "sparsify" else share, ema_decay=0.0,
        )  # fmt: skip
        run = SAERun(config, "topk", facts)
        if peer == "saelens":
            assert run.optimizer.rows is not None
            run.optimizer.rows.unit_rows = False
        return cls(run, batches, Scratch())

    def start(self, path: Path) -> None:
        """Write what the peer begins with."""
        sae, config = self.run.sae, self.run.config
        weights = {name: getattr(sae, name).detach().contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        rest = {"batches": self.batches, "k": config.k, "lr": LR, "threads": torch.get_num_threads()}
        torch.save(weights | rest, path)

    def step(self, batch: int) -> dict[str, float]:
        """`seconds` and `error` of a step."""
        self.run.sums, self.run.summed_steps = {}, 0
        begin = time.perf_counter()
        self.run.step({SITE: self.batches[batch]}, self.scratch)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "error": float(self.run.sums["error"])}


def measure(
    names: list[str], folder: Path, d_in: int, d_sae: int, k: int, batch: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """One entry for each peer.

    Raises:
        PeerError: its errors are not ours.
    """
    generator = torch.Generator().manual_seed(0)
    batches = F.normalize(torch.randn(CHECKED_STEPS, batch, d_in, generator=generator), dim=-1)
    weight, bias = torch.randn(d_sae, d_in, generator=generator), torch.randn(d_sae, generator=generator)
    for name in names:
        assert name in PEERS
        python = install(name, folder)
        ours = Ours.like(name, batches, d_sae, k)
        with tempfile.TemporaryDirectory() as temporary:
            start = Path(temporary) / "start.pt"
            ours.start(start)
            peer = Peer(name, python, start)
        largest = agree(name, ours, peer)

        def product(number: int) -> dict[str, float]:
            begin = time.perf_counter()
            F.linear(batches[number], weight, bias)
            return {"seconds": time.perf_counter() - begin}

        variants = {"product": product, "ours": ours.step, "peer": peer.step}
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for i in range(repeats):
            for variant in random.sample(list(variants), len(variants)):
                seconds[variant].append(variants[variant](i % CHECKED_STEPS)["seconds"])
        peer.close()
        yield {
            "what": name,
            "d_in": d_in,
            "d_sae": d_sae,
            "k": k,
            "batch": batch,
            "seconds": statistics.median(seconds["peer"]),
            "seconds_ours": statistics.median(seconds["ours"]),
            "seconds_encoder_product": statistics.median(seconds["product"]),
            "ratio_to_encoder_product": ratio(seconds, "peer", "product"),
            "ratio_to_ours": ratio(seconds, "peer", "ours"),
            "largest_difference": largest,
            "package": PACKAGES[name],
        }


def agree(name: str, ours: Ours, peer: Peer) -> float:
    """Take the first steps with both; the largest difference of their errors, as a share."""
    largest = 0.0
    for i in range(CHECKED_STEPS):
        a, b = ours.step(i)["error"], peer.step(i)["error"]
        largest = max(largest, abs(a - b) / abs(a))
        if not abs(a - b) <= TOLERANCE * abs(a):
            peer.close()
            raise PeerError(f"step {i}: {name} has an error of {b!r}, and ours is {a!r}: not the same mathematics.")
    return largest
