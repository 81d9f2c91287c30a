"""The numbered edge cases of editing, each with the model running.

The numbers are those of the list that the edit algebra was designed from; where a test says "here", our docstrings define
another rule than the list, and why. Rule 29 (SAEs sharded over processes) has no test here: it comes with the sharded SAE.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import threading
from collections.abc import Iterator
from typing import Any

import nnsight
import pytest
import reference_hooks as reference
import torch
from builders import BOS, EOS, LAYERS, PAD, SPECIAL, WIDTH, build_lm, byte_tokenizer, footprint, random_ids, tiny_sae
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from saehook.conditions import latent
from saehook.config import BatchTopK
from saehook.edits import (
    ablate,
    add_vector,
    at_least,
    at_most,
    cap_along,
    clamp,
    keep_only,
    project_out,
    resample,
    scale,
    steer,
    swap,
)
from saehook.errors import (
    ArgumentError,
    FormatError,
    LatentError,
    MissingStatError,
    NoEffectWarning,
    SiteError,
    SiteNotExecutedError,
)
from saehook.hooked_model import HookedModel
from saehook.interventions import AnyEdit, Program
from saehook.schedules import Schedule
from saehook.where import Where, generation, matching, prompt, roles, span, tokens

SITE = "layers.1.resid_post"
NEXT = "layers.2.resid_pre"
IDS = random_ids(9, seed=5, bos=True)
OTHER = random_ids(5, seed=6, bos=True)
TOUCHED = 3  # a token of IDS

quiet = pytest.mark.filterwarnings("ignore::saehook.errors.NoEffectWarning")


def tensor(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def attach(models_by_name: Any, name: str = "llama", **sae: Any) -> tuple[Any, Any]:
    """(handle, plain torch model with the same weights)."""
    model, lm = models_by_name(name)
    return model.attach(tiny_sae(site=SITE, **sae)), lm


@contextlib.contextmanager
def seen(lm: Any, site: str = NEXT) -> Iterator[list[Tensor]]:
    """What a plain torch hook sees at a site, pass by pass."""
    values: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        values.append(x.detach().clone())
        return x

    with reference.written(lm, site, look):
        yield values


@torch.no_grad()
def changed(hooked: Any, ids: Any, program: Any, **call: Any) -> Tensor:
    """x' at `SITE`, [rows, n, d], as the next layer reads it."""
    with seen(hooked.lm) as values:
        hooked(ids, program, **call)
    return values[-1]


@torch.no_grad()
def logits(run: Any, ids: Any, *args: Any, **call: Any) -> Tensor:
    return run(ids, *args, **call).logits


def clean(lm: Any, ids: list[int]) -> Tensor:
    return logits(lm, tensor(ids))


