"""Language model and SAEs together: how many tokens a second, against the model alone and the counted limit of the SAEs.

Called by `bench_gpu_step.py --end-to-end`. A model of GPT-2's size with random weights, in bfloat16 on an accelerator, gives the
activations of two sites, after which it stops; two SAEs train on each. `harvest` is saehook's own path, through nnsight, where
that is installed; `hooks` takes the activations with plain hooks and shuffles nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from step_limits import SETTINGS, Machine, Setting, limits
from torch import Tensor

from saehook.batches import Batch, InputFacts, Stream
from saehook.config import TopK, TrainConfig
from saehook.kernels import Scratch
from saehook.sae_run import SAERun

SITES = {"layers.4.resid_post": 4, "layers.8.resid_post": 8}
SAES_PER_SITE = 2
WINDOW, TOKENS_PER_FORWARD = 128, 32768
STEPS, WARM_UP = 60, 10
TINY = Setting(32, 64, 2, 64)


class Stop(Exception):
    """The deepest site has been read."""


def measure(device: torch.device, machine: Machine, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rates in tokens a second: of the model alone, of training by each path, and what share of the limit that is."""
    s = TINY if tiny else SETTINGS["gpt2"]
    steps, warm_up = (3, 1) if tiny else (STEPS, WARM_UP)
    lm = make_lm(device, tiny)
    alone = rate(tokens_of(activations(lm, device)), s.batch, steps, warm_up, device)
    saes = len(SITES) * SAES_PER_SITE * limits(s, machine)["total"] / s.batch
    best = 1 / (1 / alone + saes)
    yield {"what": "model alone", "tokens_per_second": alone, "limit_with_saes": best}
    paths: dict[str, Callable[[], Iterator[Batch]]] = {"hooks": lambda: activations(lm, device)}
    if importlib.util.find_spec("nnsight") is not None:
        paths["harvest"] = lambda: harvested(lm, s.batch)
    for name, source in paths.items():
        got = rate(trained(source(), s, device), s.batch, steps, warm_up, device)
        yield {"what": f"training, {name}", "tokens_per_second": got, "share_of_limit": got / best}


def make_lm(device: torch.device, tiny: bool) -> Any:
    """GPT-2 small's shape, random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": TINY.d_in, "n_head": 2, "n_layer": 9, "vocab_size": 100} if tiny else {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm: Any = GPT2LMHeadModel(GPT2Config(**sizes))
    return lm.eval().to(device, dtype)


def windows(lm: Any) -> Iterator[Tensor]:
    """Random ids, [WINDOW], without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(5, lm.config.vocab_size - 5, (WINDOW,), generator=generator)


def activations(lm: Any, device: torch.device) -> Iterator[Batch]:
    """Of all tokens of a forward pass, by plain hooks."""
    found: dict[str, Tensor] = {}

    def hook(site: str, last: bool) -> Callable[..., None]:
        def keep(_module: object, _inputs: object, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            found[site] = x.reshape(-1, x.shape[-1])
            if last:
                raise Stop

        return keep

    for site, layer in SITES.items():
        lm.transformer.h[layer].register_forward_hook(hook(site, layer == max(SITES.values())))
    ids, rows = windows(lm), max(1, TOKENS_PER_FORWARD // WINDOW)
    try:
        while True:
            given = torch.stack([next(ids) for _ in range(rows)])
            given = given.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else given
            with torch.no_grad(), contextlib.suppress(Stop):
                lm.transformer(given, use_cache=False)
            yield dict(found)
    finally:
        for site in SITES.values():
            lm.transformer.h[site]._forward_hooks.clear()


def harvested(lm: Any, batch: int) -> Iterator[Batch]:
    """The same by saehook's own path: masked and shuffled."""
    from transformers import AutoTokenizer

    import saehook
    from saehook.harvest import Shuffled, activations_of

    model = saehook.HookedModel.from_pretrained(lm, AutoTokenizer.from_pretrained(saehook.bundled("lm")))
    chunks = activations_of(model, list(SITES), windows(lm))
    return Shuffled(chunks, buffer_tokens=8 * max(batch, TOKENS_PER_FORWARD), batch_tokens=batch, seed=0)


def tokens_of(source: Iterator[Batch]) -> Iterator[int]:
    """How many tokens each pass gave."""
    for batch in source:
        yield len(next(iter(batch.values())))


def trained(source: Iterator[Batch], s: Setting, device: torch.device) -> Iterator[int]:
    """A step of all SAEs for each batch, as the trainer takes them."""
    stream = Stream(source, dict.fromkeys(SITES, s.d_in), device)
    facts = {site: InputFacts.measure(x, site) for site, x in stream.peek(min(4096, s.batch)).items()}
    runs = [
        SAERun(
            TrainConfig(
                site=site, activation=TopK(k=s.k), d_sae=s.d_sae, tokens=10**9, batch_tokens=s.batch, seed=seed
            ),
            f"{site} {seed}",
            facts[site],
        )
        for site in SITES
        for seed in range(SAES_PER_SITE)
    ]
    scratch = Scratch()
    while stream.available(s.batch) == s.batch:
        batch = stream.take(s.batch)
        for run in runs:
            run.step(batch, scratch)
        yield s.batch


def rate(source: Iterator[int], batch: int, steps: int, warm_up: int, device: torch.device) -> float:
    """Tokens a second, after `warm_up` steps of `batch` tokens, over as many as `steps` have."""

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    done = 0
    while done < warm_up * batch:
        done += next(source)
    begin, counted = wait(), 0
    while counted < steps * batch:
        counted += next(source)
    return counted / (wait() - begin)
