"""How long a visitor of the page waits, in a real browser on the bundled model.

    python tests/bench/bench_page.py [--json numbers.json]

Needs Debian's chromium and playwright, and an idle machine. Each number has its limit beside it: what the page promises; printed
is the worst of all visitors, whose times include what Playwright takes to click and to look.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from gradio_client import Client
from playwright.sync_api import Browser, Page, sync_playwright

import saehook
from saehook.app import Limits, serve
from saehook.app.token_strip import NO_TOKENS, make_strip

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync".split()
)
TOKENS = 1024
SETTLE_MS = 1500
"""A visitor looks at the page before touching it."""
LIMITS = {
    "first page load, s": 5.0,
    "strip of 1,024 tokens drawn, s": 1.0,
    "click on a token answered, s": 0.3,
    "first streamed token, s": 0.5,
    "growth of memory over 200 requests": 0.05,
}
"""What the page promises."""
REQUESTS = 200
WARM_UP = 50
REPEATS = 5


def hooked() -> Any:
    saes = [saehook.load_sae(saehook.bundled(name)) for name in ("sae", "sae-mlp")]
    return saehook.HookedModel.from_pretrained(saehook.bundled("lm")).attach({str(sae.site): sae for sae in saes})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def rss() -> int:
    """Resident memory of this process, bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def strip_drawn(browser: Browser) -> list[float]:
    """From the click that asks for a strip of `TOKENS` until the browser has painted it, in a new page each time."""
    import gradio as gr  # after saehook.app, which tells it what to leave

    tokens = [{"text": f" token{i}", "share": i / TOKENS, "title": f"token {i}"} for i in range(TOKENS)]
    with gr.Blocks(analytics_enabled=False) as blocks:
        strip = make_strip(NO_TOKENS, label="Tokens", elem_id="strip")
        button = gr.Button("Draw", elem_id="draw")
        button.click(lambda: {"tokens": tokens, "legend": "drawn"}, None, strip, queue=False, show_progress="hidden")
    blocks.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False)
    took = []
    for _ in range(REPEATS):
        page = browser.new_page()
        page.goto(str(blocks.local_url))
        page.locator("#draw").wait_for()
        page.wait_for_timeout(SETTLE_MS)
        took.append(seconds(lambda page=page: draw(page)))
        page.close()
    blocks.close()
    return took


def draw(page: Page) -> None:
    page.locator("#draw").click()
    page.locator("#strip .token").nth(TOKENS - 1).wait_for()
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def one_visit(page: Page, url: str) -> dict[str, float]:
    """What one visitor waits for."""
    found = {"first page load, s": seconds(lambda: (page.goto(url), page.locator("#strip .token").first.wait_for()))}
    page.wait_for_timeout(SETTLE_MS)
    caption = page.locator("#table caption", has_text="token 2")
    click = seconds(lambda: (page.locator("#strip .token").nth(2).click(), caption.wait_for()))
    found["click on a token answered, s"] = click
    page.get_by_role("tab", name="Generate", exact=True).click()
    page.locator("#lane-base .lane").wait_for()
    page.wait_for_timeout(SETTLE_MS)
    status = page.locator("#lane-base .status", has_text=re.compile(r"[1-9]\d* (of 60 )?tokens"))
    found["first streamed token, s"] = seconds(lambda: (page.locator("#generate").click(), status.first.wait_for()))
    page.locator("#lane-spliced .lane[data-state=done]").wait_for()
    return found


def in_browser(browser: Browser, url: str) -> dict[str, list[float]]:
    """Each number for each of some visitors, who come one after another; the first one meets a server that has just started."""
    found: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        page = browser.new_page()
        for name, value in one_visit(page, url).items():
            found.setdefault(name, []).append(value)
        page.close()
    return found | {"strip of 1,024 tokens drawn, s": strip_drawn(browser)}


ASKED = ("import os\n", "", 60, False, 1.0, 0)


def three_at_once(url: str) -> dict[str, float]:
    """Three callers at once, one of whom leaves before its turn is over; how long until the other two are done, and how long one
    takes alone."""
    clients = [Client(url, verbose=False, analytics_enabled=False) for _ in range(3)]
    alone = seconds(lambda: clients[0].submit(*ASKED, api_name="/generate").result())
    began = time.perf_counter()
    jobs = [client.submit(*ASKED, api_name="/generate") for client in clients]
    while not any(job.outputs() for job in jobs):
        time.sleep(0.001)
    gone = next(job for job in jobs if job.outputs())
    gone.cancel()
    texts = [job.result()["text"] for job in jobs if job is not gone]
    together = time.perf_counter() - began
    assert len(texts) == 2
    assert texts[0] == texts[1]
    return {"one caller alone, s": alone, "three at once, of whom one leaves, s": together}


def growth(url: str) -> float:
    """Memory after `REQUESTS` in a row, as a share of that after the warm-up."""
    client = Client(url, verbose=False, analytics_enabled=False)
    site = "layers.2.resid_post"

    def read(times: int) -> int:
        for _ in range(times):
            client.predict("import os\n\ndef main", site, api_name="/read")
        return rss()

    before = read(WARM_UP)
    return read(REQUESTS) / before - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two visitors and few requests, to try it")
    options = parser.parse_args()
    global REPEATS, REQUESTS, WARM_UP
    if options.quick:
        REPEATS, REQUESTS, WARM_UP = 2, 20, 10
    app = serve(hooked(), port=free_port(), limits=Limits(), block=False, quiet=True)
    url = str(app.local_url)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        visits = in_browser(browser, url)
        version = browser.version
        browser.close()
    callers = three_at_once(url)
    grown = growth(url)
    assert not any(thread.name in {"saehook-stream", "saehook-work"} for thread in threading.enumerate())
    measured: dict[str, Any] = {name: {"median": statistics.median(v), "each": v} for name, v in visits.items()}
    measured |= {"growth of memory over 200 requests": grown, **callers}
    for name, value in measured.items():
        value = max(value["each"]) if isinstance(value, dict) else value
        limit = f"(at most {LIMITS[name]:g})" if name in LIMITS else ""
        print(f"{name:40} {value:8.3f}  {limit}")
    if options.json:
        machine = {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "gradio", "playwright")},
            "chromium": version,
        }
        result = {
            "machine": machine,
            "visitors": REPEATS,
            "requests": REQUESTS,
            "measured": measured,
            "at most": LIMITS,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    app.close()


if __name__ == "__main__":
    main()
