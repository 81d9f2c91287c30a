"""Does adding a latent say what it stands for, and at which strength?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduction.claims.latents import NO_MODEL
from reproduction.claims.ratios import seeds_finding
from reproduction.data import Site
from reproduction.laboratory import Lab
from reproduction.measure import sample
from reproduction.outcome import Outcome, Plot, Series
from reproduction.registry import claim, methods
from saehook import SAE
from saehook.dose_response import repetition, run_rows
from saehook.interventions import Edit
from saehook.suite.steering import MAX_LOSS_RISE, MAX_REPETITION, MIN_GAIN, promoted_tokens, usable_window

STRENGTHS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Times the mean norm of the activation."""
LATENTS, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 2, 16, 12


@dataclass(frozen=True)
class Dose:
    """One way to write latents, medians over latents, each in the order of the strengths."""

    gain: list[float]
    """Log-probability that the latent's own tokens gain, nats."""
    loss_rise: list[float]
    """Loss under the clean model, less that of the unsteered continuation, nats per token."""
    windows: list[tuple[float, float] | None]
    """Usable strengths of each latent."""
    best: list[float]
    """Strength with the largest gain among the usable ones, of the latents that have any."""


@torch.no_grad()
def dose(site: Site, sae: SAE, op: str, seed: int) -> Dose:
    """Write random alive latents at every strength and token, greedy continuations; `op` as of an `Edit`."""
    held = site.held_out()
    assert held.ids is not None
    prompts = [held.ids[i, :PROMPT_TOKENS] for i in (0, len(held.ids) // 2)][:PROMPTS]
    norm = float(torch.linalg.vector_norm(held.x[held.mask], dim=-1).mean())
    alive = (sample(sae, site).counts() > 0).nonzero()[:, 0]
    chosen = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:LATENTS]].tolist()
    hooked = site.lm.model.attach({site.site: sae})
    try:
        made = [_one(hooked, site.site, latent, op, norm, prompts) for latent in chosen]
    finally:
        hooked.detach()
    gains, rises, repeated = (torch.tensor([one[i] for one in made]) for i in range(3))
    windows = [usable_window(STRENGTHS, *(x[i].tolist() for x in (gains, rises, repeated))) for i in range(len(made))]
    usable = (gains >= MIN_GAIN) & (rises <= MAX_LOSS_RISE) & (repeated <= MAX_REPETITION)
    best = [
        STRENGTHS[int(torch.where(usable[i], gains[i], -math.inf).argmax())]
        for i in range(len(made))
        if usable[i].any()
    ]
    return Dose(gains.median(0).values.tolist(), rises.median(0).values.tolist(), windows, best)


def _one(hooked, name: str, latent: int, op: str, norm: float, prompts: Sequence[Tensor]) -> list[list[float]]:
    """Gain, loss rise and repetition of one latent by strength, means over prompts."""
    top = promoted_tokens(hooked, name, latent)
    edits = [Edit(op=op, latents=(latent,), value=strength * norm, site=name) for strength in STRENGTHS]
    sums = torch.zeros(3, len(edits) + 1, dtype=torch.float64)
    for prompt in prompts:
        hf = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        rows = run_rows(hooked, hooked._batch(prompt), edits, None, hf)
        n = len(rows.logits)
        steered = torch.stack(rows.logits, 1).float()
        clean = hooked.model(rows.sequences[:, :-1]).logits[:, -n:].float()
        for i, made in enumerate(rows.generations):
            own = slice(0, len(made.new_ids))
            sums[0, i] += float(steered[i, own].log_softmax(-1)[:, top].logsumexp(-1).double().mean())
            sums[1, i] += float(F.cross_entropy(clean[i, own], made.new_ids))
            sums[2, i] += repetition(made.new_ids)
    mass, loss, repeated = (sums / len(prompts)).tolist()
    return [[m - mass[-1] for m in mass[:-1]], [x - loss[-1] for x in loss[:-1]], repeated[:-1]]


