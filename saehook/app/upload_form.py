"""The form with which a visitor attaches an SAE, where the page allows that."""

from __future__ import annotations

from typing import Any

import gradio as gr

from saehook.app.inspect_tab import UNREAD
from saehook.app.messages import told_to_the_visitor
from saehook.app.refusals import SUFFIXES
from saehook.app.shared import TOLD, Shared
from saehook.app.table import empty_table
from saehook.app.token_strip import NO_TOKENS
from saehook.hooked_saes import HookedSAEs

HELP = """
### An SAE of your own
Its `cfg.json`, its weights as `.safetensors`, and `stats.safetensors` if it has them. It is attached for this page of your browser
only, beside the others or in place of the one at its site, and forgotten when you leave.
"""


class UploadForm:
    """The form, and what happens in it."""

    def __init__(self, shared: Shared) -> None:
        """Its controls, inside the tab that is open."""
        self.shared = shared
        gr.Markdown(HELP, elem_id="upload-help")
        self.files = gr.File(
            file_count="multiple", file_types=[*SUFFIXES], label="Files of the SAE", height=140, elem_id="upload"
        )
        with gr.Row(elem_classes="bottom"):
            self.site = gr.Textbox(
                "", label="Its site", placeholder="as its configuration says", max_lines=1, max_length=200,
                elem_id="upload-site", scale=3,
            )  # fmt: skip
            self.attach = gr.Button("Attach it", variant="primary", elem_id="attach-upload", scale=1, min_width=110)
            self.detach = gr.Button("Detach it", elem_id="detach-upload", scale=1, min_width=110)

    def wire(self, shown: list[Any], blocks: gr.Blocks) -> None:
        """Connect it with the page; `shown`: what shows the reading, which is forgotten."""
        shared = self.shared
        changed = [shared.site, shared.editor, shared.latent, shared.reading, shared.span, *shown, self.files]
        self.attach.click(self.on_attach, [self.files, self.site, shared.editor], changed, **TOLD)
        self.detach.click(self.on_detach, shared.editor, changed, **TOLD)
        blocks.unload(self.on_leave)

    def on_attach(self, files: Any, site: Any, program: Any) -> list[Any]:
        """The SAE in the files is attached for this visitor."""
        with told_to_the_visitor():
            hooked, name = self.shared.uploads.attach([str(file) for file in files or []], str(site or "").strip())
            sae = hooked.saes[name]
            gr.Info(f"Attached at {name}: {sae.d_sae} latents. Press Read.", duration=8)
            return self._changed(hooked, name, program)

    def on_detach(self, program: Any) -> list[Any]:
        """Back to the SAEs that are served."""
        with told_to_the_visitor():
            self.shared.uploads.detach()
            hooked = self.shared.uploads.served
            return self._changed(hooked, hooked.sites[0], program)

    def on_leave(self, request: gr.Request) -> None:
        """The visitor's SAE is forgotten."""
        self.shared.uploads.detach(request.session_hash)

    def _changed(self, hooked: HookedSAEs, site: str, program: Any) -> list[Any]:
        sites = hooked.sites
        choices = gr.update(choices=sites, value=site, visible=len(sites) > 1)
        reading = [None, None, NO_TOKENS, empty_table(UNREAD), empty_table("")]
        return [choices, {**program, "sites": sites}, "", *reading, None]
