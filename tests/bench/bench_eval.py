"""What a splice-in evaluation costs in forward passes of the model, what memory it takes at a large vocabulary, and how long
the table of the bundled SAEs takes.

    python tests/bench/bench_eval.py [--json out.json] [--repeats 3] [--tokens 1024] [--table 100k]

Speed: a GPT-2-sized model with random weights and one SAE at each of four sites at or beyond 60 % of its depth. An
evaluation, the SAEs' own time taken off, against as many whole forward passes with all logits as it has variants, interleaved
in one run; the ratio is the median of the paired ratios. Aim: at most 0.6.
Memory: one layer of width 64 with 262,144 tokens in its vocabulary; the most that the process holds during an evaluation,
above what it held before, read from the kernel. Aim: under 2 GB.
Table: `saehook eval` on the bundled model and SAEs as a user starts it. Aim: 100,000 tokens in under 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import saehook
from saehook import SAE, HookedModel, SAEConfig, TopK, evaluate, evaluation

SITES = ("layers.7.resid_post", "layers.8.mlp_out", "layers.9.resid_post", "layers.10.resid_post")
WINDOW = 256
VOCABULARY = 2**18


def gpt2(**changes: Any) -> HookedModel:
    """GPT-2 small's shape unless changed, random weights; the bundled tokenizer, since only ids are given to it."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(**changes)).eval()
    return HookedModel.from_pretrained(lm, AutoTokenizer.from_pretrained(saehook.bundled("lm")))


def sae(width: int) -> SAE:
    return SAE(SAEConfig(d_in=width, d_sae=8 * width, activation=TopK(k=32)))


class Timed:
    """Seconds spent in the SAEs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, module: SAE) -> SAE:
        forward = module.forward

        def timed(x: torch.Tensor) -> Any:
            start = time.perf_counter()
            out = forward(x)
            self.seconds += time.perf_counter() - start
            return out

        module.forward = timed  # pyright: ignore[reportAttributeAccessIssue]
        return module


@torch.no_grad()
def speed(repeats: int, tokens: int) -> dict[str, Any]:
    """Variants in units of whole forward passes. Three batches less one are two batches without what is done once."""
    evaluation.BATCH_TOKENS = tokens
    model, saes = gpt2(), Timed()
    hooked = model.attach({site: saes.around(sae(768)) for site in SITES})
    ids = torch.randint(3, model.tokenizer.vocab_size, (3 * tokens // WINDOW, WINDOW))
    batch = ids[: len(ids) // 3]

    def seconds(windows: torch.Tensor) -> float:
        saes.seconds, start = 0.0, time.perf_counter()
        evaluate(hooked, windows, progress=False)
        return time.perf_counter() - start - saes.seconds

    def whole() -> float:
        start = time.perf_counter()
        model.lm(batch, use_cache=False)
        return time.perf_counter() - start

    n = 3 * (len(SITES) + 1) + 1  # spliced, zero, mean at each site and at all of them; and the clean run
    whole()
    pairs = []
    for _ in range(repeats):
        clean = [whole()]
        both = seconds(ids) - seconds(batch)
        clean.append(whole())
        pairs.append(both / 2 / (n * statistics.mean(clean)))
    return {"sites": SITES, "variants": n, "tokens": tokens, "ratio_to_forward_passes": statistics.median(pairs)}


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory() -> dict[str, Any]:
    """To be run in a process of its own: the peak is that of its whole life."""
    model = gpt2(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4)
    hooked = model.attach({"layers.0.resid_post": sae(64)})
    ids = torch.randint(3, model.tokenizer.vocab_size, (16, WINDOW))
    before = peak()
    evaluate(hooked, ids, progress=False)
    return {"vocabulary": VOCABULARY, "tokens": ids.numel(), "gigabytes_above_the_model": (peak() - before) / 1e9}


def table(tokens: str) -> dict[str, Any]:
    """Seconds from the command to its table, start-up included."""
    command = [sys.executable, "-m", "saehook", "eval", "--tokens", tokens]
    start = time.perf_counter()
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "command": " ".join(["saehook", *command[3:]]),
        "seconds": time.perf_counter() - start,
        "table": out.splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--table", default="100k", help="tokens of the table (default: 100k)")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(memory()))
        return
    own = subprocess.run([sys.executable, __file__, "--memory"], check=True, capture_output=True, text=True)
    results = {
        "splice-in variants, GPT-2 size": speed(arguments.repeats, arguments.tokens),
        "memory of an evaluation": json.loads(own.stdout),
        "table of the bundled SAEs": table(arguments.table),
        "machine": {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    text = json.dumps(results, indent=1, ensure_ascii=False)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
