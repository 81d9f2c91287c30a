"""The page without a browser: its parts, and a launched server asked by `gradio_client` and plain HTTP."""

from __future__ import annotations

import ast
import base64
import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from app_fixtures import HOSTILE, SITES, SPECIAL, collect_loops, free_port, tiny
from colours import SIGHT, difference
from gradio_client import Client
from gradio_client.exceptions import AppError
from transformers import StoppingCriteriaList

import saehook
from saehook import (
    Program,
    Schedule,
    ablate,
    add_vector,
    clamp,
    cli,
    generation,
    latent,
    load_sae,
    matching,
    prompt,
    save_sae,
    scale,
    steer,
    swap,
    tokens,
)
from saehook.app import Limits, build_app, plots, serve
from saehook.app.cancellable import Cancelled, Done, Progress, in_background
from saehook.app.generate_tab import CHOSEN, LOOKS, on_stop
from saehook.app.inspect_tab import COLOURS, next_value, strip_value
from saehook.app.lane import lane_value, report_notes
from saehook.app.lanes import run_lanes
from saehook.app.latent_table import Filter, listed, table_value, telling_latent
from saehook.app.messages import told_to_the_visitor
from saehook.app.page import PROMPTS
from saehook.app.page_state import PageState, control_values
from saehook.app.program_rows import editor_value, latent_row, problems_of, program_of, program_to_rows, with_row
from saehook.app.reading import Reading, prompt_of, read
from saehook.app.sampling import Sampling, sampling_of
from saehook.app.shared import one_latent
from saehook.app.snippet import edit_code, python_for, shell_for
from saehook.app.sweep_tab import Counting, numbers, plots_of, table_of
from saehook.app.token_strip import CSS as STRIP_CSS
from saehook.attribution import Logit
from saehook.dashboards import latent_card
from saehook.errors import ArgumentError, ContextLengthError, LatentError, SaehookError
from saehook.hooked_model import lock_of
from saehook.inspection import inspect_text
from saehook.latent_notes import LatentNote, write_note
from saehook.results import EditReport, Report
from saehook.visible_text import one_line, visible, visible_token

pytestmark = [
    # Gradio leaves event loops and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]
LIMITS = Limits(prompt_tokens=120, new_tokens=350, queue=4)
PROMPT = "hello, world"


def row(on: bool = True, **fields: Any) -> dict[str, Any]:
    """A row of the editor; a field that is None is left out."""
    edit = {"op": "add", "latents": [3], "value": 0.5, "site": SITES[0]} | fields
    return {"on": on, "edit": {name: value for name, value in edit.items() if value is not None}}


def program(*rows: dict[str, Any], n_prompt: int = 12, **whole: Any) -> Program:
    return program_of(tiny(), {"rows": list(rows), **whole}, LIMITS, n_prompt)


# --- edits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "edit"),
    [
        ({}, steer(3, 0.5, site=SITES[0])),
        ({"latents": " 3, 14 ", "op": "set"}, clamp([3, 14], 0.5, site=SITES[0])),
        ({"op": "ablate", "value": None, "where": {"tokens": "0, 3 -1"}}, ablate(3, site=SITES[0], where=tokens(0, 3, -1))),
        (
            {"op": "scale", "site": SITES[1], "where": {"prompt": True, "generation": False}},
            scale(3, 0.5, site=SITES[1], where=prompt()),
        ),
    ],
)  # fmt: skip
def test_a_row_means_an_edit(fields, edit):
    assert program(row(on=False, latents="no number"), row(**fields)).edits == (edit,)


def test_a_row_may_be_json():
    edit = steer(3, 0.5, site=SITES[0], when=latent(5, site=SITES[0]) > 1.0, schedule=Schedule.linear(1, 0, 5))
    assert program({"on": True, "text": json.dumps(edit.to_data())}).edits == (edit,)
    vector = add_vector([1.0] * 32, site=SITES[0])
    assert program({"on": True, "edit": vector.to_data()}).edits == (vector,)


def test_what_belongs_to_all_edits():
    whole = {"error": "mean", "norm": {"cap": 0.5}, "splice": False, "parallel": False}
    assert program_of(tiny(), {"rows": [], **whole}, LIMITS) == Program(error="mean", norm={"cap": 0.5})
    assert program(error="keep", splice=True) == Program(splice=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents": " "}, "names no latent"),
        ({"latents": "4.5"}, "the latent '4.5' is unknown; expected a whole number"),
        ({"latents": "<b>"}, "'<b>' is unknown"),
        ({"latents": [96]}, r"latent 96 is outside 0\.\.95"),
        ({"latents": [-1]}, "latent -1 is negative"),
        ({"value": None}, "no strength"),
        ({"value": float("nan")}, "a finite number is expected"),
        ({"value": 1e6}, r"strength 1e\+06 is beyond ±100000"),
        ({"op": "explode"}, "no operation 'explode'"),
        ({"unit": "miles"}, "no unit 'miles'"),
        ({"site": "layers.9.resid_post"}, "layers.9.resid_post"),
        ({"site": SITES[1], "unit": "max"}, "no statistics"),
        ({"where": "somewhere"}, "an object is expected"),
        ({"where": {"tokens": "all"}}, "the place 'all' is unknown; expected numbers of tokens"),
        ({"where": {"tokens": [0, 12]}}, r"token 12 is outside the 12 tokens of the prompt: expected -12\.\.11"),
        ({"explode": 1}, "unknown fields"),
    ],
)
def test_a_row_that_cannot_be_meant_is_named(fields, message):
    with pytest.raises(SaehookError, match=rf"^Edit 2.*{message}"):
        program(row(), row(**fields))


