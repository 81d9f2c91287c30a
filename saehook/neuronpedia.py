"""Facts about latents as the JSON that Neuronpedia imports (the batch files of SAEDashboard): where they fire, on what, and
which tokens they promote."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saehook.errors import ArgumentError
from saehook.harvest import TOKENS_PER_FORWARD
from saehook.hooked_saes import HookedSAEs
from saehook.tokenization import Windows, is_outlier, keep_mask, special_ids

BARS = 50
"""Of each histogram."""
TOKENS = 10
"""Promoted and suppressed ones named per latent."""
BY_RANK = -1.0
"""In place of the interval of activations that an example stands for, where it is one of the strongest."""


@torch.no_grad()
def neuronpedia_json(
    hooked: HookedSAEs,
    tokens: Windows | Tensor,
    latents: Sequence[int],
    *,
    site: str | None = None,
    examples: int = 20,
    source_set: str = "saehook",
) -> str:
    """One batch of latents, as JSON.

    `frac_nonzero` and the histogram count the tokens of the mask; other tokens have the value 0 in examples. Promoted tokens
    are those of `W_dec` times the unembedding, without the final norm; none where the site has another width.

    Args:
        tokens: windows of ids [n, length].
        latents: which ones.
        site: of the SAE, where several are attached.
        examples: the strongest windows per latent.
        source_set: the name of the set on Neuronpedia, e.g. `res-16k`.

    Raises:
        LatentError: a latent that the SAE does not have. ArgumentError: none, or no whole window.
    """
    name = hooked.resolve_site(site)
    sae, ids = hooked.saes[name], tokens.ids if isinstance(tokens, Windows) else tokens
    if ids.ndim != 2 or not len(ids) or not len(latents) or examples < 1:
        raise ArgumentError("at least one window [n, length], one latent and one example are needed.")
    sae.check_latents(tuple(latents))
    wanted = torch.tensor(list(latents), device=sae.device)
    reads = hooked.attached[name].reads
    special = special_ids(hooked.tokenizer)
    best = torch.zeros(len(wanted), 0)
    rows = torch.zeros(len(wanted), 0, dtype=torch.int64)
    acts_of = torch.zeros(len(wanted), 0, ids.shape[1])
    fired: list[list[Tensor]] = [[] for _ in latents]
    counted = 0
    step = max(1, TOKENS_PER_FORWARD // ids.shape[1])
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        x = hooked.model.activations(part, reads)[reads]
        keep = keep_mask(part, None, special, sae.mask_rule.skip_first_tokens).to(x.device)
        keep = keep & ~is_outlier(torch.linalg.vector_norm(x.float(), dim=-1), sae.mask_rule)
        acts = (sae.encode(x)[..., wanted].float() * keep[..., None]).cpu().permute(2, 0, 1)  # latents, rows, tokens
        counted += int(keep.sum())
        for values, found in zip(acts, fired, strict=True):
            found.append(values[values != 0])
        best = torch.cat([best, acts.amax(2)], 1)
        rows = torch.cat([rows, torch.arange(start, start + len(part)).expand(len(wanted), -1)], 1)
        acts_of = torch.cat([acts_of, acts], 1)
        best, order = best.topk(min(examples, best.shape[1]), 1)
        rows = rows.gather(1, order)
        acts_of = acts_of.gather(1, order[..., None].expand(-1, -1, ids.shape[1]))
    effects = _effects(hooked, sae.W_dec[wanted])
    features = []
    for i, latent in enumerate(latents):
        values = torch.cat(fired[i])
        shown = [
            _example(hooked.tokenizer, ids[row], acts)
            for strength, row, acts in zip(best[i].tolist(), rows[i].tolist(), acts_of[i], strict=True)
            if strength > 0
        ]
        features.append(
            {
                "feature_index": int(latent),
                **{f"neuron_alignment_{what}": [] for what in ("indices", "values", "l1")},
                **{
                    f"correlated_{of}_{what}": []
                    for of in ("neurons", "features")
                    for what in ("indices", "pearson", "l1")
                },
                **_promoted(hooked.tokenizer, None if effects is None else effects[i]),
                "frac_nonzero": len(values) / counted if counted else 0.0,
                **_histogram("freq", values),
                **_histogram("logits", torch.zeros(0) if effects is None else effects[i]),
                "decoder_weights_dist": [],
                "activations": shown,
            }
        )
    layer = re.match(r"layers\.(\d+)\.", name)
    batch = {
        "model_id": hooked.model.name,
        "layer": int(layer[1]) if layer else 0,
        "sae_set": source_set,
        "sae_id_suffix": None,
        "features": features,
    }
    return json.dumps(batch, allow_nan=False)


def _effects(hooked: HookedSAEs, directions: Tensor) -> Tensor | None:
    """Effect of each direction on the logits, [latents, vocabulary] on the CPU; None where they are not in the stream."""
    head = hooked.lm.get_output_embeddings()
    if head is None or head.weight.shape[1] != directions.shape[1]:
        return None
    return (directions.float() @ head.weight.to(directions.device).float().T).cpu()


def _promoted(tokenizer: Any, effects: Tensor | None) -> dict[str, Any]:
    found: dict[str, Any] = {"neg_str": [], "neg_values": [], "pos_str": [], "pos_values": []}
    if effects is not None:
        for sign, name in ((-1, "neg"), (1, "pos")):
            values, ids = (sign * effects).topk(min(TOKENS, len(effects)))
            found[f"{name}_str"] = [tokenizer.decode([i]) for i in ids.tolist()]
            found[f"{name}_values"] = [round(sign * value, 4) for value in values.tolist()]
    return found


def _histogram(name: str, values: Tensor) -> dict[str, list[float]]:
    """Counts and the middles of their intervals, lists of one length."""
    heights: list[float] = []
    middles: list[float] = []
    if len(values):
        low, high = float(values.min()), float(values.max())
        heights = torch.histc(values, BARS, low, high).tolist() if high > low else [float(len(values))]
        width = (high - low) / len(heights)
        middles = [round(low + width * (i + 0.5), 6) for i in range(len(heights))]
    return {f"{name}_hist_data_bar_heights": heights, f"{name}_hist_data_bar_values": middles}


def _example(tokenizer: Any, ids: Tensor, acts: Tensor) -> dict[str, Any]:
    return {
        "bin_min": BY_RANK,
        "bin_max": BY_RANK,
        "bin_contains": BY_RANK,
        "qualifying_token_index": int(acts.argmax()),
        "tokens": [tokenizer.decode([i]) for i in ids.tolist()],
        "values": [round(value, 4) for value in acts.tolist()],
    }
