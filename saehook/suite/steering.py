"""Does steering work? Dose–response of single latents on continuations of the evaluated text.

Each latent is added at strengths in units of its maximum to every token of a prompt and what is generated behind it. Of the
new tokens x_t, with q the steered model and p the clean one:

    gain       mean of log Σ q(v | x_<t) over the ten tokens v that the latent's direction promotes most, less the same of
               the unsteered continuation, nats
    kl         mean KL(p ‖ q) on the steered text, nats per token
    loss_rise  mean -log p(x_t), less that of the unsteered continuation: how much the clean model is put out by the text

A strength is usable where the gain is at least `MIN_GAIN`, the loss rises by at most `MAX_LOSS_RISE`, and at most half of the
4-grams repeat. The window is the longest run of neighbouring usable strengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from saehook.dose_response import repetition, run_rows
from saehook.errors import ArgumentError
from saehook.interventions import Edit
from saehook.metrics import token_kl
from saehook.suite.measure import Measure, median, ratio
from saehook.suite.sample import Sample, ids_of

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs
    from saehook.tokenization import Windows

STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""In units of the largest activation of the latent on the sample."""
PROMOTED = 10
PROMPT_TOKENS = 16
NEW_TOKENS = 12
MIN_GAIN = 1.0
"""Nats: the promoted tokens are e times as likely."""
MAX_LOSS_RISE = 1.0
"""Nats per token."""
MAX_REPETITION = 0.5


@dataclass(frozen=True)
class Response:
    """One latent, each list in the order of the strengths."""

    latent: int
    promoted: list[str]
    """Its top tokens."""
    strengths: list[float]
    gain: list[float]
    kl: list[float]
    loss_rise: list[float]
    repetition: list[float]
    window: tuple[float, float] | None
    """First and last usable strength; None if there is none."""


def usable_window(
    strengths: Sequence[float], gain: Sequence[float], loss_rise: Sequence[float], repeated: Sequence[float]
) -> tuple[float, float] | None:
    """The longest run of usable strengths (the weaker of two as long), as its first and last; None if none is usable."""
    best: tuple[int, int] | None = None
    start = None
    for i, row in enumerate(zip(gain, loss_rise, repeated, strict=True)):
        usable = row[0] >= MIN_GAIN and row[1] <= MAX_LOSS_RISE and row[2] <= MAX_REPETITION
        start = (i if start is None else start) if usable else None
        if start is not None and (best is None or i - start > best[1] - best[0]):
            best = (start, i)
    return None if best is None else (strengths[best[0]], strengths[best[1]])


def promoted_tokens(hooked: HookedSAEs, name: str, latent: int, n: int = PROMOTED) -> Tensor:
    """Ids of the tokens whose logits the latent's direction raises most through the unembedding, the final norm left out, [n].

    Raises:
        ArgumentError: the site is not as wide as the residual stream.
    """
    unembedding = hooked.lm.get_output_embeddings()
    direction = hooked.saes[name].W_dec[latent].detach()
    if unembedding is None or unembedding.weight.shape[-1] != len(direction):
        raise ArgumentError(
            f"the latents at {name} have {len(direction)} numbers, which the unembedding does not take, so they promote no "
            "tokens. Steering is measured at residual streams and at outputs of MLPs and attention."
        )
    weight = unembedding.weight
    return (weight.float() @ direction.to(weight.device).float()).topk(n).indices


@torch.no_grad()
def respond(
    hooked: HookedSAEs,
    name: str,
    latent: int,
    maximum: float,
    prompts: Sequence[Tensor],
    strengths: Sequence[float] = STRENGTHS,
) -> Response:
    """The dose–response of one latent, mean over prompts [length]; greedy continuations."""
    top = promoted_tokens(hooked, name, latent)
    edits = [Edit(op="add", latents=(latent,), value=strength * maximum, site=name) for strength in strengths]
    sums = torch.zeros(4, len(edits) + 1, dtype=torch.float64)
    for prompt in prompts:
        hf = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        rows = run_rows(hooked, hooked._batch(prompt), edits, None, hf)
        n = len(rows.logits)
        steered = torch.stack(rows.logits, 1).float()
        clean = hooked.model(rows.sequences[:, :-1]).logits[:, -n:].float()
        for i, made in enumerate(rows.generations):
            own = slice(0, len(made.new_ids))  # behind an EOS there is padding
            log_q = steered[i, own].log_softmax(-1)
            sums[0, i] += float(log_q[:, top].logsumexp(-1).double().mean())
            sums[1, i] += float(token_kl(clean[i, own], steered[i, own]).mean())
            sums[2, i] += float(F.cross_entropy(clean[i, own], made.new_ids.to(clean.device)))
            sums[3, i] += repetition(made.new_ids)
    mass, kl, loss, repeated = (sums / len(prompts)).tolist()
    gain = [value - mass[-1] for value in mass[:-1]]
    rise = [value - loss[-1] for value in loss[:-1]]
    return Response(
        latent=latent,
        promoted=[hooked.tokenizer.decode([i]) for i in top.tolist()],
        strengths=list(strengths),
        gain=gain,
        kl=kl[:-1],
        loss_rise=rise,
        repetition=repeated[:-1],
        window=usable_window(strengths, gain, rise, repeated[:-1]),
    )


@torch.no_grad()
def steering(
    hooked: HookedSAEs,
    sample: Sample,
    tokens: Windows | Tensor,
    *,
    n_latents: int = 16,
    n_prompts: int = 2,
    seed: int = 0,
) -> tuple[list[Measure], list[Response]]:
    """Steer by random alive latents; prompts are the starts of windows.

    `steerable` = share of the latents with a usable window; `window_ratio` = median of last / first strength of a window;
    `gain_at_1`, `loss_rise_at_1`, `kl_at_1` = medians at the latent's own maximum.

    Raises:
        ArgumentError: that of `promoted_tokens`.
    """
    ids = ids_of(tokens)
    prompts = [row[:PROMPT_TOKENS] for row in ids[:: max(1, len(ids) // n_prompts)][:n_prompts]]
    alive = (sample.counts() > 0).nonzero()[:, 0].cpu()
    generator = torch.Generator().manual_seed(seed)
    chosen = alive[torch.randperm(len(alive), generator=generator)[:n_latents]].sort().values
    maxima = sample.acts_of(chosen.to(sample.x.device)).amax(0).tolist()
    responses = [
        respond(hooked, sample.site, latent, maximum, prompts)
        for latent, maximum in zip(chosen.tolist(), maxima, strict=True)
    ]
    new = len(prompts) * NEW_TOKENS * len(responses)
    usable = torch.tensor([response.window is not None for response in responses]).double()
    widths = [r.window[1] / r.window[0] if r.window else math.nan for r in responses]
    one = STRENGTHS.index(1.0)
    note = f"gain ≥ {MIN_GAIN:g} nats, loss rise ≤ {MAX_LOSS_RISE:g} nats, {len(prompts)} prompts"

    def middle(name: str, unit: str, values: list[float]) -> Measure:
        return median(name, unit, torch.tensor(values), of="latents", tokens=new)

    return [
        ratio("steerable", "of the latents", usable, of="latents", tokens=new, note=note),
        middle("window_ratio", "last / first strength", widths),
        middle("gain_at_1", "nats", [r.gain[one] for r in responses]),
        middle("kl_at_1", "nats per token", [r.kl[one] for r in responses]),
        middle("loss_rise_at_1", "nats per token", [r.loss_rise[one] for r in responses]),
    ], responses
