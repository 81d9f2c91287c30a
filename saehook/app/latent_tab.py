"""The tab about the chosen latent: what the weights and the recorded statistics say, and where it fires in a text."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from saehook.app.contexts import group, make_contexts
from saehook.app.downloads import download_page
from saehook.app.messages import told_to_the_visitor
from saehook.app.plots import make_plots, panel, plots_value
from saehook.app.shared import ON_MODEL, QUIET, TOLD, Shared, on_table_select, one_latent
from saehook.app.table import empty_table, make_table
from saehook.corpus import held_out_files, read_documents
from saehook.dashboards import LatentCard, LatentScan, TokenWeight, ablate_contexts, bars, latent_card, scan_latent
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.latent_notes import LatentNote, read_notes, write_note
from saehook.latent_page import latent_page
from saehook.sae import SAE
from saehook.tokenization import window_size, windows
from saehook.visible_text import one_line, visible

HELP = """
**Show** reads the chosen latent's facts off the SAE. **Scan** runs text through the model and keeps where the latent fires: the
strongest places, and some from each fifth of its range, since the strongest alone may mislead. **Ablate on these** runs them again
without the latent, and says how much their loss grows.
"""
HELD_OUT = "held-out Python modules of this machine"
PROMPT = "the prompt, line by line"
NOT_YET = "Press Show."


class LatentTab:
    """The tab, and what happens in it."""

    def __init__(self, shared: Shared, tab: gr.Tab) -> None:
        """Its controls, inside `tab`, which is open."""
        self.shared = shared
        gr.Markdown(HELP, elem_id="latent-help")
        with gr.Row(elem_classes="bottom"):
            text = gr.Dropdown(
                [HELD_OUT, PROMPT], value=HELD_OUT, label="Text to scan", elem_id="scan-text", min_width=280, scale=3
            )
            tokens = gr.Number(
                min(20_000, shared.limits.scan_tokens), label="Tokens", precision=0, minimum=100,
                maximum=shared.limits.scan_tokens, elem_id="scan-tokens", min_width=100,
            )  # fmt: skip
        with gr.Row():
            show = gr.Button("Show", variant="primary", elem_id="show-latent", min_width=90)
            scan = gr.Button("Scan", elem_id="scan", min_width=90)
            ablated = gr.Button("Ablate on these", elem_id="ablate-examples", min_width=150)
            stop = gr.Button("Stop", variant="stop", elem_id="scan-stop", min_width=90)
        shared.controls += [text, tokens]
        self.facts = make_table(empty_table(NOT_YET), label="Facts about the latent", elem_id="facts")
        with gr.Row():
            raises = make_table(empty_table(""), label="Tokens that it raises", elem_id="raises", min_width=220)
            lowers = make_table(empty_table(""), label="Tokens that it lowers", elem_id="lowers", min_width=220)
            near = make_table(empty_table(""), label="Nearest latents", elem_id="near", min_width=220)
        with gr.Row():
            stored = make_plots(label="Activations on record", elem_id="stored-plots", min_width=300)
            densities = make_plots(label="How often it fires", elem_id="latent-density", min_width=300)
        with gr.Row(elem_classes="bottom"):
            label = gr.Textbox("", label="Label", max_lines=1, max_length=200, elem_id="label", min_width=160, scale=2)
            notes = gr.Textbox("", label="Notes", max_lines=3, max_length=4000, elem_id="notes", min_width=200, scale=4)
            save = gr.Button("Save beside the SAE", elem_id="save-note", min_width=120, scale=1)
        export = gr.Button("Download all of this as a page", size="sm", elem_id="export-latent")
        page = gr.Textbox("", label="Page", visible="hidden", elem_id="latent-page")
        kept = gr.State(None, time_to_live=3600)
        self.plots = make_plots(label="Activations", elem_id="scan-plots")
        self.contexts = make_contexts(label="Where it fires", elem_id="contexts")
        chosen = [shared.site, shared.latent]
        found = [self.facts, raises, lowers, near, stored, densities, label, notes]
        show.click(self.on_show, chosen, found, **TOLD)
        tab.select(self.on_open, [*chosen, self.facts], found, **TOLD)
        near.select(on_table_select, None, shared.latent, **QUIET).then(self.on_show, chosen, found, **TOLD)
        save.click(self.on_save, [*chosen, label, notes], None, **TOLD)
        running = scan.click(
            self.on_scan, [*chosen, shared.prompt, text, tokens], [self.plots, self.contexts, kept],
            api_visibility="private", show_progress="minimal", show_progress_on=self.plots, **ON_MODEL,
        )  # fmt: skip
        measuring = ablated.click(
            self.on_ablate, [*chosen, kept], [self.contexts, kept], api_visibility="private", show_progress="minimal",
            show_progress_on=self.contexts, **ON_MODEL,
        )  # fmt: skip
        stop.click(lambda: None, None, None, cancels=[running, measuring], **QUIET)
        export.click(self.on_export, [*chosen, kept], page, **TOLD).success(
            None, page, None, js=download_page("latent.html"), **QUIET
        )

    def on_show(self, site: str, chosen: Any) -> tuple[Any, ...]:
        """Facts that need no text, and what was noted."""
        hooked = self.shared.hooked
        with told_to_the_visitor():
            name = hooked.resolve_site(site)
            latent = one_latent(chosen, hooked.saes[name])
            card = latent_card(hooked, latent, name)
            note = read_notes(hooked.saes[name]).get(latent, LatentNote())
            near = {
                "caption": "Nearest decoder rows", "columns": ["latent", "cosine"],
                "rows": [{"key": n.latent, "cells": [f"{n.cosine:.3f}"], "share": n.cosine} for n in card.neighbours],
            }  # fmt: skip
            raised, lowered = (
                weights_table(what, tokens) for what, tokens in (("Raises", card.raises), ("Lowers", card.lowers))
            )
            plots = stored_plot(card), density_plot(hooked.saes[name], latent)
            return facts_table(card), raised, lowered, near, *plots, note.label, note.notes

    def on_open(self, site: str, chosen: Any, facts: Any) -> tuple[Any, ...]:
        """The facts, unless they are shown already: a note may be half written."""
        caption = str(facts.get("caption", "")) if isinstance(facts, dict) else ""
        if not chosen or (caption.startswith(f"Latent {chosen} of ") and f" at {site}" in caption):
            return (gr.skip(),) * 8
        return self.on_show(site, chosen)

    def on_save(self, site: str, chosen: Any, label: Any, notes: Any) -> None:
        """A label and notes are written beside the SAE."""
        hooked = self.shared.hooked
        with told_to_the_visitor():
            sae = hooked.saes[hooked.resolve_site(site)]
            path = write_note(sae, one_latent(chosen, sae), LatentNote(str(label or ""), str(notes or "")))
            gr.Info(f"Saved in {path.name}.", duration=4)

    def on_export(self, site: str, chosen: Any, scan: LatentScan | None) -> str:
        """A page that stands alone, with the scan where it is of this latent."""
        hooked = self.shared.hooked
        with told_to_the_visitor():
            name = hooked.resolve_site(site)
            latent = one_latent(chosen, hooked.saes[name])
            fits = scan is not None and (scan.site, scan.latent) == (name, latent)
            note = read_notes(hooked.saes[name]).get(latent)
            return latent_page(latent_card(hooked, latent, name), scan if fits else None, note)

    def on_scan(self, site: str, chosen: Any, prompt: str, source: str, tokens: Any) -> Iterator[tuple[Any, Any, Any]]:
        """What is found, again and again until all of the text is read."""
        hooked, limits = self.shared.hooked, self.shared.limits
        with told_to_the_visitor():
            name = hooked.resolve_site(site)
            latent = one_latent(chosen, hooked.saes[name])
            if not isinstance(tokens, (int, float)) or not 1 <= tokens <= limits.scan_tokens:
                raise ArgumentError(f"{tokens} tokens were asked for; this page reads 1 to {limits.scan_tokens}.")
            text = text_of(hooked, source, prompt, int(tokens))
            began = time.monotonic()
            with contextlib.closing(scan_latent(hooked, latent, text, name)) as scans:
                for scan in scans:
                    yield scan_plots(scan), scan_contexts(scan, hooked.tokenizer), scan
                    if scan.done < 1 and time.monotonic() - began > limits.seconds:
                        gr.Warning(f"Ended after {limits.seconds:g} s, at {scan.done:.0%} of the text.", duration=8)
                        return

    def on_ablate(self, site: str, chosen: Any, scan: LatentScan | None) -> Iterator[tuple[Any, Any]]:
        """The examples of a scan, one after another with what they lose without the latent."""
        hooked, limits = self.shared.hooked, self.shared.limits
        with told_to_the_visitor():
            name = hooked.resolve_site(site)
            latent = one_latent(chosen, hooked.saes[name])
            if scan is None or (scan.site, scan.latent) != (name, latent) or not scan.top:
                raise ArgumentError(
                    f"There are no examples of latent {latent} at {name} to ablate it on. Scan a text first."
                )
            began = time.monotonic()
            for measured in ablate_contexts(hooked, scan):
                yield scan_contexts(measured, hooked.tokenizer), measured
                if time.monotonic() - began > limits.seconds:
                    gr.Warning(f"Ended after {limits.seconds:g} s; some examples are not measured.", duration=8)
                    return


def text_of(hooked: HookedSAEs, source: str, prompt: str, tokens: int) -> Sequence[Any]:
    """Windows of held-out text, or the lines of the prompt.

    Raises:
        ArgumentError: no such source, or no text.
    """
    if source == PROMPT:
        lines = [line for line in prompt.splitlines(keepends=True) if line.strip()]
        if not lines:
            raise ArgumentError("The prompt is empty. Write some text.")
        return [ids[:tokens] for ids in hooked.tokenizer(lines, verbose=False)["input_ids"] if ids]
    if source != HELD_OUT:
        raise ArgumentError(f"There is no text {source!r}; expected {HELD_OUT!r} or {PROMPT!r}.")
    size = min(128, window_size(hooked.context))
    return list(windows(read_documents(held_out_files()), hooked.tokenizer, size, max_tokens=tokens).ids)


def facts_table(card: LatentCard) -> dict[str, Any]:
    """What is known without a text, one fact a row."""

    def number(value: float | None, form: str = ".4g") -> str:
        return "–" if value is None else format(value, form)

    quantiles = ", ".join(f"{level:.0%}: {value:.3g}" for level, value in card.quantiles.items()) or "–"
    facts = [
        ("status", card.status),
        ("fires on", number(card.density, ".3%")),
        ("largest activation", number(card.max_act)),
        ("mean activation", number(card.mean_act)),
        ("quantiles of positive ones", quantiles),
        ("threshold", number(card.threshold)),
        ("encoder bias", number(card.b_enc)),
        ("‖encoder‖, ‖decoder‖", f"{card.encoder_norm:.4g}, {card.decoder_norm:.4g}"),
        ("cosine of encoder and decoder", number(card.encoder_decoder_cosine)),
    ]
    rows = [{"key": i, "name": name, "cells": [value], "share": 0} for i, (name, value) in enumerate(facts)]
    measured = f" · measured on {card.measured_tokens:,} tokens" if card.measured_tokens else ""
    caption = f"Latent {card.latent} of {card.d_sae} at {card.site}{measured}"
    return {"caption": caption, "plain": True, "columns": ["fact", "value"], "rows": rows}


def weights_table(what: str, weights: list[TokenWeight]) -> dict[str, Any]:
    """Tokens and what one unit of the latent adds to their logits."""
    largest = max((abs(one.logit) for one in weights), default=1.0)
    rows = [
        {
            "key": one.id,
            "name": one_line(visible(one.token)),
            "cells": [f"{one.logit:+.3f}"],
            "share": one.logit / largest,
        }
        for one in weights
    ]
    caption = f"{what} most, logit by unit" if weights else f"{what}: this site is not as wide as the residual stream"
    return {"caption": caption, "plain": True, "columns": ["token", "logit"], "rows": rows}


def stored_plot(card: LatentCard) -> dict[str, Any]:
    """How strong it is where it fires, from the quantiles in the SAE's file: bars of unequal width, whose areas are shares."""
    levels, values = [0.0, *card.quantiles, 1.0], [0.0, *card.quantiles.values(), card.max_act or 0.0]
    edges, heights, share = [0.0], [], 0.0
    for high, level, before in zip(values[1:], levels[1:], levels[:-1], strict=True):
        share += level - before
        if high > edges[-1]:
            heights.append(share / (high - edges[-1]))
            edges.append(high)
            share = 0.0
    if not card.quantiles or not heights:
        return {"panels": []}
    title = f"Activations where it fires, on {card.measured_tokens:,} recorded tokens"
    shown = panel(title, {"share of them, by unit of activation": heights}, zero=True, bars=True, edges=edges)
    middles = [(low + high) / 2 for low, high in zip(edges[:-1], edges[1:], strict=True)]
    return plots_value(middles, [shown], what="activation", below="activation")