class Scores(LogitsProcessor):
    """Keeps the scores of each step of a generation."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.clone())
        return scores


def generated(hooked: Any, ids: Any, program: Any, **settings: Any) -> tuple[Any, Tensor]:
    """(what `generate` gives, scores [steps, rows, vocabulary])."""
    scores = Scores()
    result = hooked.generate(ids, program, logits_processor=LogitsProcessorList([scores]), **settings)
    return result, torch.stack(scores.steps)


def equal_runs(hooked: Any, program: Any, *ways: dict[str, Any], ids: Any = IDS, new: int = 8) -> None:
    """Tokens and scores are the same in all these ways of generating."""
    first, expected = generated(hooked, ids, program, max_new_tokens=new, **ways[0])
    for way in ways[1:]:
        result, scores = generated(hooked, ids, program, max_new_tokens=new, **way)
        assert result.new_ids.tolist() == first.new_ids.tolist(), way
        assert result.report.edits[0].tokens == first.report.edits[0].tokens > 0, way
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4, msg=str(way))


def with_field(edit: AnyEdit, name: str, value: Any) -> str:
    """A program of one edit as JSON, with a field of the edit replaced."""
    data = json.loads(Program(edits=[edit]).to_json())
    data["edits"][0][name] = value
    return json.dumps(data)


STATEFUL = [
    (latent(6, over="so_far_max") > 4.0) & ~(latent(3, over="last") > 6.0),
    (latent(11) > 2.5).hold(2) | (latent(2, over="decay", decay=0.5) > 3.0),
]
REMEMBERS = [steer(9, 6.0, when=STATEFUL[0]), clamp((5, 6), 4.0, when=STATEFUL[1]), ablate(2, where=span(2))]


# --- what an edit may say --------------------------------------------------------------------------------------------


def test_rule_01_a_latent_twice_in_one_edit_is_an_error_and_in_two_the_listed_order_counts(models_by_name):
    for twice in ((9, 9), (9, 4, 9)):
        with pytest.raises(ArgumentError, match="names a latent twice"):
            ablate(twice)
    with pytest.raises(FormatError, match=r"edits\[0\].*names a latent twice"):
        Program.from_json(with_field(ablate(9), "latents", [9, 9]))
    hooked, lm = attach(models_by_name)
    sae, x = hooked.saes[SITE], reference.read(lm, SITE, tensor(IDS))[0, TOUCHED]
    acts = reference.encode(sae, x)
    i, z = int(acts.argmax()), float(acts.max())
    here: dict[str, Any] = {"where": tokens(TOUCHED)}
    for edits, result in [
        ([clamp(i, 2.0, **here), scale(i, 3.0, **here)], 6.0),
        ([scale(i, 3.0, **here), clamp(i, 2.0, **here)], 2.0),
        ([steer(i, 1.0, **here), steer(i, 0.5, **here)], z + 1.5),
        ([clamp(i, 2.0, **here), steer(i, 1.0, **here), at_most(i, 2.5, **here)], 2.5),
    ]:
        expected = x + (result - z) * sae.W_dec[i].detach()
        torch.testing.assert_close(changed(hooked, IDS, edits)[0, TOUCHED], expected)


def test_rule_02_a_latent_that_the_sae_lacks_is_an_error_before_anything_runs(models_by_name):
    with pytest.raises(LatentError, match="-1 is negative"):
        ablate((3, -1))
    with pytest.raises(LatentError, match="-1 is negative"):
        latent(-1)
    hooked, _ = attach(models_by_name)
    for edit in (ablate((3, 48)), swap(48, 1), steer(3, 1.0, when=latent(48) > 0.0), resample(48, (0, 1))):
        for run in (hooked, hooked.loss, hooked.generate):
            with seen(hooked.lm) as values, pytest.raises(LatentError, match=r"latent 48 is outside 0\.\.47"):
                run(IDS, [steer(1, 1.0), edit])
            assert not values, "the model ran"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rule_03_strengths_are_finite(value):
    makers: list[Any] = [
        lambda: steer(3, value),
        lambda: scale(3, value),
        lambda: at_least(3, value),
        lambda: add_vector([1.0, 0.0], value),
        lambda: project_out([1.0, value]),
        lambda: latent(3) > value,
        lambda: latent(3, over="decay", decay=value),
        lambda: Schedule.linear(1.0, value, 3),
        lambda: Schedule.steps(1.0, value),
        lambda: Program(norm={"cap": value}),
    ]
    for make in makers:
        with pytest.raises(ArgumentError, match="finite|decay=") as raised:
            make()
        assert isinstance(raised.value, ValueError)
    text = with_field(steer(3, 1.0), "value", value)  # NaN and Infinity, as Python writes them
    with pytest.raises(FormatError, match=r"edits\[0\]"):
        Program.from_json(text)


def test_rule_03_directions_are_not_zero(models_by_name):
    for make in (add_vector, project_out, lambda vector: cap_along(vector, 1.0)):
        with pytest.raises(ArgumentError, match="no direction"):
            make([0.0] * WIDTH)
    hooked, _ = attach(models_by_name)
    with torch.no_grad():
        hooked.saes[SITE].W_dec[7] = 0.0
    with pytest.raises(ArgumentError, match="decoder row of latent 7 is 0"):
        hooked(IDS, steer(7, 1.0, unit="norm"))


def test_rule_04_an_edit_that_names_nothing_is_an_error_and_one_that_finds_nothing_says_so(models_by_name):
    # Here an empty list is an error and no silent no-op: nobody means it, and `strict` would be one switch more.
    empties: list[Any] = [
        lambda: ablate(()),
        lambda: keep_only([]),
        lambda: tokens(),
        lambda: Where(tokens=()),
        lambda: Where(rows=()),
        lambda: Where(token_ids=()),
        lambda: span(3, 3),
        lambda: roles(),
        lambda: Where(prompt=False, generation=False),
    ]
    for make in empties:
        with pytest.raises(ArgumentError):
            make()
    hooked, lm = attach(models_by_name)
    nothing = [
        steer(9, 3.0, where=span(60)),
        steer(9, 3.0, where=Where(token_ids=(EOS,))),
        steer(9, 3.0, when=latent(9) > 1e6),
        steer(9, 3.0, where=matching("no such text")),
    ]
    for edit in nothing:
        with pytest.warns(NoEffectWarning, match="selected no token, so it did nothing"):
            assert torch.equal(logits(hooked, IDS, edit), clean(lm, IDS))
    with pytest.warns(NoEffectWarning):
        report = hooked.generate(IDS, nothing, max_new_tokens=2).report
    assert [edit.tokens for edit in report.edits] == [0] * len(nothing)


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_05_an_edit_that_changes_no_latent_changes_no_bit(dtype):
    hooked = HookedModel(build_lm("llama", dtype=dtype), byte_tokenizer()).attach(tiny_sae(site=SITE))
    acts = hooked.latents(IDS).acts[TOUCHED]
    firing, (silent, other) = int(acts.argmax()), (acts == 0).nonzero()[:2, 0].tolist()
    here: dict[str, Any] = {"where": tokens(TOUCHED)}
    for program in (
        scale((firing, silent), 1.0),
        steer((firing, silent), 0.0),
        add_vector([1.0] * WIDTH, 0.0, site=SITE),
        clamp(firing, float(acts[firing]), **here),
        clamp(firing, float(acts[firing]), mode="readback", **here),
        at_least(firing, float(acts[firing]) - 0.5, **here),
        at_most(firing, float(acts[firing]) + 0.5, **here),
        ablate((silent, other), **here),
        swap(silent, other, **here),
        resample((firing, silent), (0, TOUCHED), **here),
        keep_only(range(48)),
        steer(firing, 3.0, schedule=Schedule.steps(0.0)),
        steer(silent, 3.0, active_only=True, **here),
        steer(firing, 3.0, when=latent(firing) < 0.0),
        cap_along([1.0] * WIDTH, 1e6, site=SITE),
        Program(edits=[scale(firing, 1.0)], norm="preserve"),
        Program(edits=[steer(firing, 0.0)], norm={"cap": 0.1}),
        Program(edits=[steer(firing, 0.0), scale(silent, 1.0)], parallel=True),
    ):
        assert torch.equal(logits(hooked, IDS, program), logits(hooked.lm, tensor(IDS))), program


# --- which tokens ----------------------------------------------------------------------------------------------------


@quiet
def test_rule_06_padding_is_never_touched_and_a_left_padded_row_is_the_row_alone(models_by_name):
    hooked, _ = attach(models_by_name)
    row = OTHER[1:]  # begins with an ordinary token, so that what is before it matters
    padding = len(IDS) - len(row)
    everywhere, first = Where(special=True), float(hooked.latents(row).acts[0, 12])
    assert first > 1.0, "no latent to be silent after"
    for edits in (
        [steer(9, 2.0, where=everywhere), ablate((1, 2, 3), where=everywhere)],
        [steer(9, 2.0, where=Where(token_ids=(PAD, *row[1:]), special=True))],
        # Padding has no latents, and yet is no token at which a latent is silent.
        [steer(9, 2.0, where=everywhere, when=(latent(12) < 1.0).hold(2)), clamp(5, 1.0, where=span(0, 2))],
        [steer(9, 2.0, where=everywhere, when=~(latent(12) > 4.0).hold(2)), ablate(1)],
        [steer(9, 2.0, where=everywhere, when=latent(12, over="last") <= 1.0)],
        [steer(9, 2.0, where=everywhere, when=latent(12, over="decay", decay=0.5) < 6.0)],
        [steer(9, 2.0, where=everywhere, when=latent(12, over="prompt_max") > 12.0), ablate(3, where=tokens(0, -1))],
        [resample((3, 4), (1, 1), where=everywhere)],
    ):
        batch, unedited = (changed(hooked, [IDS, row], program)[1] for program in (edits, ()))
        assert torch.equal(batch[:padding], unedited[:padding]), edits
        assert not torch.equal(batch, unedited), edits
        alone = [e if e.source is None else dataclasses.replace(e, source=(0, e.source[1])) for e in edits]
        torch.testing.assert_close(batch[padding:], changed(hooked, row, alone)[0], rtol=1e-5, atol=1e-5)
    report = hooked.generate([IDS, row], steer(9, 2.0, where=everywhere), max_new_tokens=1)[0].report
    assert report.edits[0].tokens == len(IDS) + len(row)


def test_rule_07_right_padding_is_masked_in_a_forward_pass_and_refused_by_generate(models_by_name):
    hooked, _ = attach(models_by_name)
    padding = len(IDS) - len(OTHER)
    ids = tensor(IDS, OTHER + [PAD] * padding)
    mask = tensor([1] * len(IDS), [1] * len(OTHER) + [0] * padding)
    edits = [steer(9, 2.0, where=Where(special=True)), clamp(3, 1.0, where=tokens(-1))]
    batch = changed(hooked, ids, edits, attention_mask=mask)
    torch.testing.assert_close(batch[1, : len(OTHER)], changed(hooked, OTHER, edits)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(batch[1, len(OTHER) :], changed(hooked, ids, (), attention_mask=mask)[1, len(OTHER) :])
    with seen(hooked.lm) as values:
        for padded in (ids, ids.flip(1)):
            with pytest.raises(ArgumentError, match=f"row 1 begins or ends with the padding token {PAD}"):
                hooked.generate(padded, edits)
        for given in ({"attention_mask": mask}, {"position_ids": mask.cumsum(1)}, {"input_ids": ids}):
            with pytest.raises(ArgumentError, match=f"got {next(iter(given))}.*Give a list of rows"):
                hooked.generate(ids, edits, **given)
    assert not values, "the model ran"


def test_rule_07_packed_texts_are_refused_where_edits_would_count_across_them(models_by_name):
    hooked, lm = attach(models_by_name)
    packed = tensor(IDS + OTHER)
    positions = tensor([*range(len(IDS)), *range(len(OTHER))])
    for program in (Program(edits=[steer(9, 2.0)]), Program(splice=True)):
        with seen(hooked.lm) as values, pytest.raises(ArgumentError, match="give each text as a row of its own"):
            hooked(packed, program, position_ids=positions)
        assert not values, "the model ran"
    # Without edits they are the model's own affair, and positions that go on are no packing.
    both = logits(hooked, packed, position_ids=positions, use_cache=False)[0]
    torch.testing.assert_close(both[len(IDS) :], clean(lm, OTHER)[0], rtol=0, atol=1e-4)
    shifted = torch.arange(5, 5 + len(IDS))[None]
    torch.testing.assert_close(
        logits(hooked, IDS, steer(9, 2.0), position_ids=shifted), logits(hooked, IDS, steer(9, 2.0))
    )


def test_rule_08_special_tokens_are_edited_only_where_the_edit_says_so(models_by_name):
    # Here all special tokens are left out by default, not BOS alone: one mask for training, metrics and edits.
    hooked, lm = attach(models_by_name)
    ids = [BOS, 20, EOS, 30, 20]
    x = reference.read(lm, SITE, tensor(ids))[0]
    for where, expected in [
        (Where(), [1, 3, 4]),
        (Where(bos=True), [0, 1, 3, 4]),
        (Where(special=True), [0, 1, 2, 3, 4]),
        (Where(bos=True, positions=(0, 1)), [0]),
        (tokens(0, 2), [0, 2]),
    ]:
        edit = steer(3, 2.0, where=where)
        for program in (Program(edits=[edit]), Program.from_json(Program(edits=[edit]).to_json())):
            moved = (changed(hooked, ids, program)[0] != x).any(-1).nonzero()[:, 0].tolist()
            assert moved == expected, where
    assert json.loads(Program(edits=[steer(3, 2.0, where=Where(bos=True))]).to_json())["edits"][0]["where"] == {
        "bos": True
    }


# --- generation ------------------------------------------------------------------------------------------------------


def test_rule_09_an_edit_of_the_prompt_acts_in_the_first_pass_of_a_cached_run_only(models_by_name):
    hooked, _ = attach(models_by_name)
    edits = [steer(9, 3.0, where=prompt()), ablate((1, 2), where=tokens(2, -1))]
    equal_runs(hooked, edits, {}, {"use_cache": False})
    at_mlp = hooked.model.attach({"layers.1.mlp_out": hooked.saes[SITE]}, check="off")
    down, mlp = "model.layers.1.mlp.down_proj:output", "model.layers.1.mlp:output"  # before the edit and behind it
    with seen(hooked.lm, down) as before, seen(hooked.lm, mlp) as after:
        at_mlp.generate(IDS, edits, max_new_tokens=4)
    moved = [bool((a != b).any()) for a, b in zip(before, after, strict=True)]
    assert moved == [True, False, False, False]
    at_mlp.detach()


def test_rule_10_without_a_cache_the_prompt_is_edited_again_in_the_same_way(models_by_name):
    hooked, lm = attach(models_by_name)
    for edits in ([steer(9, 3.0), ablate((1, 2), where=tokens(2, -1))], REMEMBERS):
        equal_runs(hooked, edits, {}, {"use_cache": False})
        with seen(hooked.lm) as values:
            hooked.generate(IDS, edits, max_new_tokens=4, use_cache=False)
        assert [len(x[0]) for x in values] == [10, 11, 12, 13]
        for x in values:
            torch.testing.assert_close(x[:, : len(IDS)], values[0], rtol=1e-5, atol=1e-5)
        assert (values[0] - reference.read(lm, SITE, tensor(IDS))).abs().max() > 0.1


def test_rule_11_beams_and_return_sequences_belong_to_the_row_that_they_continue(models_by_name):
    hooked, _ = attach(models_by_name)
    by_row = [
        steer(9, 3.0, where=Where(rows=(1,))),
        ablate((1, 2), where=Where(rows=(0,), tokens=(2,))),
        steer(4, 2.0, where=generation(), when=(latent(7, over="prompt_max") > 0.5) & (latent(3) < 2.0)),
        resample(5, (1, 2), where=Where(rows=(1,))),
    ]
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5}
    together = hooked.generate([IDS, OTHER], by_row, **beams)
    uncached = hooked.generate([IDS, OTHER], by_row, use_cache=False, **beams)
    assert [g.ids.tolist() for g in together] == [g.ids.tolist() for g in uncached]
    for row, ids in enumerate((IDS, OTHER)):
        alone = []
        for edit in by_row:
            if edit.where.rows in (None, (row,)):
                source = edit.source and (0, edit.source[1])
                where = dataclasses.replace(edit.where, rows=None)
                alone.append(dataclasses.replace(edit, where=where, source=source))
        expected = hooked.generate(ids, alone, **beams)
        assert [g.ids.tolist() for g in together[2 * row : 2 * row + 2]] == [g.ids.tolist() for g in expected]


@pytest.mark.parametrize("when", [*STATEFUL, latent(9, over="last") > 0.1, ~(latent(9) > 0.1).hold(1)])
def test_rule_11_a_condition_that_remembers_is_refused_with_beams(models_by_name, when):
    # Here state is not re-gathered with the cache: which beam continues which is not told to us.
    hooked, _ = attach(models_by_name)
    edit = steer(9, 2.0, when=when)
    with seen(hooked.lm) as values, pytest.raises(ArgumentError, match="beams change places"):
        hooked.generate(IDS, edit, num_beams=2, max_new_tokens=3)
    assert not values, "the model ran"
    assert len(hooked.generate(IDS, edit, do_sample=True, seed=1, num_return_sequences=2, max_new_tokens=3)) == 2


def test_rule_12_candidates_that_are_taken_back_leave_nothing_and_the_draft_model_is_not_edited(models_by_name):
    hooked, _ = attach(models_by_name)
    ids = [BOS, *[20, 30, 40, 50] * 4]
    draft = build_lm("llama", seed=0)
    with torch.no_grad():  # nearly the same model: some of its candidates are taken, some are not
        for weight in draft.parameters():
            weight.add_(0.02 * torch.randn(weight.shape))
    before = footprint(draft)
    for edits in ([steer(9, 2.0, where=generation())], REMEMBERS):
        expected = hooked.generate(ids, edits, max_new_tokens=12)
        for way in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": draft}, {"assistant_early_exit": 2}):
            with seen(draft) as values, seen(hooked.lm) as passes:
                result = hooked.generate(ids, edits, max_new_tokens=12, **way)
            assert result.new_ids.tolist() == expected.new_ids.tolist(), way
            if "assistant_model" in way:
                assert torch.equal(values[0], reference.read(draft, NEXT, tensor(ids)))
            assert max(x.shape[1] for x in passes[1:]) > 1, "no pass had candidates"
    assert footprint(draft) == before


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rule_13_a_static_cache_gives_the_same(models_by_name, name):
    # Captured graphs need an accelerator; what is tested is the length, which such a cache goes on changing in place.
    hooked, _ = attach(models_by_name, name)
    for edits in ([steer(9, 3.0, where=span(4, 14)), ablate(3, where=generation())], REMEMBERS[1:]):
        equal_runs(hooked, edits, {}, {"cache_implementation": "static"}, new=10)


# --- which sites -----------------------------------------------------------------------------------------------------


def test_rule_14_saes_at_one_site_see_each_others_writes_unless_they_are_parallel(models_by_name):
    model, lm = models_by_name("llama")
    first, second = tiny_sae(seed=1), tiny_sae(seed=2, activation="topk")
    hooked = model.attach({SITE: [first, second]})
    x = reference.read(lm, SITE, tensor(IDS))[0, TOUCHED]
    edits = [
        clamp(9, 4.0, site=f"{SITE}#0", where=tokens(TOUCHED)),
        scale(range(48), 0.5, site=f"{SITE}#1", where=tokens(TOUCHED)),
    ]

    def after_first(x: Tensor) -> Tensor:
        return x + (4.0 - reference.encode(first, x)[9]) * first.W_dec[9].detach()

    def after_second(x: Tensor) -> Tensor:
        return x - 0.5 * (reference.encode(second, x) @ second.W_dec).detach()

    one_by_one = after_second(after_first(x))
    added_up = after_first(x) + after_second(x) - x
    assert (one_by_one - added_up).abs().max() > 0.1
    torch.testing.assert_close(changed(hooked, IDS, edits)[0, TOUCHED], one_by_one)
    torch.testing.assert_close(changed(hooked, IDS, edits[::-1])[0, TOUCHED], after_first(after_second(x)))
    parallel = Program(edits=edits, parallel=True)
    torch.testing.assert_close(changed(hooked, IDS, parallel)[0, TOUCHED], added_up)
    for both in (Program(splice=True), Program(edits=edits, error="drop")):
        with pytest.raises(ArgumentError, match="2 SAEs stand at one site"):
            hooked(IDS, both)
    dropped = changed(hooked, IDS, Program(edits=edits[1:], error="drop"))[0, TOUCHED]
    torch.testing.assert_close(dropped, second.decode(0.5 * reference.encode(second, x)).detach())
    hooked.detach()
    twice = model.attach({SITE: [first, first]})
    for both in (Program(splice=True), Program(edits=[ablate(3, site=name) for name in twice.sites], error="drop")):
        with pytest.raises(ArgumentError, match="2 SAEs stand at one site"):
            twice(IDS, both)
    twice.detach()


def test_rule_15_one_sae_at_two_sites_encodes_what_reaches_each(models_by_name):
    # Here there is no `from_clean`: a second, clean pass would be another experiment. Latents of one can be noted first.
    model, lm = models_by_name("llama")
    sae, early = tiny_sae(), "layers.0.resid_post"
    hooked = model.attach({early: sae, SITE: sae})
    assert hooked.saes[early] is hooked.saes[SITE]
    where = tokens(TOUCHED)
    edits = [clamp(9, 4.0, site=SITE, where=where), clamp(9, -3.0, site=early, where=where)]

    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, TOUCHED] += (-3.0 - reference.encode(sae, x[0, TOUCHED])[9]) * sae.W_dec[9].detach()
        return x

    with reference.written(lm, early, write):
        x = reference.read(lm, SITE, tensor(IDS))[0, TOUCHED]
    expected = x + (4.0 - reference.encode(sae, x)[9]) * sae.W_dec[9].detach()
    torch.testing.assert_close(changed(hooked, IDS, edits)[0, TOUCHED], expected, rtol=0, atol=1e-5)
    with pytest.raises(FormatError, match="from_clean"):
        Program.from_json(with_field(edits[0], "from_clean", True))
    hooked.detach()


def test_rule_16_the_activation_is_taken_out_of_a_tuple_and_the_rest_stays():
    lm = build_lm("llama")
    lm.set_attn_implementation("eager")
    site = "model.layers.1.self_attn:output"
    sae = tiny_sae()
    hooked = HookedModel(lm, byte_tokenizer()).attach({site: sae})
    with torch.no_grad():
        plain = lm(tensor(IDS), output_attentions=True)
        result = hooked(IDS, steer(9, 2.0), output_attentions=True)
    assert torch.equal(result.attentions[1], plain.attentions[1]), "the second element"
    expected = reference.logits(lm, IDS, Program(edits=[steer(9, 2.0)]), {site: sae}, special=SPECIAL, prompt=len(IDS))
    torch.testing.assert_close(result.logits[0], expected, rtol=0, atol=1e-4)


def test_rule_16_the_activation_is_taken_out_of_an_output_object_and_the_rest_stays():
    lm, sae = build_lm("llama"), tiny_sae()
    hooked = HookedModel(lm, byte_tokenizer()).attach({"model:output": sae})
    with torch.no_grad():
        x = lm.model(tensor(IDS)).last_hidden_state
        x[0, TOUCHED] += 2.0 * sae.W_dec[9]
        result = hooked(IDS, steer(9, 2.0, where=tokens(TOUCHED)), use_cache=True)
        torch.testing.assert_close(result.logits, lm.lm_head(x), rtol=0, atol=1e-5)
    assert result.past_key_values.get_seq_length() == len(IDS)


class Boxed(nn.Module):
    """Gives its value in a dict."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x}


