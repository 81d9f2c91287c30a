"""The tab that finds latents: by what somebody called them, by the texts on which they fire, by the token that they raise."""

from __future__ import annotations

from typing import Any

import gradio as gr

from saehook.app.messages import told_to_the_visitor
from saehook.app.reading import prompt_of
from saehook.app.shared import ON_MODEL, QUIET, TOLD, Shared, on_table_select
from saehook.app.table import empty_table, make_table
from saehook.errors import ArgumentError
from saehook.latent_notes import read_notes
from saehook.latent_search import latents_for_token, latents_here_not_there
from saehook.visible_text import one_line, visible

HELP = """
Find latents of the SAE at the chosen site, and choose one by its row: by a **label** that somebody saved beside the SAE; by **two
texts**, for latents that fire more in the first; by a **token**, for latents whose direction raises it.
"""
NOTHING = "Search to see latents."
SHOWN = 20


class SearchTab:
    """The tab, and what happens in it."""

    def __init__(self, shared: Shared) -> None:
        """Its controls, inside the tab that is open."""
        self.shared, chars = shared, shared.limits.prompt_chars
        gr.Markdown(HELP, elem_id="search-help")
        with gr.Row(elem_classes="bottom"):
            label = gr.Textbox(
                "", label="Words of a label or note", max_lines=1, max_length=200, elem_id="search-label", scale=4
            )
            by_label = gr.Button("By label", elem_id="by-label", scale=1, min_width=110)
        with gr.Row(elem_classes="bottom"):
            here = gr.Textbox("", label="Active here", lines=2, max_lines=4, max_length=chars, elem_id="here", scale=2)
            there = gr.Textbox(
                "", label="and not there", lines=2, max_lines=4, max_length=chars, elem_id="there", scale=2
            )
            by_text = gr.Button("By texts", elem_id="by-text", scale=1, min_width=110)
        with gr.Row(elem_classes="bottom"):
            token = gr.Textbox("", label="Token", max_lines=1, max_length=60, elem_id="search-token", scale=4)
            by_token = gr.Button("By token", elem_id="by-token", scale=1, min_width=110)
        shared.controls += [label, here, there, token]
        self.table = make_table(empty_table(NOTHING), label="Latents found", elem_id="found")
        by_label.click(self.on_label, [shared.site, label], self.table, **TOLD)
        by_token.click(self.on_token, [shared.site, token], self.table, **TOLD)
        by_text.click(
            self.on_texts,
            [shared.site, here, there],
            self.table,
            api_visibility="private",
            show_progress="minimal",
            **ON_MODEL,
        )
        self.table.select(on_table_select, None, shared.latent, **QUIET)

    def on_label(self, site: str, words: Any) -> dict[str, Any]:
        """Latents whose label or note has all of the words."""
        hooked = self.shared.hooked
        with told_to_the_visitor():
            notes = read_notes(hooked.saes[hooked.resolve_site(site)])
            wanted = str(words or "").casefold().split()
            found = [
                (i, note)
                for i, note in notes.items()
                if all(w in f"{note.label} {note.notes}".casefold() for w in wanted)
            ]
            rows = [
                {"key": i, "cells": [one_line(visible(note.label)), one_line(visible(note.notes))], "share": 0}
                for i, note in sorted(found)[:SHOWN]
            ]
            caption = f"showing {len(rows)} of {len(found)} that fit, of {len(notes)} latents with a label"
            return {"caption": caption, "columns": ["latent", "label", "notes"], "rows": rows}

    def on_token(self, site: str, token: Any) -> dict[str, Any]:
        """Latents whose direction raises a token."""
        with told_to_the_visitor():
            if not token:
                raise ArgumentError("No token is given. Write one; a space before it counts.")
            found = latents_for_token(self.shared.hooked, str(token), site, SHOWN)
            rows = [
                {"key": one.latent, "cells": [f"{one.cosine:.3f}", f"{one.logit:+.3f}"], "share": one.cosine}
                for one in found
            ]
            caption = f"Latents that raise “{one_line(visible(str(token)))}” · the {len(rows)} nearest"
            return {"caption": caption, "columns": ["latent", "cosine", "logit by unit"], "rows": rows}

    def on_texts(self, site: str, here: Any, there: Any) -> dict[str, Any]:
        """Latents that fire more in one text than in another."""
        hooked, limits = self.shared.hooked, self.shared.limits
        with told_to_the_visitor():
            ids, other = (prompt_of(hooked, str(text or ""), limits).ids for text in (here, there))
            found = latents_here_not_there(hooked, ids, other, site, SHOWN)
            most = max((one.difference for one in found), default=1.0)
            rows = [
                {
                    "key": one.latent, "share": one.difference / most,
                    "cells": [f"{one.difference:.3g}", f"{one.here:.3g}", f"{one.there:.3g}", f"{one.largest:.3g}"],
                }
                for one in found
            ]  # fmt: skip
            columns = ["latent", "more, on average", "mean here", "mean there", "largest here"]
            return {
                "caption": f"Latents active here and not there · the first {len(rows)}",
                "columns": columns,
                "rows": rows,
            }
