"""How the model chooses its next token, the same in every lane."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from saehook.app.limits import Limits
from saehook.errors import ArgumentError

MAX_TEMPERATURE = 2.0
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """Settings of one generation."""

    sample: bool
    """Draw from the distribution; else always the likeliest token."""
    temperature: float
    """Of the distribution, where `sample` is on."""
    new_tokens: int
    """Most new tokens."""
    seed: int
    """Of the random numbers."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability, where `sample` is on."""

    def arguments(self) -> dict[str, Any]:
        """Arguments of `generate` and `stream`."""
        arguments: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": self.sample}
        if self.sample:
            arguments |= {"temperature": self.temperature, "seed": self.seed}
            if self.top_p < 1:
                arguments["top_p"] = self.top_p
        return arguments


def sampling_of(
    sample: Any, temperature: Any, new_tokens: Any, seed: Any, limits: Limits, top_p: Any = 1.0
) -> Sampling:
    """Settings from what a visitor sent.

    Raises:
        ArgumentError: a value out of its range; the message gives both.
    """
    if not 1 <= _whole(new_tokens, "The number of new tokens") <= limits.new_tokens:
        raise ArgumentError(
            f"{new_tokens} new tokens were asked for; this page allows 1 to {limits.new_tokens}. Ask for fewer, or start the "
            "page with Limits(new_tokens=...)."
        )
    if not 0 <= _whole(seed, "The seed") <= MAX_SEED:
        raise ArgumentError(f"The seed is {seed}; a whole number from 0 to {MAX_SEED} is expected.")
    number, share = (isinstance(v, (int, float)) and math.isfinite(v) for v in (temperature, top_p))
    if sample and not (share and 0 < top_p <= 1):
        raise ArgumentError(f"Top-p is {top_p}; a number above 0, at most 1, is expected. 1 leaves no token out.")
    if sample and not (number and 0 < temperature <= MAX_TEMPERATURE):
        raise ArgumentError(
            f"The temperature is {temperature}; a number above 0, at most {MAX_TEMPERATURE:g}, is expected. Switch sampling "
            "off for the likeliest text."
        )
    return Sampling(
        bool(sample), float(temperature) if number else 1.0, int(new_tokens), int(seed), float(top_p) if share else 1.0
    )


def _whole(value: Any, what: str) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value != int(value)
    ):
        raise ArgumentError(f"{what} is {value!r}; a whole number is expected.")
    return int(value)