@pytest.mark.parametrize("value", [None, 3, {}, {"rows": 3}, {"rows": [3]}, {"rows": [{"on": True}]}])
def test_what_is_no_program_is_refused(value):
    with pytest.raises(SaehookError, match="not as the page's editor|is no object"):
        program_of(tiny(), value, LIMITS)


def test_all_problems_are_told_at_once():
    rows = [row(latents=[700]), row(), row(on=False, latents="x"), {"on": True, "text": "{"}]
    first, second = problems_of(tiny(), {"rows": rows}, LIMITS)
    assert first.startswith("Edit 1: latent 700 is outside")
    assert second.startswith("the text of edit 4 is not JSON")
    assert "this page allows 8" in problems_of(tiny(), {"rows": [row()] * 9}, LIMITS)[0]
    assert problems_of(tiny(), {"rows": [row()]}, LIMITS) == []


def test_a_program_is_kept_by_the_editor_whatever_it_holds():
    edits = [
        steer(3, 0.5, unit="norm", site=SITES[0], where=generation()),
        ablate([1, 2], site=SITES[1], when=latent(5, site=SITES[0]) > 1.0),
        add_vector([1.0] * 32, 2.0, site="layers.1.resid_post"),
    ]
    given = Program(edits=edits, norm="preserve")
    value = program_to_rows(tiny(), given.to_json(), LIMITS)
    assert program_of(tiny(), json.loads(json.dumps(value)), LIMITS) == given
    with pytest.raises(SaehookError, match="There is no JSON"):
        program_to_rows(tiny(), " ", LIMITS)


def test_a_chosen_latent_becomes_a_row():
    value = editor_value(tiny(), LIMITS)
    for kind, op in (
        ("add 0.3 × ‖x‖", "add"),
        ("set to its max", "set"),
        ("ablate", "ablate"),
        ("keep only it", "keep_only"),
    ):
        value = with_row(value, latent_row(7, SITES[0], kind), LIMITS)
        assert program_of(tiny(), value, LIMITS).edits[-1].op == op
    with pytest.raises(ArgumentError, match="no edit 'explode'"):
        latent_row(7, None, "explode")
    full = {**value, "rows": [row()] * 8}
    with pytest.raises(ArgumentError, match="All 8 edits are in use"):
        with_row(full, row(), LIMITS)
    assert with_row({**full, "rows": [*[row()] * 3, row(on=False), *[row()] * 4]}, row(value=9), LIMITS)["rows"][
        3
    ] == row(value=9)


# --- links ---------------------------------------------------------------------------------------------------------------


def test_a_link_restores_the_page():
    program = editor_value(tiny(), LIMITS, Program(edits=[ablate(3, site=SITES[0])], error="drop"))
    controls = {"prompt": "<b>é\n", "site": SITES[1], "latent": "7", "temperature": 0.5, "seed": 9}
    state = PageState(tab="generate", program=program, tokens=[2, 4], controls=controls)
    back = PageState.from_link(state.to_link())
    assert back.to_data() == state.to_data()
    assert "sites" not in back.program, "a link says nothing about the model"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x", "cannot be read"),
        ("!!!!", "cannot be read"),
        ("x" * 9000, "9000 characters; at most 8192"),
        (base64.urlsafe_b64encode(zlib.compress(b"0" * 10**6)).decode(), "more than 200000 characters"),
        (base64.urlsafe_b64encode(zlib.compress(b"[]")).decode(), "an object is expected"),
        (base64.urlsafe_b64encode(zlib.compress(b'{"version": 2, "run": true}')).decode(), "unknown fields"),
        (base64.urlsafe_b64encode(zlib.compress(b'{"version": 2, "controls": "x"}')).decode(), "controls is 'x'"),
        (base64.urlsafe_b64encode(zlib.compress(b'{"version": 1}')).decode(), "version 1; this page reads 2"),
        (base64.urlsafe_b64encode(zlib.compress(b'{"version": 2, "tab": "x"}')).decode(), "tab is 'x'"),
    ],
)
def test_a_link_that_is_none_is_refused(code, message):
    with pytest.raises(SaehookError, match=message):
        PageState.from_link(code)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shell": "rm"}, "'shell', which this page does not have"),
        ({"new-tokens": 351}, "“New tokens” is 351; expected: a number from 1 to 350"),
        ({"temperature": float("nan")}, "a number from 0.05 to 2"),
        ({"seed": True}, "“Seed” is True"),
        ({"site": "elsewhere"}, "“Site” is 'elsewhere'; expected: of layers.0.resid_post, layers.1.mlp_out"),
        ({"chosen-lanes": ["Base", "<b>"]}, "expected: of Base, Spliced"),
        ({"chosen-lanes": "Base"}, "expected: of Base, Spliced"),
        ({"sample": 1}, "expected: true or false"),
        ({"prompt": 3}, "expected: a text"),
        ({"prompt": "x" * 8001}, "8001 characters; this page allows 8000"),
    ],
)
def test_a_link_sets_what_the_controls_take(given, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        control_values(controls(), given)


def test_a_link_may_leave_controls_as_they_are():
    ids = [control.elem_id for control in controls()]
    values = dict(zip(ids, control_values(controls(), {"seed": 3}), strict=True))
    assert (values["seed"], values["new-tokens"], values["sort"]) == (3, 60, "activation")


@functools.cache
def controls() -> list[Any]:
    """What a link may set: every control of the page but those of the panel that shows and takes programs, and notes."""
    blocks = build_app(tiny(), limits=LIMITS)
    kinds = (gr.Textbox, gr.Number, gr.Dropdown, gr.Checkbox, gr.Slider, gr.CheckboxGroup)
    left_out = {"link", "program-json", "session", "session-page", "latent-page", "label", "notes"}
    return [b for b in blocks.blocks.values() if isinstance(b, kinds) and b.elem_id not in left_out]


def test_every_control_is_restored():
    blocks = build_app(tiny(), limits=LIMITS)
    (restore,) = [fn for fn in blocks.fns.values() if fn.name == "on_restore"]
    assert {c.elem_id for c in controls()} <= {c.elem_id for c in restore.outputs}


@pytest.mark.parametrize(
    ("chosen", "message"), [("", "No latent is chosen"), ("1 2", "choose one"), ("x", "one whole number")]
)
def test_a_chosen_latent_is_one_number(chosen, message):
    with pytest.raises(ArgumentError, match=message):
        one_latent(chosen, tiny().saes[SITES[0]])
    with pytest.raises(LatentError, match=r"96 is outside 0\.\.95"):
        one_latent("96", tiny().saes[SITES[0]])


# --- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((True, 0.8, 351, 0), "351 new tokens were asked for; this page allows 1 to 350"),
        ((True, 0.8, None, 0), "new tokens is None"),
        ((True, 0.8, 1.5, 0), "1.5; a whole number"),
        ((True, 0.0, 5, 0), "temperature is 0.0; a number above 0, at most 2"),
        ((True, float("inf"), 5, 0), "temperature is inf"),
        ((True, 0.8, 5, -1), "seed is -1"),
        ((True, 0.8, 5, None), "seed is None"),
        ((True, 0.8, 5, 0, 0.0), "Top-p is 0.0"),
    ],
)
def test_settings_are_checked(values, message):
    sample, temperature, tokens, seed, *top_p = values
    with pytest.raises(ArgumentError, match=message):
        sampling_of(sample, temperature, tokens, seed, LIMITS, *top_p)


