"""The tab that attributes: which latents raise or lower a token that may come next."""

from __future__ import annotations

from typing import Any

import gradio as gr
import torch

from saehook.app.limits import Limits
from saehook.app.messages import told_to_the_visitor
from saehook.app.reading import prompt_of
from saehook.app.shared import ON_MODEL, QUIET, Shared, whole
from saehook.app.table import empty_table, make_table
from saehook.attribution import Attribution, LatentEffect, Logit
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.visible_text import one_line, visible, visible_token

HELP = """
How much of a token's logit, at the end of the prompt, each latent that fires is worth: what the logit would lose if the latent were
ablated. Positive raises the token, negative lowers it. The gradient answers for all latents at once, to first order; the integral
is nearer where latents saturate; ablation is exact, one run of the model for each latent. Choose a row for its latent.
"""
METHODS: dict[str, dict[str, Any]] = {
    "gradient (first order)": {},
    "integrated, 8 steps": {"steps": 8},
    "exact, by ablation": {"exact": True},
}
NOTHING = "Name a token and attribute it."
SHOWN = 15


class AttributionTab:
    """The tab, and what happens in it."""

    def __init__(self, shared: Shared) -> None:
        """Its controls, inside the tab that is open."""
        self.shared = shared
        gr.Markdown(HELP, elem_id="attribution-help")
        with gr.Row(elem_classes="bottom"):
            token = gr.Textbox(
                "", label="Token that may come next", placeholder="the likeliest", max_lines=1, max_length=60,
                elem_id="attribution-token", min_width=150, scale=2,
            )  # fmt: skip
            minus = gr.Textbox(
                "", label="Minus the logit of", placeholder="nothing", max_lines=1, max_length=60, elem_id="attribution-minus",
                min_width=110, scale=2,
            )  # fmt: skip
            method = gr.Dropdown(
                list(METHODS),
                value=next(iter(METHODS)),
                label="By",
                elem_id="attribution-method",
                min_width=150,
                scale=2,
            )
            run = gr.Button("Attribute", variant="primary", elem_id="attribute", min_width=90, scale=1)
        with gr.Row():
            self.up = make_table(
                empty_table(NOTHING), label="Latents that raise it", elem_id="attribution-up", min_width=300
            )
            self.down = make_table(
                empty_table(""), label="Latents that lower it", elem_id="attribution-down", min_width=300
            )
        shared.controls += [token, minus, method]
        found = gr.State(None)
        run.click(
            self.on_attribute, [shared.prompt, shared.chat, token, minus, method], [self.up, self.down, found],
            api_visibility="private", show_progress="minimal", show_progress_on=self.up, **ON_MODEL,
        )  # fmt: skip
        for number, table in enumerate((self.up, self.down)):
            table.select(_chooser(number), found, [shared.site, shared.latent], **QUIET)

    def on_attribute(self, prompt: str, chat: Any, token: Any, minus: Any, method: str) -> tuple[Any, Any, Any]:
        """Both tables, and where their latents are."""
        with told_to_the_visitor():
            name, result = attribute(self.shared.hooked, prompt, token, minus, method, self.shared.limits, bool(chat))
            sides = [result.top(SHOWN, sign=sign) for sign in (1, -1)]
            largest = max((abs(one.effect) for side in sides for one in side), default=1.0)
            up, down = (
                effects_table(f"{what} {name} (logit {result.metric:.3f})", side, result, largest)
                for what, side in zip(("Raise", "Lower"), sides, strict=True)
            )
            return up, down, [[(one.site, one.latent) for one in side] for side in sides]


def attribute(
    hooked: HookedSAEs, prompt: str, token: Any, minus: Any, method: str, limits: Limits, chat: bool = False
) -> tuple[str, Attribution]:
    """The effects on a logit behind the prompt, and that logit in words.

    Args:
        token: a text; nothing: the likeliest. minus: the other token's text; nothing: none.
        method: one of `METHODS`.

    Raises:
        SaehookError: no such token or method, or a prompt that is too long.
    """
    text = prompt_of(hooked, prompt, limits, chat=chat)
    if method not in METHODS:
        raise ArgumentError(f"There is no method {method!r}; expected one of {', '.join(METHODS)}.")
    if "exact" in METHODS[method] and len(text.ids) > limits.exact_tokens:
        raise ArgumentError(
            f"The prompt has {len(text.ids)} tokens; this page attributes up to {limits.exact_tokens} exactly. Shorten it, or take "
            "the integral."
        )
    wanted: int | str = str(token)
    if not token:
        with torch.no_grad():
            wanted = int(hooked(text.given).logits[0, -1].argmax())
    result = hooked.attribute(
        text.given, Logit(wanted, minus=str(minus) if minus else None), by_token=False, **METHODS[method]
    )
    name = visible_token(hooked.tokenizer, wanted) if isinstance(wanted, int) else visible(wanted)
    return f"“{one_line(name)}”" + (f" − “{one_line(visible(str(minus)))}”" if minus else ""), result


def _chooser(number: int) -> Any:
    """A row of one of the tables chooses its latent, and the site of that."""

    def choose(found: Any, event: gr.EventData) -> tuple[Any, Any]:
        key = whole(event, "key")
        if not found or key is None or not 0 <= key < len(found[number]):
            return gr.skip(), gr.skip()
        site, latent = found[number][key]
        return site, str(latent)

    return choose


def effects_table(caption: str, effects: list[LatentEffect], result: Attribution, largest: float) -> dict[str, Any]:
    """Latents with their effects, the largest first."""
    rows = [
        {
            "key": i, "name": str(one.latent), "share": one.effect / largest,
            "cells": [f"{one.effect:+.4f}", f"{one.activation:.3g}", f"{one_line(visible(one.token))}  ({one.position})", one.site],
        }
        for i, one in enumerate(effects)
    ]  # fmt: skip
    columns = ["latent", "effect", "activation", "on token", "site"]
    return {
        "caption": f"{caption} · {len(rows)} of {len(result.latent)} latents that fire",
        "columns": columns,
        "rows": rows,
    }
