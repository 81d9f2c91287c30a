"""A page about one latent that stands alone: one HTML file without scripts, to be kept or sent."""

from __future__ import annotations

from collections.abc import Sequence

from saehook.dashboards import Context, LatentCard, LatentScan
from saehook.latent_notes import LatentNote
from saehook.token_html import escape, strip_html, table_html

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse;font-size:14px}}td,th{{border-bottom:1px solid #8885}}
.side{{display:flex;flex-wrap:wrap;gap:2em}}.context{{margin:4px 0}}h2{{font-size:1.1em;margin:1.5em 0 .5em}}</style>
</head><body><h1>{title}</h1>
{body}
</body></html>
"""


def latent_page(card: LatentCard, scan: LatentScan | None = None, note: LatentNote | None = None) -> str:
    """The page.

    Args:
        card: facts without a text.
        scan: where the latent fires, if text has been read.
        note: what somebody called it.
    """
    title = escape(f"Latent {card.latent} of {card.d_sae} at {card.site}")
    parts = []
    if note is not None and (note.label or note.notes):
        parts.append(f"<p><strong>{escape(note.label)}</strong> {escape(note.notes)}</p>")
    facts = [
        ("status", card.status),
        ("fires on", _number(card.density, ".3%")),
        ("largest activation", _number(card.max_act)),
        ("mean activation", _number(card.mean_act)),
        (
            "quantiles of positive ones",
            ", ".join(f"{level:.0%}: {value:.3g}" for level, value in card.quantiles.items()) or "–",
        ),
        ("threshold", _number(card.threshold)),
        ("encoder bias", _number(card.b_enc)),
        ("cosine of encoder and decoder", _number(card.encoder_decoder_cosine)),
    ]
    parts.append(table_html(("fact", "value"), facts))
    raises, lowers = (
        table_html((name, "logit by unit"), [(repr(one.token), f"{one.logit:+.3f}") for one in weights])
        for name, weights in (("raises", card.raises), ("lowers", card.lowers))
    )
    near = table_html(("nearest latent", "cosine"), [(one.latent, f"{one.cosine:.3f}") for one in card.neighbours])
    parts.append(f'<div class="side">{raises}{lowers}{near}</div>')
    if scan is not None:
        read = f"fires on {scan.fired:,} of {scan.tokens:,} tokens ({scan.density:.3%}), up to {scan.max_act:.4g}"
        parts.append(f"<h2>In a text: {escape(read)}</h2>")
        bars = [(f"{bar.low:.3g} to {bar.high:.3g}", f"{bar.tokens:,}") for bar in scan.histogram]
        parts.append(table_html(("activation", "tokens"), bars))
        parts.append(_contexts("Strongest", scan.top, scan.max_act))
        for low, high, contexts in scan.sampled:
            if contexts:
                parts.append(_contexts(f"From {low:.3g} to {high:.3g}", contexts, scan.max_act))
    return PAGE.format(title=title, body="\n".join(parts))


def _contexts(title: str, contexts: Sequence[Context], largest: float) -> str:
    rows = "".join(
        f'<div class="context">{strip_html(one.tokens, one.activations, largest, one.peak)}{_change(one)}</div>'
        for one in contexts
    )
    return f"<h2>{escape(title)}</h2>{rows}"


def _change(context: Context) -> str:
    mean = context.mean_change
    return "" if mean is None else f"<small>loss when ablated {mean:+.4f} nats a token</small>"


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)
