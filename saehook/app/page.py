"""The page: what stands above and beside the tabs, and the tabs. A visitor's edits travel with each request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.events import api

from saehook.app.attribution_tab import AttributionTab
from saehook.app.card_tab import CardTab
from saehook.app.endpoints import endpoints
from saehook.app.generate_tab import GenerateTab
from saehook.app.inspect_tab import InspectTab
from saehook.app.latent_tab import LatentTab
from saehook.app.limits import Limits
from saehook.app.program_editor import make_editor
from saehook.app.program_rows import editor_value
from saehook.app.search_tab import SearchTab
from saehook.app.shared import ON_MODEL, QUIET, Shared
from saehook.app.sidebar import Sidebar, make_kind
from saehook.app.sweep_tab import SweepTab
from saehook.app.upload_form import UploadForm
from saehook.app.uploads import Uploads
from saehook.hooked_saes import HookedSAEs

TITLE = "saehook: read and edit a language model, one latent at a time"
INTRODUCTION = """
# saehook

A language model turns each token into a vector, layer by layer. A **sparse autoencoder** (SAE) takes such a vector apart into a
few **latents**: directions that are off most of the time, and when on often stand for something one can name.

**1.** Below, the tokens are coloured by one latent; click a token or a row of the table to see others. **2.** “Edit this latent”
makes the chosen one stronger. **3.** Open **Generate** and press the button: the model writes on, as it is and with your edit.
"""
# On a narrow window it would cover the page.
CLOSE_SIDEBAR = "() => { if (innerWidth <= 768) document.querySelector('.sidebar.open .toggle-button')?.click(); }"
PROMPTS = [
    "She looked out of the window and saw",
    "class Stack:\n    def __init__(self",
    "import json\n\ndef load(path):\n    with open(path) as",
    'def area(radius):\n    """Return the area of a circle.',
]
PROMPT_NAMES = ["a novel", "a Python class", "reading a file", "a docstring"]


def build_app(
    hooked: HookedSAEs,
    *,
    limits: Limits | None = None,
    sae_paths: Mapping[str, Any] | None = None,
    uploads: bool = False,
) -> gr.Blocks:
    """The page for a model with SAEs attached; `serve` launches it safely.

    Args:
        sae_paths: where each SAE lies, by site, to be named in the Python that repeats a run.
        uploads: see `serve`.
    """
    limits = limits or Limits()
    paths = {site: str(path) for site, path in (sae_paths or {}).items()}
    with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        with gr.Sidebar(position="left", width=360, elem_id="sidebar"):
            gr.Markdown("## Edits", elem_classes="step")
            editor = make_editor(editor_value(hooked, limits), elem_id="editor")
            below_editor = gr.Column(elem_id="below-editor")
        gr.Markdown(INTRODUCTION, elem_id="introduction")
        sites = hooked.sites
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                prompt = gr.Textbox(
                    PROMPTS[0], label="Prompt", info="Shift+Enter reads it", lines=3, max_lines=10, elem_id="prompt",
                    max_length=limits.prompt_chars,
                )  # fmt: skip
                chat = gr.Checkbox(
                    False, label="As a chat message", info="in the model's chat template", elem_id="chat",
                    visible=bool(getattr(hooked.tokenizer, "chat_template", None)),
                )  # fmt: skip
                gr.Examples(
                    [[text] for text in PROMPTS], [prompt], example_labels=PROMPT_NAMES, label="Or try",
                    elem_id="examples", cache_examples=False, api_visibility="private",
                )  # fmt: skip
            with gr.Column(scale=1, min_width=320):
                with gr.Row(elem_classes="bottom"):
                    site = gr.Dropdown(
                        sites, value=sites[0], label="Site", info="where an SAE is attached", scale=2, elem_id="site",
                        visible=len(sites) > 1, min_width=150,
                    )  # fmt: skip
                    read_button = gr.Button("Read", variant="primary", elem_id="read", scale=1, min_width=90)
                with gr.Row(elem_classes="bottom"):
                    latent = gr.Textbox(
                        "", label="Chosen latent", max_lines=1, max_length=12, elem_id="latent", scale=2, min_width=110
                    )
                    kind = make_kind()
                    to_edit = gr.Button(
                        "Edit this latent", variant="primary", elem_id="to-edit", scale=1, min_width=150
                    )
        reading = gr.State(None, time_to_live=3600)
        shared = Shared(
            Uploads(hooked, limits), limits, paths, prompt, site, latent, reading, editor, chat, gr.State(None)
        )
        shared.controls += [prompt, chat, site, latent, kind]
        shared.tab = gr.State("inspect")
        with gr.Tabs(selected="inspect", elem_id="tabs") as shared.tabs:
            with _tab(shared, "Inspect", "inspect"):
                inspect = InspectTab(shared)
            with _tab(shared, "Generate", "generate"):
                generate = GenerateTab(shared)
            with _tab(shared, "Sweep", "sweep"):
                SweepTab(shared, generate.sampling)
            with _tab(shared, "Attribution", "attribution"):
                AttributionTab(shared)
            with _tab(shared, "Latent", "latent") as tab:
                LatentTab(shared, tab)
            with _tab(shared, "Search", "search"):
                SearchTab(shared)
            with _tab(shared, "SAE card", "card") as tab:
                CardTab(shared, tab)
                upload = UploadForm(shared) if uploads else None
        with below_editor:
            sidebar = Sidebar(shared)
        inspect.reads_on([read_button.click, prompt.submit, site.input])
        inspect.start(PROMPTS[0])
        sidebar.wire(to_edit, kind, generate, inspect.shown, blocks)
        if upload is not None:
            upload.wire(inspect.shown, blocks)
        blocks.load(None, None, None, js=CLOSE_SIDEBAR, **QUIET)
        for name, function in endpoints(shared.uploads, limits).items():
            api(function, api_name=name, **ON_MODEL)
    return blocks.queue(max_size=limits.queue, default_concurrency_limit=1)


def _tab(shared: Shared, name: str, key: str) -> gr.Tab:
    """One that notes that it is open."""
    tab = gr.Tab(name, id=key)
    tab.select(lambda: key, None, shared.tab, **QUIET)
    return tab
