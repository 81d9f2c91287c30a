"""A text that has been read: tokens, and which latents fire where. Small enough to stay with a visitor's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saehook.app.limits import Limits
from saehook.app.visible_text import visible_token
from saehook.errors import ArgumentError, ContextLengthError
from saehook.hooked_saes import HookedSAEs
from saehook.results import LatentHit

SHOWN = 20
"""Rows of a table of latents."""


@dataclass(frozen=True)
class Reading:
    """Latents of one text at one site."""

    site: str
    ids: list[int]
    tokens: list[str]
    """The tokens, made visible."""
    mask: list[bool]
    """False outside the mask (`Latents.mask`)."""
    top: list[LatentHit]
    """The strongest latents of the text, at most `SHOWN`."""
    n_active: int
    """How many latents fire in it."""
    top_at: list[list[LatentHit]]
    """The strongest latents of each token, at most `SHOWN`."""
    n_active_at: list[int]
    """How many fire on each token."""
    fired: tuple[np.ndarray, np.ndarray, np.ndarray]
    """(positions, latents, activations) of all that fire, also outside the mask."""

    def activations(self, latent: int) -> list[float]:
        """What one latent does on each token."""
        values = [0.0] * len(self.ids)
        positions, latents, acts = self.fired
        for i in np.flatnonzero(latents == latent):
            values[int(positions[i])] = float(acts[i])
        return values


def read(hooked: HookedSAEs, prompt: str, site: str | None, limits: Limits) -> Reading:
    """Run the model up to the site and keep what fires."""
    ids = prompt_ids(hooked, prompt, limits)
    latents = hooked.latents(ids, site)
    acts = latents.acts.float().cpu()
    positions, columns = acts.nonzero(as_tuple=True)
    every = latents.top(acts.shape[1])
    return Reading(
        site=latents.site,
        ids=ids,
        tokens=[visible_token(hooked.tokenizer, i) for i in ids],
        mask=latents.mask.tolist(),
        top=every[:SHOWN],
        n_active=len(every),
        top_at=[latents.at(i, SHOWN) for i in range(len(ids))],
        n_active_at=latents.l0().tolist(),
        fired=(positions.int().numpy(), columns.int().numpy(), acts[positions, columns].numpy()),
    )


def prompt_ids(hooked: HookedSAEs, prompt: str, limits: Limits, new_tokens: int = 0) -> list[int]:
    """The prompt as the model gets it.

    Raises:
        ArgumentError: empty or too long for the page. ContextLengthError: too long for the model.
    """
    if not isinstance(prompt, str) or not prompt:
        raise ArgumentError("The prompt is empty. Write some text.")
    if len(prompt) > limits.prompt_chars:
        raise ArgumentError(
            f"The prompt has {len(prompt)} characters; this page allows {limits.prompt_chars}. Shorten it."
        )
    ids: Sequence[int] = hooked.tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise ArgumentError("The prompt has no token. Write some text.")
    if len(ids) > limits.prompt_tokens:
        raise ArgumentError(
            f"The prompt has {len(ids)} tokens; this page allows {limits.prompt_tokens}. Shorten it, or start the page with "
            "Limits(prompt_tokens=...)."
        )
    if hooked.context is not None and len(ids) + new_tokens > hooked.context:
        raise ContextLengthError(
            f"No room to generate: {len(ids)} prompt tokens and {new_tokens} new ones are more than the {hooked.context} tokens "
            "that the model takes. Shorten the prompt, or ask for fewer new tokens."
        )
    return list(ids)
