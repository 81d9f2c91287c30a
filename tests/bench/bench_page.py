"""How long a visitor of the page waits, in a real browser on the bundled model.

    python tests/bench/bench_page.py [--json numbers.json]

Needs Debian's chromium and playwright, and an idle machine. Each number has its limit beside it: what the page promises.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradio_client import Client
from playwright.sync_api import Page, sync_playwright

import saehook
from saehook.app import Limits, serve
from saehook.app.token_strip import NO_TOKENS, make_strip

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync".split()
)
TOKENS = 1024
LIMITS = {
    "first page load, s": 5.0,
    "strip drawn, s": 1.0,
    "click on a token answered, s": 0.3,
    "first streamed token, s": 0.5,
    "three at once, one of whom leaves, s": 60.0,
    "growth of memory": 0.05,
}
"""What the page promises."""
REQUESTS = 200
WARM_UP = 50


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


def strip_drawn(page: Page) -> float:
    """From the click that asks for a strip of `TOKENS` until the browser has painted it."""
    import gradio as gr  # after saehook.app, which tells it what to leave

    tokens = [{"text": f" token{i}", "share": i / TOKENS, "title": f"token {i}"} for i in range(TOKENS)]
    with gr.Blocks(analytics_enabled=False) as blocks:
        strip = make_strip(NO_TOKENS, label="Tokens", elem_id="strip")
        button = gr.Button("Draw", elem_id="draw")
        button.click(lambda: {"tokens": tokens, "legend": "drawn"}, None, strip, queue=False, show_progress="hidden")
    blocks.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False)
    page.goto(str(blocks.local_url))
    page.locator("#draw").wait_for()

    def draw() -> None:
        page.locator("#draw").click()
        page.locator("#strip .token").nth(TOKENS - 1).wait_for()
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    took = seconds(draw)
    blocks.close()
    return took


def in_browser(page: Page, url: str) -> dict[str, float]:
    found = {"strip drawn, s": strip_drawn(page)}
    found["first page load, s"] = seconds(lambda: (page.goto(url), page.locator("#strip .token").first.wait_for()))
    page.locator("#read").click()
    page.wait_for_timeout(2000)
    caption = page.locator("#table caption", has_text="token 2")
    found["click on a token answered, s"] = seconds(
        lambda: (page.locator("#strip .token").nth(2).click(), caption.wait_for())
    )
    page.get_by_role("tab", name="Generate", exact=True).click()
    status = page.locator("#lane-base .status", has_text=re.compile(r"[1-9]\d* of 60 tokens")).or_(
        page.locator("#lane-base .lane[data-state=done]")
    )
    found["first streamed token, s"] = seconds(lambda: (page.locator("#generate").click(), status.first.wait_for()))
    page.locator("#lane-spliced .lane[data-state=done]").wait_for()
    return found


def three_at_once(url: str) -> float:
    """Three callers, one of whom leaves at once; how long until the other two are done."""
    clients = [Client(url, verbose=False, analytics_enabled=False) for _ in range(3)]
    jobs = [client.submit("import os\n", "", 60, False, 1.0, 0, api_name="/generate") for client in clients]
    began = time.perf_counter()
    jobs[0].cancel()
    for job in jobs[1:]:
        job.result()
    return time.perf_counter() - began


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    app = serve(hooked(), port=free_port(), limits=Limits(), block=False, quiet=True)
    url = str(app.local_url)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        found = in_browser(browser.new_page(), url)
        browser.close()
    found["three at once, one of whom leaves, s"] = three_at_once(url)
    found["growth of memory"] = growth(url)
    assert not any(thread.name in {"saehook-stream", "saehook-work"} for thread in threading.enumerate())
    for name, value in found.items():
        print(f"{name:40} {value:8.3f}  (at most {LIMITS[name]:g})")
    if options.json:
        # Others' work on the machine shows in the load: 0 to 2 are those of this script.
        result = {
            "load average, 1 min": os.getloadavg()[0],
            "cores": os.cpu_count(),
            "measured": found,
            "at most": LIMITS,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    app.close()


if __name__ == "__main__":
    main()
