"""What to compare an edited continuation with: a control of equal size, and what the unedited model thinks of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from saehook.dose_response import repetition
from saehook.edits import steer
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import Edit, Program
from saehook.results import Report


class Continuation(NamedTuple):
    """A continuation in the eyes of the unedited model."""

    loss: float
    """Mean of -log p of the new tokens, nats; the model without SAEs, and without temperature."""
    repetition: float
    """Share of 4-grams that came before (`dose_response.repetition`)."""


@torch.no_grad()
def judge(hooked: HookedSAEs, prompt: Sequence[int], new: Sequence[int]) -> Continuation:
    """Measure new tokens behind a prompt, both as ids.

    Raises:
        ArgumentError: no new tokens.
    """
    if not prompt or not new:
        raise ArgumentError(
            f"{len(prompt)} tokens of a prompt and {len(new)} new ones; at least one of each is expected."
        )
    ids = torch.tensor([*prompt, *new])
    logits = hooked.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[len(prompt) :].to(logits.device))
    return Continuation(float(loss), repetition(ids[len(prompt) :]))


def control_program(hooked: HookedSAEs, program: Program, report: Report, seed: int) -> Program:
    """A program as large as another, in a direction that means something else: at each site that it edits, one random latent
    is added, with the mean ‖Δ‖/‖x‖ that the other one had there, on the tokens of its first edit there. It is alive (has fired
    on the recorded text), where that is known, and is none of those that the other one names.

    Args:
        report: of a run of the other program.

    Raises:
        ArgumentError: the program edits no latent, or changed nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    doses = {one.site: one.dose for one in report.sites}
    first: dict[str, Edit] = {}
    named: dict[str, set[int]] = {}
    for edit in program.edits:
        if isinstance(edit, Edit):
            name = hooked.resolve_site(edit.site)
            first.setdefault(name, edit)
            named.setdefault(name, set()).update(edit.latents)
    edits = []
    for name, edit in first.items():
        sae, _, writes = hooked.attached[name]
        dose = doses.get(writes, 0.0)
        if not 0 < dose < float("inf"):
            continue
        alive = torch.ones(sae.d_sae, dtype=torch.bool) if sae.stats is None else sae.stats.max_act.cpu() > 0
        alive[list(named[name])] = False
        latents = alive.nonzero()[:, 0]
        if not len(latents):
            continue
        latent = int(latents[torch.randint(len(latents), (), generator=generator)])
        edits.append(steer(latent, dose, unit="norm", site=name, where=edit.where))
    if not edits:
        raise ArgumentError(
            "there is nothing to match: the program changed no latent's site. Make an edit that does something."
        )
    return Program(edits=edits)
