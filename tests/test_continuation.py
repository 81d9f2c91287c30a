"""Controls and judgements, compared with single runs."""

from __future__ import annotations

import pytest
import torch
from app_fixtures import SITES, tiny

from saehook import Edit, Program, ablate, generation, steer
from saehook.continuation import control_program, judge
from saehook.errors import ArgumentError


def test_a_control_has_the_dose_of_what_it_controls():
    program = Program(edits=[steer(3, 4.0, site=SITES[0], where=generation()), ablate([1, 2], site=SITES[1])])
    run = tiny().generate("hello", program, max_new_tokens=8, do_sample=False)
    control = control_program(tiny(), program, run.report, seed=1)
    assert [(edit.site, edit.where) for edit in control.edits] == [(edit.site, edit.where) for edit in program.edits]
    first = control.edits[0]
    assert isinstance(first, Edit)
    assert 3 not in first.latents
    again = tiny().generate("hello", control, max_new_tokens=8, do_sample=False)
    assert [one.dose for one in again.report.sites] == pytest.approx([one.dose for one in run.report.sites], rel=1e-3)
    assert control == control_program(tiny(), program, run.report, seed=1)
    with pytest.raises(ArgumentError, match="nothing to match"):
        control_program(tiny(), Program(), run.report, seed=1)


def test_a_judgement_is_the_unedited_models():
    prompt, new = [5, 6, 7], [8, 9, 8, 9, 8, 9, 8]
    found = judge(tiny(), prompt, new)
    with torch.no_grad():
        log_p = tiny().lm(torch.tensor([prompt + new])).logits[0].log_softmax(-1)
    losses = [-float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(new)]
    assert found.loss == pytest.approx(sum(losses) / len(new), rel=1e-5)
    assert found.repetition == pytest.approx(0.5), "8989 and 9898, twice each"
    with pytest.raises(ArgumentError, match="0 new ones"):
        judge(tiny(), prompt, [])