def test_without_sampling_temperature_is_not_used():
    assert sampling_of(False, None, 5.0, 3, LIMITS).arguments() == {"max_new_tokens": 5, "do_sample": False}


def test_limits_are_positive():
    with pytest.raises(ArgumentError, match=r"Limits.seconds is 0; a number above 0"):
        Limits(seconds=0)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ArgumentError, "prompt is empty"),
        ("x" * 121, ArgumentError, "prompt has 121 tokens; this page allows 120"),
        ("x" * 8001, ArgumentError, "8001 characters; this page allows 8000"),
        ("x" * 100, ContextLengthError, "100 prompt tokens and 450 new ones are more than the 512"),
    ],
)
def test_prompts_are_checked(text, error, message):
    with pytest.raises(error, match=message):
        prompt_of(tiny(), text, LIMITS, 450)


# --- reading -------------------------------------------------------------------------------------------------------------


def test_a_reading_is_what_the_library_says():
    text = f"ab{SPECIAL}c"
    reading = read(tiny(), prompt_of(tiny(), text, LIMITS), SITES[0])
    facts = inspect_text(tiny(), text, SITES[0])
    assert reading.facts.strongest(20) == facts.strongest(20)
    assert reading.tokens == ["a", "b", SPECIAL, "c"]


def reading_of(*edits: Any) -> Reading:
    return read(tiny(), prompt_of(tiny(), PROMPT, LIMITS), SITES[0], Program(edits=edits))


def test_the_strip_is_coloured_by_the_latent():
    reading = reading_of()
    number = reading.facts.strongest(1)[0][0].latent
    value = strip_value(reading, number, (2, 4))
    acts = reading.facts.activations_of(number).tolist()
    assert [t["share"] for t in value["tokens"]] == pytest.approx([a / max(acts) for a in acts])
    assert [t["selected"] for t in value["tokens"]] == [i in (2, 3) for i in range(12)]
    expected = f"latent {number} at {SITES[0]}: from 0 to {max(acts):.4g}, its largest activation in this text"
    assert value["legend"] == expected
    silent = next(i for i in range(96) if not any(reading.facts.activations_of(i)))
    assert strip_value(reading, silent, None)["legend"].endswith("silent on this text")


def test_the_strip_is_coloured_by_numbers_of_tokens():
    reading = reading_of(steer(3, 4.0, site=SITES[0]))
    facts = reading.facts
    value = strip_value(reading, None, None, "loss_edited", "loss edited − loss, nats")
    more = (facts.loss_edited - facts.loss).tolist()
    assert [t["hot"] for t in value["tokens"]] == [m > 0 for m in more]
    largest = max(abs(m) for m in more[1:])
    assert [t["share"] for t in value["tokens"][1:]] == pytest.approx([abs(m) / largest for m in more[1:]])
    assert value["tokens"][0]["share"] == 0, "nothing predicts the first token"
    for measure in COLOURS.values():
        json.dumps(strip_value(reading, None, None, measure, "x", True), allow_nan=False)


def table(
    reading: Reading, sae: Any, latent: int | None = None, span: Any = None, sort: str = "activation", **keep: Any
):
    return table_value(reading, sae, latent, span, listed(reading, sae, span, sort, Filter(**keep)))


