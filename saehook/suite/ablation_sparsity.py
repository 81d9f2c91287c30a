"""Ablation sparsity: does a latent move few logits, or all a little? (Gao et al. 2024, section 4.5)

One latent is ablated on one token t, the error kept: x' = x - z_i W_dec[i]. Of the logit differences D over the vocabulary V
at t and the T - 1 tokens behind it, the median of each token is taken off, since a constant changes no prediction. With v all
V · T numbers,

    sparsity = (‖v‖₁ / ‖v‖₂)² / (V · T)

is 1/(V·T) where one logit moves, 2/π for Gaussian noise, 1 where all move as much. Beside it the same with one coordinate of
x set to 0: what a basis without dictionary does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saehook.errors import ArgumentError
from saehook.suite.measure import Measure, ratio
from saehook.suite.sample import MAX_NUMBERS, AddAction, Sample, ids_of

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs
    from saehook.tokenization import Windows

HORIZON = 16
"""T: tokens whose logits are looked at."""
CONTEXT = 64
"""Tokens are drawn from the first so many of a window: what stands before them is run for every latent."""
MAX_LATENTS = 32
"""Latents, and coordinates, of one token; more are drawn at random."""


def effect_sparsity(differences: Tensor) -> Tensor:
    """(‖v‖₁ / ‖v‖₂)² / (V · T) of logit differences [..., T, V], [...] float64; NaN where nothing moved."""
    v = differences.double()
    v = v - v.median(-1, keepdim=True).values
    l1, l2 = v.abs().sum((-1, -2)), v.square().sum((-1, -2))
    return torch.where(l2 > 0, l1.square() / l2, float("nan")) / (v.shape[-1] * v.shape[-2])


@torch.no_grad()
def ablation_sparsity(
    hooked: HookedSAEs, sample: Sample, tokens: Windows | Tensor, *, n_tokens: int = 16, seed: int = 0
) -> list[Measure]:
    """Mean sparsity of the effects of active latents, and of single coordinates, at `n_tokens` random tokens.

    What has no effect at all is left out and counted in the note.

    Args:
        sample: from the same windows.

    Raises:
        ArgumentError: no token has `HORIZON` tokens from itself on in its window.
    """
    ids = ids_of(tokens)
    generator = torch.Generator().manual_seed(seed)
    fits = ((sample.column < CONTEXT) & (sample.column + HORIZON <= ids.shape[1])).nonzero()[:, 0].cpu()
    if not len(fits):
        raise ArgumentError(
            f"effects are measured over {HORIZON} tokens, and windows of {ids.shape[1]} have no token of the mask with as many "
            "from itself on. Give longer windows."
        )
    chosen = fits[torch.randperm(len(fits), generator=generator)[:n_tokens]]
    found: dict[str, list[tuple[float, int]]] = {"latents": [], "coordinates": []}
    still = dict.fromkeys(found, 0)
    for i in chosen.tolist():
        for kind, vectors in _ablations(sample, i, generator).items():
            scores = _scores(hooked, sample, ids[sample.row[i]], int(sample.column[i]), vectors)
            alive = scores[~scores.isnan()]
            still[kind] += len(scores) - len(alive)
            if len(alive):
                found[kind].append((float(alive.sum()), len(alive)))
    measures = []
    for kind, pairs in found.items():
        sums = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
        note = f"{int(sums[:, 1].sum())} {kind}; {still[kind]} without effect are left out; T = {HORIZON}"
        name = "ablation_sparsity" if kind == "latents" else "ablation_sparsity_coordinates"
        measures.append(ratio(name, "of the logits", sums[:, 0], sums[:, 1], of="tokens", tokens=len(sums), note=note))
    return measures


def _ablations(sample: Sample, i: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What is added to y at token i to ablate each of its active latents, and each of some coordinates, [n, d_out]."""
    sae, x, y = sample.sae, sample.x[i : i + 1], sample.y[i].float()
    acts, scale = sae.encode(x)[0].float(), sae.scale(x)
    active = acts.nonzero()[:, 0]
    active = active[torch.randperm(len(active), generator=generator)[:MAX_LATENTS].to(active.device)]
    weight = acts[active] if scale is None else acts[active] * scale[0].float()
    picked = torch.randperm(len(y), generator=generator)[: max(1, len(active))].to(y.device)
    coordinates = torch.zeros(len(picked), len(y), device=y.device)
    coordinates[torch.arange(len(picked), device=y.device), picked] = -y[picked]
    return {"latents": -weight[:, None] * sae.W_dec[active].float(), "coordinates": coordinates}


def _scores(hooked: HookedSAEs, sample: Sample, window: Tensor, t: int, vectors: Tensor) -> Tensor:
    """Sparsity of the effect of each of `vectors` [n, d_out], added at token t, [n]."""
    ids = window[: t + HORIZON]
    vocab = hooked.lm.get_input_embeddings().num_embeddings
    writes = hooked.attached[sample.site].writes
    scores = [torch.zeros(0, dtype=torch.float64)]
    for part in vectors.split(max(1, MAX_NUMBERS // (len(ids) * vocab) - 1)):
        rows = torch.arange(1, len(part) + 1)  # row 0 stays clean: a batch of another shape rounds otherwise
        add = AddAction(rows, torch.full_like(rows, t), part)
        logits = hooked.run(ids.expand(len(part) + 1, -1), {writes: add}).logits[:, t : t + HORIZON].float()
        scores.append(effect_sparsity(logits[1:] - logits[:1]).cpu())
    return torch.cat(scores)
