"""The tab that reads: the prompt's tokens, coloured by a number of each, the latents that fire, and what comes next."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import gradio as gr

from saehook.app.latent_table import SORTS, Span, filter_of, labels_of, listed, table_value, telling_latent
from saehook.app.messages import told_to_the_visitor
from saehook.app.program_rows import program_of
from saehook.app.reading import Reading, prompt_of, read
from saehook.app.shared import ON_MODEL, QUIET, Shared, on_table_select, one_latent, whole
from saehook.app.table import empty_table, make_table
from saehook.app.token_strip import NO_TOKENS, make_strip
from saehook.errors import ArgumentError, SaehookError
from saehook.inspection import Inspection, ablation_effects
from saehook.visible_text import one_line, visible

HELP = """
The bluer a token, the stronger the chosen latent fires on it. **Click a token**, or go to it with the arrow keys and press Enter,
for its latents; with Shift for all up to it, again for the whole text. **Click a row** to choose its latent.
"""
EFFECTS = """
“Loss without it” is what the text's mean loss, in nats a token, gains if the latent is ablated: **≈** to first order, for all
latents at once; **measured** by ablating each one that is shown in a run of its own.
"""
COLOURS = {
    "chosen latent": "",
    "L0: latents that fire": "l0",
    "reconstruction error ‖x − x̂‖² / ‖x‖²": "error",
    "loss, nats": "loss",
    "loss spliced − loss, nats": "loss_spliced",
    "loss edited − loss, nats": "loss_edited",
    "KL to spliced, after the token, nats": "kl_spliced",
    "KL to edited, after the token, nats": "kl_edited",
}
UNREAD = "Read the prompt to see its latents."


class InspectTab:
    """The tab, and what happens in it."""

    def __init__(self, shared: Shared) -> None:
        """Its controls, inside the tab that is open."""
        self.shared = shared
        self.strip = make_strip(NO_TOKENS, label="Tokens of the prompt", elem_id="strip")
        gr.Markdown(HELP, elem_id="help")
        with gr.Row():
            with gr.Column(scale=5, min_width=420):
                self.table = make_table(empty_table(UNREAD), label="Strongest latents", elem_id="table")
            with gr.Column(scale=2, min_width=240):
                self.next = make_table(empty_table(UNREAD), label="Next tokens", elem_id="next")
        with gr.Row(elem_classes="bottom"):
            colour = gr.Dropdown(
                list(COLOURS),
                value="chosen latent",
                label="Colour the tokens by",
                elem_id="colour",
                scale=3,
                min_width=200,
            )
            numbers = gr.Checkbox(
                False, label="Numbers", info="under the tokens", elem_id="numbers", scale=1, min_width=130
            )
            measure = gr.Button("Measure by ablation", elem_id="measure", scale=1, min_width=170)
        gr.Markdown(EFFECTS, elem_id="effects-help")
        with gr.Row(elem_classes="bottom"):
            sort = gr.Dropdown(list(SORTS), value="activation", label="Latents by", elem_id="sort", min_width=130)
            dense = gr.Slider(0, 100, 100, step=0.5, label="Fires on at most, %", elem_id="dense", min_width=160)
            least = gr.Number(0, label="Active from", minimum=0, elem_id="least", min_width=90)
            words = gr.Textbox(
                "", label="With a label like", max_lines=1, max_length=60, elem_id="label-words", min_width=130
            )
        controls = [colour, numbers, sort, dense, least, words]
        shared.controls += controls
        self.view = [shared.latent, shared.span, shared.site, *controls]
        self.shown = [self.strip, self.table, self.next]
        state = [shared.reading, *self.view]
        changes = [control.change for control in (shared.latent, colour, numbers, sort, least, words)]
        gr.on([*changes, dense.release], self.show, state, self.shown, **QUIET)
        self.table.select(on_table_select, None, shared.latent, **QUIET)
        self.strip.select(self.on_strip_select, state, [shared.span, *self.shown], **QUIET)
        measure.click(
            self.on_measure, state, [shared.reading, *self.shown], api_visibility="private", show_progress="minimal",
            show_progress_on=self.table, **ON_MODEL,
        )  # fmt: skip

    def reads_on(self, triggers: list[Any]) -> None:
        """Read the prompt when one of these happens."""
        shared = self.shared
        gr.on(
            triggers, self.on_read, [shared.reading, shared.prompt, shared.chat, shared.editor, *self.view],
            [shared.reading, shared.span, shared.latent, *self.shown],
            api_visibility="private", show_progress="minimal", show_progress_on=self.table, **ON_MODEL,
        )  # fmt: skip

    def start(self, prompt: str) -> None:
        """The page opens with a text that has been read."""
        shared = self.shared
        reading, _, latent, *shown = self.on_read(None, prompt, False, {"rows": []}, "", None, shared.hooked.sites[0])
        shared.reading.value, shared.latent.value = reading, latent
        for component, value in zip(self.shown, shown, strict=True):
            component.value = value

    def on_read(
        self, before: Reading | None, prompt: str, chat: Any, value: Any, chosen: str, span: Span, site: str, *view: Any
    ) -> tuple[Any, ...]:
        """A text is read, and coloured by its strongest latent; the first time by that which a link has chosen."""
        shared = self.shared
        with told_to_the_visitor():
            text = prompt_of(shared.hooked, prompt, shared.limits, chat=bool(chat))
            program = program_of(shared.hooked, value, shared.limits, len(text.ids))
            reading = read(shared.hooked, text, site, program)
            if before is None and chosen:
                latent, span = chosen, _within(span, len(text.ids))
            else:
                latent, span = telling_latent(reading, shared.hooked.saes[reading.site]), None
            return reading, span, latent, *self.show(reading, latent, span, site, *view)

    def show(
        self, reading: Reading | None, chosen: str, span: Span, site: str = "", colour: str = "", numbers: bool = False,
        sort: str = "activation", dense: float | None = 100, least: float | None = 0, words: str = "",
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """Values of the strip and the tables."""
        hooked = self.shared.hooked
        if reading is None or reading.site not in hooked.saes:  # not read yet, or forgotten: the page was open for long
            return NO_TOKENS, empty_table(UNREAD), empty_table("")
        if site and site != reading.site:
            caption = f"The text was read at {reading.site}. Press Read for {site}."
            return (
                {**strip_value(reading, None, span), "legend": caption},
                empty_table(caption),
                next_value(reading, span),
            )
        sae = hooked.saes[reading.site]
        latent, problem = None, None
        try:
            latent = one_latent(chosen, sae)
        except SaehookError as error:
            problem = str(error)
        label = "" if latent is None else labels_of(sae)[0].get(latent, "")
        strip = strip_value(reading, latent, span, COLOURS.get(colour, ""), colour, bool(numbers), label)
        if problem and chosen and not COLOURS.get(colour):
            strip["legend"] = problem
        hits = listed(reading, sae, span, sort, filter_of(dense, least, words))
        table = table_value(reading, sae, latent, span, hits)
        return strip, table, next_value(reading, span)

    def on_strip_select(
        self, reading: Reading | None, chosen: str, span: Span, site: str, colour: str, numbers: bool, sort: str,
        dense: float | None, least: float | None, words: str, event: gr.EventData,
    ) -> tuple[Any, ...]:  # fmt: skip
        """A token is chosen, and its latents are listed; with Shift, all from the one before; the same token again: none."""
        chosen_tokens = [whole(event, name) for name in ("index", "anchor")]
        places = [place for place in chosen_tokens if place is not None]
        if reading is None or not places or not 0 <= min(places) <= max(places) < len(reading.tokens):
            return gr.skip(), *[gr.skip()] * len(self.shown)
        new = (min(places), max(places) + 1)
        if span and tuple(span) == new and new[1] - new[0] == 1:
            new = None
        return new, *self.show(reading, chosen, new, site, colour, numbers, sort, dense, least, words)

    def on_measure(
        self, reading: Reading | None, chosen: str, span: Span, site: str, colour: str, numbers: bool, sort: str,
        dense: float | None, least: float | None, words: str,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The latents of the table are ablated, each in a run of its own."""
        hooked = self.shared.hooked
        with told_to_the_visitor():
            if reading is None or reading.site not in hooked.saes or (site and site != reading.site):
                raise ArgumentError("There is no text whose latents could be ablated. Press Read first.")
            found = listed(reading, hooked.saes[reading.site], span, sort, filter_of(dense, least, words))
            latents = [row.hit.latent for row in found.rows if row.hit.latent not in reading.measured]
            effects = ablation_effects(hooked, reading.facts.ids, reading.site, latents)
            reading = replace(reading, measured={**reading.measured, **effects})
            return reading, *self.show(reading, chosen, span, site, colour, numbers, sort, dense, least, words)


