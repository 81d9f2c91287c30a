"""Edits that run as one because only their rows and amounts differ."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from builders import build_lm, byte_tokenizer, tiny_sae

from saehook import HookedModel, Program, ablate, clamp, scale, steer
from saehook.edit_blocks import LatentBlock
from saehook.where import Where, generation

SITE = "layers.1.resid_post"
ROWS = [[5, 9, 17, 33], [6, 40, 41], [7, 8, 9, 10, 11], [12, 13]]


@pytest.fixture(scope="module")
def hooked():
    sae = tiny_sae(site=SITE)
    return HookedModel(build_lm("llama"), byte_tokenizer()).attach(sae)


def in_row(edit, row):
    return dataclasses.replace(edit, where=dataclasses.replace(edit.where, rows=(row,)))


def sizes(hooked, edits):
    block = LatentBlock(hooked.saes[SITE], list(enumerate(edits)), Program(edits=edits))
    return [len(group.parts) for group in block.row_edits]


def test_which_edits_run_as_one(hooked):
    strengths = [in_row(steer(3, float(i)), i) for i in range(4)]
    assert sizes(hooked, strengths) == [4]
    assert sizes(hooked, [*strengths[:2], clamp(3, 1.0), *strengths[2:]]) == [2, 1, 2]
    assert sizes(hooked, [strengths[0], steer(3, 1.0)]) == [1, 1], "all rows"
    assert sizes(hooked, [strengths[0], strengths[0]]) == [1, 1], "the same row twice"
    assert sizes(hooked, [strengths[0], in_row(steer(4, 1.0), 1)]) == [1, 1], "another latent"
    assert sizes(hooked, [strengths[0], in_row(steer(3, 1.0, where=generation()), 1)]) == [1, 1], "other tokens"
    assert sizes(hooked, [in_row(ablate(3), 0), in_row(ablate(3), 1)]) == [1, 1], (
        "without an amount there is nothing to gain"
    )


@pytest.mark.parametrize(
    "edit",
    [
        steer((3, 7), 2.0),
        steer(3, 0.5, unit="norm"),
        clamp(3, 2.0),
        scale((3, 9), 0.25),
        clamp((3, 5), 1.0, active_only=True),
        steer(3, 2.0, where=Where(tokens=(1,))),
        steer(3, 2.0, where=generation()),
    ],
    ids=str,
)
def test_each_row_is_what_its_edit_alone_makes_of_it(hooked, edit):
    amounts = [0.5, -1.0, 3.0]
    alone = [dataclasses.replace(edit, value=edit.value * amount) for amount in amounts]
    edits = [in_row(one, row) for row, one in enumerate(alone)]
    texts = hooked.generate(ROWS, edits, do_sample=False, num_beams=2, max_new_tokens=3)
    for row, one in enumerate(alone):
        own = hooked.generate(ROWS[row], one, do_sample=False, num_beams=2, max_new_tokens=3)
        assert texts[row].ids.tolist() == own.ids.tolist()
        assert texts[row].report.edits[row].tokens == own.report.edits[0].tokens
        assert texts[row].report.edits[row].dose == pytest.approx(own.report.edits[0].dose, rel=1e-4)
    if edit.where.prompt:
        logits = hooked(ROWS, edits).logits[:, -1]
        for row, one in enumerate([*alone, ()]):
            torch.testing.assert_close(logits[row], hooked(ROWS[row], one).logits[0, -1], rtol=1e-5, atol=1e-5)


def test_a_full_report_tells_the_rows_apart(hooked):
    edits = [in_row(clamp(3, amount), row) for row, amount in enumerate((2.0, 5.0))]
    report = hooked.report(ROWS, edits)
    for row, amount in enumerate((2.0, 5.0)):
        (change,) = report.edits[row].latents
        assert change.after == pytest.approx(amount)
        (own,) = hooked.report(ROWS[row], clamp(3, amount)).edits[0].latents
        assert change.before == pytest.approx(own.before, rel=1e-5)
