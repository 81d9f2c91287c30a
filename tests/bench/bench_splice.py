"""What splicing and editing through nnsight cost, against the same mathematics in hand-written torch hooks.

    python tests/bench/bench_splice.py [--json out.json] [--repeats 9]

A GPT-2-sized model with random weights: loss with two SAEs spliced (batch 4 x 128), and greedy generation with one edit
(batch 1, 64 tokens); on the bundled model the added milliseconds per token. All variants are interleaved in one run and in
random order, ratios are medians of the paired ratios. Memory is what torch's allocator holds at most during one call, above
what it held before.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saehook
from saehook import SAE, HookedModel, SAEConfig, TopK, steer

SITES = {"layers.5.resid_post": 5, "layers.8.resid_post": 8}
STRENGTH = 4.0
LATENT = 7


def gpt2_sized() -> HookedModel:
    """GPT-2 small's shape, random weights; the bundled tokenizer, since only ids are given to it."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config()).eval()
    return HookedModel.from_pretrained(lm, AutoTokenizer.from_pretrained(saehook.bundled("lm")))


def saes(model: HookedModel, sites: dict[str, int]) -> dict[str, SAE]:
    width = model.lm.config.hidden_size
    return {site: SAE(SAEConfig(d_in=width, d_sae=8 * width, activation=TopK(k=32))) for site in sites}


