"""What a training step costs on an accelerator, against the least that it can cost (`step_limits.py`) and against peers.

    python tests/bench/bench_gpu_step.py [--json out.json] [--only gpt2 ...] [--repeats 30] [--parts] [--profile FOLDER]
        [--graph] [--peers] [--end-to-end] [--flops 790e12] [--bandwidth 4.3e12] [--tiny]

First the kernels are checked: their results on random numbers must be those of `kernels/reference.py`, and their selection that
of `torch.topk`, else nothing is timed. A step is `SAERun.step`, the whole of it, with metrics and dead latents, on inputs that
are new each time; it is timed between device events, without waiting in between, as the trainer runs, and the median counts.
Versions: `triton` (the default there) and `sparse` (plain torch). `product` is the encoder's product alone.

`--parts` times the parts of the step by themselves, `--profile` writes a table of kernels for each setting, `--graph` replays a
step as a CUDA graph, which shows what the host's launches cost. On a machine that is lent for minutes, everything in one go:

    PYTHONPATH=. python tests/bench/bench_gpu_step.py --json $OUT/step.json --parts --graph --profile $OUT --peers --end-to-end

`--peers` steps sparsify and dictionary_learning where they are installed in this environment; `--end-to-end` adds
`gpu_end_to_end.py`. `--tiny` is a rehearsal in small sizes, also without an accelerator. Needs torch and Triton, beside this
repository on PYTHONPATH; `--end-to-end` needs transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peer_worker import PEERS
from step_limits import SETTINGS, Machine, Setting, limits
from torch import Tensor

from saehook import kernels
from saehook.batches import InputFacts
from saehook.config import TopK, TrainConfig
from saehook.kernels import Scratch, reference
from saehook.kernels.triton import block_topk, sparse
from saehook.kernels.triton.adam import adam_rows_, remove_parallel_
from saehook.kernels.triton.latent_sums import latent_sums
from saehook.kernels.triton.token_sums import token_sums
from saehook.sae_run import SAERun

SITE = "layers.0.resid_post"
WARM_UP = 5
TINY = Setting(12, 32, 1, 4)
CHECKED = Setting(768, 8192, 32, 1024)
TOLERANCE = 1e-2
"""How far a result may be from the reference's, as a share of its norm: rows are read as bfloat16, which has 8 bits."""
VERSIONS = ("triton", "sparse")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--flops", type=float, default=Machine.flops)
    parser.add_argument("--bandwidth", type=float, default=Machine.bandwidth)
    parser.add_argument("--anyway", action="store_true", help="also where results are not those of the reference")
    parser.add_argument("--tiny", action="store_true")
    a = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not a.tiny:
        parser.error("there is no accelerator; without one only --tiny runs, with TRITON_INTERPRET=1")
    machine = replace(Machine(), flops=a.flops, bandwidth=a.bandwidth)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = {"device": name, "torch": torch.__version__, "triton": version_of("triton"), "machine": asdict(machine)}
    say(about)
    entries: list[dict[str, Any]] = []

    def add(entry: dict[str, Any]) -> None:
        entries.append(entry)
        say(entry)
        if a.json:  # at once: the time on such machines is short
            a.json.write_text(json.dumps([e | about for e in entries], indent=1) + "\n")

    checked = check(TINY if a.tiny else CHECKED, device)
    add({"what": "check", **checked})
    if not checked["agrees"] and not a.anyway:
        parser.error("the results are not those of the reference; --anyway times them all the same")
    settings = {"tiny": TINY} if a.tiny else {name: SETTINGS[name] for name in a.only}
    for name, setting in settings.items():
        limit = limits(setting, machine)
        for entry in measure(setting, device, a):
            add({"setting": name, **asdict(setting), **entry, "limit": limit["total"]} | over(entry, limit["total"]))
        if a.parts:
            for entry in parts(setting, device, a.repeats):
                counted = limit[entry["what"]]
                add({"setting": name, **asdict(setting), **entry, "limit": counted} | over(entry, counted))
    if a.end_to_end:
        import gpu_end_to_end

        for entry in gpu_end_to_end.measure(device, machine, tiny=a.tiny):
            add(entry)
    return entries