def test_the_table_says_how_much_it_shows():
    reading = reading_of()
    sae = tiny().saes[SITES[0]]
    hits, n_active = reading.facts.strongest(20)
    value = table(reading, sae, hits[1].latent)
    assert value["caption"] == f"Strongest latents of the text · showing 20 of {n_active} that fire"
    assert [r["key"] for r in value["rows"]] == [hit.latent for hit in hits]
    assert [r["selected"] for r in value["rows"]] == [i == 1 for i in range(20)]
    assert value["rows"][0]["cells"][2:4] == ["2", "12.50%"]
    at = table(reading, sae, span=(3, 4))
    assert at["caption"].startswith("Strongest latents of token 3, “l” · showing")
    assert [r["key"] for r in at["rows"]] == [hit.latent for hit in reading.facts.strongest(20, 3, 4)[0]]
    rows = table(reading, sae, sort="effect on the loss, ≈")["rows"]
    effects = [abs(reading.facts.effects[r["key"]]) for r in rows]
    assert effects == sorted(effects, reverse=True)
    assert table(reading, sae, dense=0.1)["rows"] == [], "all fire on 12.5 %"
    kept = table(reading, sae, least=hits[4].activation)
    assert [r["key"] for r in kept["rows"]] == [hit.latent for hit in hits[:5]]
    assert kept["caption"].endswith(f"showing 5 of 5 that the filters keep, {n_active} fire")
    json.dumps([value, at, next_value(reading, None)])


def test_effects_to_first_order_and_measured_stand_apart():
    blocks = build_app(tiny(), limits=LIMITS)
    (measure,) = [fn for fn in blocks.fns.values() if fn.name == "on_measure"]
    assert measure.fn is not None
    view = ["", (2, 4), SITES[0], "chosen latent", False, "activation", 100, 0, ""]
    reading, _, shown, _ = measure.fn(reading_of(), *view)
    assert shown["columns"][-2:] == ["loss without it, ≈", "measured"]
    for row in shown["rows"]:
        exact = tiny().loss(PROMPT, ablate(row["key"], site=SITES[0])) - tiny().loss(PROMPT)
        assert float(row["cells"][-1]) == pytest.approx(exact, abs=6e-5)
        assert float(row["cells"][-2]) == pytest.approx(reading.facts.effects[row["key"]], abs=6e-5)
    assert set(reading.measured) == {row["key"] for row in shown["rows"]}
    before = table(reading_of(), tiny().saes[SITES[0]])
    assert {row["cells"][-1] for row in before["rows"]} == {"–"}
    with pytest.raises(gr.Error, match="Press Read first"):
        measure.fn(None, *view)


def test_a_text_opens_with_a_latent_that_has_a_name(tmp_path):
    reading, sae = reading_of(), tiny().saes[SITES[0]]
    assert telling_latent(reading, sae) == str(reading.facts.strongest(1)[0][0].latent)
    named = load_sae(save_sae(sae, tmp_path / "sae"))
    few = [hit.latent for hit in reading.facts.strongest(10)[0][4:6]]
    for number in few:
        write_note(named, number, LatentNote(f"<b>label {number}"))
    assert telling_latent(reading, named) == str(few[0]), "all have the same maximum on record"
    value = table(reading, named)
    assert value["columns"][3] == "label"
    assert value["rows"][4]["cells"][2] == f"<b>label {few[0]}"
    assert [row["key"] for row in table(reading, named, words=str(few[1]))["rows"]] == [few[1]]


def test_next_tokens_before_and_after():
    value = next_value(reading_of(steer(3, 9.0, site=SITES[0])), (3, 4))
    assert value["caption"].startswith("Likeliest tokens after token 3, “l”")
    assert any(row["cells"][0] != row["cells"][1] for row in value["rows"])


# --- sweep, attribution --------------------------------------------------------------------------------------------------


def test_a_sweep_is_shown_as_curves_and_texts():
    edit = steer(3, 1.0, site=SITES[0])
    result = tiny().sweep(PROMPT, edit, [-2.0, 4.0], seed=1, max_new_tokens=6, do_sample=True)
    plots, table = plots_of([result], edit), table_of([result])
    assert plots["x"] == [-2.0, 4.0]
    assert plots["panels"][2]["series"][0]["y"] == [row.kl for row in result.rows]
    assert [row["name"] for row in table["rows"]] == ["-2", "4", "unedited"]
    assert [row["cells"][-1] for row in table["rows"][:2]] == [
        one_line(visible(r.generation.text)) for r in result.rows
    ]
    json.dumps([plots, table], allow_nan=False)
    other = tiny().sweep("abc", edit, [-2.0, 4.0], target=result.target, max_new_tokens=6, do_sample=False)
    plots, table = plots_of([result, other], edit), table_of([result, other])
    mean, first, second = (one["y"] for one in plots["panels"][2]["series"])
    assert (first, second) == ([row.kl for row in result.rows], [row.kl for row in other.rows])
    assert mean == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    assert [row["key"] for row in table["rows"]] == [0, 1, 2, 0, 1, 2]
    assert table["rows"][3]["cells"][-2:] == ["2", one_line(visible(other.rows[0].generation.text))]


@pytest.mark.parametrize(
    ("text", "message"), [("", "0 strengths"), ("a", "'a' are not understood"), ("1 " * 17, "17 strengths")]
)
def test_strengths_are_checked(text, message):
    with pytest.raises(ArgumentError, match=message):
        numbers(text, 16)


def test_a_sweep_that_is_left_frees_the_model():
    ids = prompt_of(tiny(), PROMPT, LIMITS).ids
    before = tiny().generate(PROMPT, max_new_tokens=5, do_sample=False).text

    def work(progress: Progress) -> Any:
        criteria = StoppingCriteriaList([Counting(progress, len(ids))])
        return tiny().sweep(ids, steer(3, 1.0, site=SITES[0]), [1.0], stopping_criteria=criteria, max_new_tokens=450)

    with contextlib.closing(in_background(work)) as parts:
        first = next(said for said in parts if said is not None)
        assert not isinstance(first, Done)
        assert int(first) > 0
    assert not any(thread.name == "saehook-work" for thread in threading.enumerate())
    assert tiny().generate(PROMPT, max_new_tokens=5, do_sample=False).text == before


