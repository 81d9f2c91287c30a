"""What one visitor of the page may ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from saehook.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the page, checked on the server."""

    prompt_chars: int = 8000
    """Longest prompt, in characters: what is longer is not even tokenised."""
    prompt_tokens: int = 256
    """Longest prompt, in tokens."""
    new_tokens: int = 200
    """Most new tokens per lane."""
    edits: int = 8
    """Edits of one program."""
    strength: float = 1e5
    """Largest absolute value of an edit's strength."""
    strengths: int = 16
    """Strengths of one sweep."""
    prompts: int = 4
    """Prompts of one sweep."""
    exact_tokens: int = 64
    """Longest prompt whose latents are ablated one by one."""
    scan_tokens: int = 100_000
    """Most tokens of text that are scanned for a latent."""
    seconds: float = 60.0
    """Longest time for one lane."""
    upload_bytes: int = 2**30
    """Largest upload, where uploads are allowed."""
    uploads: int = 4
    """Visitors who may have an SAE of their own attached at a time."""
    queue: int = 16
    """Visitors who may wait for the model; the next one is told that the page is busy."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not math.isfinite(value) or value <= 0:
                raise ArgumentError(f"Limits.{name} is {value!r}; a number above 0 is expected.")