class BoxedMLP(nn.Module):
    """An MLP with such a module behind it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.box = mlp, Boxed()

    def forward(self, x: Tensor) -> Tensor:
        return self.box(self.mlp(x))["x"]


def test_rule_16_a_value_of_another_kind_is_an_error():
    lm = build_lm("llama")
    lm.model.layers[1].mlp = BoxedMLP(lm.model.layers[1].mlp)
    model = HookedModel(lm, byte_tokenizer())
    with pytest.raises(SiteError, match=r"box:output is a dict and no activation"):
        model.attach({"model.layers.1.mlp.box:output": tiny_sae()})
    with pytest.raises(SiteError, match=r"box:output is a dict and no activation"):
        model(IDS, add_vector([1.0] * WIDTH, site="model.layers.1.mlp.box:output"))
    assert torch.equal(logits(model, IDS), clean(build_lm("llama"), IDS))


def test_rule_17_a_site_that_no_pass_reached_is_an_error(models_by_name):
    # Here there is no `allow_missing`: an edit that may not have happened is never reported as one that did.
    hooked, lm = attach(models_by_name)
    for edit in (steer(9, 2.0), add_vector([1.0] * WIDTH, site="layers.2.mlp_out")):
        site = edit.site or SITE
        hooked.lm.config.num_hidden_layers = 1  # how early exit skips layers
        try:
            for run in (hooked, hooked.loss, hooked.generate):
                with pytest.raises(SiteNotExecutedError, match=f"did not run {site}"):
                    run(IDS, edit)
        finally:
            hooked.lm.config.num_hidden_layers = LAYERS
    assert torch.equal(logits(hooked, IDS), clean(lm, IDS))
    assert not torch.equal(logits(hooked, IDS, steer(9, 2.0)), clean(lm, IDS))


@pytest.mark.filterwarnings("ignore:the language model is in train mode")
def test_rule_18_what_gradient_checkpointing_computes_again_is_edited_the_same_or_refused():
    lm = build_lm("llama", seed=3)
    model = HookedModel(lm, byte_tokenizer())
    sae = tiny_sae()
    hooked = model.attach({SITE: sae})
    inside = model.attach({"layers.1.mlp_out": sae, "layers.1.resid_mid": sae})
    edits = [scale(range(48), 0.5), steer(9, 0.5)]
    lm.train()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(hooked(IDS, edits).logits.square().mean(), list(lm.parameters()))

    expected = gradients()
    lm.activation_checkpointing_enable()
    for ours, plain in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, plain)
    for site in inside.sites:
        edit = dataclasses.replace(edits[0], site=site)
        with pytest.raises(ArgumentError, match=f"gradient checkpointing computes {site} again"):
            inside(IDS, edit)
        assert logits(inside, IDS, edit).isfinite().all(), "without gradients nothing is computed again"
    lm.activation_checkpointing_disable()
    assert inside(IDS, dataclasses.replace(edits[0], site=inside.sites[0])).logits.requires_grad


def test_rule_18_a_site_that_runs_twice_in_a_pass_is_an_error():
    lm = build_lm("llama")
    lm.model.layers[2] = lm.model.layers[1]
    hooked = HookedModel(lm, byte_tokenizer()).attach({"layers.1.mlp_out": tiny_sae()})
    with pytest.raises(SiteError, match=r"runs layers\.1\.mlp_out twice in one forward pass"):
        hooked(IDS, steer(9, 2.0), use_cache=False)
    assert torch.equal(logits(hooked, IDS, use_cache=False), logits(lm, tensor(IDS), use_cache=False))


@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_19_the_change_is_made_in_float32_whatever_the_dtypes(dtype, sae_dtype):
    # Another device than the model's needs an accelerator: `test_an_sae_follows_the_model` says that an SAE is moved.
    lm = build_lm("llama", dtype=dtype)
    hooked = HookedModel(lm, byte_tokenizer()).attach(tiny_sae(site=SITE, dtype=sae_dtype))
    sae, x = hooked.saes[SITE], reference.read(lm, SITE, tensor(IDS))
    weights = [weight.data_ptr() for weight in sae.parameters()]
    result = changed(hooked, IDS, [steer(9, 0.3, where=tokens(2, 5)), scale((3, 4), 0.5, where=tokens(TOUCHED))])
    assert result.dtype == dtype
    expected = x.clone()
    expected[0, [2, 5]] = (x[0, [2, 5]].float() + torch.tensor(0.3) * sae.W_dec[9].detach().float()).to(dtype)
    halves = -0.5 * sae.encode(x)[0, TOUCHED, [3, 4]].detach().float()
    expected[0, TOUCHED] = (x[0, TOUCHED].float() + halves @ sae.W_dec[[3, 4]].detach().float()).to(dtype)
    assert torch.equal(result[0, [2, 5]], expected[0, [2, 5]])
    torch.testing.assert_close(result, expected)
    assert torch.equal(result[:, TOUCHED + 3 :], x[:, TOUCHED + 3 :])
    assert weights == [weight.data_ptr() for weight in sae.parameters()], "weights were copied"


def test_rule_20_what_float16_cannot_hold_is_named():
    # Here it is always an error, never clipped: `norm={"cap": ...}` bounds a change and says so in the program.
    hooked = HookedModel(build_lm("llama", dtype=torch.float16), byte_tokenizer()).attach(tiny_sae(site=SITE))
    edit = steer((7, 9), 6e4, where=Where(positions=(2, None), rows=(1,)))
    with torch.no_grad():
        hooked.saes[SITE].W_dec[[7, 9]] = 3.0
    named = rf"add 7, 9 60000 \(.*\) at {SITE} gave a value that torch.float16 cannot hold, first at token 2 \(.*\) of row 1"
    for run in (hooked, hooked.loss, hooked.generate):
        with pytest.raises(ArgumentError, match=named):
            run([IDS, OTHER], edit)
    assert logits(hooked, [IDS, OTHER], Program(edits=[edit], norm={"cap": 0.5})).isfinite().all()
    with torch.no_grad():
        hooked.saes[SITE].b_dec[0] = 1e5
    with pytest.raises(ArgumentError, match="the splice at .* first at token 1"):
        hooked(IDS, splice=True)
    assert logits(hooked, IDS).isfinite().all()


@quiet
def test_rule_21_a_token_of_norm_0_stays_and_what_is_not_finite_passes_through():
    lm, site = build_lm("llama"), "layers.0.resid_pre"
    hooked = HookedModel(lm, byte_tokenizer()).attach({site: tiny_sae()})
    ids = [BOS, 20, 30, 40, 50]
    with torch.no_grad():
        lm.model.embed_tokens.weight[30] = 0.0
    x = reference.read(lm, site, tensor(ids))

    def values(program: Any) -> Tensor:
        """What the norm of the first layer's attention reads."""
        path = "model.layers.0.input_layernorm:input"
        with seen(lm, path) as found, torch.no_grad():
            hooked(ids, program)
        return found[-1]

    kept = values(Program(edits=[steer(9, 2.0)], norm="preserve"))
    assert torch.equal(kept[:, :3:2], x[:, :3:2]), "BOS and the token of norm 0"
    torch.testing.assert_close(kept.norm(dim=-1), x.norm(dim=-1))
    for nothing in (Program(edits=[steer(9, 2.0)], norm={"cap": 0.5}), steer(9, 2.0, unit="norm")):
        assert torch.equal(values(nothing)[0, 2], x[0, 2])
    edits = [steer(9, 2.0), scale((1, 2), 0.5)]
    before = values(edits)
    with torch.no_grad():
        lm.model.embed_tokens.weight[30] = torch.nan
    after = values(edits)
    assert after[0, 2].isnan().all()
    assert torch.equal(after[0, [0, 1, 3, 4]], before[0, [0, 1, 3, 4]])
    # Here it is seen in the dose, and there is no counter of its own.
    report = hooked.generate(ids, edits, max_new_tokens=1).report
    assert math.isnan(report.edits[0].dose)
    assert report.edits[0].tokens == 4