def test_work_in_the_background_can_be_left():
    began, left = threading.Event(), threading.Event()

    def work(progress: Progress) -> None:
        began.set()
        try:
            while True:
                progress("busy")
                time.sleep(0.01)
        except Cancelled:
            left.set()
            raise

    parts = in_background(work)
    assert next(parts) == "busy"
    assert began.is_set()
    parts.close()
    assert left.is_set()
    assert [part.result for part in in_background(lambda progress: 7) if isinstance(part, Done)] == [7]
    with pytest.raises(LatentError):
        list(in_background(lambda progress: tiny().saes[SITES[0]].check_latents((96,))))


def test_text_becomes_visible():
    ids = tiny().tokenizer("é\n")["input_ids"]
    assert [visible_token(tiny().tokenizer, i) for i in ids] == ["<0xC3>", "<0xA9>", "↵\n"]
    assert visible("a\u202eb\x1b\t\n<i>") == "a<U+202E>b<U+001B>\t\n<i>"
    assert one_line("  a↵\n ") == "··a↵·"
    assert one_line("   ") == "···"


# --- lanes ---------------------------------------------------------------------------------------------------------------


def lanes_of(
    edits: Program, new_tokens: int = 8, chosen: Any = CHOSEN, limits: Limits = LIMITS, **prompts: Any
) -> list[list[dict]]:
    sampling = Sampling(True, 0.9, new_tokens, 4)
    text = prompts.pop("prompt", prompt_of(tiny(), PROMPT, LIMITS))
    return list(run_lanes(tiny(), text, edits, sampling, limits, chosen, **prompts))


def test_lanes_are_three_generations_with_one_seed():
    edits = Program(edits=(steer(3, 4.0, site=SITES[0]),))
    *_, (base, spliced, edited, control) = lanes_of(edits)
    assert "not chosen" in control["status"]
    arguments = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.9, "seed": 4}
    for lane, more in ((base, {}), (spliced, {"splice": True}), (edited, {"edits": edits.edits})):
        expected = tiny().generate(PROMPT, **more, **arguments)
        assert lane["text"] == visible(tiny().tokenizer.decode(expected.new_ids.tolist()))
        assert lane["prompt"] == PROMPT
        assert lane["state"] == "done"
        assert lane["notes"] == report_notes(expected.report)
    assert edited["notes"][0]["text"].startswith("edit 1: add 3 4 at layers.0.resid_post (every token): dose ‖Δ‖/‖x‖ ")
    assert "on 19 tokens" in edited["notes"][0]["text"]
    states = [[lane["state"] for lane in value] for value in lanes_of(edits)]
    assert states[0] == ["running", "waiting", "waiting", "idle"]
    *_, lanes = lanes_of(edits, chosen=["Edited", "Control"])
    assert lanes[3]["notes"][0]["text"].endswith(lanes[2]["notes"][0]["text"].partition("dose")[2])


def test_a_chat_is_continued_and_a_system_prompt_is_its_control():
    chat, system = (prompt_of(tiny(), "hi", LIMITS, chat=True, system=text) for text in ("", "be kind"))
    assert tiny().tokenizer.decode(chat.ids) == "[user]hi\n[assistant]"
    assert tiny().tokenizer.decode(system.ids) == "[system]be kind\n[user]hi\n[assistant]"
    *_, lanes = lanes_of(Program(), chosen=["Base", "Control"], prompt=chat, control=system)
    arguments = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.9, "seed": 4}
    for lane, prompt_text in ((lanes[0], chat), (lanes[3], system)):
        expected = tiny().generate(prompt_text.given, **arguments)
        assert lane["text"] == visible(tiny().tokenizer.decode(expected.new_ids.tolist()))
        assert lane["prompt"] == visible(tiny().tokenizer.decode(prompt_text.ids))
    with pytest.raises(ArgumentError, match="123 tokens; this page allows 120"):
        prompt_of(tiny(), "x" * 105, LIMITS, chat=True)


def test_a_lane_ends_at_the_time_limit():
    *_, lanes = lanes_of(Program(), 450, ["Base"], Limits(prompt_tokens=120, new_tokens=450, seconds=0.05))
    assert re.search(
        r"^\d+ tokens in [\d.]+ s, ended by the time limit of 0.05 s; 450 were asked for", lanes[0]["status"]
    )


def test_without_edits_the_third_lane_is_not_run():
    *_, lanes = lanes_of(Program())
    assert "No edit is on" in lanes[2]["status"]
    assert lanes[2]["state"] == "idle"


def test_notes_of_a_report():
    edit = steer(3, 4.0, site=SITES[0])
    notes = report_notes(Report(edits=(EditReport(edit, 1, 0.75), EditReport(edit, 0, 0.0), EditReport(edit, 9, 0.0))))
    assert [note["kind"] for note in notes] == ["dose", "dose", "dose", "note", "note", "warning"]
    assert notes[0]["text"].endswith("dose ‖Δ‖/‖x‖ 0.750 on 1 token")
    assert "selected no token" in notes[3]["text"]
    assert "0.75 × the activation" in notes[5]["text"]
    assert report_notes(Report(edits=(EditReport(edit, 5, float("nan")),)))[-1]["kind"] == "warning"


def test_stop_marks_what_was_running():
    running, done = lane_value("p", "t", status="3 of 8 tokens", state="running"), lane_value(state="done")
    marked = on_stop(running, done, "nonsense")
    assert marked[0]["state"] == "stopped"
    assert marked[0]["text"] == "t"
    assert all(not isinstance(value, dict) or "__type__" in value for value in marked[1:])