def _doses(lab: Lab, op: str) -> dict[Site, list[Dose]]:
    return {
        site: [dose(site, sae, op, seed) for seed, sae in zip(lab.seeds, lab.arms(site, "topk")["topk"], strict=True)]
        for site in lab.residual()
    }


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return torch.tensor(rows).double().mean(0).tolist()


@claim(
    "steering-window",
    source="Templeton et al. 2024, section on steering; Wu et al. 2025 (AxBench)",
    says="There is a range of strengths at which steering by a latent works before the text breaks; about half the norm of "
    "the activation is a good strength.",
    shown="At least half of the latents have a usable strength (their tokens e times as likely, loss up by at most 1 nat, "
    "at most half of the 4-grams repeated); the median best strength is 0.25 to 1 times the norm; at 4 times the norm the loss "
    "has risen by more than 1 nat.",
    trains=methods("topk", on=Lab.residual),
)
def steering_window(lab: Lab) -> Outcome:
    rows, plots = [], []
    for site, doses in _doses(lab, "add").items():
        share = [sum(w is not None for w in d.windows) / len(d.windows) for d in doses]
        rows.append(seeds_finding(site, "share of latents with a usable strength", share, above=0.5))
        best = [float(torch.tensor(d.best).median()) if d.best else math.nan for d in doses]
        rows.append(seeds_finding(site, "median best strength / norm", best, above=0.25 - 1e-6, below=1.0 + 1e-6))
        rows.append(
            seeds_finding(site, "loss rise at 4 × norm, nats", [d.loss_rise[-1] for d in doses], above=MAX_LOSS_RISE)
        )
        series = [
            Series("gain, nats", list(STRENGTHS), _mean([d.gain for d in doses])),
            Series("loss rise, nats per token", list(STRENGTHS), _mean([d.loss_rise for d in doses])),
        ]
        name = site.words.replace("`", "")
        plots.append(Plot(f"Steering, {name}", "strength / norm of the activation", "nats", series, log_x=True))
    note = f"TopK; {LATENTS} random latents and {PROMPTS} prompts for each seed, {NEW_TOKENS} greedy tokens."
    return Outcome(rows, plots, [note]) if rows else Outcome([], untestable=NO_MODEL)


@claim(
    "clamp-or-add",
    source="a public study of steering Llama 3.1 8B (2025), against Wu et al. 2025 (AxBench)",
    says="Clamping a latent to a value works better than adding it; AxBench found the opposite.",
    shown="Clamping gives a larger share of latents with a usable strength than adding, in every seed.",
    trains=methods("topk", on=Lab.residual),
)
def clamp_or_add(lab: Lab) -> Outcome:
    rows = []
    adding, clamping = _doses(lab, "add"), _doses(lab, "set")
    for site in adding:
        shares = [
            [sum(w is not None for w in d.windows) / len(d.windows) for d in found[site]]
            for found in (clamping, adding)
        ]
        rows.append(seeds_finding(site, "share with a usable strength, clamping", shares[0]))
        rows.append(seeds_finding(site, "share with a usable strength, adding", shares[1]))
        gaps = [a - b for a, b in zip(*shares, strict=True)]
        rows.append(seeds_finding(site, "clamping less adding", gaps, above=0.0))
        gains = [
            max(a.gain[i] for i in range(len(STRENGTHS)) if a.loss_rise[i] <= MAX_LOSS_RISE)
            - max(b.gain[i] for i in range(len(STRENGTHS)) if b.loss_rise[i] <= MAX_LOSS_RISE)
            for a, b in zip(clamping[site], adding[site], strict=True)
        ]
        rows.append(seeds_finding(site, "best median gain within 1 nat of loss, clamping less adding, nats", gains))
    return Outcome(rows) if rows else Outcome([], untestable=NO_MODEL)
