"""What runs with an SAE of a million latents hold in memory, as the kernel counts it; run by test_sparse_acts.py.

Writes the growth of the process's peak in MiB for each run, and fails where one is too large.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from builders import byte_tokenizer, random_ids
from transformers import AutoConfig, AutoModelForCausalLM

from saehook import SAE, HookedModel, SAEConfig, TopK, ablate, clamp, load_sae, save_sae, steer

SITE, D_IN, D_SAE, K, TOKENS = "layers.0.resid_post", 16, 2**20, 64, 128
DENSE = TOKENS * D_SAE * 4 / 2**20
"""MiB of all activations as one float32 tensor."""
WEIGHTS = 2 * D_IN * D_SAE * 4 / 2**20


def status(name: str) -> float:
    """A number of this process, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def growth(run: Callable[[], object]) -> float:
    """How far the peak of resident memory during `run` is above what is resident before, MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def check(what: str, run: Callable[[], object], most: float) -> None:
    grown = growth(run)
    sys.stdout.write(f"{what}: {grown:.0f} MiB, at most {most:.0f}\n")
    assert grown < most, f"{what} grew the process by {grown:.0f} MiB, and {most:.0f} are expected at most"


def main() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=D_IN, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2 * TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = HookedModel(AutoModelForCausalLM.from_config(config).eval(), byte_tokenizer())
    model.lm.generation_config.eos_token_id = None
    ids = random_ids(TOKENS - 1, bos=True)
    with tempfile.TemporaryDirectory() as folder:
        save_sae(SAE(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=TopK(k=K)), site=SITE), folder)
        model.generate(ids, max_new_tokens=4)  # what any first run loads

        def steer_from_the_file() -> None:
            model.attach(load_sae(folder, mapped=True)).generate(ids, steer(12345, 2.0), max_new_tokens=4)

        check("steering from the file", steer_from_the_file, WEIGHTS / 4)
        hooked = model.attach(load_sae(folder))
        most, found = DENSE / 4, []
        check("latents", lambda: found.append(hooked.latents(ids)), most)
        strongest = found[0].top(2)
        assert len(strongest) == 2
        edits = [clamp(strongest[0].latent, 1.0), ablate(strongest[1].latent)]
        check("edits", lambda: hooked.generate(ids, edits, max_new_tokens=4), most)
        check("splice", lambda: hooked.generate(ids, edits, splice=True, max_new_tokens=4), most)
        with torch.no_grad():
            dense = growth(lambda: hooked.saes[SITE].encode(torch.randn(TOKENS // 2, D_IN)))
        assert dense > DENSE / 2, "a dense tensor would be seen"


if __name__ == "__main__":
    main()