@pytest.mark.parametrize("norm", [None, "preserve"])
def test_python_that_repeats_a_run_repeats_it(capsys, monkeypatch, norm):
    edits = Program(
        edits=(steer(3, 4.0, site=SITES[0], where=generation()), ablate([1, 2], site=SITES[1])), error="drop", norm=norm
    )
    code = python_for(tiny(), 'a "quoted" \n prompt', edits, Sampling(True, 0.9, 6, 4, 0.9), {SITES[0]: "path/of/sae"})
    assert f"{SITES[0]!r}: saehook.load_sae('path/of/sae')" in code
    monkeypatch.setattr(saehook.HookedModel, "from_pretrained", lambda _: tiny().model)
    monkeypatch.setattr(saehook, "load_sae", lambda path: tiny().saes[SITES[0 if path == "path/of/sae" else 1]])
    exec(code, {})
    expected = tiny().generate(
        'a "quoted" \n prompt',
        edits=edits,
        max_new_tokens=6,
        do_sample=True,
        temperature=0.9,
        top_p=0.9,
        seed=4,
    )
    assert capsys.readouterr().out == f"{expected.text}\n{expected.report}\n"


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (steer(3, 0.25, unit="norm"), "steer(3, 0.25, unit='norm')"),
        (clamp([3, 4], 1 / 3, where=tokens(0, -1)), "clamp([3, 4], 0.3333333333333333, where=saehook.tokens(0, -1))"),
        (scale(3, -2, where=prompt()), "scale(3, -2, where=saehook.prompt())"),
        (ablate(3, site="x"), "ablate(3, site='x')"),
        (swap(3, 4, where=matching(r"\w")), "swap(3, 4, where=saehook.Where(pattern='\\\\w'))"),
        (
            steer(3, 1.0, active_only=True, schedule=Schedule.steps(1, 0)),
            "steer(3, 1, active_only=True, schedule=saehook.Schedule(line=None, rate=None, factors=(1.0, 0.0)))",
        ),
        (ablate(3, when=latent(5) > 1.0), None),
    ],
)
def test_code_of_an_edit(edit, code):
    assert edit_code(edit) == code


def test_a_shell_command_that_repeats_a_run():
    edits = Program(edits=[ablate(3, site=SITES[0], where=matching("'"))])
    text = shell_for(tiny(), "it's\n$HOME", edits, Sampling(True, 0.9, 6, 4), {site: f"at/{site}" for site in SITES})
    file, command = text.removeprefix("cat > program.json <<'END'\n").split("\nEND\n")
    assert Program.from_json(file) == edits
    words = shlex.split(command)
    assert words[:3] == ["saehook", "generate", "it's\n$HOME"]
    parsed = cli._parser().parse_args(words[1:])
    assert parsed.sae == [f"at/{site}" for site in SITES]
    assert (parsed.edits, parsed.lm, parsed.temperature, parsed.seed, parsed.max_new_tokens) == (
        "program.json",
        "tiny",
        0.9,
        4,
        6,
    )


def test_messages_are_escaped_and_others_hidden(caplog):
    with pytest.raises(gr.Error, match="&lt;img src=x&gt; 'quoted'"), told_to_the_visitor():
        raise ArgumentError("<img src=x> 'quoted'")
    with pytest.raises(gr.Error, match="The run failed on the server") as caught, told_to_the_visitor():
        raise OSError("/secret/path")
    assert "secret" not in str(caught.value)
    assert "/secret/path" in caplog.text


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    yield
    collect_loops()


# --- the server ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Iterator[gr.Blocks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_SHARE", "True")  # which would otherwise open a tunnel
        patch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")  # and listen to the whole network
        app = serve(tiny(), port=free_port(), limits=LIMITS, block=False, quiet=True)
    yield app
    app.close()


@pytest.fixture(scope="module")
def url(served) -> str:
    assert served.local_url
    return served.local_url


@pytest.fixture(scope="module")
def client(url) -> Client:
    return Client(url, verbose=False, analytics_enabled=False)