def interleaved(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, one of each per round in random order."""
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name in random.sample(list(variants), len(variants)):
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def bench_loss(repeats: int) -> dict[str, float]:
    """Loss of spliced reconstructions."""
    model = gpt2_sized()
    attached = saes(model, SITES)
    hooked = model.attach(attached)
    ids = torch.randint(1, model.tokenizer.vocab_size, (4, 128))
    layers = model.lm.transformer.h

    def hook_of(sae: SAE) -> Callable:
        def hook(_module: object, _inputs: object, x: Tensor) -> Tensor:
            return sae.decode(sae.encode(x)).to(x.dtype)

        return hook

    @torch.no_grad()
    def by_hand() -> float:
        handles = [layers[i].register_forward_hook(hook_of(attached[site])) for site, i in SITES.items()]
        try:
            return float(model.lm(input_ids=ids, labels=ids, use_cache=False).loss)
        finally:
            for handle in handles:
                handle.remove()

    ours, theirs = hooked.loss(ids, splice=True), by_hand()
    assert abs(ours - theirs) < 1e-3, (ours, theirs)
    seconds = interleaved({"hooked": lambda: hooked.loss(ids, splice=True), "by_hand": by_hand}, repeats)
    return {
        "seconds": statistics.median(seconds["hooked"]),
        "seconds_by_hand": statistics.median(seconds["by_hand"]),
        "ratio": ratio(seconds, "hooked", "by_hand"),
        "peak_bytes": (ours := peak_bytes(lambda: hooked.loss(ids, splice=True))),
        "peak_bytes_ratio": ours / peak_bytes(by_hand),
    }


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held during `run()`, above those before it."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = peak = 0
    events: list[Any] = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def bench_generate(model: HookedModel, layer: int, tokens: int, repeats: int) -> dict[str, float]:
    """Greedy generation with one clamp-free edit: encode, scale one latent's contribution in."""
    site = f"layers.{layer}.resid_post"
    sae = saes(model, {site: layer})[site]
    hooked = model.attach({site: sae})
    ids = list(range(10, 26))
    module = model.lm.get_submodule(model.sites(site)[0].path)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    edit = saehook.clamp(LATENT, STRENGTH)

    def hook(_module: object, _inputs: object, x: Tensor) -> Tensor:
        acts = sae.encode(x)
        return x + (STRENGTH - acts[..., LATENT : LATENT + 1]) * sae.W_dec[LATENT]

    @torch.no_grad()
    def by_hand() -> Tensor:
        handle = module.register_forward_hook(hook)
        try:
            ones = torch.ones(1, len(ids), dtype=torch.long)
            return model.lm.generate(input_ids=torch.tensor([ids]), attention_mask=ones, pad_token_id=0, **options)
        finally:
            handle.remove()

    def clean() -> object:
        return model.generate(ids, pad_token_id=0, **options)

    def ours() -> Tensor:
        return hooked.generate(ids, edits=[edit], pad_token_id=0, **options).ids

    assert torch.equal(ours(), by_hand()[0]), "the two programs do not generate the same tokens"
    seconds = interleaved(
        {
            "hooked": ours,
            "by_hand": by_hand,
            "clean": clean,
            "idle": lambda: hooked.generate(ids, pad_token_id=0, **options),
            "steer": lambda: hooked.generate(ids, edits=[steer(LATENT, STRENGTH)], pad_token_id=0, **options),
        },
        repeats,
    )
    per_token = {name: 1000 * statistics.median(values) / tokens for name, values in seconds.items()}
    return {
        "ms_per_token": per_token["hooked"],
        "ms_per_token_by_hand": per_token["by_hand"],
        "ms_per_token_clean": per_token["clean"],
        "added_ms_per_token": per_token["hooked"] - per_token["by_hand"],
        "ratio": ratio(seconds, "hooked", "by_hand"),
        "ratio_idle_to_clean": ratio(seconds, "idle", "clean"),
        "ratio_steer_to_clean": ratio(seconds, "steer", "clean"),
    }


def bench_program(model: HookedModel, layers: tuple[int, int], tokens: int, repeats: int) -> dict[str, float]:
    """Greedy generation with three edits at two sites: one latent set and two halved at the first, one raised at the second."""
    sites = {f"layers.{layer}.resid_post": layer for layer in layers}
    first, second = sites
    attached = saes(model, sites)
    hooked = model.attach(attached)
    ids = list(range(10, 26))
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    edits = [
        saehook.clamp(LATENT, STRENGTH, site=first),
        saehook.scale([8, 9], 0.5, site=first),
        saehook.at_least(LATENT, STRENGTH, site=second),
    ]

    def at_first(_module: object, _inputs: object, x: Tensor) -> Tensor:
        sae = attached[first]
        z = sae.encode(x)
        change = torch.cat([STRENGTH - z[..., LATENT : LATENT + 1], -0.5 * z[..., 8:10]], -1)
        return x + change @ sae.W_dec[LATENT : LATENT + 3]

    def at_second(_module: object, _inputs: object, x: Tensor) -> Tensor:
        sae = attached[second]
        z = sae.encode(x)
        return x + (STRENGTH - z[..., LATENT : LATENT + 1]).clamp_min(0.0) * sae.W_dec[LATENT]

    @torch.no_grad()
    def by_hand() -> Tensor:
        modules = [model.lm.get_submodule(model.sites(site)[0].path) for site in sites]
        handles = [m.register_forward_hook(hook) for m, hook in zip(modules, (at_first, at_second), strict=True)]
        try:
            ones = torch.ones(1, len(ids), dtype=torch.long)
            return model.lm.generate(input_ids=torch.tensor([ids]), attention_mask=ones, pad_token_id=0, **options)
        finally:
            for handle in handles:
                handle.remove()

    def ours() -> Tensor:
        return hooked.generate(ids, edits=edits, pad_token_id=0, **options).ids

    assert torch.equal(ours(), by_hand()[0]), "the two programs do not generate the same tokens"
    seconds = interleaved({"hooked": ours, "by_hand": by_hand}, repeats)
    per_token = {name: 1000 * statistics.median(values) / tokens for name, values in seconds.items()}
    return {
        "ms_per_token": per_token["hooked"],
        "ms_per_token_by_hand": per_token["by_hand"],
        "added_ms_per_token": per_token["hooked"] - per_token["by_hand"],
        "ratio": ratio(seconds, "hooked", "by_hand"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    results = {
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "loss, GPT-2 size, 2 SAEs spliced, batch 4 x 128": bench_loss(arguments.repeats),
        "generate, GPT-2 size, 1 edit, batch 1, 64 tokens": bench_generate(gpt2_sized(), 6, 64, arguments.repeats),
        "generate, bundled model, 1 edit, batch 1, 64 tokens": bench_generate(
            HookedModel.from_pretrained(saehook.bundled("lm")), 3, 64, arguments.repeats
        ),
        "generate, GPT-2 size, 3 edits at 2 sites, batch 1, 64 tokens": bench_program(
            gpt2_sized(), (4, 8), 64, arguments.repeats
        ),
        "generate, bundled model, 3 edits at 2 sites, batch 1, 64 tokens": bench_program(
            HookedModel.from_pretrained(saehook.bundled("lm")), (2, 4), 64, arguments.repeats
        ),
    }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
