"""Training as a whole, text to SAEs, against the least that it could take: the language model alone, and the encoders' products.

    python tests/bench/bench_end_to_end.py [--json out.json] [--steps 6]

A GPT-2-sized model with random weights, two sites, two TopK SAEs of 24,576 latents at each, by the real trainer: windows
through the model, shuffled, centred, trained on, metrics. The limit is what the same windows take through the Hugging Face
model without its head, and as many bare encoder products (`F.linear`) as there are steps of SAEs; all in one process, the
parts of the limit before and after the training, of which the mean counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_splice import gpt2_sized

from saehook.config import TopK, TrainConfig
from saehook.harvest import Shuffled, activations_of
from saehook.trainer import Trainer

SITES = ("layers.5.resid_post", "layers.11.resid_post")
SAES_AT_EACH, D_SAE, K, BATCH, WINDOW = 2, 24576, 32, 4096, 512


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(steps: int) -> dict[str, Any]:
    """All numbers, in seconds for the same tokens."""
    model = gpt2_sized()
    n_tokens = steps * BATCH
    ids = torch.randint(1000, 2000, (n_tokens // WINDOW, WINDOW), generator=torch.Generator().manual_seed(0))
    width = model.lm.config.hidden_size
    x, weight, bias = torch.randn(BATCH, width), torch.randn(D_SAE, width), torch.zeros(D_SAE)
    saes = len(SITES) * SAES_AT_EACH

    @torch.no_grad()
    def language_model() -> None:
        for some in ids.split(BATCH // WINDOW):
            model.lm.transformer(input_ids=some, use_cache=False)

    def products() -> None:
        for _ in range(steps * saes):
            F.linear(x, weight, bias)

    def training() -> None:
        configs = [
            TrainConfig(site=site, activation=TopK(k=K), d_sae=D_SAE, tokens=n_tokens, batch_tokens=BATCH, seed=seed)
            for site in SITES
            for seed in range(SAES_AT_EACH)
        ]
        batches = Shuffled(
            activations_of(model, list(SITES), iter(ids)), buffer_tokens=2 * BATCH, batch_tokens=BATCH, seed=0
        )
        trainer = Trainer(configs, batches, d_in=width, progress=False)
        trainer.fit()
        assert trainer.steps == steps

    language_model()  # a first round that does not count
    products()
    lm, product = [seconds(language_model)], [seconds(products)]
    whole = seconds(training)
    lm.append(seconds(language_model))
    product.append(seconds(products))
    limit = (sum(lm) + sum(product)) / 2
    return {
        "what": "GPT-2 size, 2 sites, 2 SAEs at each",
        "d_in": width,
        "d_sae": D_SAE,
        "k": K,
        "batch": BATCH,
        "tokens": n_tokens,
        "seconds": whole,
        "seconds_language_model": lm,
        "seconds_encoder_products": product,
        "share_of_the_limit": limit / whole,
        "tokens_per_second": n_tokens / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
    text = json.dumps(measure(arguments.steps) | versions, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