def test_endpoints_are_named_and_described(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    expected = "read inspect generate sweep attribute latent latents_for_token latents_here_not_there".split()
    assert set(named) == {f"/{name}" for name in expected}
    for name, endpoint in named.items():
        assert endpoint["description"], name
        assert all(parameter["parameter_name"] != "self" for parameter in endpoint["parameters"])


def test_client_inspects(client):
    edits = Program(edits=[steer(3, 4.0, site=SITES[0])])
    facts = inspect_text(tiny(), PROMPT, SITES[0], edits)
    result = client.predict(PROMPT, SITES[0], edits.to_json(), api_name="/inspect")
    assert result["loss_edited"][1:] == pytest.approx(facts.loss_edited[1:].tolist(), abs=1e-5)
    assert result["loss"][0] is None
    assert [token["id"] for token in result["next_tokens"]] == [token.id for token in facts.next_tokens[-1]]


def test_client_sweeps_and_attributes(client):
    edits = Program(edits=[steer(3, 4.0, site=SITES[0])])
    result = client.predict(PROMPT, edits.to_json(), "1, 2", "", 4, api_name="/sweep")
    expected = tiny().sweep(PROMPT, edits.edits[0], [1.0, 2.0], max_new_tokens=4, do_sample=False)
    assert [row["text"] for row in result["rows"]] == [row.generation.text for row in expected.rows]
    result = client.predict(PROMPT, "e", api_name="/attribute")
    expected = tiny().attribute(PROMPT, Logit("e"), by_token=False).top(20, sign=1)
    assert [one["latent"] for one in result["raise"]] == [one.latent for one in expected]


def test_client_finds_latents(client):
    card = client.predict(5, SITES[0], api_name="/latent")
    assert card["neighbours"][0]["latent"] == latent_card(tiny(), 5, SITES[0]).neighbours[0].latent
    found = client.predict("e", SITES[0], api_name="/latents_for_token")
    assert found[0]["cosine"] >= found[1]["cosine"]
    assert client.predict("abc", "abc", SITES[0], api_name="/latents_here_not_there") == []


def test_client_reads(client):
    result = client.predict(PROMPT, SITES[0], api_name="/read")
    latents = tiny().latents(PROMPT, SITES[0])
    assert result["tokens"] == list(PROMPT)
    assert [hit["latent"] for hit in result["top"]] == [hit.latent for hit in latents.top(20)]
    assert [[hit["latent"] for hit in hits] for hits in result["top_at"]] == [
        [hit.latent for hit in latents.at(i, 20)] for i in range(12)
    ]


def test_client_generates(client):
    edits = Program(edits=(steer(3, 4.0, site=SITES[0]),), error="drop", norm="preserve")
    job = client.submit(PROMPT, edits.to_json(), 30, True, 0.9, 4, api_name="/generate")
    final = job.result()
    expected = tiny().generate(PROMPT, edits=edits, max_new_tokens=30, do_sample=True, temperature=0.9, seed=4)
    assert final["text"] == expected.text
    assert final["tokens"] == 30
    assert final["report"] == expected.report.to_data()
    outputs = job.outputs()
    assert len(outputs) > 1, "the text should be streamed"
    assert not any(output["done"] for output in outputs[:-1])


def test_two_clients_with_opposite_edits_get_their_solo_outputs(url):
    programs = [Program(edits=(steer(3, c, site=SITES[0]),)) for c in (4.0, -4.0)]
    arguments = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.9, "seed": 4}
    solo = [tiny().generate(PROMPT, edits=p.edits, **arguments).text for p in programs]
    assert solo[0] != solo[1]
    clients = [Client(url, verbose=False, analytics_enabled=False) for _ in programs]
    jobs = [
        c.submit(PROMPT, p.to_json(), 40, True, 0.9, 4, api_name="/generate")
        for c, p in zip(clients, programs, strict=True)
    ]
    assert [job.result()["text"] for job in jobs] == solo


def test_a_cancelled_job_frees_the_model(client):
    job = client.submit(PROMPT, "", 350, False, 1.0, 0, api_name="/generate")
    deadline = time.monotonic() + 20
    while not job.outputs() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.cancel()
    while any(t.name == "saehook-stream" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(t.name == "saehook-stream" for t in threading.enumerate())
    assert client.predict(PROMPT, SITES[0], api_name="/read")["tokens"] == list(PROMPT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("/read", "", SITES[0]), "The prompt is empty"),
        (("/read", "x" * 500, SITES[0]), "500 tokens; this page allows 120"),
        (("/read", PROMPT, ""), "several SAEs are attached"),
        (("/read", PROMPT, "layers.0.resid_pots"), "layers.0.resid_post"),
        (("/generate", PROMPT, "", 1000), "1000 new tokens were asked for; this page allows 1 to 350"),
        (("/generate", PROMPT, "{}"), r"lacks \['edits', 'schema'\]"),
        (("/generate", PROMPT, "x" * 130_000), "130000 characters"),
        (
            ("/generate", PROMPT, Program(edits=(steer(700, 1.0, site=SITES[0]),)).to_json()),
            r"latent 700 is outside 0..95",
        ),
    ],
)
def test_bad_input_gets_a_clear_message(client, call, message):
    api_name, *arguments = call
    with pytest.raises(AppError, match=message):
        client.predict(*arguments, api_name=api_name)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back_as_it_is(client, text):
    result = client.predict(text, SITES[0], api_name="/read")
    assert result["ids"] == tiny().tokenizer(text)["input_ids"]
    if text.isascii() and "\n" not in text:
        assert "".join(result["tokens"]) == text
    final = client.predict(text, "", 3, False, 1.0, 0, api_name="/generate")
    assert final["tokens"] == 3


def get(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_this_machine_is_listened_to(served, url):
    assert served.share is False
    assert served.share_url is None
    port = urllib.parse.urlsplit(url).port
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with pytest.raises(OSError):  # noqa: PT011  # refused, or no such address
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_a_foreign_host_is_refused(url):
    assert get(url) == 200
    assert get(url, Host="evil.example") == 400
    assert get(url + "gradio_api/info", Host="evil.example") == 400


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "pyproject.toml", "..%2f..%2fetc/passwd", "%2e%2e/%2e%2e/etc/passwd", "file:///etc/passwd",
        "/proc/self/environ", "a%00b", "%3Cimg%20src=x%20onerror=alert(1)%3E", "//etc/passwd", "~/.ssh/id_rsa",
    ],
)  # fmt: skip
def test_no_files_are_served(url, path):
    assert get(f"{url}gradio_api/file={path}") in {400, 403, 404}


def post(url: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
    """The status of the answer, and what it says."""
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "name", ["a.safetensors", "../../../tmp/a.pt", "<img src=x onerror=alert(1)>.pkl", "a\\b\x00.json"]
)
def test_nothing_can_be_uploaded(url, name):
    disposition = f'Content-Disposition: form-data; name="files"; filename="{name}"'.encode()
    body = b"--x\r\n" + disposition + b"\r\n\r\n0\r\n--x--\r\n"
    status, says = post(f"{url}gradio_api/upload", body, "multipart/form-data; boundary=x")
    assert (status, json.loads(says)["detail"]) == (
        413,
        f"A file of {len(body)} bytes was sent; this page takes 0: it has no uploads.",
    )


def index_of(url: str, name: str) -> int:
    """The number by which Gradio knows a function of the page."""
    with urllib.request.urlopen(url + "config", timeout=20) as response:
        (found,) = [d["id"] for d in json.load(response)["dependencies"] if d["api_name"] == name]
    return found