def strip_value(
    reading: Reading,
    latent: int | None,
    span: Span,
    measure: str = "",
    name: str = "",
    numbers: bool = False,
    label: str = "",
) -> dict[str, Any]:
    """The tokens of a reading, coloured by `latent` or, with a `measure` of the inspection, by that."""
    facts = reading.facts
    values, legend = _measured(facts, latent, measure, name, label)
    counted = [v if math.isfinite(v) and (keep or measure) else 0.0 for v, keep in zip(values, facts.mask, strict=True)]
    largest = max(map(abs, counted), default=0.0)
    start, stop = span or (0, 0)
    tokens = []
    for i, (text, value, count) in enumerate(zip(reading.tokens, values, counted, strict=True)):
        says = f"token {i}, id {facts.ids[i]}"
        if measure or latent is not None:
            says += f"\n{name if measure else f'latent {latent}'}: {value:.4g}"
        says += "" if facts.mask[i] else "\noutside the mask: the SAE was not trained on it"
        tokens.append(
            {
                "text": text, "share": abs(count) / largest if largest else 0.0, "title": says, "selected": start <= i < stop,
                "special": not facts.mask[i], "hot": bool(measure.startswith("loss_") and count > 0),
                "number": f"{value:.2g}" if value and math.isfinite(value) else "",
            }
        )  # fmt: skip
    if legend and largest:
        legend += f"from {-largest:.3g} to {largest:.3g}" if measure.startswith("loss_") else f"from 0 to {largest:.4g}"
        legend += "" if measure else ", its largest activation in this text"
    elif legend:
        legend += "0 on this text" if measure else "silent on this text"
    return {
        "tokens": tokens, "legend": legend or "no latent chosen", "numbers": numbers, "both": measure.startswith("loss_")
    }  # fmt: skip


