"""The tab about the SAE itself: what it is, how well it does, how often its latents fire, how it was trained."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gradio as gr

from saehook.app.latent_tab import density_plot
from saehook.app.messages import told_to_the_visitor
from saehook.app.plots import make_plots, panel, plots_value
from saehook.app.shared import TOLD, Shared
from saehook.app.table import empty_table, make_table
from saehook.charts import human
from saehook.errors import FileError
from saehook.metrics_log import METRICS
from saehook.reports import read_log
from saehook.sae import SAE

HELP = "What the SAE at the chosen site is, as its file says; the curves of its training where the run's log lies beside it."
MEASURES = {
    "ce_clean": "loss, clean", "ce_spliced": "loss, spliced", "delta_ce": "loss, more when spliced", "kl": "KL clean ‖ spliced",
    "ce_recovered_zero": "loss recovered, of zero ablation", "ce_recovered_mean": "loss recovered, of mean ablation",
    "fvu": "FVU", "l0": "L0", "dead_share": "dead latents, share",
}  # fmt: skip
CURVES = {"loss": "Training loss", "fvu": "FVU", "l0": "L0", "dead_share": "Dead latents, share"}
POINTS = 200


class CardTab:
    """The tab, and what happens in it."""

    def __init__(self, shared: Shared, tab: gr.Tab) -> None:
        """Its controls, inside `tab`, which is open."""
        self.shared = shared
        gr.Markdown(HELP, elem_id="card-help")
        facts = make_table(empty_table(""), label="Facts about the SAE", elem_id="card")
        densities = make_plots(label="How often latents fire", elem_id="densities")
        curves = make_plots(label="Training", elem_id="curves")
        gr.on([tab.select, shared.site.change], self.on_show, shared.site, [facts, densities, curves], **TOLD)

    def on_show(self, site: str) -> tuple[Any, Any, Any]:
        """All of it; nothing runs."""
        hooked = self.shared.hooked
        with told_to_the_visitor():
            name = hooked.resolve_site(site)
            return card_table(name, hooked.saes[name]), density_plot(hooked.saes[name]), curve_plots(hooked.saes[name])


def card_table(site: str, sae: SAE) -> dict[str, Any]:
    """What the file says, one fact a row."""
    config = sae.config
    training, evaluation = (sae.metadata.get(name) or {} for name in ("training", "evaluation"))
    facts: list[tuple[str, Any]] = [
        ("reads", site),
        ("writes", sae.site_out or "the same"),
        ("latents", config.d_sae),
        ("widths", f"{sae.d_in}, {sae.d_out}"),
        ("activation", repr(config.activation)),
        (
            "leaves out",
            ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(sae.mask_rule).items() if v) or "special tokens only",
        ),
        ("trained on, tokens", sae.metadata.get("tokens_seen")),
        ("learning rate", training.get("lr")),
        ("evaluated on, tokens", evaluation.get("tokens")),
        *((text, evaluation.get(key)) for key, text in MEASURES.items()),
        ("statistics from, tokens", None if sae.stats is None else sae.stats.tokens),
    ]
    rows = [
        {"key": i, "name": name, "cells": [value if isinstance(value, str) else human(value)], "share": 0}
        for i, (name, value) in enumerate(facts)
    ]
    return {"caption": f"SAE at {site}", "plain": True, "columns": ["fact", "value"], "rows": rows}


def curve_plots(sae: SAE) -> dict[str, Any]:
    """Its lines in the log of the run in whose folder it lies."""
    if sae.source is None:
        return {"panels": []}
    try:
        lines = read_log(sae.source.parent / METRICS, []).get(sae.source.name, [])
    except FileError:
        return {"panels": []}
    lines = lines[:: max(1, len(lines) // POINTS)]
    panels = [
        panel(title, {title: [_number(line.get(key)) for line in lines]}, still=True)
        for key, title in CURVES.items()
        if any(key in line for line in lines)
    ]
    return plots_value([line["tokens"] for line in lines], panels, what="tokens", below="tokens")


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) else math.nan