def test_rule_22_a_model_in_train_mode_runs_with_its_dropout_and_a_warning():
    lm, plain, sae = build_lm("gpt2").train(), build_lm("gpt2").train(), tiny_sae(site=SITE)
    hooked = HookedModel(lm, byte_tokenizer()).attach(sae)
    assert not lm.training, "a model comes in eval mode"
    program = Program(edits=[clamp(9, 2.0)])
    still = logits(hooked, IDS, program)
    sae.train()
    assert torch.equal(logits(hooked, IDS, program), still), "an SAE has no train mode"
    lm.train()
    write = reference.program_write(program, program.edits, sae, reference.Row(len(IDS), SPECIAL), IDS)
    with torch.no_grad(), reference.written(plain, SITE, write):
        torch.manual_seed(4)
        expected = plain(tensor(IDS)).logits
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match="train mode, so dropout acts"):
        dropped = logits(hooked, IDS, program)
    torch.testing.assert_close(dropped, expected, rtol=0, atol=1e-4)
    assert (dropped - still).abs().max() > 1e-2


def test_rule_23_an_edited_run_has_the_gradients_of_the_same_run_by_hand(models_by_name):
    # Here gradients flow through z as they do through x; what attribution wants otherwise it does itself.
    hooked, lm = attach(models_by_name)
    sae = hooked.saes[SITE]
    edits = [scale(range(48), 0.5), steer(9, 0.5), at_least(7, 0.4, where=tokens(TOUCHED))]

    raised = torch.zeros(len(IDS), 48, dtype=torch.bool)
    raised[TOUCHED, 7] = True

    def write(x: Tensor) -> Tensor:
        z = sae.encode(x)
        new = 0.5 * z + 0.5 * (torch.arange(48) == 9)
        new = torch.where(raised, new.clamp_min(0.4), new)
        return torch.cat([x[:, :1], (x + (new - z) @ sae.W_dec)[:, 1:]], 1)  # not BOS

    def gradients(run: Any, of: Any) -> tuple[Tensor, ...]:
        weights = [of.model.embed_tokens.weight, of.model.layers[0].mlp.down_proj.weight, sae.W_dec, sae.W_enc]
        return torch.autograd.grad(run().logits.square().mean(), weights)

    ours = gradients(lambda: hooked(IDS, edits), hooked.lm)
    with reference.written(lm, SITE, write):
        theirs = gradients(lambda: lm(tensor(IDS)), lm)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", [SITE, "layers.1.mlp_out", "layers.1.resid_mid", "layers.0.resid_pre"])
