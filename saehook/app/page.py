"""The page: its controls, and what happens when they are used. A visitor's edits travel with each request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr
from gradio.events import api

from saehook.app.edit_rows import DEFAULT_STRENGTH, EditRow, edit_row, first_free, program_of, rows_of, whole_numbers
from saehook.app.endpoints import generate_endpoint, read_endpoint
from saehook.app.lane import make_lane
from saehook.app.lanes import run_lanes
from saehook.app.latent_table import make_table, table_value
from saehook.app.limits import Limits
from saehook.app.messages import told_to_the_visitor
from saehook.app.reading import Reading, prompt_ids, read
from saehook.app.sampling import MAX_TEMPERATURE, sampling_of
from saehook.app.snippet import snippet
from saehook.app.token_strip import make_strip, strip_value
from saehook.errors import ArgumentError, SaehookError
from saehook.hooked_saes import HookedSAEs
from saehook.sae import SAE

TITLE = "saehook: read and edit a language model, one latent at a time"
INTRODUCTION = """
# saehook

A language model turns each token into a vector, layer by layer. A **sparse autoencoder** (SAE) takes such a vector apart into a
few **latents**: directions that are mostly off, and when on often stand for something one can name, such as "inside a function
signature". Here you read which latents fire on your text, change some of them, and watch the model write on in three lanes: as it
is, with its vectors replaced by what the SAE makes of them, and under your edits.
"""
HELP = """
The tokens are coloured by one latent: the bluer, the stronger it fires. Click a token (or go to it with the arrow keys and press
Enter) for the latents of that token alone; choose a row of the table to colour the tokens by its latent.
"""
LANES = (
    ("Base", "The model as it is.", "#7a7a85"),
    ("Spliced", "With the SAE's reconstruction put in, without edits.", "#1A85FF"),
    ("Edited", "The model under your edits.", "#D41159"),
)
PROMPTS = [
    "class Stack:\n    def __init__(self",
    "import json\n\ndef load(path):\n    with open(path) as",
    "She looked out of the window and saw",
    'def area(radius):\n    """Return the area of a circle.',
]
PROMPT_NAMES = ["a Python class", "reading a file", "a novel", "a docstring"]
ERRORS = [("keep it: only the edits change", "keep"), ("drop it: edited tokens become what the SAE decodes", "drop")]
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""For listeners that never touch the model."""
ON_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
"""For listeners that run the model: one at a time."""


def build_app(
    hooked: HookedSAEs, *, limits: Limits | None = None, sae_paths: Mapping[str, Any] | None = None
) -> gr.Blocks:
    """The page for a model with SAEs attached; `serve` launches it safely.

    Args:
        sae_paths: where each SAE lies, by site, to be named in the Python that repeats a run.
    """
    return _Page(hooked, limits or Limits(), {k: str(v) for k, v in (sae_paths or {}).items()}).blocks()


class _Page:
    """Handlers of the page, and the components that `blocks` puts between them. Nothing here changes after that."""

    def __init__(self, hooked: HookedSAEs, limits: Limits, sae_paths: Mapping[str, str]) -> None:
        self.hooked, self.limits, self.sae_paths = hooked, limits, sae_paths

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            gr.Markdown(INTRODUCTION, elem_id="introduction")
            self.reading_controls()
            self.edit_controls()
            self.lane_controls()
            api(read_endpoint(self.hooked, self.limits), api_name="read", **ON_MODEL)
            api(generate_endpoint(self.hooked, self.limits), api_name="generate", **ON_MODEL)
        return blocks.queue(max_size=self.limits.queue, default_concurrency_limit=1)

    def reading_controls(self) -> None:
        sites = self.hooked.sites
        first = self.on_read(PROMPTS[0], sites[0])
        gr.Markdown("## 1 · Read", elem_classes="step")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self.prompt = gr.Textbox(
                    PROMPTS[0], label="Prompt", info="Shift+Enter reads it", lines=5, max_lines=10, elem_id="prompt",
                    max_length=self.limits.prompt_chars,
                )  # fmt: skip
                gr.Examples(
                    [[prompt] for prompt in PROMPTS], [self.prompt], example_labels=PROMPT_NAMES, label="Or try",
                    elem_id="examples", cache_examples=False, api_visibility="private",
                )  # fmt: skip
                with gr.Row(elem_classes="bottom"):
                    self.site = gr.Dropdown(
                        sites, value=sites[0], label="Site", info="where an SAE is attached", scale=2, elem_id="site",
                        visible=len(sites) > 1,
                    )  # fmt: skip
                    read_button = gr.Button("Read", variant="primary", elem_id="read", scale=1, min_width=100)
                gr.Markdown(HELP, elem_id="help")
            with gr.Column(scale=7, min_width=360):
                self.strip = make_strip(first[3], label="Tokens of the prompt", elem_id="strip")
                self.table = make_table(first[4], label="Strongest latents", elem_id="table")
                with gr.Row(elem_classes="bottom"):
                    self.latent = gr.Textbox(
                        first[2], label="Chosen latent", info="colours the tokens; choose it in the table or type its number",
                        max_lines=1, max_length=12, elem_id="latent", scale=3,
                    )  # fmt: skip
                    self.to_edit = gr.Button("Edit this latent", elem_id="to-edit", scale=1, min_width=140)
        self.reading = gr.State(first[0], time_to_live=3600)
        self.position = gr.State(None)
        shown = [self.strip, self.table]
        asked, read_out = [self.prompt, self.site], [self.reading, self.position, self.latent, *shown]
        gr.on(
            [read_button.click, self.prompt.submit, self.site.input], self.on_read, asked, read_out,
            api_visibility="private", show_progress="minimal", show_progress_on=self.table, **ON_MODEL,
        )  # fmt: skip
        state = [self.reading, self.latent, self.position]
        self.latent.change(self.show, state, shown, **QUIET)
        self.table.select(on_table_select, None, self.latent, **QUIET)
        self.strip.select(self.on_strip_select, state, [self.position, *shown], **QUIET)

    def edit_controls(self) -> None:
        gr.Markdown("## 2 · Edit", elem_classes="step")
        with gr.Group(elem_id="edits"):
            self.rows = [edit_row(i + 1, self.hooked.sites, self.limits) for i in range(self.limits.edits)]
        with gr.Row(elem_classes="bottom"):
            self.error = gr.Radio(
                ERRORS, value="keep", label="What the SAE misses of a vector (its error)", elem_id="error", scale=4
            )
            clear = gr.Button("Clear edits", elem_id="clear", scale=1, min_width=120)
        controls = [control for row in self.rows for control in row]
        self.to_edit.click(self.on_to_edit, [self.reading, self.latent, *controls], controls, **QUIET)
        clear.click(self.on_clear, None, controls, **QUIET)

    def lane_controls(self) -> None:
        limits = self.limits
        gr.Markdown("## 3 · Generate", elem_classes="step")
        with gr.Row(equal_height=True, elem_id="settings"):
            sample = gr.Checkbox(
                True, label="Sampling", info="off: always the likeliest token", elem_id="sample", min_width=130
            )
            temperature = gr.Slider(
                0.05, MAX_TEMPERATURE, 0.8, step=0.05, label="Temperature", elem_id="temperature", min_width=180
            )
            new_tokens = gr.Slider(
                1,
                limits.new_tokens,
                min(60, limits.new_tokens),
                step=1,
                label="New tokens",
                elem_id="new-tokens",
                min_width=180,
            )
            seed = gr.Number(
                0,
                label="Seed",
                info="the same in all three lanes",
                precision=0,
                minimum=0,
                elem_id="seed",
                min_width=110,
            )
            with gr.Column(min_width=180):
                run = gr.Button("Generate", variant="primary", elem_id="generate")
                stop = gr.Button("Stop", variant="stop", elem_id="stop")
        sample.change(
            lambda on: (gr.update(interactive=on), gr.update(interactive=on)), sample, [temperature, seed], **QUIET
        )
        with gr.Row(equal_height=True, elem_id="lanes"):
            lanes = [make_lane(*lane, elem_id=f"lane-{lane[0].lower()}", min_width=260) for lane in LANES]
        with gr.Accordion("Python that repeats the edited lane", open=False, elem_id="code"):
            code = gr.Code(language="python", label="Python", interactive=False, elem_id="snippet")
        controls = [control for row in self.rows for control in row]
        running = run.click(
            self.on_generate,
            [self.prompt, self.error, sample, temperature, new_tokens, seed, *controls],
            [*lanes, code],
            api_visibility="private", show_progress="full", show_progress_on=lanes[0], **ON_MODEL,
        )  # fmt: skip
        # In two steps: an update of the run that is still on its way would overwrite what `on_stop` shows.
        ended = stop.click(lambda: None, None, None, cancels=[running], **QUIET)
        ended.then(on_stop, lanes, lanes, **QUIET)

    def on_read(self, prompt: str, site: str) -> tuple[Any, ...]:
        """A text is read, and coloured by its strongest latent."""
        with told_to_the_visitor():
            reading = read(self.hooked, prompt, site, self.limits)
            latent = str(reading.top[0].latent) if reading.top else ""
            return reading, None, latent, *self.show(reading, latent, None)

    def show(self, reading: Reading | None, chosen: str, position: int | None) -> tuple[Any, Any]:
        """Values of the strip and the table."""
        if reading is None:  # forgotten: the page was open for long
            return strip_value(None, None, None), table_value(None, None, None, None)
        sae = self.hooked.saes[reading.site]
        latent, problem = None, None
        try:
            latent = one_latent(chosen, sae)
        except SaehookError as error:
            problem = str(error)
        strip = strip_value(reading, latent, position)
        if problem and chosen:
            strip["legend"] = problem
        return strip, table_value(reading, sae, latent, position)

    def on_strip_select(
        self, reading: Reading | None, chosen: str, position: int | None, event: gr.EventData
    ) -> tuple[Any, Any, Any]:
        """A token is marked, and its latents are listed; a second click goes back to the whole text."""
        index = _whole(event, "index")
        if reading is None or index is None or not 0 <= index < len(reading.ids) or index == position:
            index = None
        return index, *self.show(reading, chosen, index)

    def on_to_edit(self, reading: Reading | None, chosen: str, *values: Any) -> list[Any]:
        """The chosen latent goes into the first free row."""
        with told_to_the_visitor():
            site = self.hooked.sites[0] if reading is None else reading.site
            latent = str(one_latent(chosen, self.hooked.saes[site]))
            rows = list(rows_of(values))
            i = first_free(rows)
            rows[i] = rows[i]._replace(on=True, site=site, latent=latent)
            return [value for row in rows for value in row]

    def on_clear(self) -> list[Any]:
        """All rows as they were at first."""
        row = EditRow(False, self.hooked.sites[0], "", "add", DEFAULT_STRENGTH, "norm", "everywhere")
        return [*row] * self.limits.edits

    def on_generate(
        self, prompt: str, error: str, sample: Any, temperature: Any, new_tokens: Any, seed: Any, *values: Any
    ) -> Iterator[list[Any]]:
        """All three lanes, streamed; everything is checked before the first one starts."""
        with told_to_the_visitor():
            sampling = sampling_of(sample, temperature, new_tokens, seed, self.limits)
            ids = prompt_ids(self.hooked, prompt, self.limits, sampling.new_tokens)
            program = program_of(self.hooked, list(rows_of(values)), error, len(ids), self.limits)
            code = snippet(self.hooked, prompt, program, sampling, self.sae_paths)
            with contextlib.closing(run_lanes(self.hooked, ids, program, sampling, self.limits)) as values_of_lanes:
                for lanes in values_of_lanes:
                    yield [*lanes, code]


def one_latent(chosen: str, sae: SAE) -> int:
    """The latent that a visitor has chosen.

    Raises:
        ArgumentError: none or several. LatentError: the SAE does not have it.
    """
    if not chosen:
        raise ArgumentError("No latent is chosen. Read a text and choose one in the table, or type its number.")
    latent, *others = whole_numbers(chosen, "chosen latent", "one whole number")
    if others:
        raise ArgumentError(f"{1 + len(others)} latents are chosen; choose one.")
    sae.check_latents((latent,))
    return latent


def on_table_select(event: gr.EventData) -> Any:
    """A row of the table chooses its latent."""
    latent = _whole(event, "latent")
    return gr.skip() if latent is None else str(latent)


def on_stop(*lanes: Any) -> list[Any]:
    """What the lanes show once they are stopped; the run itself ends by being cancelled."""
    stopped = []
    for lane in lanes:
        state = lane.get("state") if isinstance(lane, dict) else None
        if state == "running":
            stopped.append({**lane, "state": "stopped", "status": f"stopped at {lane.get('status')}"})
        elif state == "waiting":
            stopped.append({**lane, "state": "stopped", "status": "stopped before its turn"})
        else:
            stopped.append(gr.skip())
    return stopped


def _whole(event: gr.EventData, name: str) -> int | None:
    """A whole number that the browser sent with an event."""
    value = getattr(event, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
