"""Feature absorption: a latent that stands for something is silent where another, more special one has swallowed its
direction (Chanin et al. 2024). In the form of SAEBench's measure (Karvonen et al. 2025), on any probe tasks: their labels are
certain, so no large language model is asked for anything.

For a task, on half of its examples: p is the direction of a logistic probe on x; the main latents are the one whose firing
has the best F1, and others as long as each adds more than 0.03. On the other half, of the true positives of the probe:

    projection of a latent = z_i W_dec[i] · p,    total = (x - b_dec) · p
    M = that of the main latents, R = that of the three largest others with cos(W_dec[i], p) ≥ 0.1, A = min(R, total - M)
    absorbed = A / (A + M), and 0 where M ≥ total or R < 0.4 total or total ≤ 0; 1 where then M ≤ 0

With main latents and direction given, this is SAEBench's share of a word. Different from it: main latents by their firing
alone, without k-sparse probes; the offset b_dec is no latent's and is taken off. Compare numbers of this library with one
another only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saehook.errors import ArgumentError
from saehook.sae import SAE
from saehook.suite.measure import Measure, ratio
from saehook.suite.probe_loss import Examples, check_tasks, halves
from saehook.suite.probe_tasks import ProbeTask

MOST_MAIN = 10
MIN_GAIN = 0.03
MIN_F1 = 0.7
"""On the test examples, of the probe and of the main latents: below, the direction is not known, or no latent stands for it.
Always saying yes has 2/3 where the classes are even."""
RIDGE = 1e-2


def probe_direction(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """A logistic probe with a ridge on standardised x [n, d]: its unit direction in x [d], and bias; it says yes where
    x · direction + bias > 0. Float64."""
    x = x.double()
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-12)
    z = F.pad((x - mean) / std, (0, 1), value=1.0)
    ridge = RIDGE * torch.ones(z.shape[1], dtype=z.dtype, device=z.device)
    ridge[-1] = 1e-9
    w = torch.zeros_like(ridge)
    for _ in range(50):
        p = (z @ w).sigmoid()
        gradient = z.T @ (p - y.double()) / len(z) + ridge * w
        hessian = (z.T * (p * (1 - p))) @ z / len(z) + ridge.diag()
        step = torch.linalg.solve(hessian, gradient)
        w = w - step * min(1.0, 5.0 / max(float(step.norm()), 1e-12))
        if float(step.norm()) < 1e-10:
            break
    direction, bias = w[:-1] / std, float(w[-1] - (w[:-1] / std * mean).sum())
    norm = float(direction.norm())
    if norm == 0:
        return direction, bias
    return direction / norm, bias / norm


def f1(said: Tensor, y: Tensor) -> Tensor:
    """F1 of yes/no answers [n] or [n, m] against the classes y [n]: [] or [m]."""
    y = y.bool() if said.ndim == 1 else y.bool()[:, None]
    both = (said & y).double().sum(0)
    return 2 * both / ((said.double().sum(0) + y.double().sum(0)).clamp(min=1))


def main_latents(fires: Tensor, y: Tensor) -> list[int]:
    """The latent whose firing [n, d_sae] tells the classes best, and those that add to it: any of them fires."""
    chosen: list[int] = []
    said, score = torch.zeros(len(y), dtype=torch.bool, device=fires.device), 0.0
    for _ in range(MOST_MAIN):
        scores = f1(said[:, None] | fires, y)
        best = int(scores.argmax())
        if chosen and float(scores[best]) <= score + MIN_GAIN:
            break
        chosen.append(best)
        said, score = said | fires[:, best], float(scores[best])
    return chosen


@torch.no_grad()
def absorbed_share(sae: SAE, x: Tensor, main: Sequence[int], direction: Tensor) -> Tensor:
    """How much of the direction other latents carry in place of the main ones on each token x [n, d_in], [n] float64 in
    0..1."""
    scale = sae.scale(x)
    weight = sae.encode(x).double() * (1.0 if scale is None else scale.double())
    along = sae.W_dec.double() @ direction.to(sae.device)
    cosines = along / torch.linalg.vector_norm(sae.W_dec.double(), dim=-1).clamp(min=1e-12)
    projection = weight * along
    total = (x.double() - sae.b_dec.double()) @ direction.to(x.device)
    mine = projection[:, list(main)].sum(-1)
    others = projection.clone()
    others[:, list(main)] = 0.0
    others[:, cosines < 0.1] = 0.0
    largest = others.topk(min(3, others.shape[1]), dim=-1).values.clamp(min=0).sum(-1)
    theirs = torch.minimum(largest, total - mine)
    share = torch.where(mine <= 0, 1.0, theirs / (theirs + mine))
    return torch.where((mine >= total) | (largest < 0.4 * total) | (total <= 0), 0.0, share)


@torch.no_grad()
def absorption(sae: SAE, tasks: Sequence[ProbeTask], examples: Examples) -> list[Measure]:
    """`absorption` = mean over tasks of the mean over true positives; then each task's own. Resampled are examples.

    Tasks whose probe or main latents have an F1 below `MIN_F1` are left out and counted in the note.

    Raises:
        ArgumentError: those of `check_tasks`; no task is left; a transcoder, whose latents are of another site than x.
    """
    if sae.is_transcoder:
        raise ArgumentError(
            "absorption compares latents with a probe on what they reconstruct; a transcoder reads another."
        )
    check_tasks(tasks)
    shares, single = [], []
    for task in tasks:
        x, y = examples.of(task)
        finite = x.isfinite().all(-1)
        x, y = x[finite], y[finite]
        test = halves(y)
        direction, bias = probe_direction(x[~test], y[~test])
        said = x[test].double() @ direction + bias > 0
        fires = sae.encode(x) > 0
        main = main_latents(fires[~test], y[~test])
        if min(float(f1(answers, y[test])) for answers in (said, fires[test][:, main].any(-1))) < MIN_F1:
            continue
        share = absorbed_share(sae, x[test][said & y[test].bool()], main, direction).cpu()
        shares.append(share)
        note = f"main latents {', '.join(map(str, main))}"
        single.append(
            ratio(f"absorption.{task.name}", "share", share, of="examples", tokens=len(share), needed=40, note=note)
        )
    if not shares:
        raise ArgumentError(
            f"of the {len(tasks)} tasks there is none that a probe on x and the latents that fire both tell (F1 of {MIN_F1}), so "
            "absorption has no meaning. Give others."
        )
    weights = torch.cat([torch.full((len(share),), 1 / len(share)).double() for share in shares])
    note = f"{len(shares)} tasks; {len(tasks) - len(shares)} that a probe or the latents do not tell are left out"
    whole = ratio(
        "absorption",
        "share",
        torch.cat(shares) * weights,
        weights,
        of="examples",
        tokens=len(weights),
        needed=40,
        note=note,
    )
    return [whole, *single]