def test_rule_23_no_grad_and_inference_mode_are_kept_and_x_is_not_written_into(models_by_name, site):
    model, _ = models_by_name("llama")
    hooked = model.attach({site: tiny_sae()})
    edits = [scale(range(48), 0.5), steer(9, 2.0)]
    expected = logits(hooked, IDS, edits)
    with torch.inference_mode():
        inferred = hooked(IDS, edits).logits
        tokens_of = hooked.generate(IDS, edits, max_new_tokens=3).new_ids.tolist()
    assert inferred.is_inference()
    assert not expected.requires_grad
    assert torch.equal(inferred, expected)
    assert tokens_of == hooked.generate(IDS, edits, max_new_tokens=3).new_ids.tolist()
    with_gradient = hooked(IDS, edits).logits
    assert with_gradient.requires_grad
    assert torch.equal(with_gradient.detach(), expected)
    if site == "layers.1.mlp_out":
        kept = []  # the very tensor that the site's module returns
        down = hooked.lm.model.layers[1].mlp.down_proj
        handle = down.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
        logits(hooked, IDS, edits)
        handle.remove()
        assert torch.equal(*kept[0])
    hooked.detach()


# --- runs beside and inside each other -------------------------------------------------------------------------------


def test_rule_24_threads_with_different_programs_get_what_each_gets_alone(models_by_name):
    hooked, _ = attach(models_by_name)
    programs: list[Any] = [REMEMBERS, steer(9, 3.0), Program(splice=True), ablate(range(24)), ()]
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": True, "seed": 7}
    alone = [hooked.generate(IDS, program, **settings).new_ids.tolist() for program in programs]
    before = footprint(hooked.lm)
    results: dict[int, list[list[int]]] = {i: [] for i in range(len(programs))}

    def work(i: int) -> None:
        for _ in range(3):
            results[i].append(hooked.generate(IDS, programs[i], **settings).new_ids.tolist())

    threads = [threading.Thread(target=work, args=(i,)) for i in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [ids] * 3 for i, ids in enumerate(alone)}
    assert footprint(hooked.lm) == before


