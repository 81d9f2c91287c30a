"""The strength that moves the model's next tokens by a given KL."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from builders import random_ids, tiny_sae
from torch.nn.functional import kl_div

from saehook.edits import ablate, add_vector, at_least, at_most, clamp, scale, steer
from saehook.errors import ArgumentError
from saehook.interventions import Program, VectorEdit
from saehook.kl_strength import strength_for_kl
from saehook.metrics import token_kl
from saehook.where import Where, generation, tokens

SITE = "layers.1.resid_post"
TEXT = [random_ids(30, bos=True), random_ids(17, seed=1), random_ids(24, seed=2, bos=True)]


@pytest.fixture
def hooked(models_by_name) -> Any:
    return models_by_name("llama")[0].attach({SITE: tiny_sae()})


@torch.no_grad()
def mean_kl(hooked: Any, program: Program) -> float:
    """Row by row, without padding; the mask here is all but the BOS."""
    total, n = 0.0, 0
    for row in TEXT:
        keep = torch.tensor(row) != hooked.tokenizer.bos_token_id
        clean, edited = (
            logits[0, keep].double().log_softmax(-1)
            for logits in (hooked.model(row).logits, hooked(row, program).logits)
        )
        total += float(kl_div(edited, clean, log_target=True, reduction="sum"))
        n += int(keep.sum())
    return total / n


@pytest.mark.parametrize(
    ("edit", "target"),
    [
        (steer(5, 1.0), 1e-4),
        (steer(5, 1.0), 0.5),
        (steer(5, -40.0, unit="norm"), 0.05),
        (steer([5, 6], 0.0, unit="max"), 0.01),
        (clamp(5, 30.0, unit="max"), 0.3),
        (clamp(5, -0.01), 0.3),
        (scale(5, 1.5), 0.02),
        (scale(5, 0.9), 5e-4),
        (scale(5, -1.0), 0.15),
        (at_least(5, 0.1), 0.2),
        (at_most(5, 2.0), 0.06),
        (steer(5, 1.0, active_only=True), 0.1),
        (steer(5, 1.0, where=tokens(3)), 1e-3),
        (VectorEdit(op="add", vector=(1.0,) * 32, value=-0.1, site="layers.0.mlp_out"), 0.05),
    ],
    ids=str,
)
def test_the_kl_is_the_one_asked_for(hooked, edit, target):
    found = strength_for_kl(hooked, edit, target, TEXT)
    assert found.kl == pytest.approx(target, rel=0.01)
    assert found.kl == pytest.approx(mean_kl(hooked, Program(edits=[found.edit])), rel=1e-3)
    assert found.tokens == 30 + 17 + 24
    assert found.passes <= 12
    assert edit.value is not None
    assert found.edit.value is not None
    assert found.edit == dataclasses.replace(edit, value=found.edit.value)
    assert (found.edit.value < 0) == (edit.value < 0)


def test_few_passes_and_the_clean_one_only_once(hooked):
    passes = []
    handle = hooked.lm.get_input_embeddings().register_forward_pre_hook(lambda *_: passes.append(1))
    found = strength_for_kl(hooked, steer(5, 1.0), 0.2, TEXT)
    handle.remove()
    assert len(passes) == found.passes + 1
    assert found.passes <= 7


def test_the_text_runs_in_parts_that_fit(hooked, monkeypatch):
    whole = strength_for_kl(hooked, steer(5, 1.0), 0.2, TEXT)
    monkeypatch.setattr("saehook.kl_strength.MAX_LOGITS", 1)
    parts = strength_for_kl(hooked, steer(5, 1.0), 0.2, TEXT)
    assert parts.edit.value == pytest.approx(whole.edit.value, rel=1e-4)
    assert parts.tokens == whole.tokens


def test_the_error_and_norm_of_the_program_count(hooked):
    edit, norm = steer(5, 1.0, where=tokens(3)), {"cap": 2.0}
    found = strength_for_kl(hooked, edit, 0.25, TEXT, error="drop", norm=norm)
    assert mean_kl(hooked, Program(edits=[found.edit], error="drop", norm=norm)) == pytest.approx(0.25, rel=0.01)
    with pytest.raises(ArgumentError, match="largest reached"):  # what is dropped is there however small the edit is
        strength_for_kl(hooked, edit, 1e-4, TEXT, error="drop")


def test_edits_of_generated_tokens_and_of_rows_are_measured_on_all(hooked):
    everywhere = strength_for_kl(hooked, steer(5, 1.0), 0.2, TEXT)
    for where in (generation(), Where(rows=(7,))):
        found = strength_for_kl(hooked, steer(5, 1.0, where=where), 0.2, TEXT)
        assert found.edit.value == everywhere.edit.value
        assert found.edit.where == where


@pytest.mark.parametrize(
    ("edit", "target"),
    [
        (steer(5, 1.0), 1000.0),
        (scale(5, 0.5), 5.0),
        (at_most(5, 1.0), 5.0),
        (at_least(5, -1.0), 0.1),
        (clamp(5, 1.0), 1e-9),
    ],
    ids=str,
)
def test_a_kl_out_of_reach(hooked, edit, target):
    with pytest.raises(ArgumentError, match=r"the largest reached was \S+, with value \S+, the smallest") as caught:
        strength_for_kl(hooked, edit, target, TEXT)
    said = str(caught.value).split()
    largest, smallest = (
        float(said[said.index(word) + step].strip(",")) for word, step in (("largest", 3), ("smallest", 1))
    )
    assert not smallest <= target <= largest


@pytest.mark.parametrize(
    ("edit", "target", "text", "message"),
    [
        (ablate(5), 0.1, TEXT, "no value"),
        (steer(5, 1.0, unit="kl"), 0.1, TEXT, "the KL itself"),
        (steer(5, 1.0), 0.0, TEXT, "above 0"),
        (steer(5, 1.0), float("nan"), TEXT, "above 0"),
        (steer(5, 1.0), True, TEXT, "above 0"),
        (steer(5, 1.0), 0.1, [0, 0], "in the mask"),
        (steer(5, 1.0), 0.1, "", "empty"),
    ],
)
def test_what_is_refused(hooked, edit, target, text, message):
    with pytest.raises(ArgumentError, match=message):
        strength_for_kl(hooked, edit, target, text)


def test_kl_of_tokens_in_chunks(monkeypatch):
    clean, edited = 3 * torch.randn(11, 7), 3 * torch.randn(11, 7)
    expected = kl_div(
        edited.double().log_softmax(-1), clean.double().log_softmax(-1), log_target=True, reduction="none"
    )
    for chunk in (1, 14, 1000):
        monkeypatch.setattr("saehook.metrics.CHUNK_LOGITS", chunk)
        torch.testing.assert_close(token_kl(clean, edited), expected.sum(-1))
    assert token_kl(clean[:0], edited[:0]).shape == (0,)


@pytest.mark.parametrize(
    "edit",
    [
        steer(5, 0.05, unit="kl"),
        steer(5, -0.05, unit="kl"),
        clamp(5, 0.1, unit="kl"),
        scale(5, 0.01, unit="kl"),
        add_vector([1.0, -1.0] * 16, 0.03, unit="kl", site="layers.0.mlp_out"),
    ],
    ids=str,
)
def test_a_strength_that_is_a_kl_becomes_an_amount(hooked, edit):
    with pytest.raises(ArgumentError, match=r"hooked\.calibrate\(edits, text\)"):
        hooked(TEXT[0], edit)
    other = ablate(7)
    program = hooked.calibrate([other, edit], TEXT)
    assert program.edits[0] == other
    found = program.edits[1]
    assert dataclasses.replace(found, value=edit.value, unit="kl") == edit
    assert found.unit == "raw"
    assert mean_kl(hooked, Program(edits=[found])) == pytest.approx(abs(edit.value), rel=0.011)
    if edit.op == "add":
        assert (found.value > 0) == (edit.value > 0)


def test_only_some_operations_have_a_kl():
    with pytest.raises(ArgumentError, match="unit='kl' is for set, add, scale, not for 'min'"):
        at_least(5, 0.1, unit="kl")
    with pytest.raises(ArgumentError, match="KL of 0 is the unedited model"):
        steer(5, 0.0, unit="kl")
