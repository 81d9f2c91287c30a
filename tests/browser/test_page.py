"""The page in a real browser: what a visitor does, from reading a text to three lanes."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import accessibility
import pytest
import torch
from app_fixtures import HOSTILE, SITES, tiny
from playwright.sync_api import Page, expect

from saehook import SAE, Program, SAEConfig, TopK, ablate, latent, save_sae, steer
from saehook.attribution import Logit
from saehook.dashboards import latent_card
from saehook.latent_search import latents_for_token
from saehook.visible_text import one_line, visible, visible_token

pytestmark = [
    pytest.mark.browser,
    # Gradio leaves event loops and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]
PROMPT = "hello, world"
TABS = ("Inspect", "Generate", "Sweep", "Attribution", "Latent", "Search", "SAE card")
SAMPLED = {"max_new_tokens": 60, "do_sample": True, "temperature": 0.8, "seed": 0}
"""What the page does unless told otherwise."""


def read(page: Page, text: str) -> None:
    """Type a prompt and read it with the keyboard; the strip shows its tokens."""
    page.locator("#prompt textarea").fill(text)
    page.locator("#prompt textarea").press("Shift+Enter")
    ids = tiny().tokenizer(text)["input_ids"]
    expect(page.locator("#strip .token")).to_have_count(len(ids))
    expect(page.locator("#strip .strip")).to_have_text(
        re.compile(re.escape("".join(visible_token(tiny().tokenizer, i) for i in ids))), use_inner_text=True
    )


def edit(page: Page, latent: int | str, strength: float, unit: str) -> None:
    """Add an edit at the first site."""
    page.locator("#add-edit").click()
    number = page.locator("#editor li").count()
    page.locator(f"#edit-{number}-latent").fill(str(latent))
    page.locator(f"#edit-{number}-strength").fill(str(strength))
    page.locator(f"#edit-{number}-unit").select_option(unit)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def choose(page: Page, dropdown: str, option: str) -> None:
    page.locator(f"{dropdown} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def set_new_tokens(page: Page, n: int) -> None:
    tab(page, "Generate")
    page.locator("#new-tokens input[type=number]").fill(str(n))
    page.locator("#new-tokens input[type=number]").press("Tab")


def generate(page: Page) -> None:
    tab(page, "Generate")
    page.locator("#generate").click()
    expect(page.locator("#lane-edited .lane")).to_have_attribute("data-state", "done", timeout=60_000)


def lane_text(page: Page, lane: str) -> str:
    """What the model wrote, with the special token that ended it."""
    parts = page.locator(f"#lane-{lane}").locator(".text, .end")
    return "".join(parts.evaluate_all("nodes => nodes.map(node => node.textContent)"))


def expected_text(**program) -> str:
    ids = tiny().generate(PROMPT, **program, **SAMPLED).new_ids.tolist()
    return visible(tiny().tokenizer.decode(ids))


def streams() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "saehook-stream"]


def wait_until(true, seconds: float = 5.0) -> float:
    began = time.perf_counter()
    while not true():
        assert time.perf_counter() - began < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.perf_counter() - began


def test_from_reading_to_three_lanes(visit):
    page = visit()
    read(page, PROMPT)
    latents = tiny().latents(PROMPT, SITES[0])
    strongest = latents.top(1)[0].latent
    expect(page.locator("#latent input")).to_have_value(str(strongest))
    expect(page.locator("#strip .legend")).to_contain_text(f"latent {strongest} at {SITES[0]}: from 0 to ")
    expect(page.locator("#table caption")).to_have_text(re.compile(r"of the text · showing 20 of \d+ that fire"))

    page.locator("#strip .token").nth(3).click()
    expect(page.locator("#table caption")).to_have_text(re.compile("token 3, “l” · showing"))
    expect(page.locator("#strip .token.selected")).to_have_text("l")
    hits = latents.at(3, 20)
    expect(page.locator("#table tbody button")).to_have_text([str(hit.latent) for hit in hits])

    chosen = hits[1].latent
    page.locator("#table tbody tr").nth(1).click()
    expect(page.locator("#latent input")).to_have_value(str(chosen))
    expect(page.locator("#table tr.selected button")).to_have_text(str(chosen))
    expect(page.locator("#strip .token").nth(3)).to_have_attribute("title", re.compile(f"latent {chosen}: [0-9.]+"))

    page.locator("#to-edit").click()
    expect(page.locator("#edit-1-on")).to_be_checked()
    expect(page.locator("#edit-1-latent")).to_have_value(str(chosen))
    page.locator("#edit-1-strength").fill("0.75")
    generate(page)
    edits = [steer(chosen, 0.75, unit="norm", site=SITES[0])]
    assert lane_text(page, "base") == expected_text()
    assert lane_text(page, "spliced") == expected_text(splice=True)
    assert lane_text(page, "edited") == expected_text(edits=edits)
    tokens = tiny().generate(PROMPT, edits=edits, **SAMPLED).report.edits[0].tokens
    assert tokens > len(PROMPT)
    expect(page.locator("#lane-edited .dose")).to_contain_text(f"dose ‖Δ‖/‖x‖ 0.750 on {tokens} tokens")
    expect(page.locator("#lane-edited .warning")).to_contain_text("0.75 × the activation")
    expect(page.locator("#lane-base .notes li")).to_have_count(0)
    page.get_by_text("JSON, Python, shell, link").click()
    expect(page.locator("#snippet .cm-content")).to_contain_text(
        f"steer({chosen}, 0.75, unit='norm', site='{SITES[0]}')"
    )

    page.locator("#clear").click()
    expect(page.locator("#editor li")).to_have_count(0)


def test_a_link_restores_all_and_runs_nothing(visit):
    page = visit()
    read(page, PROMPT)
    page.locator("#latent input").fill("7")
    edit(page, "3, 5", 4, "raw")
    page.locator("#edit-1-where").select_option("tokens")
    page.locator("#edit-1-place").fill("0, -1")
    page.locator("#error").select_option("drop")
    program = Program(edits=[ablate(3, site=SITES[0], when=latent(5, site=SITES[0]) > 1.0)])
    edit(page, 9, 1, "raw")
    page.locator("#edit-2-as-json").click()
    page.locator("#edit-2-json").fill(json.dumps(program.edits[0].to_data()))
    page.locator("#edit-2-on").uncheck()
    page.locator("#strip .token").nth(2).click()
    choose(page, "#colour", "loss, nats")
    page.locator("#least input").fill("0.5")
    tab(page, "Sweep")
    page.locator("#sweep-strengths input").fill("1, 2")
    page.locator("#sweep-prompts textarea").fill("abc")
    tab(page, "Search")
    page.locator("#here textarea").fill("here")
    set_new_tokens(page, 5)
    choose(page, "#control", "a system prompt")
    page.get_by_text("JSON, Python, shell, link").click()
    page.locator("#copy-link").click()
    expect(page.locator("#link textarea, #link input")).to_have_value(re.compile(r"\?s=\S+"))

    other = visit("?" + page.url.partition("?")[2], wait="#new-tokens")
    expect(other.locator("#new-tokens input[type=number]")).to_have_value("5")
    expect(other.locator("#prompt textarea")).to_have_value(PROMPT)
    expect(other.locator("#latent input")).to_have_value("7")
    expect(other.locator("#edit-1-latent")).to_have_value("3, 5")
    expect(other.locator("#edit-1-place")).to_have_value("0, -1")
    expect(other.locator("#error")).to_have_value("drop")
    expect(other.locator("#edit-2-on")).not_to_be_checked()
    assert json.loads(other.locator("#edit-2-json").input_value()) == program.edits[0].to_data(), "no control shows it"
    expect(other.locator("#lane-base .lane")).to_have_attribute("data-state", "idle")
    tab(other, "Inspect")
    expect(other.locator("#table caption")).to_have_text("Read the prompt to see its latents.")
    expect(other.locator("#least input")).to_have_value("0.5")
    expect(other.locator("#colour input")).to_have_value("loss, nats")
    other.locator("#read").click()
    expect(other.locator("#table caption")).to_contain_text("of token 2, “l”")
    expect(other.locator("#latent input")).to_have_value("7")
    tab(other, "Sweep")
    expect(other.locator("#sweep-strengths input")).to_have_value("1, 2")
    expect(other.locator("#sweep-prompts textarea")).to_have_value("abc")
    expect(other.locator("#sweep-table caption")).to_have_text("Sweep to see what each strength does.")
    tab(other, "Search")
    expect(other.locator("#here textarea")).to_have_value("here")
    tab(other, "Generate")
    expect(other.locator("#system textarea")).to_be_visible()

    other.locator("#preset-name").fill("<b>mine")
    other.locator("#save-preset").click()
    other.locator("#clear").click()
    other.locator("#preset").select_option("<b>mine")
    expect(other.locator("#edit-1-latent")).to_have_value("3, 5")
    expect(other.locator("#editor li")).to_have_count(2)


def test_strengths_are_swept_and_taken_over(visit):
    page = visit()
    read(page, PROMPT)
    page.locator("#latent input").fill("3")
    set_new_tokens(page, 6)
    tab(page, "Sweep")
    page.locator("#sweep-strengths input").fill("-0.5, 0.5, 2")
    page.locator("#sweep").click()
    expect(page.locator("#sweep-table tbody tr")).to_have_count(4, timeout=60_000)
    edits = steer(3, 1.0, unit="norm", site=SITES[0])
    arguments = {**SAMPLED, "max_new_tokens": 6}
    result = tiny().sweep(tiny().tokenizer(PROMPT)["input_ids"], edits, [-0.5, 0.5, 2.0], **arguments)
    expect(page.locator("#sweep-table tbody tr").nth(2).locator("td").last).to_have_text(
        one_line(visible(result.rows[2].generation.text)), use_inner_text=False
    )
    page.locator("#sweep-plots circle[data-key='1']").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#edit-1-strength")).to_have_value("0.5")
    page.locator("#sweep-table tbody tr").nth(2).click()
    expect(page.locator("#edit-1-strength")).to_have_value("2")
    expect(page.locator("#editor li")).to_have_count(1)


def test_latents_behind_a_next_token(visit):
    page = visit()
    read(page, PROMPT)
    tab(page, "Attribution")
    page.locator("#attribution-token input").fill("e")
    page.locator("#attribute").click()
    expect(page.locator("#attribution-up caption")).to_contain_text("Raise “e” (logit")
    found = tiny().attribute(PROMPT, Logit("e"), by_token=False)
    for side, sign in (("up", 1), ("down", -1)):
        names = [str(one.latent) for one in found.top(15, sign=sign)]
        expect(page.locator(f"#attribution-{side} tbody button")).to_have_text(names)
    last = found.top(15, sign=-1)[-1]
    page.locator("#attribution-down tbody tr").last.click()
    expect(page.locator("#latent input")).to_have_value(str(last.latent))
    expect(page.locator("#site input")).to_have_value(last.site)


def test_facts_and_contexts_of_a_latent(visit):
    page = visit()
    read(page, HOSTILE[0])
    page.locator("#latent input").fill("3")
    tab(page, "Latent")
    page.locator("#show-latent").click()
    card = latent_card(tiny(), 3, SITES[0])
    expect(page.locator("#facts caption")).to_contain_text(f"Latent 3 of 96 at {SITES[0]}")
    expect(page.locator("#near tbody button")).to_have_text([str(one.latent) for one in card.neighbours])
    expect(page.locator("#latent-density figcaption")).to_contain_text("How often latents fire: 0 of 96")
    choose(page, "#scan-text", "the prompt, line by line")
    fires = tiny().latents(HOSTILE[0], SITES[0]).top(1)[0].latent
    page.locator("#latent input").fill(str(fires))
    page.locator("#scan").click()
    expect(page.locator("#scan-plots figcaption")).to_contain_text("100% read")
    expect(page.locator("#contexts .piece.top").first).to_be_visible()
    page.locator("#ablate-examples").click()
    expect(page.locator("#contexts .change").first).to_have_text(re.compile(r"[+-]\d\.\d{4}"))
    expect(page.locator("#contexts h4").first).to_contain_text("Without the latent the loss of")
    with page.expect_download() as download:
        page.locator("#export-latent").click()
    assert f"Latent {fires} of 96" in download.value.path().read_text()
    assert "loss when ablated" in download.value.path().read_text()
    page.locator("#label input").fill("<b>label")
    page.locator("#save-note").click()
    expect(page.locator(".toast-body")).to_contain_text("came from no folder")
    tab(page, "Search")
    page.locator("#search-token input").fill("e")
    page.locator("#by-token").click()
    expect(page.locator("#found tbody button").first).to_have_text(
        str(latents_for_token(tiny(), "e", SITES[0])[0].latent)
    )
    tab(page, "SAE card")
    expect(page.locator("#card caption")).to_have_text(f"SAE at {SITES[0]}")
    assert page.locator("#contexts img, #contexts script, .toast-body b").count() == 0
    assert page.evaluate("typeof window.PWN") == "undefined"


def test_tables_and_pictures_are_kept_as_files(visit):
    page = visit()
    read(page, PROMPT)
    hits = tiny().latents(PROMPT, SITES[0]).top(3)
    kept = saved(page, "CSV of Strongest latents")
    assert [line.split(",")[0] for line in kept.read_text().splitlines()[:4]] == [
        '"latent"',
        *(f'"{hit.latent}"' for hit in hits),
    ]
    rows = json.loads(saved(page, "JSON of Strongest latents").read_text())["rows"]
    assert rows[0]["largest activation"] == f"{hits[0].activation:.3g}"
    tab(page, "SAE card")
    title = "How often latents fire: 0 of 96 never did"
    assert saved(page, f"SVG of {title}").read_text().startswith("<svg")
    assert saved(page, f"PNG of {title}").read_bytes().startswith(b"\x89PNG")
    page.get_by_role("button", name="JSON of all numbers").first.wait_for()
    assert saved(page, "CSV of Facts about the SAE").read_text().startswith('"fact","value"')


def saved(page: Page, button: str) -> Path:
    """The file that a button keeps."""
    with page.expect_download() as download:
        page.get_by_role("button", name=button, exact=True).click()
    return download.value.path()


def test_a_chat_and_a_system_prompt_as_control(visit):
    page = visit()
    page.locator("#prompt textarea").fill("hi")
    page.locator("#chat input").check()
    page.locator("#read").click()
    expect(page.locator("#strip .token")).to_have_count(len("[user]hi\n[assistant]"))
    set_new_tokens(page, 5)
    for lane in ("Spliced", "Edited"):
        page.locator("#chosen-lanes").get_by_label(lane).uncheck()
    page.locator("#chosen-lanes").get_by_label("Control").check()
    choose(page, "#control", "a system prompt")
    page.locator("#system textarea").fill("be kind")
    page.locator("#generate").click()
    expect(page.locator("#lane-control .lane")).to_have_attribute("data-state", "done", timeout=60_000)
    expect(page.locator("#lane-control .prompt")).to_contain_text("[system]be kind")
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    settings: Any = SAMPLED | {"max_new_tokens": 5}
    for lane, given in (("control", messages), ("base", messages[1:])):
        ids = tiny().generate(given, **settings).new_ids.tolist()
        assert lane_text(page, lane) == visible(tiny().tokenizer.decode(ids))


def test_a_narrow_window_opens_without_the_sidebar(visit):
    page = visit(width=700)
    expect(page.locator(".sidebar.open")).to_have_count(0)
    page.locator("#strip .token").nth(2).click()
    expect(page.locator("#table caption")).to_contain_text("token 2")
    page.locator(".sidebar .toggle-button").click()
    expect(page.locator("#add-edit")).to_be_visible()


def test_a_range_of_tokens_and_other_colours(visit):
    page = visit()
    read(page, PROMPT)
    page.locator("#strip .token").nth(2).click()
    page.locator("#strip .token").nth(5).click(modifiers=["Shift"])
    expect(page.locator("#table caption")).to_contain_text("Strongest latents of tokens 2 to 5")
    expect(page.locator("#strip .token.selected")).to_have_count(4)
    choose(page, "#colour", "loss, nats")
    expect(page.locator("#strip .legend")).to_contain_text("loss, nats: from 0 to")
    page.locator("#numbers input").check()
    expect(page.locator("#strip .token small")).to_have_count(len(PROMPT) - 1)
    expect(page.locator("#next caption")).to_contain_text("Likeliest tokens after token 5")
    page.locator("#measure").click()
    measured = page.locator("#table tbody tr").first.locator("td").last
    expect(measured).to_have_text(re.compile(r"^[+-]0\.\d{4}$"))
    first = int(page.locator("#table tbody button").first.inner_text())
    effect = tiny().loss(PROMPT, ablate(first, site=SITES[0])) - tiny().loss(PROMPT)
    assert float(measured.inner_text()) == pytest.approx(effect, abs=6e-5)


def test_an_edit_without_effect_says_so(visit):
    page = visit()
    read(page, PROMPT)
    set_new_tokens(page, 3)
    edit(page, 5, 0, "raw")
    generate(page)
    expect(page.locator("#lane-edited .note")).to_contain_text("changed nothing on the")
    assert lane_text(page, "edited") == lane_text(page, "base")


def test_mistakes_are_explained(visit):
    page = visit()
    edit(page, 700, 0.5, "raw")
    expect(page.locator("#problems")).to_contain_text("Edit 1: latent 700 is outside 0..95")
    tab(page, "Generate")
    page.locator("#generate").click()
    expect(page.locator(".toast-body")).to_contain_text("Edit 1: latent 700 is outside 0..95")
    page.locator("#sample input").uncheck()
    expect(page.locator("#temperature input[type=number]")).to_be_disabled()
    page.locator("#edit-1-op").select_option("ablate")
    expect(page.locator("#edit-1-strength")).to_have_count(0)
    page.locator("#edit-1-latent").fill("7")
    expect(page.locator("#problems li")).to_have_count(0)
    tab(page, "Inspect")
    page.locator("#latent input").fill("700")
    expect(page.locator("#strip .legend")).to_contain_text("latent 700 is outside 0..95")


def test_stop_ends_the_lane_at_once(visit):
    page = visit()
    read(page, PROMPT)
    set_new_tokens(page, 3000)
    page.locator("#generate").click()
    expect(page.locator("#lane-base .status")).to_contain_text(re.compile(r"[1-9]\d* of 3000 tokens"))
    page.locator("#stop").click()
    assert wait_until(lambda: not streams()) < 2
    expect(page.locator("#lane-base .lane")).to_have_attribute("data-state", "stopped")
    expect(page.locator("#lane-spliced .lane")).to_have_attribute("data-state", "stopped")
    set_new_tokens(page, 60)
    edit(page, 3, 4.0, "raw")
    generate(page)
    assert lane_text(page, "edited") == expected_text(edits=[steer(3, 4.0, site=SITES[0])])


@pytest.mark.parametrize("leave", ["close", "reload"])
def test_leaving_the_page_ends_the_run(visit, leave):
    page = visit()
    set_new_tokens(page, 3000)
    page.locator("#generate").click()
    expect(page.locator("#lane-base .status")).to_contain_text(re.compile(r"[1-9]\d* of 3000 tokens"))
    assert streams()
    visit.leaves()
    getattr(page, leave)()
    wait_until(lambda: not streams())


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(visit, text):
    page = visit()
    text = text.replace("\r", "\n")  # a browser does that in every text field
    read(page, text)
    page.locator("#strip .token").nth(2).click()
    expect(page.locator("#table caption")).to_contain_text("token 2")
    set_new_tokens(page, 3)
    edit(page, text.replace("\n", " "), 1.0, "raw")
    page.locator("#generate").click()
    expect(page.locator(".toast-body")).to_contain_text("Edit 1: the latent")
    expect(page.locator(".toast-body")).to_contain_text(text.split()[0][:12])
    assert page.locator(".toast-body img, .toast-body b, .toast-body a, .toast-body script").count() == 0
    page.locator("#edit-1-remove").click()
    edit(page, 3, 4.0, "raw")
    generate(page)
    shown = page.locator("#lane-edited .prompt").evaluate("node => node.textContent")
    assert shown == visible(tiny().tokenizer.decode(tiny().tokenizer(text)["input_ids"]))
    assert page.locator("#strip img, #lanes img, #table img, #strip b, #lanes b, #lanes a, #lanes script").count() == 0
    assert page.evaluate("typeof window.PWN") == "undefined"


def test_two_visitors_with_opposite_edits_get_their_solo_outputs(visit):
    pages = [visit(), visit()]
    strengths = (4.0, -4.0)
    for page, strength in zip(pages, strengths, strict=True):
        page.locator("#prompt textarea").fill(PROMPT)
        edit(page, 3, strength, "raw")
    for page in pages:
        tab(page, "Generate")
        page.locator("#generate").click()
    for page, strength in zip(pages, strengths, strict=True):
        expect(page.locator("#lane-edited .lane")).to_have_attribute("data-state", "done", timeout=60_000)
        assert lane_text(page, "base") == expected_text()
        assert lane_text(page, "edited") == expected_text(edits=[steer(3, strength, site=SITES[0])])


def test_the_keyboard_is_enough(visit):
    page = visit()
    read(page, PROMPT)
    focused = page.locator(":focus")
    page.locator("#strip .token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#table caption")).to_contain_text("token 2, “l”")
    expect(focused).to_have_attribute("data-index", "2")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+Enter")
    expect(page.locator("#table caption")).to_contain_text("tokens 2 to 3")
    page.locator("#table tbody button").first.focus()
    page.keyboard.press("Tab")
    number = focused.inner_text()
    page.keyboard.press("Enter")
    expect(page.locator("#latent input")).to_have_value(number)
    expect(focused).to_have_text(number)
    page.locator("#to-edit").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#edit-1-latent")).to_have_value(number)
    set_new_tokens(page, 3)
    page.locator("#generate").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#lane-edited .lane")).to_have_attribute("data-state", "done", timeout=60_000)


def test_controls_can_be_found_by_their_labels(visit):
    page = visit()
    for _ in range(2):
        page.locator("#add-edit").click()
    for label in (
        "Prompt",
        "Site",
        "Chosen latent",
        "Colour the tokens by",
        "Operation of edit 1",
        "Latent of edit 2",
        "Site of edit 2",
        "Edit 2",
    ):
        expect(page.get_by_label(re.compile(rf"^\s*{label}(\s|$)")).first).to_be_visible()
    for button in ("Read", "Edit this latent", "Clear", "Remove edit 2", "Edit 2 as JSON"):
        expect(page.get_by_role("button", name=button, exact=True)).to_be_visible()
    expect(page.get_by_role("listbox", name="Tokens of the prompt")).to_be_visible()
    tab(page, "Generate")
    expect(page.get_by_role("region", name="Spliced")).to_be_visible()
    expect(page.get_by_label("Seed")).to_be_visible()


def test_a_page_for_one_site_reads_the_other(visit):
    page = visit()
    read(page, PROMPT)
    choose(page, "#site", SITES[1])
    expect(page.locator("#strip .legend")).to_contain_text(f"at {SITES[1]}")
    hit = tiny().latents(PROMPT, SITES[1]).top(1)[0]
    expect(page.locator("#latent input")).to_have_value(str(hit.latent))
    page.locator("#to-edit").click()
    expect(page.locator("#edit-1-site")).to_have_value(SITES[1])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(visit, theme):
    page = visit(f"?__theme={theme}")
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    read(page, PROMPT)
    edit(page, 3, 0.4, "norm")
    set_new_tokens(page, 3)
    generate(page)
    accessibility.check(page)
    tab(page, "Inspect")
    accessibility.check(page)
    page.get_by_text("JSON, Python, shell, link").click()
    expect(page.locator("#snippet .cm-content")).to_contain_text("steer(3")
    accessibility.check(page)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_tab_by_keyboard_in_both_themes(visit, theme):
    """Whatever a tab does is started from the keyboard, and what it shows can be read."""
    page = visit(f"?__theme={theme}")
    read(page, PROMPT)
    page.locator("#latent input").fill("3")
    number = "3"

    def press(*path: str, key: str = "Enter") -> None:
        for selector in path:
            page.locator(selector).first.focus()
            page.keyboard.press(key)

    def type_into(selector: str, text: str) -> None:
        page.locator(selector).focus()
        page.keyboard.press("Control+a")
        page.keyboard.type(text)

    def open_tab(name: str) -> None:
        page.get_by_role("tab", name=name, exact=True).focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")

    open_tab("Generate")
    type_into("#new-tokens input[type=number]", "3")
    page.keyboard.press("Tab")
    open_tab("Sweep")
    type_into("#sweep-strengths input", "1, 2")
    press("#sweep")
    expect(page.locator("#sweep-table tbody tr")).to_have_count(3, timeout=60_000)
    press("#sweep-table tbody button")
    expect(page.locator("#edit-1-strength")).to_have_value("1")
    accessibility.check(page)
    open_tab("Attribution")
    type_into("#attribution-token input", "e")
    press("#attribute")
    expect(page.locator("#attribution-up tbody button").first).to_be_visible()
    number = page.locator("#attribution-up tbody button").first.inner_text()
    press("#attribution-up tbody button")
    expect(page.locator("#latent input")).to_have_value(number)
    accessibility.check(page)
    open_tab("Latent")
    press("#show-latent")
    expect(page.locator("#facts caption")).to_contain_text(f"Latent {number} of 96")
    accessibility.check(page)
    press("#near tbody button")
    expect(page.locator("#facts caption")).not_to_contain_text(f"Latent {number} of 96")
    open_tab("Search")
    type_into("#search-token input", "e")
    press("#by-token")
    expect(page.locator("#found tbody button").first).to_be_visible()
    number = page.locator("#found tbody button").first.inner_text()
    press("#found tbody button")
    expect(page.locator("#latent input")).to_have_value(number)
    accessibility.check(page)
    open_tab("SAE card")
    expect(page.locator("#card caption")).to_have_text(re.compile("SAE at "))
    accessibility.check(page)
    open_tab("Inspect")
    expect(page.locator("#strip .token").first).to_be_visible()


def test_nothing_is_wider_than_the_window(visit):
    page = visit()
    for width in (1280, 700, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        if page.locator(".sidebar.open").count() and width < 768:  # it lies over the page until it is closed
            page.locator("#sidebar .toggle-button").click()
        for name in TABS:
            if not page.get_by_role("tab", name=name, exact=True).is_visible():  # what does not fit is in a menu
                page.locator(".overflow-menu > button").click()
                page.locator(".overflow-dropdown button", has_text=name).click()
            else:
                tab(page, name)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name


def test_an_sae_of_ones_own(visit, app_with_uploads, tmp_path):
    own = SAE(
        SAEConfig(d_in=32, d_sae=48, activation=TopK(k=4)), site="layers.2.resid_post",
        generator=torch.Generator().manual_seed(7),
    ).requires_grad_(False)  # fmt: skip
    folder, name = save_sae(own, tmp_path / "sae"), "layers.2.resid_post"
    other, page = visit(at=app_with_uploads.local_url), visit(at=app_with_uploads.local_url)
    (leaving,) = [fn.fn for fn in app_with_uploads.fns.values() if fn.name == "on_leave"]
    held = leaving.__self__.shared.uploads._own
    tab(page, "SAE card")
    page.locator("#attach-upload").click()
    expect(page.locator(".toast-body").first).to_contain_text("0 files were sent")
    page.locator("#upload input[type=file]").set_input_files(sorted(folder.iterdir()))
    expect(page.locator("#upload")).to_contain_text("sae_weights")
    page.locator("#attach-upload").click()
    expect(page.locator("#site input")).to_have_value(name)
    expect(page.locator("#card caption")).to_have_text(f"SAE at {name}")
    assert len(held) == 1
    accessibility.check(page)
    tab(page, "Inspect")
    read(page, PROMPT)
    expect(page.locator("#strip .legend")).to_contain_text(f"at {name}")
    both = tiny().model.attach({**{site: tiny().saes[site] for site in SITES}, name: own})
    strongest = both.latents(PROMPT, name).top(1)[0].latent
    expect(page.locator("#latent input")).to_have_value(str(strongest))
    page.locator("#to-edit").click()
    expect(page.locator("#edit-1-site")).to_have_value(name)
    set_new_tokens(page, 8)
    generate(page)
    settings: Any = SAMPLED | {"max_new_tokens": 8}
    edits = [steer(strongest, 0.3, unit="norm", site=name)]
    expected = both.generate(PROMPT, edits=edits, **settings).new_ids.tolist()
    assert lane_text(page, "edited") == visible(tiny().tokenizer.decode(expected))
    spliced = both.generate(PROMPT, splice=True, **settings).new_ids.tolist()
    assert lane_text(page, "spliced") == visible(tiny().tokenizer.decode(spliced))
    both.detach()

    read(other, PROMPT)
    set_new_tokens(other, 8)
    edit(other, 3, 4.0, "raw")
    generate(other)
    mine = tiny().generate(PROMPT, splice=True, **settings).new_ids.tolist()
    assert lane_text(other, "spliced") == visible(tiny().tokenizer.decode(mine)), "another visitor's SAE took part"
    tab(page, "SAE card")
    page.locator("#detach-upload").click()
    expect(page.locator("#site input")).to_have_value(SITES[0])
    assert not held
    page.locator("#upload input[type=file]").set_input_files(sorted(folder.iterdir()))
    expect(page.locator("#upload")).to_contain_text("sae_weights")
    page.locator("#attach-upload").click()
    expect(page.locator("#site input")).to_have_value(name)
    assert len(held) == 1
    visit.leaves()
    page.close()
    wait_until(lambda: not held)
