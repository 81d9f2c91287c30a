"""The page without a browser: its parts, and a launched server asked by `gradio_client` and plain HTTP."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import gradio as gr
import pytest
from app_fixtures import HOSTILE, SITES, SPECIAL, collect_loops, free_port, tiny
from gradio_client import Client
from gradio_client.exceptions import AppError

import saehook
from saehook import Program, ablate, clamp, generation, prompt, scale, steer, tokens
from saehook.app import Limits, build_app, serve
from saehook.app.edit_rows import EditRow, check_program, first_free, parse_where, program_of, rows_of
from saehook.app.lane import lane_value, report_notes
from saehook.app.lanes import run_lanes
from saehook.app.latent_table import table_value
from saehook.app.messages import told_to_the_visitor
from saehook.app.page import PROMPTS, on_stop, one_latent
from saehook.app.reading import prompt_ids, read
from saehook.app.sampling import Sampling, sampling_of
from saehook.app.snippet import edit_code, snippet
from saehook.app.token_strip import strip_value
from saehook.app.visible_text import one_line, visible, visible_token
from saehook.errors import ArgumentError, ContextLengthError, LatentError, SaehookError
from saehook.results import EditReport, Report
from saehook.where import EVERYWHERE

pytestmark = [
    # Gradio leaves event loops and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]
LIMITS = Limits(prompt_tokens=120, new_tokens=350, queue=4)
PROMPT = "hello, world"


def row(**values: Any) -> EditRow:
    default = EditRow(on=True, site=SITES[0], latent="3", op="add", strength=0.5, unit="raw", where="everywhere")
    return default._replace(**values)


def program(*rows: EditRow, error: str = "keep", n_prompt: int = 12) -> Program:
    return program_of(tiny(), rows, error, n_prompt, LIMITS)


# --- edits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "edit"),
    [
        ({}, steer(3, 0.5, site=SITES[0])),
        ({"unit": "norm", "where": "generation"}, steer(3, 0.5, unit="norm", site=SITES[0], where=generation())),
        ({"unit": "max", "where": " prompt "}, steer(3, 0.5, unit="max", site=SITES[0], where=prompt())),
        ({"op": "set", "latent": " 3, 14 ", "where": ""}, clamp([3, 14], 0.5, site=SITES[0])),
        ({"op": "scale", "unit": "max", "site": SITES[1]}, scale(3, 0.5, site=SITES[1])),
        ({"op": "ablate", "strength": None, "where": "0, 3 -1"}, ablate(3, site=SITES[0], where=tokens(0, 3, -1))),
    ],
)
def test_a_row_means_an_edit(values, edit):
    assert program(row(on=False), row(**values)).edits == (edit,)


def test_rows_that_are_off_mean_nothing():
    assert program(row(on=False, latent="no number"), error="drop") == Program(error="drop")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latent": ""}, "names no latent"),
        ({"latent": "4.5"}, "the latent '4.5' is unknown; expected a whole number"),
        ({"latent": "<b>"}, "'<b>' is unknown"),
        ({"latent": "96"}, r"latent 96 is outside 0\.\.95"),
        ({"latent": "-1"}, "latent -1 is negative"),
        ({"strength": None}, "no strength"),
        ({"strength": float("nan")}, "a finite number is expected"),
        ({"strength": 1e6}, r"strength 1e\+06 is beyond ±100000"),
        ({"op": "explode"}, "no operation 'explode'"),
        ({"unit": "miles"}, "no unit 'miles'"),
        ({"site": "layers.9.resid_post"}, "layers.9.resid_post"),
        ({"site": SITES[1], "unit": "max"}, "no statistics"),
        ({"where": "somewhere"}, "the place 'somewhere' is unknown; expected everywhere, prompt, generation"),
        ({"where": "0, 12"}, r"token 12 is outside the 12 tokens of the prompt: expected -12\.\.11"),
    ],
)
def test_a_row_that_cannot_be_meant_is_named(values, message):
    with pytest.raises(SaehookError, match=rf"^Edit 2: .*{message}"):
        program(row(), row(**values))


def test_with_one_sae_edits_name_no_site():
    hooked = tiny().model.attach(tiny().saes[SITES[1]])
    assert program_of(hooked, [row(site=SITES[1])], "keep", 12, LIMITS).edits == (steer(3, 0.5),)
    sites = [
        block for block in build_app(hooked).blocks.values() if str(getattr(block, "elem_id", "")).endswith("site")
    ]
    assert len(sites) == 5
    assert not any(block.visible for block in sites)
    hooked.detach()


def test_too_many_edits():
    with pytest.raises(ArgumentError, match="5 edits were given; this page allows 4"):
        check_program(tiny(), Program(edits=(steer(1, 1.0, site=SITES[0]),) * 5), 3, LIMITS)


def test_error_is_checked():
    with pytest.raises(ArgumentError, match="expected 'keep' or 'drop'"):
        program(row(), error="lose")


def test_first_free_row():
    used, off, empty = row(), row(on=False), row(on=False, latent="")
    assert first_free([used, off, empty, empty]) == 2
    assert first_free([used, off, used, used]) == 1
    with pytest.raises(ArgumentError, match="All 4 edits are in use"):
        first_free([used] * 4)
    assert list(rows_of([*used, *off])) == [used, off]


def test_an_empty_place_is_everywhere():
    assert parse_where(None) == parse_where("") == EVERYWHERE


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
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ArgumentError, match=message):
        sampling_of(values[0], values[1], values[2], values[3], LIMITS)


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
        prompt_ids(tiny(), text, LIMITS, 450)


# --- reading -------------------------------------------------------------------------------------------------------------


def test_a_reading_is_what_the_library_says():
    text = f"ab{SPECIAL}c"
    latents = tiny().latents(text, SITES[0])
    reading = read(tiny(), text, SITES[0], LIMITS)
    assert reading.top == latents.top(20)
    assert reading.n_active == len(latents.top(96))
    assert reading.top_at == [latents.at(i, 20) for i in range(4)]
    assert reading.tokens == ["a", "b", SPECIAL, "c"]
    assert reading.mask == [True, True, False, True]
    for latent in (0, reading.top[0].latent):
        assert reading.activations(latent) == latents.acts[:, latent].tolist()


def test_the_strip_is_coloured_by_the_latent():
    reading = read(tiny(), PROMPT, SITES[0], LIMITS)
    latent = reading.top[0].latent
    value = strip_value(reading, latent, 2)
    acts = reading.activations(latent)
    assert [t["share"] for t in value["tokens"]] == pytest.approx([a / max(acts) for a in acts])
    assert [t["selected"] for t in value["tokens"]] == [i == 2 for i in range(12)]
    assert (
        value["legend"]
        == f"latent {latent} at {SITES[0]}: from 0 to {max(acts):.4g}, its largest activation in this text"
    )
    silent = next(i for i in range(96) if not any(reading.activations(i)))
    assert strip_value(reading, silent, None)["legend"].endswith("silent on this text")
    assert strip_value(None, None, None)["tokens"] == []


def test_the_table_says_how_much_it_shows():
    reading = read(tiny(), PROMPT, SITES[0], LIMITS)
    sae = tiny().saes[SITES[0]]
    value = table_value(reading, sae, reading.top[1].latent, None)
    assert value["caption"] == f"Strongest latents of the text · showing 20 of {reading.n_active} that fire"
    assert [r["latent"] for r in value["rows"]] == [hit.latent for hit in reading.top]
    assert [r["selected"] for r in value["rows"]] == [i == 1 for i in range(20)]
    assert value["rows"][0]["cells"][-2:] == ["2", "12.50%"]
    at = table_value(reading, sae, None, 3)
    assert at["caption"].startswith("Strongest latents of token 3, “l” · showing")
    assert [r["latent"] for r in at["rows"]] == [hit.latent for hit in reading.top_at[3]]
    assert "Read a text" in table_value(None, None, None, None)["caption"]
    json.dumps([value, at])


def test_text_becomes_visible():
    ids = tiny().tokenizer("é\n")["input_ids"]
    assert [visible_token(tiny().tokenizer, i) for i in ids] == ["<0xC3>", "<0xA9>", "↵\n"]
    assert visible("a\u202eb\x1b\t\n<i>") == "a<U+202E>b<U+001B>\t\n<i>"
    assert one_line("  a↵\n ") == "··a↵·"
    assert one_line("   ") == "···"


# --- lanes ---------------------------------------------------------------------------------------------------------------


def lanes_of(edits: Program, new_tokens: int = 8) -> list[list[dict]]:
    sampling = Sampling(True, 0.9, new_tokens, 4)
    return list(run_lanes(tiny(), prompt_ids(tiny(), PROMPT, LIMITS), edits, sampling, LIMITS))


def test_lanes_are_three_generations_with_one_seed():
    edits = Program(edits=(steer(3, 4.0, site=SITES[0]),))
    *_, (base, spliced, edited) = lanes_of(edits)
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
    assert states[0] == ["running", "waiting", "waiting"]


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


def test_python_that_repeats_a_run_repeats_it(capsys, monkeypatch):
    edits = Program(
        edits=(steer(3, 4.0, site=SITES[0], where=generation()), ablate([1, 2], site=SITES[1])), error="drop"
    )
    code = snippet(tiny(), 'a "quoted" \n prompt', edits, Sampling(True, 0.9, 6, 4), {SITES[0]: "path/of/sae"})
    assert f"{SITES[0]!r}: saehook.load_sae('path/of/sae')" in code
    monkeypatch.setattr(saehook.HookedModel, "from_pretrained", lambda _: tiny().model)
    monkeypatch.setattr(saehook, "load_sae", lambda path: tiny().saes[SITES[0 if path == "path/of/sae" else 1]])
    exec(code, {})
    expected = tiny().generate(
        'a "quoted" \n prompt',
        edits=edits.edits,
        error="drop",
        max_new_tokens=6,
        do_sample=True,
        temperature=0.9,
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
    ],
)
def test_code_of_an_edit(edit, code):
    assert edit_code(edit) == code


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
def url() -> Iterator[str]:
    app = serve(tiny(), port=free_port(), limits=LIMITS, block=False, quiet=True)
    assert app.local_url
    yield app.local_url
    app.close()


@pytest.fixture(scope="module")
def client(url) -> Client:
    return Client(url, verbose=False, analytics_enabled=False)


def test_only_two_endpoints_are_named(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/read", "/generate"}


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
        (("/generate", PROMPT, "x" * 30_000), "30000 characters"),
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


def test_a_foreign_host_is_refused(url):
    assert get(url) == 200
    assert get(url, Host="evil.example") == 400
    assert get(url + "gradio_api/info", Host="evil.example") == 400


@pytest.mark.parametrize("path", ["/etc/passwd", "pyproject.toml", "..%2f..%2fetc/passwd"])
def test_no_files_are_served(url, path):
    assert get(f"{url}gradio_api/file={path}") in {403, 404}


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