class Breakdown(Exception):
    pass


def test_rule_25_an_exception_in_the_model_leaves_it_as_it_was(models_by_name):
    hooked, lm = attach(models_by_name)
    before = footprint(hooked.lm)
    edited = logits(hooked, IDS, REMEMBERS)
    tokens_before = hooked.generate(IDS, REMEMBERS, max_new_tokens=4).new_ids.tolist()
    n = 0

    def fail(module: Any, args: Any) -> None:
        nonlocal n
        n += 1
        if n % 3 == 0:
            raise Breakdown

    for run in (
        lambda: [hooked(IDS, REMEMBERS) for _ in range(3)],
        lambda: hooked.generate(IDS, REMEMBERS, max_new_tokens=8),
        lambda: hooked.generate(IDS, REMEMBERS, max_new_tokens=8, use_cache=False),
    ):
        n, handle = 0, hooked.lm.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(Breakdown):
            run()
        handle.remove()
        assert footprint(hooked.lm) == before
        assert torch.equal(logits(hooked, IDS), clean(lm, IDS))
        assert torch.equal(logits(hooked.lm, tensor(IDS)), clean(lm, IDS))
        assert torch.equal(logits(hooked, IDS, REMEMBERS), edited)
        assert hooked.generate(IDS, REMEMBERS, max_new_tokens=4).new_ids.tolist() == tokens_before


