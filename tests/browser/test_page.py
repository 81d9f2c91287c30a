"""The page in a real browser: what a visitor does, from reading a text to three lanes."""

from __future__ import annotations

import re
import threading
import time

import pytest
from app_fixtures import HOSTILE, SITES, tiny
from playwright.sync_api import Page, expect

from saehook import steer
from saehook.app.visible_text import visible, visible_token

pytestmark = [
    pytest.mark.browser,
    # Gradio leaves event loops and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]
PROMPT = "hello, world"
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


def edit(page: Page, number: int, latent: int, strength: float, unit: str) -> None:
    """Fill a row of the edits with the mouse."""
    page.locator(f"#edit-{number}-on input").check()
    page.locator(f"#edit-{number}-latent input").fill(str(latent))
    page.locator(f"#edit-{number}-strength input").fill(str(strength))
    choose(page, f"#edit-{number}-unit", unit)


def choose(page: Page, dropdown: str, option: str) -> None:
    page.locator(f"{dropdown} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def set_new_tokens(page: Page, n: int) -> None:
    page.locator("#new-tokens input[type=number]").fill(str(n))
    page.locator("#new-tokens input[type=number]").press("Tab")


def generate(page: Page) -> None:
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
    expect(page.locator("#edit-1-on input")).to_be_checked()
    expect(page.locator("#edit-1-latent input")).to_have_value(str(chosen))
    page.locator("#edit-1-strength input").fill("0.75")
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
    page.get_by_text("Python that repeats the edited lane").click()
    expect(page.locator("#snippet .cm-content")).to_contain_text(
        f"steer({chosen}, 0.75, unit='norm', site='{SITES[0]}')"
    )

    page.locator("#clear").click()
    expect(page.locator("#edit-1-on input")).not_to_be_checked()
    expect(page.locator("#edit-1-latent input")).to_have_value("")


def test_an_edit_without_effect_says_so(visit):
    page = visit()
    read(page, PROMPT)
    set_new_tokens(page, 3)
    edit(page, 2, 5, 0, "raw")
    generate(page)
    expect(page.locator("#lane-edited .note")).to_contain_text("changed nothing on the")
    assert lane_text(page, "edited") == lane_text(page, "base")


def test_mistakes_are_explained(visit):
    page = visit()
    edit(page, 1, 700, 0.5, "raw")
    page.locator("#generate").click()
    expect(page.locator(".toast-body")).to_contain_text("Edit 1: latent 700 is outside 0..95")
    page.locator("#latent input").fill("700")
    expect(page.locator("#strip .legend")).to_contain_text("latent 700 is outside 0..95")
    choose(page, "#edit-1-op", "ablate")
    expect(page.locator("#edit-1-strength input")).to_be_disabled()
    expect(page.locator("#edit-1-unit input")).to_be_disabled()
    page.locator("#sample input").uncheck()
    expect(page.locator("#temperature input[type=number]")).to_be_disabled()


def test_stop_ends_the_lane_at_once(visit):
    page = visit()
    read(page, PROMPT)
    set_new_tokens(page, 400)
    page.locator("#generate").click()
    expect(page.locator("#lane-base .status")).to_contain_text(re.compile(r"[1-9]\d* of 400 tokens"))
    page.locator("#stop").click()
    assert wait_until(lambda: not streams()) < 2
    expect(page.locator("#lane-base .lane")).to_have_attribute("data-state", "stopped")
    expect(page.locator("#lane-spliced .lane")).to_have_attribute("data-state", "stopped")
    set_new_tokens(page, 60)
    edit(page, 1, 3, 4.0, "raw")
    generate(page)
    assert lane_text(page, "edited") == expected_text(edits=[steer(3, 4.0, site=SITES[0])])


def test_closing_the_tab_ends_the_run(visit):
    page = visit()
    set_new_tokens(page, 400)
    page.locator("#generate").click()
    expect(page.locator("#lane-base .status")).to_contain_text(re.compile(r"[1-9]\d* of 400 tokens"))
    assert streams()
    page.close()
    wait_until(lambda: not streams())


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(visit, text):
    page = visit()
    text = text.replace("\r", "\n")  # a browser does that in every text field
    read(page, text)
    page.locator("#strip .token").nth(2).click()
    expect(page.locator("#table caption")).to_contain_text("token 2")
    set_new_tokens(page, 3)
    page.locator("#edit-1-on input").check()
    page.locator("#edit-1-latent input").fill(text.replace("\n", " "))
    page.locator("#generate").click()
    expect(page.locator(".toast-body")).to_contain_text("Edit 1: the latent")
    expect(page.locator(".toast-body")).to_contain_text(text.split()[0][:12])
    assert page.locator(".toast-body img, .toast-body b, .toast-body a, .toast-body script").count() == 0
    edit(page, 1, 3, 4.0, "raw")
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
        edit(page, 1, 3, strength, "raw")
    for page in pages:
        page.locator("#generate").click()
    for page, strength in zip(pages, strengths, strict=True):
        expect(page.locator("#lane-edited .lane")).to_have_attribute("data-state", "done", timeout=60_000)
        assert lane_text(page, "base") == expected_text()
        assert lane_text(page, "edited") == expected_text(edits=[steer(3, strength, site=SITES[0])])


def test_the_keyboard_is_enough(visit):
    page = visit()
    read(page, PROMPT)
    focused = page.locator(":focus")
    page.locator("#read").focus()
    page.keyboard.press("Tab")
    expect(focused).to_have_class(re.compile("token"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#table caption")).to_contain_text("token 2, “l”")
    expect(focused).to_have_attribute("data-index", "2")
    page.keyboard.press("Tab")
    expect(focused).to_have_attribute("data-latent", re.compile(r"\d+"))
    page.keyboard.press("Tab")
    latent = focused.inner_text()
    page.keyboard.press("Enter")
    expect(page.locator("#latent input")).to_have_value(latent)
    expect(focused).to_have_text(latent)
    page.locator("#to-edit").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#edit-1-latent input")).to_have_value(latent)
    set_new_tokens(page, 3)
    page.locator("#generate").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#lane-edited .lane")).to_have_attribute("data-state", "done", timeout=60_000)


def test_controls_can_be_found_by_their_labels(visit):
    page = visit()
    for label in (
        "Prompt",
        "Site",
        "Chosen latent",
        "Latent",
        "Strength",
        "Latent of edit 2",
        "Seed",
        "Edit 3",
        "Sampling",
    ):
        expect(page.get_by_label(re.compile(rf"^\s*{label}(\s|$)")).first).to_be_visible()
    for button in ("Read", "Edit this latent", "Clear edits", "Generate", "Stop"):
        expect(page.get_by_role("button", name=button, exact=True)).to_be_visible()
    expect(page.get_by_role("listbox", name="Tokens of the prompt")).to_be_visible()
    expect(page.get_by_role("region", name="Spliced")).to_be_visible()


def test_a_page_for_one_site_reads_the_other(visit):
    page = visit()
    read(page, PROMPT)
    choose(page, "#site", SITES[1])
    expect(page.locator("#strip .legend")).to_contain_text(f"at {SITES[1]}")
    hit = tiny().latents(PROMPT, SITES[1]).top(1)[0]
    expect(page.locator("#latent input")).to_have_value(str(hit.latent))
    page.locator("#to-edit").click()
    expect(page.locator("#edit-1-site input")).to_have_value(SITES[1])


CONTRAST = """([text, behind]) => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const paint = colors => { canvas.clearRect(0, 0, 1, 1);
    colors.forEach(color => { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); });
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const luminance = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const style = selector => getComputedStyle(document.querySelector(selector));
  const ground = [style('body').backgroundColor, style(behind).backgroundColor, style(text).backgroundColor];
  const [a, b] = [luminance(paint([...ground, style(text).color])), luminance(paint(ground))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(visit, theme):
    page = visit(f"?__theme={theme}")
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    read(page, PROMPT)
    set_new_tokens(page, 3)
    page.locator("#edit-1-on input").check()
    page.locator("#edit-1-latent input").fill("3")
    generate(page)
    strongest = page.locator("#strip .token").evaluate_all(
        "tokens => { const t = tokens.find(t => t.style.getPropertyValue('--share') === '1'); t.id = 'strongest'; }"
    )
    assert strongest is None
    for text, behind in (
        ("#strongest", "#strip .strip"),
        ("#table caption", "#table .box"),
        ("#table tbody td:nth-child(3)", "#table .box"),
        ("#table tbody button", "#table .box"),
        ("#lane-edited .what", "#lane-edited .lane"),
        ("#lane-edited .prompt", "#lane-edited .lane"),
        ("#lane-edited .status", "#lane-edited .lane"),
        ("#lane-edited .dose", "#lane-edited .lane"),
    ):
        assert page.evaluate(CONTRAST, [text, behind]) >= 4.5, text


def test_nothing_is_wider_than_the_window(visit):
    page = visit()
    for width in (1280, 700):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