def density_plot(sae: SAE, latent: int | None = None) -> dict[str, Any]:
    """A histogram of the shares of tokens on which the SAE's latents fire; one latent's is marked."""
    density = sae.density if sae.stats is None else sae.stats.density
    if density is None:
        return {"panels": []}
    density = density.float().cpu()
    found = bars(density[density > 0])
    title = f"How often latents fire: {int((density == 0).sum()):,} of {len(density):,} never did"
    mark = None if latent is None else float(density[latent]) or None
    title += "" if mark is None else f"; this one on {mark:.3%}"
    counts = panel(title, {"latents": [bar.tokens for bar in found]}, zero=True, bars=True, logarithmic=True, mark=mark)
    x = [math.sqrt(bar.low * bar.high) for bar in found]
    return plots_value(x, [counts] if x else [], what="share of tokens", below="share of tokens (logarithmic)")


def scan_plots(scan: LatentScan) -> dict[str, Any]:
    """The histogram of activations."""
    title = f"{scan.done:.0%} read: fires on {scan.fired:,} of {scan.tokens:,} tokens ({scan.density:.3%})"
    centres = [(bar.low * bar.high) ** 0.5 for bar in scan.histogram]
    counts = panel(title, {"tokens": [bar.tokens for bar in scan.histogram]}, zero=True, bars=True, logarithmic=True)
    return plots_value(centres, [counts] if centres else [], what="activation", below="activation (logarithmic)")


def scan_contexts(scan: LatentScan, tokenizer: Any) -> dict[str, Any]:
    """The strongest contexts, and those of each part of the range."""
    largest = scan.max_act
    if not scan.top:
        return {
            "groups": [
                group(f"Silent on the {scan.tokens:,} tokens read so far ({scan.done:.0%})", [], tokenizer, largest)
            ]
        }
    shown = {one.window: one.mean_change for one in [*scan.top, *(c for *_, some in scan.sampled for c in some)]}
    changes = [change for change in shown.values() if change is not None]
    strongest = "Strongest: activation, text"
    if changes:
        strongest = (
            f"Without the latent the loss of {len(changes)} of {len(shown)} examples grows by {sum(changes) / len(changes):+.4f} "
            "nats a token on average. Strongest: activation, growth, text"
        )
    groups = [group(strongest, scan.top, tokenizer, largest)]
    groups += [
        group(f"From {low:.3g} to {high:.3g}", contexts, tokenizer, largest)
        for low, high, contexts in scan.sampled
        if contexts
    ]
    return {"groups": groups}