def test_rule_25_a_run_inside_a_run_is_refused_and_the_outer_one_goes_on(models_by_name):
    # Here nothing nests: an edit is an argument of one call. The inner call must not take the outer one's edits off.
    hooked, _ = attach(models_by_name)
    expected = hooked.generate(IDS, REMEMBERS, max_new_tokens=6).new_ids.tolist()
    refused = []

    class Streamer:
        def put(self, value: Any) -> None:
            for inner in (
                lambda: hooked(IDS, steer(4, 1.0)),
                lambda: hooked(IDS),
                lambda: hooked.latents(IDS),
                lambda: hooked.model(IDS),
                lambda: hooked.model.activations(IDS, "layers.0.mlp_out"),
            ):
                with pytest.raises(ArgumentError, match="running already"):
                    inner()
                refused.append(inner)

        def end(self) -> None:
            pass

    result = hooked.generate(IDS, REMEMBERS, max_new_tokens=6, streamer=Streamer())
    assert result.new_ids.tolist() == expected
    assert len(refused) == 5 * 7
    with torch.no_grad(), hooked.trace(tensor(IDS)):
        with pytest.raises(ArgumentError, match="running already"):
            hooked(IDS, steer(4, 1.0))
        after = nnsight.save(hooked.at(SITE).output)
    assert torch.equal(after, reference.read(hooked.lm, SITE, tensor(IDS)))


# --- other models and SAEs -------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear map whose weights are whole numbers from -127 to 127, with a factor for each output."""

    weight: Tensor
    factor: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        factor = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / factor).round().to(torch.int8))
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.factor).T


def quantised() -> Any:
    lm = build_lm("llama")
    for module in list(lm.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return lm


def test_rule_26_a_quantised_model_is_edited_like_any_other():
    lm = quantised()
    hooked = HookedModel(lm, byte_tokenizer()).attach(tiny_sae(site=SITE))
    program = Program(edits=[clamp(9, 2.0), ablate((1, 2))])
    expected = reference.logits(lm, IDS, program, hooked.saes, special=SPECIAL, prompt=len(IDS))
    torch.testing.assert_close(logits(hooked, IDS, program)[0], expected, rtol=0, atol=1e-4)
    equal_runs(hooked, program, {}, {"use_cache": False}, new=3)


def test_rule_26_an_offloaded_model_is_edited_like_any_other(models_by_name, tmp_path):
    expected = logits(attach(models_by_name)[0], IDS, REMEMBERS)
    build_lm("llama").save_pretrained(tmp_path)
    on_disk = {"model.embed_tokens": "disk", "model.layers": "disk"}
    places = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **on_disk}
    model = HookedModel.from_pretrained(
        tmp_path, byte_tokenizer(), device_map=places, offload_folder=tmp_path / "weights"
    )
    assert model.lm.device.type == "meta"
    hooked = model.attach(tiny_sae(site=SITE))
    assert torch.equal(logits(hooked, IDS, REMEMBERS), expected)
    equal_runs(hooked, REMEMBERS, {}, {"use_cache": False}, new=2)


def test_rule_26_a_model_or_sae_without_weights_is_refused(models_by_name):
    with pytest.raises(ArgumentError, match="sizes and no weights"):
        models_by_name("llama")[0].attach(tiny_sae(site=SITE).to("meta"))
    with pytest.raises(ArgumentError, match="'meta', which holds sizes and no numbers"):
        HookedModel(build_lm("llama").to("meta"), byte_tokenizer())


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_rule_27_latents_of_a_row_do_not_depend_on_other_rows(models_by_name, activation):
    hooked, _ = attach(models_by_name, activation=activation)
    for program in (Program(splice=True), Program(edits=[scale(range(48), 2.0)])):
        alone = changed(hooked, IDS, program)[0]
        for other in (OTHER, random_ids(9, seed=8, bos=True)):
            torch.testing.assert_close(changed(hooked, [IDS, other], program)[0], alone, rtol=1e-5, atol=1e-5)


def test_rule_27_a_batchtopk_without_a_threshold_is_refused(models_by_name):
    model, _ = models_by_name("llama")
    sae = tiny_sae(site=SITE, activation=BatchTopK(k=6))
    sae.register_parameter("threshold", None)
    hooked = model.attach(sae)
    for program in (Program(splice=True), ablate(3), steer(3, 1.0, when=latent(4) > 0)):
        with pytest.raises(MissingStatError, match="threshold"):
            hooked(IDS, program)
    hooked(IDS, steer(3, 1.0))  # asks for no latent
    hooked.detach()


