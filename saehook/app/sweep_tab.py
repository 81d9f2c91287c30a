"""The tab that sweeps: one edit at many strengths, as curves and as texts; a strength is taken over by a click."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from saehook.app.cancellable import Done, Progress, in_background
from saehook.app.messages import told_to_the_visitor
from saehook.app.plots import make_plots, panel, plots_value
from saehook.app.program_rows import check_program, checked_rows, edit_of, latent_row, with_row
from saehook.app.reading import prompt_of
from saehook.app.sampling import sampling_of
from saehook.app.shared import ON_MODEL, QUIET, Shared, one_latent, whole
from saehook.app.table import empty_table, make_table
from saehook.dose_response import DoseResponse
from saehook.errors import ArgumentError, SaehookError
from saehook.interventions import AnyEdit, Program
from saehook.visible_text import one_line, visible

HELP = """
One edit at many strengths, all with the same noise: how far the next tokens move from the unedited model (KL), how likely one token
becomes, how surprising the text is to the unedited model (loss), how much it repeats. Click a point or a row to take its strength
over into the sidebar. With more prompts each has its curve, and the first one is their mean. The settings of the tab Generate hold
here, too.
"""
NOTHING = "Sweep to see what each strength does."
STRENGTHS = "-0.6, -0.3, -0.15, 0.15, 0.3, 0.45, 0.6, 0.9"
FIRST_LATENT = "the chosen latent, added"


class SweepTab:
    """The tab, and what happens in it."""

    def __init__(self, shared: Shared, sampling: list[Any]) -> None:
        """Its controls, inside the tab that is open; `sampling` are those of the tab Generate."""
        self.shared = shared
        gr.Markdown(HELP, elem_id="sweep-help")
        edits = [FIRST_LATENT, *(f"edit {i + 1}" for i in range(shared.limits.edits))]
        with gr.Row(elem_classes="bottom"):
            which = gr.Dropdown(
                edits, value=FIRST_LATENT, label="Edit to sweep", elem_id="sweep-edit", min_width=210, scale=3
            )
            strengths = gr.Textbox(
                STRENGTHS, label="Strengths, in the edit's unit", max_lines=1, max_length=400, elem_id="sweep-strengths",
                min_width=200, scale=3,
            )  # fmt: skip
            target = gr.Textbox(
                "", label="Token to watch", placeholder="its own", max_lines=1, max_length=60, elem_id="sweep-target",
                min_width=110, scale=2,
            )  # fmt: skip
            run = gr.Button("Sweep", variant="primary", elem_id="sweep", min_width=90, scale=1)
            stop = gr.Button("Stop", variant="stop", elem_id="sweep-stop", min_width=80, scale=1)
        more = gr.Textbox(
            "", label="More prompts, one a line", lines=1, max_lines=4, max_length=shared.limits.prompt_chars,
            elem_id="sweep-prompts",
        )  # fmt: skip
        shared.controls += [which, strengths, target, more]
        self.plots = make_plots(label="Dose and response", elem_id="sweep-plots")
        self.table = make_table(empty_table(NOTHING), label="Texts by strength", elem_id="sweep-table")
        done = gr.State(None)
        inputs = [shared.prompt, more, shared.chat, shared.site, shared.latent, shared.editor, which, strengths, target]
        inputs += sampling
        running = run.click(
            self.on_sweep, inputs, [self.plots, self.table, done], api_visibility="private", show_progress="minimal",
            show_progress_on=self.table, **ON_MODEL,
        )  # fmt: skip
        stop.click(lambda: empty_table("Stopped."), None, self.table, cancels=[running], **QUIET)
        for shown in (self.plots, self.table):
            shown.select(self.on_take, [shared.editor, done], shared.editor, **QUIET)

    def on_sweep(
        self, prompt: str, more: Any, chat: Any, site: str, chosen: Any, value: Any, which: str, strengths: Any,
        target: Any, sample: Any, temperature: Any, top_p: Any, new_tokens: Any, seed: Any,
    ) -> Iterator[tuple[Any, Any, Any]]:  # fmt: skip
        """All strengths in one batch, a prompt at a time; what is shown meanwhile is how many tokens are there."""
        shared = self.shared
        with told_to_the_visitor():
            settings = sampling_of(sample, temperature, new_tokens, seed, shared.limits, top_p)
            texts = [prompt, *(line for line in str(more or "").splitlines() if line.strip())]
            if len(texts) > shared.limits.prompts:
                raise ArgumentError(f"{len(texts)} prompts are given; this page sweeps up to {shared.limits.prompts}.")
            prompts = [
                prompt_of(shared.hooked, text, shared.limits, settings.new_tokens, chat=bool(chat)) for text in texts
            ]
            number, edit = self.edit(value, which, site, chosen)
            doses = numbers(strengths, shared.limits.strengths)
            for dose in doses:
                for one in prompts:
                    check_program(
                        shared.hooked, Program(edits=[replace(edit, value=dose)]), shared.limits, len(one.ids)
                    )
            arguments = {**settings.arguments(), "max_time": shared.limits.seconds}
            wanted = str(target) if target else None

            def work(progress: Progress) -> tuple[list[DoseResponse], bool]:
                results, late = [], False
                for i, one in enumerate(prompts):
                    criteria = StoppingCriteriaList([Counting(progress, len(one.ids), f"prompt {i + 1}: ")])
                    same = results[0].target if results else wanted
                    began = time.monotonic()
                    results.append(
                        shared.hooked.sweep(
                            one.given, edit, doses, target=same, stopping_criteria=criteria, **arguments
                        )
                    )
                    late = late or time.monotonic() - began > shared.limits.seconds
                return results, late

            with contextlib.closing(in_background(work)) as parts:
                for part in parts:
                    if isinstance(part, Done):
                        kept = {"row": number, "edit": edit.to_data(), "strengths": doses}
                        results, late = part.result
                        table = table_of(results)
                        if late:
                            most = max(len(r.generation.new_ids) for result in results for r in result.rows)
                            table["caption"] += (
                                f" · ended by the time limit of {shared.limits.seconds:g} s a prompt: at most {most} of "
                                f"{settings.new_tokens} tokens"
                            )
                        yield plots_of(results, edit), table, kept
                    elif part is not None:
                        yield gr.skip(), empty_table(f"{part} of {settings.new_tokens} tokens"), None

    def edit(self, value: Any, which: str, site: str, chosen: Any) -> tuple[int | None, AnyEdit]:
        """The edit that is meant, and its row in the sidebar; None where it is the chosen latent's.

        Raises:
            SaehookError: there is none, or it has no strength.
        """
        shared = self.shared
        if which == FIRST_LATENT:
            latent = one_latent(chosen, shared.hooked.saes[shared.hooked.resolve_site(site)])
            return None, edit_of(latent_row(latent, site, "add 0.3 × ‖x‖"), 1)
        rows = checked_rows(value)
        number = int(which.removeprefix("edit ")) if which.removeprefix("edit ").isdecimal() else 0
        if not 1 <= number <= len(rows):
            raise ArgumentError(
                f"There is no {which}; the sidebar has {len(rows)}. Add one, or sweep the chosen latent."
            )
        edit = edit_of(rows[number - 1], number)
        if edit.value is None:
            raise ArgumentError(f"Edit {number} ({edit.op}) has no strength to sweep. Choose one that has.")
        return number - 1, edit

    def on_take(self, value: Any, done: Any, event: gr.EventData) -> Any:
        """A strength goes into the edit that was swept; into a new row where it is there no more."""
        key = whole(event, "key")
        if not isinstance(done, dict) or key is None or not 0 <= key < len(done["strengths"]):
            return gr.skip()
        with told_to_the_visitor():
            edit = {**done["edit"], "value": done["strengths"][key]}
            rows, number = list(checked_rows(value)), done["row"]
            if number is not None and number < len(rows) and _same(rows[number], edit):
                rows[number] = {"on": True, "edit": edit}
                return {**value, "rows": rows}
            for i, row in enumerate(rows):
                if _same(row, edit):
                    rows[i] = {"on": True, "edit": edit}
                    return {**value, "rows": rows}
            return with_row(value, {"on": True, "edit": edit}, self.shared.limits)


class Counting(StoppingCriteria):
    """Says how many tokens are there, and ends the model at the next one when nobody waits."""

    def __init__(self, progress: Progress, length: int, before: str = "") -> None:
        self.progress, self.length, self.before = progress, length, before

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.progress(f"{self.before}{input_ids.shape[1] - self.length}")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _same(row: dict[str, Any], edit: dict[str, Any]) -> bool:
    """Whether a row means the edit at some strength."""
    try:
        given = edit_of(row, 1).to_data()
    except SaehookError:
        return False
    return {**given, "value": None} == {**edit, "value": None}


def numbers(text: Any, most: int) -> list[float]:
    """The numbers in `-0.5, 1, 2`.

    Raises:
        ArgumentError: none, too many, or something else.
    """
    words = str(text or "").replace(",", " ").split()
    try:
        found = [float(word) for word in words]
    except ValueError:
        raise ArgumentError(
            f"The strengths {str(text)[:60]!r} are not understood; expected for example 0.5, 1, 2."
        ) from None
    if not 1 <= len(found) <= most:
        raise ArgumentError(f"{len(found)} strengths are given; this page allows 1 to {most}.")
    return found


def plots_of(results: Sequence[DoseResponse], edit: AnyEdit) -> dict[str, Any]:
    """Target, KL, loss and repetition over the strength; of several prompts the mean, and each."""
    token = one_line(visible(results[0].target_token))
    panels = [
        _panel(f"Log-probability of “{token}” as next token", results, "target_logprob"),
        _panel(f"Log-probability of “{token}”, mean of new tokens", results, "mean_target_logprob"),
        _panel("KL to the unedited model, nats a token", results, "kl", zero=True),
        _panel("Loss of the text in the unedited model, nats a token", results, "loss"),
        _panel("Share of 4-grams that repeat", results, "repetition", zero=True),
    ]
    strengths = [row.strength for row in results[0].rows if row.strength is not None]
    unit = {"raw": "", "norm": " × ‖x‖", "max": " × its max"}.get(edit.unit, f", {edit.unit}")
    return plots_value(strengths, panels, what="strength", below=f"strength{unit}")


def _panel(title: str, results: Sequence[DoseResponse], measure: str, zero: bool = False) -> dict[str, Any]:
    curves = [[getattr(row, measure) for row in result.rows] for result in results]
    means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    series: dict[str, Sequence[float]] = {"mean" if len(results) > 1 else measure: means}
    if len(results) > 1:
        series |= {f"prompt {i}": curve for i, curve in enumerate(curves, 1)}
    base = sum(getattr(result.unedited, measure) for result in results) / len(results)
    return panel(title, series, base=base, zero=zero)


def table_of(results: Sequence[DoseResponse]) -> dict[str, Any]:
    """The texts, one for each strength, and the unedited one last; of each prompt."""
    several = len(results) > 1
    rows = []
    for number, result in enumerate(results, 1):
        for i, row in enumerate((*result.rows, result.unedited)):
            cells = [
                f"{row.kl:.3f}",
                f"{row.dose:.3f}",
                f"{row.loss:.3f}",
                f"{row.repetition:.0%}",
                *([str(number)] if several else []),
                one_line(visible(row.generation.text)),
            ]
            name = "unedited" if row.strength is None else f"{row.strength:g}"
            rows.append({"key": i, "name": name, "cells": cells, "share": 0})
    first = results[0]
    caption = f"Texts by strength · the prompt's {len(first.prompt_ids)} tokens ran " + (
        f"once but for {len(first.prompt_ids) - first.shared_tokens}" if first.shared_tokens else "for each"
    )
    if several:
        caption = f"Texts by strength, of {len(results)} prompts"
    if not any(row.dose for result in results for row in result.rows):
        caption += " · no strength changed anything: check where the edit acts"
    columns = ["strength", "KL", "‖Δ‖/‖x‖", "loss", "repeated", *(["prompt"] if several else []), "text"]
    return {"caption": caption, "what": "strength", "columns": columns, "rows": rows}
