"""Records saelens_eval.json: what the functions of `sae_lens.evals` (6.54.12) give for the case.

In an environment of its own: `pip install torch==2.13.0 sae-lens==6.54.12`, then
`PYTHONPATH=tests/parity python tests/parity/record_saelens_eval.py`. Nothing of that package is in this repository but numbers
that it computed. The model is a Hugging Face one behind the few methods that those functions call.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import StandardSAE, StandardSAEConfig  # pyright: ignore[reportMissingImports]
from sae_lens.evals import get_recons_loss, get_sparsity_and_variance_metrics  # pyright: ignore[reportMissingImports]
from sae_lens.saes.sae import SAEMetadata  # pyright: ignore[reportMissingImports]
from sae_lens.training.activation_scaler import ActivationScaler  # pyright: ignore[reportMissingImports]
from saelens_eval_case import D_SAE, LAYER, WIDTH, ids, language_model, sae_weights

HOOK = f"blocks.{LAYER}.hook_resid_post"


class Model:
    """Logits, losses per token, and one place where they can be changed."""

    def __init__(self) -> None:
        self.lm = language_model()

    def __call__(self, tokens: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.lm(tokens).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return logits, losses.view(len(tokens), -1)

    def run_with_hooks(self, tokens: torch.Tensor, fwd_hooks: Any, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ((_, hook),) = fwd_hooks
        layer = self.lm.model.layers[LAYER]
        handle = layer.register_forward_hook(lambda module, inputs, x: hook(x, hook=None))
        found = self(tokens)
        handle.remove()
        return found

    def run_with_cache(self, tokens: torch.Tensor, **_: Any) -> tuple[None, dict[str, torch.Tensor]]:
        return None, {HOOK: self.lm(tokens, output_hidden_states=True).hidden_states[LAYER + 1]}


class Store:
    """The windows in batches of two."""

    def __init__(self) -> None:
        self.batches = iter(ids().split(2))

    def get_batch_tokens(self, n: int) -> torch.Tensor:
        return next(self.batches)


@torch.no_grad()
def main() -> None:
    sae = StandardSAE(StandardSAEConfig(d_in=WIDTH, d_sae=D_SAE, metadata=SAEMetadata(hook_name=HOOK)))
    sae.load_state_dict(sae_weights())
    model = Model()
    switches = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    metrics, latents = get_sparsity_and_variance_metrics(
        sae, model, Store(), ActivationScaler(), n_batches=3, eval_batch_size_prompts=2, model_kwargs={},
        **{f"compute_{name}": True for name in switches},
    )  # fmt: skip
    losses = get_recons_loss(sae, model, ActivationScaler(), ids(), compute_kl=True, compute_ce_loss=True)
    # The KL of the last token, which predicts none of the text, is left out.
    metrics |= {name: values[:, : ids().shape[1] - 1].double().mean().item() for name, values in losses.items()}
    metrics["feature_density"] = latents["feature_density"]
    Path(__file__).with_name("saelens_eval.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