def test_rule_28_edits_act_after_the_selection_so_more_than_k_latents_may_be_active(models_by_name):
    # Here there is no `reselect`: an edit's latents would push out others that nobody named.
    hooked, lm = attach(models_by_name, activation="topk")
    sae, x = hooked.saes[SITE], reference.read(lm, SITE, tensor(IDS))[0, TOUCHED]
    z = reference.encode(sae, x)
    silent = (z == 0).nonzero()[:3, 0].tolist()
    new = z.clone()
    new[silent] = 0.7
    assert (z > 0).sum() == 6
    assert (new > 0).sum() == 9
    program = Program(edits=[clamp(silent, 0.7, where=tokens(TOUCHED))], error="drop")
    expected = reference.decode(sae, new, x)
    torch.testing.assert_close(changed(hooked, IDS, program)[0, TOUCHED], expected, rtol=0, atol=1e-5)
    with pytest.raises(FormatError, match="reselect"):
        Program.from_json(with_field(program.edits[0], "reselect", True))


# --- caches ----------------------------------------------------------------------------------------------------------


def test_rule_30_a_prompt_that_comes_in_pieces_is_edited_as_a_whole(models_by_name):
    hooked, _ = attach(models_by_name)
    for edits in ([steer(9, 3.0, where=tokens(1, 5, -1)), ablate((1, 2), where=span(3, 8))], REMEMBERS):
        equal_runs(hooked, edits, {}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 1}, new=4)
    late = [steer(9, 1.0, when=latent(4, over="prompt_max") > 0.2), resample(3, (0, -1))]
    for edit in late:
        with pytest.raises(ArgumentError, match="the input comes in pieces.*prefill_chunk_size"):
            hooked.generate(IDS, edit, prefill_chunk_size=4, max_new_tokens=2)
    equal_runs(hooked, resample(3, (0, 2), where=span(2)), {}, {"prefill_chunk_size": 4}, new=2)


def cache_of(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


def test_rule_30_a_cache_is_refused_where_edits_mean_its_tokens(models_by_name):
    # Here it is not asked how the cache was made: whoever edited its tokens says what follows with where=span(n).
    hooked, _ = attach(models_by_name)
    cache, n = cache_of(hooked.model, IDS[:6]), 6
    meant = [
        (steer(9, 2.0), "where=span"),
        (steer(9, 2.0, where=prompt()), "where=span"),
        (ablate(3, where=span(5)), "where=span"),
        (ablate(3, where=tokens(0)), "where=span"),
        (steer(9, 2.0, where=Where(positions=(0, 1), bos=True)), "where=span"),
        (steer(9, 2.0, when=latent(4) > 0.2), "where=span"),
        (add_vector([1.0] * WIDTH, site=SITE, where=span(2, 7)), "where=span"),
        (Program(splice=True), "splice=True"),
    ]
    for program, what in meant:
        with seen(hooked.lm) as values:
            with pytest.raises(ArgumentError, match=rf"past_key_values holds already.*{re_escaped(what, n)}"):
                hooked.generate(IDS, program, past_key_values=copy.deepcopy(cache))
            with pytest.raises(ArgumentError, match=rf"past_key_values holds already.*{re_escaped(what, n)}"):
                hooked(IDS[n:], program, past_key_values=copy.deepcopy(cache))
        assert not values, "the model ran"
    for wrong in (IDS[:6], IDS[6:]):
        with pytest.raises(ArgumentError, match="Give the whole prompt"):
            hooked.generate(wrong, (), past_key_values=copy.deepcopy(cache))
    with pytest.raises(ArgumentError, match="rows of one length"):
        hooked([IDS[n:], IDS[n + 1 :]], (), past_key_values=copy.deepcopy(cache))


def re_escaped(what: str, n: int) -> str:
    return rf"where=span\({n}\)" if what == "where=span" else "Leave past_key_values out"


def test_rule_30_edits_behind_a_cache_act_as_in_a_run_without_it(models_by_name):
    hooked, _ = attach(models_by_name)
    empty = hooked.generate(IDS, REMEMBERS, max_new_tokens=3, past_key_values=DynamicCache())
    assert empty.new_ids.tolist() == hooked.generate(IDS, REMEMBERS, max_new_tokens=3).new_ids.tolist()
    cache, n = cache_of(hooked.model, IDS[:6]), 6
    for edits in (
        [steer(9, 3.0, where=span(n)), ablate((1, 2), where=tokens(-1, n))],
        [clamp(9, 2.0, where=generation()), steer(3, 1.0, where=span(7))],
        [steer(9, 3.0, where=Where(token_ids=(IDS[8],))), steer(4, 2.0, where=span(7, 9), when=latent(5) < 9.0)],
    ):
        plain = hooked.generate(IDS, edits, max_new_tokens=5)
        cached = hooked.generate(IDS, edits, max_new_tokens=5, past_key_values=copy.deepcopy(cache))
        assert cached.new_ids.tolist() == plain.new_ids.tolist()
        assert [e.tokens for e in cached.report.edits] == [e.tokens for e in plain.report.edits]
    edits = [
        steer(9, 3.0, where=span(n)),
        ablate((1, 2), where=tokens(-1)),
        clamp(5, 1.0, where=tokens(8), when=latent(4) < 9.0),
    ]
    behind = logits(hooked, IDS[n:], edits, past_key_values=copy.deepcopy(cache))
    torch.testing.assert_close(behind, logits(hooked, IDS, edits)[:, n:], rtol=0, atol=1e-4)
    two = copy.deepcopy(cache)
    two.batch_repeat_interleave(2)
    rows = logits(
        hooked, [IDS[n:], IDS[n:]], [steer(9, 3.0, where=Where(positions=(n, None), rows=(1,)))], past_key_values=two
    )
    torch.testing.assert_close(rows[1:], logits(hooked, IDS, steer(9, 3.0, where=span(n)))[:, n:], rtol=0, atol=1e-4)
    for looks_back in (latent(4, over="so_far_max") > 0.2, (latent(4) > 0.2).hold(3)):
        with pytest.raises(ArgumentError, match=f"began with a KV cache of {n} tokens"):
            hooked(IDS[n:], steer(9, 3.0, where=span(n), when=looks_back), past_key_values=copy.deepcopy(cache))
    with pytest.raises(ArgumentError, match="a pattern needs the row's whole text"):
        hooked(
            IDS[n:], steer(9, 3.0, where=Where(pattern="a", positions=(n, None))), past_key_values=copy.deepcopy(cache)
        )
