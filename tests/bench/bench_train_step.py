"""What a whole training step costs, in time and memory, against the encoder's product, which no method can do without.

    python tests/bench/bench_train_step.py [--json out.json] [--repeats 9] [--batch 1024 4096] [--only topk relu] [--peers]
    python tests/bench/bench_train_step.py --growth [--json out.json]

A step is `SAERun.step`: forward, backward, dead latents, AuxK, clipping, Adam, decoder rows, metrics, by the path that the
trainer takes by default. The product is `F.linear` with fresh output. Both are interleaved in one process, in random order;
ratios are medians of the paired ratios. The penalised methods are measured with about 64 latents firing per token, and with
half of all firing ("many"), as early in training. `topk+auxk` has a tenth of its latents dead.
`memory_over_pre_activations` is what a step holds at most above model and optimiser, gradients with it, in units of
batch x d_sae x 4 bytes. `profile` says how a step's seconds are spent, by stage and by kind of operation. `--peers` adds the
steps of other libraries (`peers.py`), which it installs first; `--only --peers` times nothing else. `--growth` shows how the
cost of a topk step grows with d_sae, k, the batch and the number of SAEs instead (`plots.py` draws it). `--in-float32` takes all
products in float32, as on a CPU that does not multiply bfloat16 faster. On a busy machine: OMP_NUM_THREADS=1 and --cpu-time, which
counts the time of the one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from bench_splice import peak_bytes, ratio
from torch import Tensor

from saehook.batches import InputFacts
from saehook.config import BatchTopK, Gated, JumpReLU, Matryoshka, Method, MultiTopK, ReLU, TopK, TrainConfig
from saehook.kernels import Scratch, screened
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
GROWTH: dict[str, tuple[int, ...]] = {
    "d_sae": (4096, 8192, 16384, 32768, 65536),
    "k": (8, 16, 32, 64, 128, 256),
    "batch": (256, 512, 1024, 2048, 4096, 8192),
    "saes": (1, 2, 4, 8),
}
"""What `--growth` varies; all else is as here."""
GROWTH_FROM = {"d_sae": 16384, "k": K, "batch": 1024, "saes": 1}
SAES_OF = 4096
"""Their d_sae, where there are several."""
OPERATIONS = {
    "products": ("mm", "addmm", "addmm_", "bmm", "addmv_", "mv"),
    "sums of rows": ("_embedding_bag", "_embedding_bag_forward_only", "_embedding_bag_per_sample_weights_backward"),
    "selection": ("topk", "take", "amax", "nonzero", "sort", "gather", "searchsorted", "scatter_"),
    "Adam": ("_fused_adam_",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="written anew, or with --add gone on with")
    parser.add_argument("--add", action="store_true")
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
    parser.add_argument("--in-float32", action="store_true")
    parser.add_argument("--growth", action="store_true", help="how the cost grows, instead of the table")
    a = parser.parse_args()
    clock = time.thread_time if a.cpu_time else time.perf_counter
    if a.in_float32:
        screened.is_fast = lambda: False
    versions = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "looks_in": "bfloat16" if screened.is_fast() else "float32",
    }
    print(json.dumps(versions))
    entries = json.loads(a.json.read_text()) if a.add else []
    if a.growth:
        for entry in growth(a.d_in, a.repeats, clock):
            entries.append(entry | versions)
            at = ", ".join(f"{name} {entry[name]}" for name in GROWTH_FROM)
            print(f"{at}: {entry['seconds']:.3f} s, {entry['ratio_to_encoder_product']:.2f} x the product", flush=True)
    for batch in a.batch if not a.growth else ():
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
            "memory_over_pre_activations": (peak_bytes(step) + scratch.nbytes) / (4 * batch * d_sae),
            "profile": {"stages": stages(run, x, scratch), "operations": operations(step)},
        }


def growth(d_in: int, repeats: int, clock: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Steps of TopK SAEs on one batch, with one thing varied at a time."""
    for varied, sizes in GROWTH.items():
        for size in sizes:
            at = GROWTH_FROM | {varied: size} | ({"d_sae": SAES_OF} if varied == "saes" else {})
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(at["batch"], d_in, generator=generator)
            weight, bias = torch.randn(at["d_sae"], d_in, generator=generator), torch.zeros(at["d_sae"])
            runs, scratch = [make_run("topk", x, at["d_sae"], at["k"]) for _ in range(at["saes"])], Scratch()

            def step(runs: list[SAERun] = runs, x: Tensor = x, scratch: Scratch = scratch) -> None:
                for run in runs:
                    run.step({SITE: x}, scratch)

            def products(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias, n: int = len(runs)) -> None:
                for _ in range(n):
                    F.linear(x, weight, bias)

            seconds = interleaved({"product": products, "step": step}, repeats, clock)
            yield {
                "what": "topk",
                "varied": varied,
                "d_in": d_in,
                **at,
                "seconds": statistics.median(seconds["step"]),
                "seconds_encoder_product": statistics.median(seconds["product"]),
                "ratio_to_encoder_product": ratio(seconds, "step", "product"),
                "tokens_per_second": at["batch"] / statistics.median(seconds["step"]),
            }


def stages(run: SAERun, x: Tensor, scratch: Scratch, steps: int = 2) -> dict[str, float]:
    """Median seconds of the parts of a step; what is no other part is `backward`, with the sums that tell whether all is finite."""
    found: dict[str, list[float]] = {}

    def timed(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def run_it(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = part(*args, **kwargs)
            found.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return run_it

    parts: dict[str, tuple[Any, str]] = {
        "forward": (run.method, "terms"),
        "AuxK": (run, "_auxiliary_loss"),
        "optimiser": (run.optimizer, "step"),
        "dead latents": (run, "_track_firing"),
        "averages": (run, "_average"),
        "metrics": (run, "_add_metrics"),
    }
    for name, (owner, method) in parts.items():
        setattr(owner, method, timed(name, getattr(owner, method)))
    step = timed("whole", stepper(run, x, scratch))
    for _ in range(steps):
        step()
    for owner, method in parts.values():
        delattr(owner, method)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    whole = medians.pop("whole")
    return {**medians, "backward": whole - sum(medians.values())}


def operations(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of one step by kind of operation, as torch's profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    kinds = {f"aten::{name}": kind for kind, names in OPERATIONS.items() for name in names}
    found = dict.fromkeys([*OPERATIONS, "entry by entry and the rest"], 0.0)
    for event in record.key_averages():
        found[kinds.get(event.key, "entry by entry and the rest")] += event.self_cpu_time_total / 1e6
    return found


def make_run(what: str, x: Tensor, d_sae: int, k: int = K) -> SAERun:
    """A run in the state that its name says."""
    method = CASES[what]
    if isinstance(method, TopK):
        method = replace(method, k=k)
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
