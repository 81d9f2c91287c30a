"""Edits and programs as data: what is accepted, what an error says, and the JSON form."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saehook
from saehook.conditions import COMPARISONS, OVER, And, Comparison, Or, latent
from saehook.edits import ablate, at_least, at_most, clamp, keep_only, scale, set_, steer, to_mean
from saehook.errors import ArgumentError, FormatError, LatentError
from saehook.interventions import (
    ERRORS,
    KL_OPS,
    MODES,
    NO_ACTIVE_ONLY,
    NO_UNIT,
    NO_VALUE,
    OPS,
    UNITS,
    VECTOR_OPS,
    Cap,
    Edit,
    Program,
    VectorEdit,
)
from saehook.schedules import Schedule
from saehook.where import EVERYWHERE, Where, generation, prompt, span, token_ids, tokens

# --- making edits ----------------------------------------------------------------------------------------------------


def test_the_functions_make_the_edits_that_they_name():
    assert steer(3, 2) == Edit(op="add", latents=(3,), value=2.0)
    assert steer([3, 4], 0.5, unit="max", site="layers.1.mlp_out") == Edit(
        op="add", latents=(3, 4), value=0.5, unit="max", site="layers.1.mlp_out"
    )
    assert clamp(3, -1.0, unit="norm", where=prompt()) == Edit(
        op="set", latents=(3,), value=-1.0, unit="norm", where=Where(generation=False)
    )
    assert scale(range(3), 0.0) == Edit(op="scale", latents=(0, 1, 2), value=0.0)
    assert ablate((7,)) == Edit(op="ablate", latents=(7,))
    assert steer(3, 1.0, where=None).where == EVERYWHERE
    assert at_least(3, 2, unit="max") == Edit(op="min", latents=(3,), value=2.0, unit="max")
    assert at_most(3, 2, active_only=True) == Edit(op="max", latents=(3,), value=2.0, active_only=True)
    assert to_mean((3, 4), where=prompt()) == Edit(op="mean", latents=(3, 4), where=prompt())
    assert keep_only((3, 4)) == Edit(op="keep_only", latents=(3, 4))
    for make in (steer, clamp, scale, at_least, at_most):
        assert make(3, 1.0, active_only=True).active_only
    assert to_mean(3, active_only=True).active_only


def test_set_is_clamp():
    assert set_ is clamp
    assert saehook.set_ is saehook.clamp


def test_edits_are_frozen_and_hashable():
    edit = steer(3, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.value = 2.0  # type: ignore[misc]
    assert len({edit, steer(3, 1), ablate(3), Program(edits=(edit,)), tokens(0)}) == 4
    latents = [1, 2]
    edit = ablate(latents)
    latents.append(3)
    assert edit.latents == (1, 2)


def test_numbers_of_other_libraries_are_latents_too():
    import numpy as np
    import torch

    given: list[Any] = [np.array([3, 4]), torch.tensor([3, 4]), [np.int64(3), 4], {3: 1, 4: 1}]
    for latents in given:
        assert ablate(latents).latents == (3, 4)
        assert all(type(i) is int for i in ablate(latents).latents)
    one: Any = np.int64(3)
    assert ablate(one).latents == (3,)
    assert type(steer(3, np.float64(2)).value) is float


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"op": "multiply"}, ArgumentError, "'multiply'; expected one of set, add, scale, ablate"),
        ({"op": None}, ArgumentError, "None"),
        ({"op": ["add"]}, ArgumentError, "add"),
        ({"latents": ()}, ArgumentError, "names no latent"),
        ({"latents": (3, 4, 3)}, ArgumentError, r"twice: \(3, 4, 3\)"),
        ({"latents": (3, -1)}, LatentError, "-1 is negative"),
        ({"latents": (3.0,)}, ArgumentError, "3.0 among the latents is no whole number"),
        ({"latents": ("3",)}, ArgumentError, "'3' among the latents"),
        ({"latents": (True,)}, ArgumentError, "True among the latents"),
        ({"latents": "34"}, ArgumentError, "'34'"),
        ({"latents": None}, ArgumentError, "None"),
        ({"latents": 3}, ArgumentError, "latents are 3"),
        ({"value": None}, ArgumentError, "None; a finite number"),
        ({"value": float("nan")}, ArgumentError, "nan; a finite number"),
        ({"value": float("-inf")}, ArgumentError, "-inf; a finite number"),
        ({"value": "2"}, ArgumentError, "'2'; a finite number"),
        ({"value": True}, ArgumentError, "True; a finite number"),
        ({"value": 10**40}, ArgumentError, "a finite number"),
        ({"value": 1e39}, ArgumentError, "1e\\+39"),
        ({"value": 2j}, ArgumentError, "2j"),
        ({"unit": "percent"}, ArgumentError, "'percent'; expected one of raw, max, norm"),
        ({"unit": None}, ArgumentError, "None"),
        ({"op": "scale", "unit": "max"}, ArgumentError, "'scale' has no unit, but unit='max'"),
        ({"op": "ablate", "value": None, "unit": "norm"}, ArgumentError, "'ablate' has no unit"),
        ({"op": "ablate", "value": 0.0}, ArgumentError, "'ablate' takes no value, but 0.0"),
        ({"op": "mean", "value": 0.0}, ArgumentError, "'mean' takes no value"),
        ({"op": "keep_only", "value": 0.0}, ArgumentError, "'keep_only' takes no value"),
        ({"op": "mean", "value": None, "unit": "max"}, ArgumentError, "'mean' has no unit"),
        ({"op": "min", "value": None}, ArgumentError, "None; a finite number"),
        ({"op": "ablate", "value": None, "active_only": True}, ArgumentError, "'ablate' does the same"),
        ({"op": "keep_only", "value": None, "active_only": True}, ArgumentError, "'keep_only' does the same"),
        ({"active_only": 1}, ArgumentError, "active_only=1"),
        ({"where": None}, ArgumentError, "where=None is no Where"),
        ({"where": "prompt"}, ArgumentError, "where='prompt'"),
        ({"where": prompt}, ArgumentError, "is no Where"),
        ({"site": 3}, ArgumentError, "site=3"),
    ],
)
def test_an_edit_that_cannot_be_meant(fields, error, match):
    with pytest.raises(error, match=match):
        Edit(**{"op": "add", "latents": (3,), "value": 1.0, **fields})


@pytest.mark.parametrize("make", [lambda: steer("3", 1.0), lambda: ablate([[1, 2]]), lambda: ablate(None)])  # type: ignore[arg-type]
def test_latents_that_are_none(make):
    with pytest.raises(ArgumentError, match="no whole number"):
        make()


# --- where -----------------------------------------------------------------------------------------------------------


def test_where_objects():
    assert Where() == EVERYWHERE
    assert (prompt().prompt, prompt().generation, prompt().tokens) == (True, False, None)
    assert (generation().prompt, generation().generation) == (False, True)
    assert tokens(0, 3, -1).tokens == (0, 3, -1)
    assert Where(tokens=[1, 2]).tokens == (1, 2)  # type: ignore[arg-type]
    assert [str(w) for w in (EVERYWHERE, prompt(), generation(), tokens(0, -1))] == [
        "every token",
        "prompt",
        "generation",
        "tokens 0, -1",
    ]
    assert span(3, 8) == Where(positions=(3, 8))
    assert span(3).positions == (3, None)
    assert token_ids(7, 9).token_ids == (7, 9)
    several = Where(generation=False, positions=[0, 3], token_ids=[5], rows=[1, 2], special=True)  # type: ignore[arg-type]
    assert str(several) == "prompt, positions from 0 to before 3, ids 5, rows 1, 2, special ones included"
    assert str(span(3)) == "positions from 3"
    assert str(Where(special=True)) == "every token, special ones included"
    assert hash(several) == hash(dataclasses.replace(several))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: tokens(), "names no token"),
        (lambda: Where(tokens=()), "names no token|touches nothing"),
        (lambda: Where(prompt=False, generation=False), "touches nothing"),
        (lambda: tokens(1.5), "1.5 among the tokens"),  # type: ignore[arg-type]
        (lambda: tokens("last"), "'last' among the tokens"),  # type: ignore[arg-type]
        (lambda: tokens(True), "True among the tokens"),
        (lambda: tokens([0, 1]), r"\[0, 1\] among the tokens"),  # type: ignore[arg-type]
        (lambda: Where(tokens="01"), "'01'"),  # type: ignore[arg-type]
        (lambda: Where(tokens=3), "3"),  # type: ignore[arg-type]
        (lambda: Where(prompt="yes"), "prompt='yes'|prompt is 'yes'"),  # type: ignore[arg-type]
        (lambda: Where(generation=1), "generation=1|generation is 1"),  # type: ignore[arg-type]
        (lambda: Where(prompt=False, tokens=(0,)), "alone"),
        (lambda: Where(special=None), "special=None"),  # type: ignore[arg-type]
        (lambda: span(-1, 3), "hold no token"),
        (lambda: span(3, 3), "hold no token"),
        (lambda: span(1.5), "1.5 among the positions"),  # type: ignore[arg-type]
        (lambda: span(None), "None among the positions"),  # type: ignore[arg-type]
        (lambda: Where(positions=3), "start, stop"),  # type: ignore[arg-type]
        (lambda: Where(positions=(1, 2, 3)), "start, stop"),  # type: ignore[arg-type]
        (lambda: token_ids(), "token_ids=\\(\\)"),
        (lambda: token_ids(-1), "token_ids=\\(-1,\\)"),
        (lambda: Where(rows=()), "rows=\\(\\)"),
        (lambda: Where(rows=(0, -2)), "rows=\\(0, -2\\)"),
        (lambda: Where(rows=("a",)), "'a' among the rows"),  # type: ignore[arg-type]
    ],
)
def test_a_where_that_cannot_be_meant(make, match):
    with pytest.raises(ArgumentError, match=match):
        make()


# --- programs --------------------------------------------------------------------------------------------------------


def test_programs():
    program = Program(edits=[steer(3, 1.0)])  # type: ignore[arg-type]
    assert program.edits == (steer(3, 1.0),)
    assert not program.drops_error
    assert Program(error="drop").drops_error
    assert Program(splice=True).drops_error
    assert Program(splice=True, error="drop").drops_error
    assert not Program(error="keep").drops_error


def test_the_norm_of_a_program():
    assert Program(norm={"cap": 1}).norm == Cap(1.0)
    assert len({Program(norm={"cap": 0.5}), Program(norm=Cap(0.5)), Program(norm="preserve"), Program()}) == 3
    assert Program.of(Program(norm="preserve"), error="drop") == Program(norm="preserve", error="drop")
    for norm in ("preserve", {"cap": 0.5}):
        program = Program(norm=norm)
        assert json.loads(program.to_json())["norm"] == norm
        assert Program.from_json(program.to_json()) == program


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"edits": (3,)}, "3 is no edit"),
        ({"edits": (None,)}, "None is no edit"),
        ({"error": "half"}, "'half' is unknown; expected one of keep, drop, mean"),
        ({"error": False}, "False"),
        ({"splice": True, "error": "keep"}, "splice=True .* error='keep'"),
        ({"splice": "yes"}, "splice"),
        ({"norm": "keep"}, "norm='keep' is unknown; expected 'preserve'"),
        ({"norm": 0.5}, "norm=0.5"),
        ({"norm": {"cap": 1.0, "floor": 0.0}}, "floor"),
        ({"norm": {"cap": 0.0}}, "0.0; a finite number above 0"),
        ({"norm": {"cap": float("nan")}}, "nan"),
        ({"norm": {"cap": 10**400}}, "finite number"),
        ({"norm": {"cap": True}}, "True"),
    ],
)
def test_a_program_that_cannot_be_meant(fields, match):
    with pytest.raises(ArgumentError, match=match):
        Program(**fields)


def test_edits_read_as_a_sentence():
    assert str(steer(3, 0.5, unit="max", where=prompt())) == "add 3 0.5 max (prompt)"
    assert str(at_least(3, 2, active_only=True)) == "min 3 2 where active (every token)"
    assert str(ablate((3, 4), site="layers.1.mlp_out")) == "ablate 3, 4 at layers.1.mlp_out (every token)"


@pytest.mark.parametrize("pattern", ["(?R)", "((?R))*", "(a|(?1))(?1)", "(?<n>(?&n))", r"\\(?R)", "(?P<n>x|(?P>n))"])
def test_a_pattern_that_calls_itself_is_refused(pattern):
    with pytest.raises(ArgumentError, match="calls a group from within"):
        Where(pattern=pattern)


def test_patterns_that_look_like_it():
    for pattern in (r"\(?R\)", r"(a)(?(1)b|c)", r"\(\?R\)", "(?P<R>a)", "(?i:R)"):
        assert Where(pattern=pattern).pattern == pattern


def test_nothing_to_combine():
    for kind in (And, Or):
        with pytest.raises(ArgumentError, match="no conditions to combine"):
            kind(())


# --- JSON ------------------------------------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
numbers = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)
wheres = st.builds(
    lambda base, **more: dataclasses.replace(base, **more),
    st.one_of(
        st.sampled_from([EVERYWHERE, prompt(), generation()]),
        st.lists(st.integers(-9, 9), min_size=1, max_size=4).map(lambda t: Where(tokens=tuple(t))),
    ),
    positions=st.none() | st.integers(0, 9).flatmap(lambda n: st.sampled_from([(n, None), (n, n + 1), (n, n + 7)])),
    token_ids=st.none() | numbers,
    pattern=st.none() | st.sampled_from(["def", r"\bimport\s+\w+", "[äß]"]),
    roles=st.none() | st.just(("user", "system")),
    rows=st.none() | numbers,
    special=st.booleans(),
    bos=st.booleans(),
)
compared = st.one_of(
    st.builds(latent, st.integers(0, 99), st.none() | st.text(max_size=9), st.sampled_from(OVER[:-1])),
    st.builds(lambda i, decay: latent(i, over="decay", decay=decay), st.integers(0, 99), st.floats(0.01, 0.99)),
)
conditions = st.recursive(
    st.builds(
        lambda left, op, right: Comparison(op, left, right), compared, st.sampled_from(list(COMPARISONS)), finite
    ),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
        st.builds(lambda a, n: a.hold(n), inner, st.integers(1, 99)),
    ),
    max_leaves=4,
)
schedules = st.one_of(
    st.builds(Schedule.linear, finite, finite, st.integers(1, 99)),
    st.builds(Schedule.exponential, st.floats(0, 9)),
    st.lists(finite, min_size=1, max_size=4).map(lambda factors: Schedule.steps(*factors)),
)
sites = st.none() | st.text(max_size=20)


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    op = draw(st.sampled_from(OPS))
    unit = "raw" if op in NO_UNIT else draw(st.sampled_from([u for u in UNITS if u != "kl" or op in KL_OPS]))
    low = {"quantile": 0.0, "kl": 0.015625}.get(unit)
    value = draw(finite if low is None else st.floats(low, 1.0, width=32))
    return Edit(
        op=op,
        latents=tuple(
            draw(
                st.lists(
                    st.integers(0, 2**40), min_size=1 + (op == "swap"), max_size=2 + 2 * (op != "swap"), unique=True
                )
            )
        ),
        value=None if op in NO_VALUE else value,
        unit=unit,
        active_only=op not in NO_ACTIVE_ONLY and draw(st.booleans()),
        mode="decoder" if op == "keep_only" else draw(st.sampled_from(MODES)),
        source=(draw(st.integers(0, 9)), draw(st.integers(-9, 9))) if op == "resample" else None,
        site=draw(sites),
        where=draw(wheres),
        when=draw(st.none() | conditions),
        schedule=None if op == "keep_only" else draw(st.none() | schedules),
    )


@st.composite
def vector_edits(draw: st.DrawFn) -> VectorEdit:
    op = draw(st.sampled_from(VECTOR_OPS))
    return VectorEdit(
        op=op,
        vector=tuple(draw(st.lists(finite, min_size=1, max_size=4).filter(any))),
        value=None if op == "project_out" else draw(finite),
        unit="raw" if op == "project_out" else draw(st.sampled_from(["raw", "norm"])),
        site=draw(sites),
        where=draw(wheres),
        when=draw(st.none() | conditions),
        schedule=draw(st.none() | schedules),
    )


@st.composite
def programs(draw: st.DrawFn) -> Program:
    splice = draw(st.booleans())
    error = draw(st.sampled_from([None, *ERRORS]).filter(lambda e: not (splice and e == "keep")))
    drops = splice or error in ("drop", "mean")
    made = draw(st.lists(st.one_of(edits(), vector_edits()), max_size=4))
    if drops:
        made = [dataclasses.replace(e, mode="decoder") if isinstance(e, Edit) else e for e in made]
    norm = draw(st.sampled_from([None, "preserve", Cap(0.25)]))
    parallel = not drops and draw(st.booleans())
    return Program(edits=tuple(made), splice=splice, error=error, norm=norm, parallel=parallel)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(programs())
def test_json_gives_the_program_back(program):
    text = program.to_json()
    again = Program.from_json(text)
    assert again == program
    assert again.to_json() == text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_json_form():
    program = Program(
        edits=(
            steer(3, 1.5, unit="max", where=tokens(0, -1)),
            ablate((4, 5), site="layers.1.mlp_out", where=prompt()),
            at_least(6, 2, active_only=True, where=Where(positions=(3, None), rows=(1,), special=True)),
            keep_only(7, where=Where(prompt=False, token_ids=(11, 12))),
        ),
        norm={"cap": 0.5},
    )
    assert json.loads(program.to_json()) == {
        "schema": 1,
        "edits": [
            {"op": "add", "latents": [3], "value": 1.5, "unit": "max", "where": {"tokens": [0, -1]}},
            {
                "op": "ablate",
                "latents": [4, 5],
                "site": "layers.1.mlp_out",
                "where": {"prompt": True, "generation": False},
            },
            {
                "op": "min",
                "latents": [6],
                "value": 2.0,
                "unit": "raw",
                "active_only": True,
                "where": {"positions": [3, None], "rows": [1], "special": True},
            },
            {
                "op": "keep_only",
                "latents": [7],
                "where": {"prompt": False, "generation": True, "token_ids": [11, 12]},
            },
        ],
        "splice": False,
        "error": None,
        "norm": {"cap": 0.5},
    }
    assert "norm" not in json.loads(Program(edits=(steer(3, 1.0),)).to_json())
    assert Program.from_json('{"schema": 1, "edits": []}') == Program()


BASE: dict[str, Any] = json.loads(
    Program(
        edits=(
            steer((3, 4), 1.5, unit="max", where=tokens(0, -1)),
            ablate(5, site="layers.1.mlp_out", where=generation()),
            scale(6, 0.5),
            at_most(7, 0.5, active_only=True, where=Where(positions=(1, 4), token_ids=(5,), rows=(0,), special=True)),
        ),
        error="drop",
        norm={"cap": 0.5},
    ).to_json()
)


def changed(path: list[str | int], value: Any) -> str:
    data = copy.deepcopy(BASE)
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (["schema"], 2, "schema is 2"),
        (["schema"], "1", "schema is '1'"),
        (["color"], "red", r"unknown fields \['color'\]"),
        (["edits"], {}, "program.edits is"),
        (["edits"], None, "program.edits is None"),
        (["edits", 0], "steer", r"edits\[0\] is 'steer'"),
        (["edits", 0, "colour"], 1, r"edits\[0\] has unknown fields \['colour'\]"),
        (["edits", 1, "op"], "delete", r"edits\[1\].*'delete'"),
        (["edits", 1, "op"], 3, r"edits\[1\]\.op is 3"),
        (["edits", 0, "latents"], [-3], r"edits\[0\].*-3"),
        (["edits", 0, "latents"], [1.5], r"edits\[0\].*1.5"),
        (["edits", 0, "latents"], 3, r"edits\[0\].*3"),
        (["edits", 0, "value"], float("nan"), r"edits\[0\].*nan"),
        (["edits", 0, "value"], float("inf"), r"edits\[0\].*inf"),
        (["edits", 0, "value"], "1", r"edits\[0\].*'1'"),
        (["edits", 0, "value"], None, r"edits\[0\].*None"),
        (["edits", 0, "value"], 10**40, r"edits\[0\].*finite"),
        (["edits", 0, "unit"], "feet", r"edits\[0\].*'feet'"),
        (["edits", 0, "unit"], [], r"edits\[0\]\.unit is \[\]"),
        (["edits", 1, "site"], 3, r"edits\[1\]\.site is 3"),
        (["edits", 0, "where"], {"tokens": [0], "prompt": True}, r"edits\[0\]\.where names tokens and more"),
        (["edits", 0, "where"], {"tokens": []}, r"edits\[0\].*names no token"),
        (["edits", 0, "where"], {"speakers": [0]}, r"edits\[0\]\.where has unknown fields"),
        (["edits", 3, "where", "rows"], [-1], r"edits\[3\].*rows"),
        (["edits", 3, "where", "rows"], 0, r"edits\[3\]\.where\.rows is 0"),
        (["edits", 3, "where", "positions"], [4, 1], r"edits\[3\].*positions=\[4, 1\]"),
        (["edits", 3, "where", "token_ids"], [], r"edits\[3\].*token_ids"),
        (["edits", 3, "where", "special"], 1, r"edits\[3\]\.where\.special is 1"),
        (["edits", 3, "active_only"], "yes", r"edits\[3\].*active_only='yes'"),
        (["edits", 1, "active_only"], True, r"edits\[1\].*'ablate' does the same"),
        (["norm"], "keep", "program: norm='keep'"),
        (["norm"], {"cap": -1}, "program: .*-1"),
        (["edits", 0, "where"], {"prompt": "yes"}, r"edits\[0\]\.where\.prompt is 'yes'"),
        (["edits", 0, "where"], {"prompt": False, "generation": False}, r"edits\[0\].*touches nothing"),
        (["edits", 0, "where"], None, r"edits\[0\]\.where is None"),
        (["splice"], 1, "program.splice is 1"),
        (["splice"], None, "program.splice is None"),
        (["error"], "half", "'half'"),
        (["error"], ["drop"], "drop"),
    ],
)
def test_a_program_file_that_is_wrong_names_the_field(path, value, match):
    with pytest.raises(FormatError, match=match):
        Program.from_json(changed(path, value))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"text"', "{'schema': 1}", '{"schema": 1}', "[" * 100_000, "\ud800", "NaN"]
)
def test_a_text_that_is_no_program(text):
    with pytest.raises(FormatError, match="program"):
        Program.from_json(text)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ('{"op": "add", "latents": [3], "op": "ablate"}', r"edits\[0\] has the field 'op' twice"),
        (
            '{"op": "ablate", "latents": [3], "where": {"bos": true, "bos": false}}',
            r"edits\[0\]\.where has .* 'bos' twice",
        ),
        ('{"op": "ablate", "latents": [3], "where": {"roles": {"user": 3}}}', r"edits\[0\]\.where\.roles is .* a list"),
        ('{"op": "ablate", "latents": [3], "when": {"and": []}}', r"edits\[0\]\.when\.and is empty"),
        *[
            (
                f'{{"op": "ablate", "latents": {"[" * n}{"]" * n}}}',
                r"edits\[0\]\.latents\S* is nested more than 100",
            )
            for n in (100, 300, 700)
        ],
    ],
)
def test_an_object_that_is_wrong_is_named(edit, match):
    with pytest.raises(FormatError, match=match):
        Program.from_json('{"schema": 1, "edits": [' + edit + "]}")


def test_the_norm_of_a_file_has_one_field():
    with pytest.raises(FormatError, match=r"program\.norm has unknown fields \['floor'\]"):
        Program.from_json('{"schema": 1, "edits": [], "norm": {"cap": 1, "floor": 0}}')


def test_contradicting_fields_in_a_file():
    with pytest.raises(FormatError, match="splice=True"):
        Program.from_json('{"schema": 1, "edits": [], "splice": true, "error": "keep"}')


JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**70,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    1e300,
    "",
    "add",
    "max",
    "layers.0.mlp_out",
    [],
    [0],
    [0, 0],
    ["x"],
    [[0]],
    {},
    {"tokens": [1]},
    {"prompt": False},
    {"op": "add"},
]


def mutate(data: Any, rng: random.Random) -> None:
    """Change one place of the data, somewhere."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(data[key], (dict, list)) and data[key] and rng.random() < 0.7:
            data = data[key]
            continue
        match rng.randrange(4):
            case 0:
                data[key] = copy.deepcopy(rng.choice(JUNK))
            case 1:
                del data[key]
            case 2 if isinstance(data, dict):
                data[rng.choice(["op", "value", "unit", "site", "where", "extra", "tokens", "rows", "norm"])] = (
                    copy.deepcopy(rng.choice(JUNK))
                )
            case _ if isinstance(data, list):
                data.append(copy.deepcopy(rng.choice(JUNK)))
            case _:
                data[key] = copy.deepcopy(rng.choice(JUNK))
        return


