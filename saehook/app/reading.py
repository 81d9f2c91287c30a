"""A text that has been read: its tokens made visible, and what the model makes of them. Small enough to stay with a visitor's
page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saehook.app.limits import Limits
from saehook.conversation import conversation_ids
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
    measured: Mapping[int, float] = field(default_factory=dict)
    """The effects of latents that were ablated, `ablation_effects`."""

    @property
    def site(self) -> str:
        """The attached SAE meant."""
        return self.facts.site


@dataclass(frozen=True)
class Prompt:
    """What a visitor wrote, as the model gets it."""

    ids: list[int]
    given: Any
    """What a run is called with: the ids, or the conversation of which they are, whose roles an edit may name."""


def read(hooked: HookedSAEs, prompt: Prompt, site: str | None, program: Program | None = None) -> Reading:
    """What the model makes of a text, by itself, spliced, and under the program."""
    facts = inspect_text(hooked, prompt.given, site, program or Program())
    return Reading(facts, [visible_token(hooked.tokenizer, i) for i in prompt.ids])


def prompt_of(
    hooked: HookedSAEs, prompt: Any, limits: Limits, new_tokens: int = 0, *, chat: bool = False, system: str = ""
) -> Prompt:
    """The prompt as the model gets it.

    Args:
        new_tokens: how many must still fit behind it.
        chat: it is the user's message, put into the model's chat template. system: a message before it.

    Raises:
        ArgumentError: empty, too long for the page, or a conversation where the tokenizer has no template.
        ContextLengthError: too long for the model.
    """
    if not isinstance(prompt, str) or not prompt:
        raise ArgumentError("The prompt is empty. Write some text.")
    if len(prompt) + len(system) > limits.prompt_chars:
        raise ArgumentError(
            f"The prompt has {len(prompt) + len(system)} characters; this page allows {limits.prompt_chars}. Shorten it."
        )
    given: Any = [{"role": "system", "content": system}] if system else []
    given.append({"role": "user", "content": prompt})
    ids: Sequence[int] = (
        conversation_ids(given, hooked.tokenizer)[0] if chat else hooked.tokenizer(prompt, verbose=False)["input_ids"]
    )
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
    return Prompt(list(ids), given if chat else list(ids))
