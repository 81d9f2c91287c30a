"""What a whole training step costs, in time and memory, against the encoder's product, which no method can do without.

    python tests/bench/bench_train_step.py [--json out.json] [--repeats 9] [--batch 1024 4096] [--only topk relu] [--peers]

A step is `SAERun.step`: forward, backward, dead latents, AuxK, clipping, Adam, decoder rows, metrics, by the path that the
trainer takes by default. The product is `F.linear` with fresh output. Both are interleaved in one process, in random order;
ratios are medians of the paired ratios. The penalised methods are measured with about 64 latents firing per token, and with
half of all firing ("many"), as early in training. `topk+auxk` has a tenth of its latents dead.
`memory_over_pre_activations` is what a step holds at most above model, gradients and optimiser, in units of
batch x d_sae x 4 bytes. `--peers` adds the steps of other libraries (`peers.py`), which it installs first. On a busy
machine: OMP_NUM_THREADS=1 and --cpu-time, which counts the time of the one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from bench_splice import peak_bytes, ratio
from torch import Tensor

from saehook.batches import InputFacts
from saehook.config import BatchTopK, Gated, JumpReLU, Matryoshka, Method, MultiTopK, ReLU, TopK, TrainConfig
from saehook.kernels import Scratch
from saehook.sae_run import SAERun

SITE = "layers.0.resid_post"
K, FIRING = 32, 64
CASES: dict[str, Method] = {
    "topk": TopK(k=K),
    "topk+auxk": TopK(k=K),
    "multitopk": MultiTopK(k=K),
    "batchtopk": BatchTopK(k=K),
    "matryoshka": Matryoshka(k=K),
    "relu": ReLU(),
    "relu, many": ReLU(),
    "jumprelu": JumpReLU(),
    "jumprelu, many": JumpReLU(),
    "gated": Gated(),
    "gated, many": Gated(),
}
DEAD_SHARE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument(
        "--peers", nargs="*", choices=peers.PACKAGES, metavar="PEER", help="without a name, all of them"
    )
    parser.add_argument(
        "--peers-in", type=Path, default=peers.FOLDER, help="where their environments are, or are to be"
    )
    a = parser.parse_args()
    clock = time.thread_time if a.cpu_time else time.perf_counter
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
    print(json.dumps(versions))
    entries = []
    for batch in a.batch:
        for entry in measure(a.only, a.d_in, a.d_sae, batch, a.repeats, clock):
            entries.append(entry | versions)
            print(f"{batch:6} {entry['what']:16} {entry['ratio_to_encoder_product']:6.2f} x the product,", end=" ")
            print(f"{entry['memory_over_pre_activations']:5.2f} x the pre-activations", flush=True)
        if a.peers is not None:
            names = a.peers or list(peers.PACKAGES)
            for entry in peers.measure(names, a.peers_in, a.d_in, a.d_sae, K, batch, a.repeats):
                entries.append(entry | versions)
                print(f"{batch:6} {entry['what']:16} {entry['ratio_to_encoder_product']:6.2f} x the product,", end=" ")
                print(
                    f"{entry['ratio_to_ours']:5.2f} x ours, errors within {entry['largest_difference']:.0e}", flush=True
                )
    if a.json:
        a.json.write_text(json.dumps(entries, indent=1) + "\n")


def measure(
    cases: list[str], d_in: int, d_sae: int, batch: int, repeats: int, clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Case by case, each interleaved with the product, so that only one SAE is in memory."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, d_in, generator=generator)
    weight, bias = torch.randn(d_sae, d_in, generator=generator), torch.randn(d_sae, generator=generator)
    for what in cases:
        run, scratch = make_run(what, x, d_sae), Scratch()
        step = stepper(run, x, scratch)
        seconds = interleaved({"product": lambda: F.linear(x, weight, bias), "step": step}, repeats, clock)
        gradients = sum(p.nbytes for p in run.method.parameters.values())
        yield {
            "what": what,
            "d_in": d_in,
            "d_sae": d_sae,
            "k": run.config.k or FIRING,
            "batch": batch,
            "fired_per_token": float(run.sums["l0"]) / run.summed_steps,
            "seconds": statistics.median(seconds["step"]),
            "seconds_encoder_product": statistics.median(seconds["product"]),
            "ratio_to_encoder_product": ratio(seconds, "step", "product"),
            # The gradients of the matrices lie in `scratch`.
            "memory_over_pre_activations": (peak_bytes(step) + scratch.nbytes - gradients) / (4 * batch * d_sae),
        }


def make_run(what: str, x: Tensor, d_sae: int) -> SAERun:
    """A run in the state that its name says."""
    method = CASES[what]
    target = None if hasattr(method, "k") else float(FIRING)
    config = TrainConfig(site=SITE, activation=method, d_sae=d_sae, tokens=10**9, batch_tokens=len(x), target_l0=target)
    facts = InputFacts.measure(x, SITE)
    run = SAERun(config, what, facts)
    sae = run.sae
    with torch.no_grad():
        if target is not None and "many" not in what:
            some = ((x[:64] * facts.scale - sae.b_dec) @ sae.W_enc).flatten()
            cut = float(some.topk(FIRING * 64).values.min())
            if isinstance(method, JumpReLU):
                run.method.parameters["threshold"].fill_(cut)
            else:
                sae.b_enc.sub_(cut)
        if what == "topk+auxk":
            dead = torch.randperm(d_sae, generator=torch.Generator().manual_seed(0))[: int(DEAD_SHARE * d_sae)]
            sae.W_enc[:, dead] *= 0.02  # their pre-activations are never among the largest
            run.tokens_since_fired[dead] = 10**9
    return run


def stepper(run: SAERun, x: Tensor, scratch: Scratch) -> Callable[[], None]:
    return lambda: run.step({SITE: x}, scratch)


def interleaved(
    variants: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each variant, one of each per round in random order, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(repeats + 1):
        for name in random.sample(list(variants), len(variants)):
            start = clock()
            variants[name]()
            if i > 0:
                seconds[name].append(clock() - start)
    return seconds


if __name__ == "__main__":
    main()
