"""A text that has been read: its tokens made visible, and what the model makes of them. Small enough to stay with a visitor's
page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saehook.app.limits import Limits
from saehook.errors import ArgumentError, ContextLengthError
from saehook.hooked_saes import HookedSAEs
from saehook.inspection import Inspection, inspect_text
from saehook.interventions import Program
from saehook.visible_text import visible_token

SHOWN = 20
"""Rows of a table of latents."""


@dataclass(frozen=True)
class Reading:
    """One text at one site."""

    facts: Inspection
    tokens: list[str]
    """The tokens, made visible."""

    @property
    def site(self) -> str:
        """The attached SAE meant."""
        return self.facts.site


def read(hooked: HookedSAEs, prompt: str, site: str | None, limits: Limits, program: Program | None = None) -> Reading:
    """What the model makes of a text, by itself, spliced, and under the program."""
    ids = prompt_ids(hooked, prompt, limits)
    facts = inspect_text(hooked, ids, site, program or Program())
    return Reading(facts, [visible_token(hooked.tokenizer, i) for i in ids])


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