def _measured(facts: Inspection, latent: int | None, measure: str, name: str, label: str) -> tuple[list[float], str]:
    """The number of each token, and what it is; nothing where no latent is chosen."""
    if measure:
        values = getattr(facts, measure) - (facts.loss if measure.startswith("loss_") else 0)
        return values.tolist(), f"{name}: "
    if latent is None:
        return [0.0] * len(facts.ids), ""
    return facts.activations_of(latent).tolist(), f"latent {latent}{label and f', labelled {label},'} at {facts.site}: "


def _within(span: Any, n: int) -> Span:
    """Chosen tokens of a text with n of them, as a link says; None where it has not so many."""
    fits = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(place) is int for place in span)
    return (span[0], span[1]) if fits and 0 <= span[0] < span[1] <= n else None


def next_value(reading: Reading, span: Span) -> dict[str, Any]:
    """What comes after the text, or after the last of the chosen tokens, by itself and under the edits."""
    facts = reading.facts
    last = (span[1] if span else len(facts.ids)) - 1
    rows = [
        {"key": token.id, "name": one_line(visible(token.token)), "share": token.edited,
         "cells": [f"{token.edited:.2%}", f"{token.clean:.2%}"]}
        for token in facts.next_tokens[last]
    ]  # fmt: skip
    caption = f"Likeliest tokens after token {last}, “{one_line(reading.tokens[last])}” · under the edits as they were when read"
    return {"caption": caption, "plain": True, "columns": ["token", "edited", "base"], "rows": rows}
