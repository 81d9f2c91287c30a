"""The claims by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from reproduction.laboratory import Lab
from reproduction.outcome import Outcome

Measure = Callable[[Lab], Outcome]


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and how it is measured."""

    name: str
    source: str
    """Paper and section."""
    says: str
    """The claim, in our words."""
    shown: str
    """What must be seen for it to hold."""
    measure: Measure


MODULES = ("sparsity", "methods", "jumprelu", "training", "scaling", "latents", "steering", "inference")
"""Files in `claims/`, in the order of the page."""
CLAIMS: dict[str, Claim] = {}


def claim(name: str, *, source: str, says: str, shown: str) -> Callable[[Measure], Measure]:
    """Enter a function as the measurement of a claim."""

    def enter(measure: Measure) -> Measure:
        CLAIMS[name] = Claim(name, source, says, shown, measure)
        return measure

    return enter


def claims() -> dict[str, Claim]:
    """All of them, in the order of the page."""
    modules = [importlib.import_module(f"reproduction.claims.{module}").__name__ for module in MODULES]
    return dict(sorted(CLAIMS.items(), key=lambda item: modules.index(item[1].measure.__module__)))