def say(line: dict[str, Any]) -> None:
    print(json.dumps({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def over(entry: dict[str, Any], limit: float) -> dict[str, float]:
    return {"times_limit": entry["seconds"] / limit} if "seconds" in entry else {}


def version_of(package: str) -> str | None:
    return __import__(package).__version__ if importlib.util.find_spec(package) else None


# --- are they right? -------------------------------------------------------------------------------------------------


def check(s: Setting, device: torch.device) -> dict[str, Any]:
    """Differences from the reference, as shares of the norms, and whether all are small enough.

    Raises:
        AssertionError: the selection is another.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, b_enc, b_dec = random(s.batch, s.d_in), random(s.d_sae) * 0.1, random(s.d_in) * 0.1
    x[: s.batch // 2, 0] += 30.0  # and one latent that fires on half of the tokens
    W_dec = F.normalize(random(s.d_sae, s.d_in), dim=-1)
    W_dec[5] = F.normalize(x[0] - x[-1], dim=0)
    weights = [W_dec.T.clone(), b_enc, W_dec, b_dec]
    weights = [w.requires_grad_() for w in weights]
    found = []
    for version in (reference, sparse):
        pre, selection = version.encode(x, weights[0], b_enc, b_dec, lambda pre: chosen(pre, s.k))
        x_hat = version.decode(pre.relu(), W_dec, selection) + b_dec
        loss = (x_hat - x).square().sum(-1).mean()
        found.append([x_hat, *torch.autograd.grad(loss, weights)])
    names = ("x_hat", "d_W_enc", "d_b_enc", "d_W_dec", "d_b_dec")
    errors = {
        name: float(((got - expected).norm() / expected.norm()).detach())
        for name, expected, got in zip(names, *found, strict=True)
    }
    return {**errors, "agrees": all(error <= TOLERANCE for error in errors.values())}


def chosen(pre: Tensor, k: int) -> kernels.Selection:
    """The k largest, by the kernel, which are those of torch."""
    assert block_topk.applies(pre, k)
    latents = block_topk.block_topk(pre, k)
    assert torch.equal(pre.gather(1, latents).sort(1, descending=True).values, pre.topk(k).values)
    tokens = torch.arange(len(pre), device=pre.device).repeat_interleave(k)
    return kernels.Selection(tokens, latents.view(-1), *pre.shape, order="token")


# --- whole steps -----------------------------------------------------------------------------------------------------


def measure(s: Setting, device: torch.device, a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The encoder's product, the versions of ours, and peers."""
    weight = torch.randn(s.d_sae, s.d_in, device=device, dtype=torch.bfloat16)
    bias = torch.zeros(s.d_sae, device=device, dtype=torch.bfloat16)
    fresh = inputs(s, device)
    yield {"what": "product", **timed(lambda x: F.linear(x, weight, bias), lambda: fresh().bfloat16(), a.repeats)}
    for version in VERSIONS:
        with forced(version):
            run, scratch = make_run(s, fresh()), Scratch()
            yield {"what": version, **timed(lambda x, r=run, m=scratch: r.step({SITE: x}, m), fresh, a.repeats)}
            if device.type == "cuda":
                yield {"what": f"{version}, memory", "peak_bytes": torch.cuda.max_memory_allocated()}
            run.read_metrics()  # raises where something was not finite
            if a.profile and version == "triton":
                a.profile.mkdir(parents=True, exist_ok=True)
                file = a.profile / f"kernels-{s.d_in}-{s.d_sae}-{s.batch}.txt"
                file.write_text(profiled(lambda r=run, m=scratch: r.step({SITE: fresh()}, m), device))
            if a.graph and version == "triton" and device.type == "cuda":
                yield {"what": "triton, graph", **graphed(run, scratch, fresh, a.repeats)}
        del run, scratch
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if a.peers:
        for name in ("sparsify", "dictionary_learning"):
            if importlib.util.find_spec(name) is None:
                yield {"what": name, "missing": True}
                continue
            for autocast in (True, False):
                what = name if autocast else f"{name}, float32"
                try:
                    found = timed(peer(name, s, fresh(), autocast), fresh, max(3, a.repeats // 3))
                except torch.cuda.OutOfMemoryError:
                    found = {"failed": "out of memory"}
                yield {"what": what, **found}


def inputs(s: Setting, device: torch.device) -> Callable[[], Tensor]:
    """New tokens at each call."""
    generator = torch.Generator(device).manual_seed(1)
    return lambda: torch.randn(s.batch, s.d_in, generator=generator, device=device)


@contextlib.contextmanager
def forced(version: str) -> Iterator[None]:
    """That version of the kernels."""
    before = os.environ.get("SAEHOOK_KERNELS")
    os.environ["SAEHOOK_KERNELS"] = version
    try:
        yield
    finally:
        del os.environ["SAEHOOK_KERNELS"]
        if before is not None:
            os.environ["SAEHOOK_KERNELS"] = before


def make_run(s: Setting, x: Tensor) -> SAERun:
    """A TopK SAE as the trainer would begin it."""
    config = TrainConfig(site=SITE, activation=TopK(k=s.k), d_sae=s.d_sae, tokens=10**9, batch_tokens=s.batch)
    return SAERun(config, "topk", InputFacts.measure(x[:1024], SITE))


def timed(step: Callable[[Tensor], object], fresh: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    """Median seconds of `step` on new inputs, which are made outside of what is timed; and the quartiles."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    spans: list[tuple[Any, Any]] = []
    warm_up = min(WARM_UP, repeats)
    for _ in range(warm_up + repeats):
        x = fresh()
        begin = now()
        step(x)
        spans.append((begin, now()))
    if cuda:
        torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in spans[warm_up:]]
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {"seconds": statistics.median(seconds), "quartiles": [quartiles[0], quartiles[2]], "repeats": len(seconds)}


def profiled(step: Callable[[], None], device: torch.device, steps: int = 5) -> str:
    """A table of what runs in some steps."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=60)


def graphed(run: SAERun, scratch: Scratch, fresh: Callable[[], Tensor], repeats: int) -> dict[str, Any]:
    """A step recorded as a CUDA graph and replayed: without the host's part. The learning rate stays what it was."""
    for group in run.optimizer.adam.param_groups:
        group["capturable"] = True
    held = fresh()
    run.steps = 1  # the list of dead latents is not renewed in this step
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run.step({SITE: held}, scratch)
        torch.cuda.current_stream().wait_stream(stream)
        run.steps = 1
        with torch.cuda.graph(graph):
            run.step({SITE: held}, scratch)
    except RuntimeError as error:
        return {"failed": str(error).splitlines()[0]}

    def replay(x: Tensor) -> None:
        held.copy_(x)
        graph.replay()

    return timed(replay, fresh, repeats)


def peer(name: str, s: Setting, x: Tensor, autocast: bool) -> Callable[[Tensor], float]:
    """A step of a peer's trainer in this process, from the weights that ours begins with."""
    sae = make_run(s, x).sae
    start: dict[str, Any] = {n: getattr(sae, n).detach() for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
    step = PEERS[name](start | {"k": s.k, "lr": 1e-4, "device": str(x.device), "autocast": autocast})
    numbers = iter(range(10**9))
    return lambda batch: step(batch, next(numbers))


# --- parts -----------------------------------------------------------------------------------------------------------


def parts(s: Setting, device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Each part of a step by itself, named as in `step_limits.limits`."""
    narrow = torch.bfloat16 if device.type == "cuda" else torch.float32
    fresh = inputs(s, device)
    weights = F.normalize(torch.randn(s.d_sae, s.d_in, device=device), dim=-1)
    rows, x = weights.to(narrow), fresh().to(narrow)
    bias = torch.zeros(s.d_sae, device=device, dtype=narrow)
    pre = F.linear(x, rows, bias)
    selection = kernels.Selection(*pairs(pre, s.k), *pre.shape, order="token")
    values, out = selection.values(pre).float().relu(), torch.empty_like(weights)
    yield {"what": "encoder's product", **timed(lambda x: F.linear(x, rows, bias), lambda: fresh().to(narrow), repeats)}
    yield {"what": "selection", **timed(lambda _: block_topk.block_topk(pre, s.k), fresh, repeats)}
    yield {"what": "decoding", **timed(lambda _: token_sums(values, rows, selection), fresh, repeats)}

    def gradients(grad: Tensor) -> None:
        fired = kernels.Selection(selection.tokens, selection.latents, *pre.shape, order="token")  # sorts anew
        dots = latent_sums(values, grad, fired, out, against=rows).dots
        assert dots is not None
        latent_sums(dots, x, fired, out)

    yield {"what": "gradients", **timed(gradients, lambda: fresh().to(narrow), repeats)}
    parameters = [torch.nn.Parameter(weights.clone()) for _ in range(2)]
    adam = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    taken = torch.ones((), dtype=torch.bool, device=device)

    def optimise(_: Tensor) -> None:
        for parameter in parameters:
            parameter.grad = out
        remove_parallel_(out, parameters[0].detach())
        adam_rows_(adam, taken, torch.nn.utils.get_total_norm([out, out]).clamp(max=1), unit=parameters[0])

    yield {"what": "optimiser", **timed(optimise, fresh, repeats)}


def pairs(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(len(pre), device=pre.device)[:, None].expand(-1, k).reshape(-1)
    return tokens, block_topk.block_topk(pre, k).view(-1)


if __name__ == "__main__":
    main()
