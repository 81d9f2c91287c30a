"""Records saebench.json: what SAEBench's core evaluation (`sae_bench.evals.core.main.run_evals`, 0.6.0) says of our SAE behind
our adapter, on the case of `saelens_eval_case.py`, and whether the adapter passes its checks.

In an environment of its own: `pip install torch==2.13.0 sae-bench==0.6.0 safetensors`, then
`PYTHONPATH=.:tests:tests/parity python tests/parity/record_saebench.py tests/parity/saebench.json`. Nothing of that package is in
this repository but numbers that it computed. Its command loads a model and a data set from a hub; here both come from formulas.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from builders import tiny_sae
from record_saelens_eval import HOOK, Model, Store
from sae_bench.custom_saes.base_sae import BaseSAE  # pyright: ignore[reportMissingImports]
from sae_bench.evals.core.eval_config import CoreEvalConfig  # pyright: ignore[reportMissingImports]
from sae_bench.evals.core.main import run_evals  # pyright: ignore[reportMissingImports]
from saelens_eval_case import D_SAE, LAYER, WIDTH, ids, sae_weights

from saehook.adapters.saebench import as_saebench
from saehook.config import ReLU, SAEConfig
from saehook.sae import SAE


class Batches(Store):
    """What the evaluation asks of an activation store."""

    context_size = ids().shape[1]
    store_batch_size_prompts = 2

    def reset_input_dataset(self) -> None:
        self.batches = iter(ids().split(2))


def checked(activation: str) -> str:
    """What `BaseSAE.test_sae` asks for, without the download of a language model; the architecture that SAEBench notes."""
    sae = tiny_sae(WIDTH, activation=activation, site="layers.2.resid_post")
    theirs = as_saebench(sae, model_name="pythia-70m-deduped")
    assert isinstance(theirs, BaseSAE)
    assert theirs.check_decoder_norms()
    assert theirs.W_dec.shape == (theirs.cfg.d_sae, theirs.cfg.d_in)
    assert theirs.W_enc.shape == (theirs.cfg.d_in, theirs.cfg.d_sae)
    assert (theirs.cfg.hook_name, theirs.cfg.hook_layer) == ("blocks.2.hook_resid_post", 2)
    x = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(theirs(x), theirs.decode(theirs.encode(x)))
    torch.testing.assert_close(theirs(x), sae(x).x_hat, atol=1e-5, rtol=1e-4)
    half = theirs.to(dtype=torch.bfloat16)
    assert half.encode(x.bfloat16()).dtype == half.dtype == half.W_enc.dtype == torch.bfloat16
    assert half.check_decoder_norms()
    return theirs.cfg.architecture


def measured() -> dict[str, Any]:
    """All its numbers, flat."""
    sae = SAE(SAEConfig(d_in=WIDTH, d_sae=D_SAE, activation=ReLU()))
    sae.load_state_dict(sae_weights())
    theirs = as_saebench(sae, model_name="tiny", hook_name=HOOK, hook_layer=LAYER)
    switches = (
        "kl ce_loss l2_norms sparsity_metrics variance_metrics featurewise_density_statistics "
        "featurewise_weight_based_metrics"
    )
    config = CoreEvalConfig(
        model_name="tiny",
        batch_size_prompts=2,
        n_eval_reconstruction_batches=3,
        n_eval_sparsity_variance_batches=3,
        context_size=Batches.context_size,
        **{f"compute_{name}": True for name in switches.split()},
    )
    with torch.no_grad():
        groups, latents = run_evals(theirs, Batches(), Model(), config)
    flat = {name: value for group in groups.values() for name, value in group.items()}
    return flat | {"checked": {name: checked(name) for name in ("relu", "batchtopk", "jumprelu")}, "latents": latents}


if __name__ == "__main__":
    found = measured() | {"version": importlib.metadata.version("sae-bench")}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
