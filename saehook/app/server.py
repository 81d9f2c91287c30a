"""The page as a server that keeps to itself: one machine, no telemetry, no files, no foreign hosts."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.themes import Base, Default
from gradio.themes.utils.fonts import LocalFont
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from saehook.app.limits import Limits
from saehook.app.page import build_app
from saehook.app.refusals import Refusals
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs

CSS = """
.gradio-container { width: 100% !important; max-width: 1400px !important; margin: 0 auto !important; }
/* Gradio makes room beside its sidebar by a measurement that a slow first load can lose. Up to 768px the sidebar takes the whole
   width; no @media for that: in it Gradio lets rules reach only what is below .contain. */
.sidebar-parent:has(.sidebar.open) {
  padding-left: max(0px, min(358px - max(0px, (100vw - 1400px) / 2), (100vw - 768px) * 1000)) !important;
}
#introduction h1 { margin-bottom: 4px; }
.step h2 { margin: 8px 0 0; }
.gradio-container .html-container { padding: 0 !important; }
#snippet .cm-content *, #shell .cm-content * { color: var(--body-text-color) !important; }
.tab-container button.selected { color: var(--link-text-color) !important; }
.bottom > button { align-self: flex-end; }
#settings .form, #lanes { flex-wrap: wrap; }
#settings .form > * { min-width: 140px !important; }
#lanes > .block { min-width: min(260px, 100%) !important; }
#lanes .block, #lanes .html-container, #lanes .html-container > div { display: flex; flex-direction: column; flex: 1 1 0; }
#lanes .html-container, #lanes .html-container > div { min-height: 0; flex-basis: auto; }
"""


def serve(
    hooked: HookedSAEs,
    *,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    allowed_hosts: Sequence[str] = (),
    limits: Limits | None = None,
    sae_paths: Mapping[str, Any] | None = None,
    mcp: bool = False,
    uploads: bool = False,
    block: bool = True,
    quiet: bool = False,
) -> gr.Blocks:
    """Build the page and serve it, until interrupted or, with `block=False`, until `close()` of what is returned.

    Args:
        host: the address to listen on. Whoever reaches it may use the model: there is no password.
        port: None: a free one from 7860 on; `local_url` of what is returned says which.
        allowed_hosts: names under which the page may be asked for, beside `host` and this machine's own; a request for another
            name is refused (a foreign web page could otherwise use the visitor's browser to reach this one).
        sae_paths: see `build_app`.
        mcp: offer the named endpoints to language models, too, by the Model Context Protocol, at
            /gradio_api/mcp/ (`pip install 'saehook[mcp]'`).
        uploads: a visitor may send an SAE, which is then attached for that visitor: its cfg.json and `.safetensors` files.

    Raises:
        ArgumentError: `mcp` without its package.
    """
    if mcp and importlib.util.find_spec("mcp") is None:
        # `gradio[mcp]` asks for the same package, and for an older pydantic than is needed.
        raise ArgumentError("mcp=True needs the package mcp, which is not there. Run: pip install 'mcp>=1.21,<2'.")
    limits = limits or Limits()
    app = build_app(hooked, limits=limits, sae_paths=sae_paths, uploads=uploads)
    hosts = list(dict.fromkeys(["127.0.0.1", "localhost", host, *allowed_hosts]))
    app.launch(
        server_name=host,
        server_port=port,
        share=False,
        show_error=False,
        strict_cors=True,
        allowed_paths=[],
        enable_monitoring=False,
        max_file_size=limits.upload_bytes if uploads else 0,
        mcp_server=mcp,
        pwa=False,
        ssr_mode=False,
        run_history=False,
        footer_links=["api"],
        app_kwargs={
            "middleware": [
                Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
                Middleware(Refusals, limits=limits, uploads=uploads),
            ]
        },
        theme=theme(),
        css=CSS,
        prevent_thread_lock=not block,
        quiet=quiet,
    )
    return app


def theme() -> Base:
    """Gradio's default with fonts that come with it, and text that is dark enough to be read (WCAG AA)."""
    # The semi-bold files that its default asks for hold a few letters only; bold ones are whole.
    default = Default(
        primary_hue="blue",
        font=[LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"],
        font_mono=[LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"],
    )
    return default.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_cancel_background_fill="#c42020",
        button_cancel_background_fill_hover="#a01515",
        block_title_text_color_dark="*neutral_200",
    )
