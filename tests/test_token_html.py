"""Tokens, latents and programs as HTML: hostile text stays text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from app_fixtures import HOSTILE, SITES, tiny

from saehook import Program, ablate, matching
from saehook.app.page_state import PageState
from saehook.app.session_page import session_page
from saehook.dashboards import latent_card, scan_latent
from saehook.latent_notes import LatentNote
from saehook.latent_page import latent_page
from saehook.token_html import shown, strip_html


class Tags(HTMLParser):
    """The tags, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_tokens_are_text(text):
    found = Tags(strip_html([text, "b"], [1.0, 0.5]))
    assert found.tags == {"div", "span"}
    assert found.text == shown(text).replace("\r", "<U+000D>") + "b"


def test_a_strip_is_blue_by_strength():
    found = re.findall(r"rgb\(26 133 255/([0-9.]+)\)", strip_html("abc", [0.0, 1.0, 4.0], 2.0))
    assert [float(share) for share in found] == [0, 0.375, 0.75]


def test_latents_and_programs_show_themselves():
    latents = tiny().latents(HOSTILE[0], SITES[0])
    found = Tags(latents._repr_html_())
    assert found.tags <= {"div", "span", "p", "table", "thead", "tbody", "tr", "th", "td"}
    assert str(latents.top(1)[0].latent) in found.text
    program = Program(edits=[ablate(3, where=matching("<b>"))], error="drop")
    text = Tags(program._repr_html_()).text
    assert str(program.edits[0]) in text
    assert "error: drop" in text


def test_a_page_about_a_latent_stands_alone():
    latent = tiny().latents(HOSTILE[0], SITES[0]).top(1)[0].latent
    *_, scan = scan_latent(tiny(), latent, list(HOSTILE), SITES[0])
    page = latent_page(latent_card(tiny(), latent, SITES[0]), scan, LatentNote("<script>x</script>"))
    found = Tags(page)
    assert not found.tags & {"script", "img", "link", "iframe", "a"}
    assert "<script>x</script>" in found.text
    assert "http" not in re.sub(r"http-equiv|example\.invalid|http://", "", page)
    assert f"Latent {latent} of 96" in found.text


def test_a_session_stands_alone_and_holds_what_restores_it():
    state = PageState(controls={"prompt": HOSTILE[0], "latent": "3"})
    lanes = {
        "Base": {"prompt": "p", "text": HOSTILE[1], "status": "<b>", "notes": [{"text": HOSTILE[0]}, 3]},
        "Edited": 5,
    }
    page = session_page(state, HOSTILE[0], Program(edits=[ablate(3)]), "print('<b>')", "saehook", lanes)
    found = Tags(page)
    assert not found.tags & {"script", "img", "b"}
    assert HOSTILE[1] in found.text
    data = found.text[found.text.index('{\n "version"') :].strip()
    assert PageState.from_data(json.loads(data)) == state
