"""The claims by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reproduction.data import Data
from reproduction.laboratory import Lab
from reproduction.outcome import Outcome
from reproduction.runner import Run

Measure = Callable[[Lab], Outcome]
Trains = Callable[[Lab], list[Run]]


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
    trains: Trains
    """The SAEs that it takes, in the form and on the data of the laboratory."""
    measure: Measure
    remark: str = ""
    """What we make of the numbers, written after they were seen."""


MODULES = ("sparsity", "methods", "jumprelu", "training", "scaling", "latents", "steering", "inference")
"""Files in `claims/`, in the order of the page."""
CLAIMS: dict[str, Claim] = {}


def claim(
    name: str, *, source: str, says: str, shown: str, trains: Trains, remark: str = ""
) -> Callable[[Measure], Measure]:
    """Enter a function as the measurement of a claim."""

    def enter(measure: Measure) -> Measure:
        CLAIMS[name] = Claim(name, source, says, shown, trains, measure, remark)
        return measure

    return enter


def methods(*names: str, on: Callable[[Lab], Sequence[Data]] = lambda lab: lab.everywhere) -> Trains:
    """The default SAEs of some methods."""
    return lambda lab: [run for data in on(lab) for name in names for run in lab.runs(data, name)]


def arms(
    of: Callable[[Lab, Any], Mapping[Any, list[Run]]], on: Callable[[Lab], Sequence[Any]] = lambda lab: lab.everywhere
) -> Trains:
    """Those that a function names for each of the data."""
    return lambda lab: [run for data in on(lab) for runs in of(lab, data).values() for run in runs]


def nothing(lab: Lab) -> list[Run]:
    """No SAE."""
    return []


def claims() -> dict[str, Claim]:
    """All of them, in the order of the page."""
    modules = [importlib.import_module(f"reproduction.claims.{module}").__name__ for module in MODULES]
    return dict(sorted(CLAIMS.items(), key=lambda item: modules.index(item[1].measure.__module__)))
