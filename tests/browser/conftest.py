"""A real browser (Debian's chromium) on a page with the tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from app_fixtures import collect_loops, free_port, tiny

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    from saehook.app import Limits, serve

    config = tiny().lm.config
    context, config.max_position_embeddings = config.max_position_embeddings, 4096
    # So many tokens that on any machine a run lasts until somebody stops it.
    app = serve(tiny(), port=free_port(), limits=Limits(new_tokens=3000), block=False, quiet=True)
    assert app.local_url
    yield app.local_url
    app.close()
    collect_loops()
    config.max_position_embeddings = context


@pytest.fixture(scope="session")
def app_with_uploads() -> Iterator[Any]:
    from saehook.app import Limits, serve

    app = serve(tiny(), port=free_port(), limits=Limits(), uploads=True, block=False, quiet=True)
    yield app
    app.close()
    collect_loops()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=20_000)  # machines differ

    chromium = shutil.which("chromium")
    assert chromium, "these tests need Debian's chromium: apt-get install chromium fonts-dejavu-core"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url) -> Iterator[Callable]:
    """`visit(query)` opens the page for one more visitor. In the end no page may have had an error or asked elsewhere; after
    `visit.leaves()` errors do not count, since Gradio says so of a stream that the visitor left."""
    contexts, outside, errors, left = [], [], [], []

    def note(error: str) -> None:
        if not left:
            errors.append(error)

    def open_page(query: str = "?__theme=light", wait: str = "#strip .token", width: int = 1280, at: str = url):
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda r: None if r.url.startswith((at, "data:", "blob:")) else outside.append(r.url))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("console", lambda message: note(message.text) if message.type == "error" else None)
        page.goto(at + query)
        page.locator(wait).first.wait_for(timeout=60_000)
        return page

    open_page.leaves = lambda: left.append(True)  # pyright: ignore[reportFunctionMemberAccess]
    yield open_page
    for context in contexts:
        context.close()
    assert not outside, "the page asked another server"
    assert not errors
