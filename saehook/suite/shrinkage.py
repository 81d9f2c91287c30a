"""Shrinkage: are the encoder's activations those that reconstruct best? (Gao et al. 2024, section 5.1)

The decoder and the set of active latents stay as they are; their values are solved for again, without sign change:
min over a ≥ 0 of ‖target - a W_dec[active]‖². ReLU with an L1 penalty makes them too small, so they rise; those of TopK
stay about the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saehook.suite.measure import Measure, ratio
from saehook.suite.sample import MAX_NUMBERS, Sample

TOLERANCE = 1e-6
"""Change of the values in one step, as a share of the largest, at which a solution counts as found."""
MAX_STEPS = 1000
ROWS = 256
"""Most tokens that are solved for together."""


def refine(acts: Tensor, target: Tensor, W_dec: Tensor) -> Tensor:
    """The non-negative activations of the same active latents that reconstruct `target` best, [n, d_sae] like `acts`.

    Args:
        acts: [n, d_sae]; active are those above 0.
        target: [n, d_out], what the latents shall add up to: y less the decoder's bias.
        W_dec: [d_sae, d_out].
    """
    refined = torch.zeros_like(acts)
    active = (acts > 0).sum(-1)
    most = max(1, int(active.max())) if len(active) else 1
    size = max(1, min(ROWS, MAX_NUMBERS // (most * W_dec.shape[1])))
    for rows in active.argsort().split(size):  # tokens with about as many active latents together
        values, latents = acts[rows].topk(max(1, int(active[rows].max())), dim=-1)
        solved = _solve(values.double(), W_dec[latents].double(), target[rows].double())
        refined[rows] = torch.zeros_like(acts[rows]).scatter_(-1, latents, solved.to(acts.dtype))
    return refined


def _solve(a: Tensor, D: Tensor, target: Tensor) -> Tensor:
    """Accelerated projected gradient descent from a [n, k] with D [n, k, d], restarted where it overshoots."""
    active = a > 0
    a = a * active
    D = D * active[..., None]
    gram = D @ D.mT
    wanted = (D @ target[..., None])[..., 0]
    step = 1 / gram.abs().sum(-1).amax(-1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)
    ahead, momentum = a, torch.ones_like(a[:, :1])
    for _ in range(MAX_STEPS):
        gradient = (gram @ ahead[..., None])[..., 0] - wanted
        new = (ahead - step * gradient).relu() * active
        moved = new - a
        overshot = ((ahead - new) * moved).sum(-1, keepdim=True) > 0
        later = torch.where(overshot, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        ahead = new + torch.where(overshot, 0.0, (momentum - 1) / later) * moved
        a, momentum = new, later
        if float(moved.abs().max()) <= TOLERANCE * float(a.abs().max()):
            break
    return a


@torch.no_grad()
def shrinkage(sample: Sample) -> list[Measure]:
    """How far the values move when they are refined, and how much error that removes.

    `refinement_shift` = Σ(refined - encoded) / Σ encoded; `refinement_gain` = 1 - Σ‖error refined‖² / Σ‖error‖²;
    `refined_up` = share of the active values that rise.
    """
    sae = sample.sae
    shift, total, before, after, up, active = (torch.zeros(len(sample), dtype=torch.float64) for _ in range(6))
    for part in sample.parts():
        x, y = sample.x[part], sample.y[part].to(sae.dtype)
        acts = sae.encode(x)
        rest = y - sae.decode(torch.zeros_like(acts), x)
        scale = sae.scale(x)
        target = rest if scale is None else rest / scale
        refined = refine(acts, target, sae.W_dec)
        shift[part], total[part] = (refined - acts).double().sum(-1).cpu(), acts.double().sum(-1).cpu()
        before[part] = (y - sae.decode(acts, x)).double().square().sum(-1).cpu()
        after[part] = (y - sae.decode(refined, x)).double().square().sum(-1).cpu()
        up[part], active[part] = (refined > acts).double().sum(-1).cpu(), (acts > 0).double().sum(-1).cpu()

    def measure(name: str, unit: str, top: Tensor, bottom: Tensor) -> Measure:
        return ratio(name, unit, sample.by_window(top), sample.by_window(bottom), of="windows", tokens=len(sample))

    return [
        measure("refinement_shift", "of the activation", shift, total),
        measure("refinement_gain", "of the squared error", before - after, before),
        measure("refined_up", "of the active values", up, active),
    ]