def test_mutated_programs_are_read_or_refused():
    rng = random.Random(0)
    accepted = refused = 0
    for _ in range(600):
        data = copy.deepcopy(BASE)
        for _ in range(rng.randint(1, 3)):
            mutate(data, rng)
        text = json.dumps(data)
        try:
            program = Program.from_json(text)
        except FormatError:
            refused += 1
        else:
            assert Program.from_json(program.to_json()) == program
            accepted += 1
    assert accepted > 20
    assert refused > 200


def test_damaged_text_is_read_or_refused():
    rng = random.Random(1)
    text = json.dumps(BASE)
    for _ in range(400):
        cut = list(text)
        for _ in range(rng.randint(1, 3)):
            position = rng.randrange(len(cut))
            match rng.randrange(3):
                case 0:
                    cut[position] = chr(rng.randrange(32, 0x250))
                case 1:
                    del cut[position]
                case _:
                    cut.insert(position, rng.choice('{}[],:"0-.eE'))
        with contextlib.suppress(FormatError):
            Program.from_json("".join(cut))


def test_a_number_beyond_every_float_is_refused():
    with pytest.raises(ArgumentError, match="finite number"):
        steer(3, 10**400)
    with pytest.raises(FormatError, match="finite number"):
        Program.from_json(changed(["edits", 0, "value"], 10**400))
