"""The sidebar: the program that all tabs run, and the same as JSON, Python, a shell command and a link."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from saehook.app.downloads import download_page
from saehook.app.generate_tab import GenerateTab
from saehook.app.inspect_tab import UNREAD
from saehook.app.lanes import LANES
from saehook.app.messages import told_to_the_visitor
from saehook.app.notes import make_notes
from saehook.app.page_state import TABS, PageState, control_values
from saehook.app.program_rows import (
    KINDS,
    checked_rows,
    editor_value,
    latent_row,
    problems_of,
    program_of,
    program_to_rows,
    with_row,
)
from saehook.app.sampling import sampling_of
from saehook.app.session_page import session_page
from saehook.app.shared import QUIET, TOLD, Shared, one_latent
from saehook.app.snippet import python_for, shell_for
from saehook.app.table import empty_table
from saehook.app.token_strip import NO_TOKENS
from saehook.errors import ArgumentError, SaehookError
from saehook.fields import from_json
from saehook.interventions import Program

# A link holds what the visitor has set; following it sets that again, and runs nothing.
COPY_LINK = """code => { if (!code) return; const url = location.origin + location.pathname + '?s=' + code;
  history.replaceState(null, '', url); navigator.clipboard?.writeText(url).catch(() => {}); return url; }"""


class Sidebar:
    """What stands beside the tabs. The editor itself is `shared.editor`, made before."""

    def __init__(self, shared: Shared) -> None:
        """Its controls below the editor, inside the sidebar that is open."""
        self.shared = shared
        self.problems = make_notes(label="What is wrong with the edits", elem_id="problems")
        self.panel = gr.Accordion("JSON, Python, shell, link", open=False, elem_id="panel")
        with self.panel:
            self.link = gr.Textbox(
                label="Link to all that is set", info="it restores, and runs nothing", interactive=False, max_lines=1,
                elem_id="link",
            )  # fmt: skip
            self.copy = gr.Button("Copy the link", size="sm", elem_id="copy-link")
            self.json = gr.Textbox(
                label="Program as JSON", info="edits that are on", lines=5, max_lines=12, elem_id="program-json"
            )
            load = gr.Button("Take over this JSON", size="sm", elem_id="load-json")
            self.python = gr.Code(language="python", label="Python", interactive=False, elem_id="snippet")
            self.shell = gr.Code(language="shell", label="Shell", interactive=False, elem_id="shell")
            self.session = gr.Textbox(
                label="Session as JSON", info="paste one to restore it", lines=2, max_lines=6, elem_id="session"
            )
            self.restore = gr.Button("Restore this session", size="sm", elem_id="restore")
            self.export = gr.Button("Download the session as a page", size="sm", elem_id="export-session")
            self.page = gr.Textbox("", label="Page", visible="hidden", elem_id="session-page")
        load.click(self.on_load_json, self.json, shared.editor, **TOLD).then(
            self.on_edited, shared.editor, self.problems, **QUIET
        )
        shared.editor.input(self.on_edited, shared.editor, self.problems, **QUIET)

    def wire(self, to_edit: gr.Button, kind: gr.Dropdown, generate: GenerateTab, shown: list[Any], blocks: Any) -> None:
        """Connect it with the rest of the page.

        Args:
            shown: what shows the reading: it is emptied when a link or session is restored.
        """
        shared = self.shared
        edited = to_edit.click(
            self.on_to_edit, [shared.editor, shared.site, shared.latent, kind], shared.editor, **TOLD
        )
        edited.then(self.on_edited, shared.editor, self.problems, **QUIET)
        state = [shared.tab, shared.editor, shared.span, *shared.controls]
        panel = [self.json, self.python, self.shell, self.session]
        edited.success(self.on_panel, state, panel, **QUIET)
        triggers = [self.panel.expand, shared.editor.input, shared.prompt.blur]
        gr.on(triggers, self.on_panel, state, panel, **QUIET)
        self.copy.click(self.on_link, state, self.link, **TOLD).success(
            None, self.link, self.link, js=COPY_LINK, **QUIET
        )
        self.export.click(self.on_export, [*state, *generate.lanes], self.page, **TOLD).success(
            None, self.page, None, js=download_page("session.html"), **QUIET
        )
        restored = [shared.tabs, *state, shared.reading, *shown]
        self.n_restored = len(restored)
        self.restore.click(self.on_restore, self.session, restored, **TOLD)
        blocks.load(self.on_open, None, restored, **TOLD)

    def on_edited(self, value: Any) -> list[dict[str, str]]:
        """The rows are checked while they are written."""
        with told_to_the_visitor():
            problems = problems_of(self.shared.hooked, value, self.shared.limits)
            return [{"kind": "warning", "text": problem} for problem in problems]

    def on_to_edit(self, value: Any, site: str, chosen: Any, kind: str) -> dict[str, Any]:
        """The chosen latent becomes one more row."""
        with told_to_the_visitor():
            hooked = self.shared.hooked
            latent = one_latent(chosen, hooked.saes[hooked.resolve_site(site)])
            row = latent_row(latent, site if len(hooked.sites) > 1 else None, kind)
            return with_row(value, row, self.shared.limits)

    def on_load_json(self, text: Any) -> dict[str, Any]:
        """A program that was pasted."""
        with told_to_the_visitor():
            return program_to_rows(self.shared.hooked, text, self.shared.limits)

    def on_panel(self, *values: Any) -> list[Any]:
        """The program as JSON, Python and a shell command; of one that cannot be meant, why."""
        with told_to_the_visitor():
            state = self.state(values)
            session = json.dumps(state.to_data(), indent=1)
            try:
                program, *code = self.meant(state)
            except SaehookError as problem:
                return [gr.skip(), f"# {problem}", f"# {problem}", session]
            return [program.to_json(), *code, session]

    def meant(self, state: PageState) -> tuple[Program, str, str]:
        """The program that is set, and the Python and shell that run it.

        Raises:
            SaehookError: it cannot be meant.
        """
        shared = self.shared
        set_to = dict(
            zip((c.elem_id for c in shared.controls), control_values(shared.controls, state.controls), strict=True)
        )
        sampling = sampling_of(
            set_to["sample"],
            set_to["temperature"],
            set_to["new-tokens"],
            set_to["seed"],
            shared.limits,
            set_to["top-p"],
        )
        program = program_of(shared.hooked, state.program, shared.limits)
        what = (shared.hooked, set_to["prompt"], program, sampling, shared.sae_paths, set_to["chat"])
        return program, python_for(*what), shell_for(*what)

    def on_export(self, *values: Any) -> str:
        """The session with what the lanes wrote, as a page that stands alone."""
        with told_to_the_visitor():
            state = self.state(values[: -len(LANES)])
            lanes: dict[str, Any] = dict(zip(LANES, values[-len(LANES) :], strict=True))
            return session_page(state, str(state.controls.get("prompt", "")), *self.meant(state), lanes)

    def on_link(self, *values: Any) -> str:
        """The code in a link."""
        with told_to_the_visitor():
            return self.state(values).to_link()

    def on_restore(self, text: Any) -> list[Any]:
        """A session that was pasted is set again; nothing runs."""
        with told_to_the_visitor():
            return self.restored(PageState.from_data(from_json(str(text or ""), "session")))

    def on_open(self, request: gr.Request) -> list[Any]:
        """A link is followed: what it holds is set, and nothing runs."""
        code = request.query_params.get("s")
        with told_to_the_visitor():
            if not code:
                return [gr.skip()] * self.n_restored
            return self.restored(PageState.from_link(code))

    def restored(self, state: PageState) -> list[Any]:
        """Values of all controls that a state sets; what was read before is forgotten.

        Raises:
            SaehookError: values that the page does not take.
        """
        shared = self.shared
        hooked, limits = shared.hooked, shared.limits
        editor = editor_value(hooked, limits)
        if state.program:
            fields = {name: state.program[name] for name in editor if name in state.program}
            editor |= {**fields, "sites": hooked.sites, "most": limits.edits}
            if len(checked_rows(editor)) > limits.edits:
                raise ArgumentError(f"{len(editor['rows'])} edits are given; this page allows {limits.edits}.")
        controls = control_values(shared.controls, state.controls)
        reading = [None, NO_TOKENS, empty_table(UNREAD), empty_table("")]
        return [gr.Tabs(selected=state.tab), state.tab, editor, state.tokens or None, *controls, *reading]

    def state(self, values: tuple[Any, ...]) -> PageState:
        """From what a browser sends: the open tab, the editor's value, the chosen tokens, and the controls."""
        tab, program, tokens, *rest = values
        controls = {c.elem_id: v for c, v in zip(self.shared.controls, rest, strict=True) if v is not None}
        tab = tab if tab in TABS else TABS[0]
        return PageState(tab=tab, program=program, tokens=list(tokens or ()), controls=controls)


def make_kind() -> gr.Dropdown:
    """What “Edit this latent” does with it."""
    return gr.Dropdown(list(KINDS), value=next(iter(KINDS)), label="How", elem_id="kind", min_width=170, scale=4)
