"""The page about a training run in a real browser, light and dark, wide and narrow."""

from __future__ import annotations

import json
import math

import pytest
from builders import tiny_sae

from saehook.checkpoint import save_sae
from saehook.reports import CHARTS, write_report

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror='window.PWN=1'><script>window.PWN=2</script>"
VISIBLE = """nodes => nodes.map(node => { const box = node.getBoundingClientRect();
  return Math.min(box.width, box.height, node.getTotalLength ? node.getTotalLength() : 1e9); })"""
CONTRAST = """selector => {
  const luminance = color => color.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const node = document.querySelector(selector);
  let ground = node;
  while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
  const style = getComputedStyle(node);
  const [a, b] = [node instanceof SVGElement ? style.fill : style.color, getComputedStyle(ground).backgroundColor]
    .map(luminance);
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """Address of a page with ten curves in every chart, one of them with a hostile name, and two histograms."""
    run = tmp_path_factory.mktemp("run")
    names = [*(f"layers.{i}.resid_post-topk32-4096" for i in range(9)), HOSTILE]
    lines = [
        {"sae": name, "tokens": 4096 * i} | {m.key: 0.02 * (k + 1) + math.exp(-i / 40) for k, m in enumerate(CHARTS)}
        for i in range(600)
        for name in names
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"sae": "layers')
    for name in ("layers.0.resid_post", "layers.1.resid_post"):
        sae = tiny_sae(site=name)
        sae.metadata = {"lm": {"id": HOSTILE}, "note": "long" * 100}
        save_sae(sae, run / name)
    row = {"sae": HOSTILE, "site": "layers.0.resid_post"} | dict.fromkeys(["ce_clean", "ce_recovered_zero", "fvu"], 0.5)
    (run / "eval.json").write_text(json.dumps({"results": [row]}))
    return write_report(run).as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_report_can_be_seen_and_asks_for_nothing(browser, report, scheme, width):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(report)
    page.locator("summary").first.click()
    assert page.locator("figure").count() == len(CHARTS) + 2
    for what, n in [("figure svg", len(CHARTS) + 2), ("figure .line", 10 * len(CHARTS)), (".key path", 10)]:
        sizes = page.locator(what).evaluate_all(VISIBLE)
        assert len(sizes) == n
        if what != ".key path":  # a straight line has no height
            assert min(sizes) > 20, what
    strokes = page.locator("figure >> nth=0 >> .line").evaluate_all(
        "lines => lines.map(line => getComputedStyle(line).stroke + getComputedStyle(line).strokeDasharray)"
    )
    assert len(set(strokes)) == 10
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor").startswith("rgb(18,")
    assert dark == (scheme == "dark")
    for text in ("h1", "dt", "dd", ".note", "thead th", "tbody td", "figcaption", "figure text", "summary small"):
        assert page.evaluate(CONTRAST, text) >= 4.5, text
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    columns = {
        box["x"] for box in page.locator("figure").evaluate_all("all => all.map(f => f.getBoundingClientRect())")
    }
    assert len(columns) == (3 if width == 1280 else 1)
    assert page.locator("h1").inner_text() == f"10 SAEs on {HOSTILE}"
    assert page.evaluate("typeof window.PWN") == "undefined"
    assert requests == [report]
    assert not messages
    context.close()


def test_a_row_of_the_legend_brings_its_curves_forward(browser, report):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(report)
    faint = "lines => lines.map(line => getComputedStyle(line).opacity < 0.5)"
    lines = page.locator("figure >> nth=1 >> .line")
    assert lines.evaluate_all(faint) == [False] * 10
    page.locator("tbody >> nth=0 >> tr >> nth=3").hover()
    assert lines.evaluate_all(faint) == [i != 3 for i in range(10)]
    band = page.locator("figure >> nth=1 >> .band >> nth=9")
    band.hover()  # nothing lies above it
    assert lines.evaluate_all(faint) == [False] * 10
    assert band.locator("title").evaluate("node => node.textContent.split('\\n').length") == 11
    page.close()
