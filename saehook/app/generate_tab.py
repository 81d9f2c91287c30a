"""The tab that generates: the same text continued by the model as it is, spliced, edited, and with a control."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gradio as gr

from saehook.app.lane import make_lane
from saehook.app.lanes import LANES, run_lanes
from saehook.app.messages import told_to_the_visitor
from saehook.app.program_rows import program_of
from saehook.app.reading import prompt_of
from saehook.app.sampling import MAX_TEMPERATURE, sampling_of
from saehook.app.shared import ON_MODEL, QUIET, Shared
from saehook.errors import ArgumentError

LOOKS = {
    "Base": ("The model as it is.", "#8f8f99"),
    "Spliced": ("With the SAE's reconstruction put in, without edits.", "#1A85FF"),
    "Edited": ("The model under your edits.", "#D41159"),
    "Control": ("A random latent, as large as your edits, or a system prompt.", "#8a7a00"),
}
CHOSEN = [*LANES[:3]]
CONTROLS = ("a random latent", "a system prompt")
SYSTEM = "You are a pirate. Talk like one."


class GenerateTab:
    """The tab, and what happens in it."""

    def __init__(self, shared: Shared) -> None:
        """Its controls, inside the tab that is open."""
        self.shared = shared
        limits = shared.limits
        with gr.Row(elem_id="settings"):
            sample = gr.Checkbox(
                True, label="Sampling", info="off: always the likeliest token", elem_id="sample", min_width=130
            )
            temperature = gr.Slider(
                0.05, MAX_TEMPERATURE, 0.8, step=0.05, label="Temperature", elem_id="temperature", min_width=140
            )
            top_p = gr.Slider(0.05, 1.0, 1.0, step=0.05, label="Top-p", elem_id="top-p", min_width=140)
            new_tokens = gr.Slider(
                1, limits.new_tokens, min(60, limits.new_tokens), step=1, label="New tokens", elem_id="new-tokens",
                min_width=140,
            )  # fmt: skip
            seed = gr.Number(
                0, label="Seed", info="the same in all lanes", precision=0, minimum=0, elem_id="seed", min_width=110
            )
        with gr.Row(elem_classes="bottom"):
            chosen = gr.CheckboxGroup(
                [*LANES], value=CHOSEN, label="Lanes", info="one after another, with the same noise",
                elem_id="chosen-lanes", scale=4, min_width=300,
            )  # fmt: skip
            run = gr.Button("Generate", variant="primary", elem_id="generate", scale=1, min_width=130)
            stop = gr.Button("Stop", variant="stop", elem_id="stop", scale=1, min_width=90)
        with gr.Row(visible=shared.has_template):
            control = gr.Dropdown(
                list(CONTROLS), value=CONTROLS[0], label="Control lane", info="what the edits are compared with", scale=1,
                elem_id="control",
            )  # fmt: skip
            system = gr.Textbox(
                SYSTEM, label="System prompt of the control lane", max_lines=4, max_length=limits.prompt_chars, scale=3,
                visible=False, elem_id="system",
            )  # fmt: skip
        control.change(lambda name: gr.update(visible=name == CONTROLS[1]), control, system, **QUIET)
        self.sampling = [sample, temperature, top_p, new_tokens, seed]
        self.settings = [shared.chat, *self.sampling, chosen, control, system]
        shared.controls += [*self.sampling, chosen, control, system]
        sample.change(
            lambda on: [gr.update(interactive=on)] * 3, sample, [temperature, top_p, seed], **QUIET,
        )  # fmt: skip
        with gr.Row(equal_height=True, elem_id="lanes"):
            lanes = [
                make_lane(name, *LOOKS[name], elem_id=f"lane-{name.lower()}", min_width=260, visible=name in CHOSEN)
                for name in LANES
            ]
        self.lanes = lanes
        chosen.change(lambda names: [gr.update(visible=name in names) for name in LANES], chosen, lanes, **QUIET)
        running = run.click(
            self.on_generate, [shared.prompt, shared.editor, *self.settings], lanes,
            api_visibility="private", show_progress="full", show_progress_on=lanes[0], **ON_MODEL,
        )  # fmt: skip
        # In two steps: an update of the run that is still on its way would overwrite what `on_stop` shows.
        ended = stop.click(lambda: None, None, None, cancels=[running], **QUIET)
        ended.then(on_stop, lanes, lanes, **QUIET)

    def on_generate(
        self,
        prompt: str,
        value: Any,
        chat: Any,
        sample: Any,
        temperature: Any,
        top_p: Any,
        new_tokens: Any,
        seed: Any,
        chosen: Any,
        control: Any,
        system: Any,
    ) -> Iterator[list[Any]]:
        """All lanes, streamed; everything is checked before the first one starts."""
        shared = self.shared
        with told_to_the_visitor():
            sampling = sampling_of(sample, temperature, new_tokens, seed, shared.limits, top_p)
            text = prompt_of(shared.hooked, prompt, shared.limits, sampling.new_tokens, chat=bool(chat))
            names = [name for name in LANES if isinstance(chosen, list) and name in chosen]
            if not names:
                raise ArgumentError("No lane is chosen. Choose at least one.")
            program = program_of(shared.hooked, value, shared.limits, len(text.ids))
            other = None
            if control == CONTROLS[1] and "Control" in names:
                if not chat or not system:
                    raise ArgumentError(
                        "A system prompt needs some text, and the chat template. Write one and switch on “As a chat message”, "
                        f"or take {CONTROLS[0]} as control."
                    )
                other = prompt_of(
                    shared.hooked, prompt, shared.limits, sampling.new_tokens, chat=True, system=str(system)
                )
            lanes = run_lanes(shared.hooked, text, program, sampling, shared.limits, names, other)
            with contextlib.closing(lanes):
                yield from lanes


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
