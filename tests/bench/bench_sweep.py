"""Sixteen texts in one batch, fifteen strengths and the unedited one, against one generation after another.

    python tests/bench/bench_sweep.py [--json out.json] [--repeats 5]

A GPT-2-sized model with random weights and the bundled model, greedy, once with edits of generated tokens only (the whole
prompt is shared) and once of every token. `texts` is the batch alone against 16 calls of `generate`; `sweep` is the whole
sweep, with its unedited row, KL and loss, against 16 calls of `generate` and the unedited model's pass over each text.
All variants are interleaved in one run and in random order, ratios are medians of the paired ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch
from bench_splice import gpt2_sized, interleaved, ratio, saes

import saehook
from saehook import HookedModel, generation, steer
from saehook.dose_response import run_rows
from saehook.where import Where

STRENGTHS = [float(value) for value in range(1, 16)]
LATENT = 7


def bench(model: HookedModel, layer: int, n_prompt: int, n_new: int, where: Where | None, repeats: int) -> dict:
    site = f"layers.{layer}.resid_post"
    hooked = model.attach({site: saes(model, {site: layer})[site]})
    ids = [10 + i % 200 for i in range(n_prompt)]
    options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
    edits = [steer(LATENT, value, where=where) for value in STRENGTHS]
    programs = [*edits, ()]

    def texts() -> list[list[int]]:
        rows = run_rows(hooked, hooked._batch(ids), edits, None, dict(options))
        return [row.new_ids.tolist() for row in rows.generations]

    def loop() -> list[list[int]]:
        return [hooked.generate(ids, edits=edit, **options).new_ids.tolist() for edit in programs]

    @torch.no_grad()
    def loop_measured() -> list[torch.Tensor]:
        found = [hooked.generate(ids, edits=edit, **options).ids for edit in programs]
        return [model(row, use_cache=False).logits[:, -1] for row in found]

    same = sum(a == b for a, b in zip(texts(), loop(), strict=True))
    assert same == len(programs), f"only {same} rows have the tokens of their single runs"
    seconds = interleaved(
        {
            "texts": texts,
            "loop": loop,
            "sweep": lambda: hooked.sweep(ids, LATENT, STRENGTHS, where=where, **options),
            "loop_measured": loop_measured,
        },
        repeats,
    )
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "texts_faster_than_loop": 1 / ratio(seconds, "texts", "loop"),
        "sweep_faster_than_loop_measured": 1 / ratio(seconds, "sweep", "loop_measured"),
        "sweep_faster_than_loop": 1 / ratio(seconds, "sweep", "loop"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    results: dict = {
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    }
    bundled = HookedModel.from_pretrained(saehook.bundled("lm"))
    for name, model, layer, n_prompt, n_new in (
        ("bundled model, prompt 64, 32 new", bundled, 3, 64, 32),
        ("GPT-2 size, prompt 64, 16 new", gpt2_sized(), 6, 64, 16),
    ):
        for said, where in (("generated tokens", generation()), ("every token", None)):
            found = bench(model, layer, n_prompt, n_new, where, arguments.repeats)
            results[f"{name}, {said}"] = found
            print(json.dumps({f"{name}, {said}": found}, indent=1), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
