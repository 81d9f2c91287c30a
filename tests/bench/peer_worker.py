"""One peer, taking optimiser steps with its own code when it is told to; started by `peers.py` in the peer's environment.

    python peer_worker.py NAME START.pt     then on stdin `step 0`, `step 1`, ...; on stdout one line of JSON for each

START.pt holds the weights to begin with (W_enc, b_enc, W_dec, b_dec), batches [n, tokens, d_in], k, lr and the number of
threads. `bench_gpu_step.py` takes the same steps in its own process, with a `device`, and `autocast` to bfloat16, which these
peers' own trainers have. What a peer adds to the mathematics of TopK with Adam and unit decoder rows is switched off; what it
leaves out is left out of ours (`peers.py`). No import of saehook: it is not installed there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MARK = "peer:"
"""Begins the lines that are meant for us; peers print lines of their own."""
Step = Callable[[Tensor, int], float]
"""Takes a batch and the number of the step, and returns the mean squared error of a token before it, [n, d_in] summed over d_in."""


def sparsify(start: dict[str, Any]) -> Step:
    """Normalises the decoder before each step; its loss is the FVU of the batch; no clipping."""
    from sparsify.config import SparseCoderConfig  # pyright: ignore[reportMissingImports]
    from sparsify.sparse_coder import SparseCoder  # pyright: ignore[reportMissingImports]

    d_in, d_sae = start["W_enc"].shape
    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=start["k"])).to(start.get("device", "cpu"))
    fill(sae.encoder.weight, start["W_enc"].T)
    fill(sae.encoder.bias, start["b_enc"])
    fill(sae.W_dec, start["W_dec"])
    fill(sae.b_dec, start["b_dec"])
    adam = torch.optim.Adam(sae.parameters(), lr=start["lr"])

    def step(x: Tensor, number: int) -> float:
        sae.set_decoder_norm_to_unit_norm()
        with autocast(start):
            out = sae(x)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        return float(out.fvu) * float((x - x.mean(0)).square().sum(-1).mean())

    return step


def dictionary_learning(start: dict[str, Any]) -> Step:
    """Clips at norm 1, and normalises the decoder after each step. From step 1 on, since step 0 would choose b_dec."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]

    d_in, d_sae = start["W_enc"].shape
    trainer = TopKTrainer(
        steps=10**9,
        activation_dim=d_in,
        dict_size=d_sae,
        k=start["k"],
        layer=0,
        lm_name="none",
        lr=start["lr"],
        warmup_steps=0,
        threshold_start_step=10**9,
        device=start.get("device", "cpu"),
    )
    fill(trainer.ae.encoder.weight, start["W_enc"].T)
    fill(trainer.ae.encoder.bias, start["b_enc"])
    fill(trainer.ae.decoder.weight, start["W_dec"].T)
    fill(trainer.ae.b_dec, start["b_dec"])

    def step(x: Tensor, number: int) -> float:
        with autocast(start):
            return trainer.update(number + 1, x)

    return step


def saelens(start: dict[str, Any]) -> Step:
    """Leaves the norms of decoder rows alone; clips at norm 1, as its trainer does."""
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]

    d_in, d_sae = start["W_enc"].shape
    config = TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=start["k"], rescale_acts_by_decoder_norm=False)
    sae = TopKTrainingSAE(config)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        fill(getattr(sae, name), start[name])
    adam = torch.optim.Adam(sae.parameters(), lr=start["lr"])
    dead = torch.zeros(d_sae, dtype=torch.bool)

    def step(x: Tensor, number: int) -> float:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=number, is_logging_step=False
        )
        out = sae.training_forward_pass(given)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return float(out.losses["mse_loss"])

    return step


PEERS: dict[str, Callable[[dict[str, Any]], Step]] = {
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "saelens": saelens,
}


def autocast(start: dict[str, Any]) -> torch.autocast:
    """bfloat16 products, where `start` asks for them."""
    device = torch.device(start.get("device", "cpu"))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=start.get("autocast", False))


def fill(parameter: Tensor, value: Tensor) -> None:
    """The values, in the memory that the peer chose for them."""
    with torch.no_grad():
        parameter.copy_(value)


def main() -> None:
    name, path = sys.argv[1:]
    start = torch.load(path, weights_only=True)
    torch.set_num_threads(start["threads"])
    step = PEERS[name](start)
    print(MARK, "{}", flush=True)
    for number, line in enumerate(sys.stdin):
        x = start["batches"][int(line.split()[1])]
        begin = time.perf_counter()
        error = step(x, number)
        print(MARK, json.dumps({"seconds": time.perf_counter() - begin, "error": error}), flush=True)


if __name__ == "__main__":
    main()
