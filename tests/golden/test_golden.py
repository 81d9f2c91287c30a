"""Training on planted data gives the numbers that were recorded (golden.json; record.py says how wide the tolerances are).

A change of the mathematics on purpose needs a new recording; a faster way to the same mathematics needs none.
"""

from __future__ import annotations

import json

import pytest
from golden.runs import CASES, FILE, LENGTHS, run

from saehook.config import METHODS

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", ["short", pytest.param("long", marks=pytest.mark.slow)])
def test_golden_run(case, length):
    golden = GOLDEN[length][case]
    numbers = run(case, length)
    assert list(numbers) == [*(f"step {step}" for step in LENGTHS[length][1]), "end"] == list(golden)
    wrong = [
        f"{when}: {name} = {value:.7g}, not {golden[when][name][0]:.7g} ± {golden[when][name][1]:.1g}"
        for when, values in numbers.items()
        for name, value in values.items()
        if not abs(value - golden[when][name][0]) <= golden[when][name][1]
    ]
    assert not wrong, "\n".join(wrong)


def test_every_method_is_run():
    assert {type(activation) for activation, _ in CASES.values()} == set(METHODS.values())