def joined(url: str, index: int, data: list[Any], session: str) -> tuple[int, str]:
    """What is answered to a request for a function by its number."""
    body = {"data": data, "fn_index": index, "session_hash": session, "event_data": None}
    return post(f"{url}gradio_api/queue/join", json.dumps(body).encode())


def completed(url: str, session: str) -> dict[str, Any]:
    """The last thing that the server says about a request."""
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash={session}", timeout=20) as response:
        for line in response:
            if line.startswith(b"data:") and (said := json.loads(line[5:]))["msg"] == "process_completed":
                return said
    raise AssertionError("the server said nothing")


def test_a_full_queue_says_how_full_it_is(url):
    read_index = index_of(url, "read")
    with lock_of(tiny().lm):  # the model is busy
        answers = [joined(url, read_index, [PROMPT, SITES[0]], "waits")]
        while answers[-1][0] == 200 and len(answers) < 20:
            time.sleep(0.2)  # the first one is taken off the queue
            answers.append(joined(url, read_index, [PROMPT, SITES[0]], "waits"))
    assert LIMITS.queue <= len(answers) - 1 <= LIMITS.queue + 2
    status, says = answers[-1]
    assert status == 429
    assert "4 requests wait for it, and this page lets 4 wait. Try again" in json.loads(says)["detail"]
    assert completed(url, "waits")["success"]


def test_a_function_asked_for_by_its_number_checks_what_it_gets(url):
    """Gradio hides functions of the page from clients only."""
    blocks = build_app(tiny(), limits=LIMITS)
    (generate,) = [fn for fn in blocks.fns.values() if fn.name == "on_generate"]
    values = {
        "prompt": PROMPT,
        "editor": {"rows": []},
        "chat": False,
        "chosen-lanes": ["Base"],
        "control": "a random latent",
    }
    settings = {"sample": True, "temperature": 0.8, "top-p": 1.0, "seed": 0, "system": ""}
    for new_tokens, says in ((10**6, "maximum value 350"), (0, "minimum value 1")):
        given = values | settings | {"new-tokens": new_tokens}
        data = [given[str(component.elem_id)] for component in generate.inputs]
        assert joined(url, generate._id, data, f"n{new_tokens}")[0] == 200
        answer = completed(url, f"n{new_tokens}")
        assert not answer["success"]
        assert says in answer["output"]["error"]
        assert str(new_tokens) in answer["output"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, "<img src=x>${x}", {"a": [1]}, [[]], 1e308])
def test_no_function_breaks_or_tells_what_it_should_not(url, client, value):
    with urllib.request.urlopen(url + "config", timeout=20) as response:
        dependencies = [d for d in json.load(response)["dependencies"] if d["backend_fn"]]
    assert len(dependencies) > 40
    for dependency in dependencies:
        session = f"s{dependency['id']}"
        status, says = joined(url, dependency["id"], [value] * len(dependency["inputs"]), session)
        if status == 200:
            says = str(completed(url, session)["output"].get("error"))
        for secret in ("Traceback", "site-packages", str(Path.cwd()), str(Path.home())):
            assert secret not in says, dependency
    assert client.predict(PROMPT, SITES[0], api_name="/read")["tokens"] == list(PROMPT)


def test_names_of_files_are_quoted_where_they_are_shown():
    name = "it's \"\n<img src=x onerror=alert(1)>$(rm -r .)`x`"
    where: dict[str, str] = {site: name for site in SITES}
    code = python_for(tiny(), PROMPT, Program(), Sampling(False, 1.0, 5, 0), where)
    assert name in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    command = shell_for(tiny(), PROMPT, Program(), Sampling(False, 1.0, 5, 0), where, chat=True).partition("\nEND\n")[2]
    assert shlex.split(command).count(name) == 2
    assert cli._parser().parse_args(shlex.split(command)[1:]).chat


def test_mcp_needs_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ArgumentError, match="needs the package mcp.*pip install 'mcp>=1.21,<2'"):
        serve(tiny(), port=free_port(), mcp=True, block=False, quiet=True)


def test_telemetry_is_off(url):
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    with urllib.request.urlopen(url + "config", timeout=20) as response:
        config = json.load(response)
    assert config["analytics_enabled"] is False
    assert "runs" not in json.dumps(config.get("footer_links"))


def test_every_control_has_an_id_and_a_label():
    blocks = build_app(tiny())
    for block in blocks.blocks.values():
        if isinstance(block, (gr.Textbox, gr.Number, gr.Dropdown, gr.Checkbox, gr.Slider, gr.Radio, gr.Code)):
            assert block.elem_id, block
            assert block.label, block.elem_id
        if isinstance(block, (gr.Button, gr.HTML)):
            assert block.elem_id, block
    ids = [block.elem_id for block in blocks.blocks.values() if getattr(block, "elem_id", None)]
    assert len(set(ids)) == len(ids)
    assert PROMPTS[0] in [block.value for block in blocks.blocks.values() if isinstance(block, gr.Textbox)]


def test_colours_can_be_told_apart_by_everybody():
    script = Path(plots.__file__).with_suffix(".js").read_text(encoding="utf-8")
    drawn = re.findall("#[0-9A-Fa-f]{6}", script.partition("COLOURS = ")[2].partition(";")[0])
    lanes = [colour for _, colour in LOOKS.values()]
    assert len(drawn) == len(lanes) == 4
    for colours in (drawn, lanes, ["#1A85FF", "#D41159"]):
        for one, other in itertools.combinations(colours, 2):
            for sight in SIGHT:
                assert difference(one, other, sight) > 18, (one, other, sight)
    for colour in ("26 133 255", "212 17 89"):
        assert colour in STRIP_CSS, "the strip has the two of the pair"
