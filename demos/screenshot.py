"""A picture of the page after a generation with edits on.

    python demos/app.py &                          # or any other page of saehook
    python demos/screenshot.py page.png [--url http://127.0.0.1:7860] [--dark] [--width 1280]

Needs Debian's chromium and `pip install playwright`.
"""

from __future__ import annotations

import argparse
import shutil

from playwright.sync_api import sync_playwright

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--before", action="store_true", help="the page as it opens")
    parser.add_argument("--tab", default="Generate", help="the tab that is open in the end")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": options.width, "height": 900})
        page.goto(options.url + ("?__theme=dark" if options.dark else "?__theme=light"))
        page.locator("#read").wait_for()
        if not options.before:
            page.locator("#to-edit").click()
            page.get_by_role("tab", name="Generate", exact=True).click()
            page.locator("#generate").click()
            page.locator("#lane-edited .lane[data-state=done]").wait_for(timeout=120_000)
            page.get_by_role("tab", name=options.tab, exact=True).click()
        page.wait_for_timeout(500)
        page.screenshot(path=options.out, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
