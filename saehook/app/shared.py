"""What all tabs of the page share: the model, and the controls above the tabs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from saehook.app.limits import Limits
from saehook.app.program_rows import whole_numbers
from saehook.app.uploads import Uploads
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.sae import SAE

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""For listeners that never run the model, and never complain."""
TOLD: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 8}
"""For listeners that never run the model and may have something to complain of: Gradio shows messages of queued ones only."""
ON_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""For listeners that run the model: one at a time."""


@dataclass
class Shared:
    """Nothing here changes once the page is built; what a visitor sets stays with the visitor's page."""

    uploads: Uploads
    """What a visitor's request runs."""
    limits: Limits
    served_paths: Mapping[str, str]
    """Where each served SAE lies, by site."""
    prompt: gr.Textbox
    site: gr.Dropdown
    latent: gr.Textbox
    """The chosen latent, of the SAE at `site`."""
    reading: gr.State
    """The `Reading` of the prompt, or None."""
    editor: gr.HTML
    """The program: `program_rows`."""
    chat: gr.Checkbox
    """Whether the prompt is a message in the chat template."""
    span: gr.State
    """The chosen tokens of the reading, from the first to before the second; None: all."""
    controls: list[Any] = field(default_factory=list)
    """What a link restores, beside the editor: each has an id and a label."""
    tabs: gr.Tabs | None = None
    tab: gr.State | None = None
    """Id of the open tab."""

    @property
    def hooked(self) -> HookedSAEs:
        """The model with the SAEs that this visitor has."""
        return self.uploads.hooked

    @property
    def sae_paths(self) -> dict[str, str]:
        """Where each of them lies, by site; nowhere if it was uploaded."""
        own, served = self.hooked.saes, self.uploads.served.saes
        return {site: path for site, path in self.served_paths.items() if own.get(site) is served.get(site)}

    @property
    def has_template(self) -> bool:
        """Whether the model's tokenizer can write a conversation."""
        return bool(getattr(self.hooked.tokenizer, "chat_template", None))


def one_latent(chosen: Any, sae: SAE) -> int:
    """The latent that a visitor has chosen.

    Raises:
        ArgumentError: none or several. LatentError: the SAE does not have it.
    """
    if not chosen:
        raise ArgumentError("No latent is chosen. Read a text and choose one in the table, or type its number.")
    latent, *others = whole_numbers(chosen, "chosen latent", "one whole number")
    if others:
        raise ArgumentError(f"{1 + len(others)} latents are chosen; choose one.")
    sae.check_latents((latent,))
    return latent


def whole(event: gr.EventData, name: str) -> int | None:
    """A whole number that the browser sent with an event."""
    value = getattr(event, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def on_table_select(event: gr.EventData) -> Any:
    """A row of a table of latents chooses its latent."""
    latent = whole(event, "key")
    return gr.skip() if latent is None else str(latent)
