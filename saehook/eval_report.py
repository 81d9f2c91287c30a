"""The page about an evaluation: `eval.json` as one HTML file that stands alone. It opens offline and runs no script."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saehook.charts import Curve, bars, curve_chart, density_bars, escape, human
from saehook.errors import FileError, FormatError
from saehook.eval_result import EvalResult, EvalRow
from saehook.files import atomic_write
from saehook.page import counted, figure, flat, grid, page, section, table
from saehook.suite_report import suite_sections

_DRAWN = {"positions", "l0", "density", "special"}
"""Blocks that have a picture or a table of their own."""
_CURVES = (
    ("delta_ce", "Loss added, by position", "cross-entropy spliced less clean, nats per token"),
    ("kl", "KL, by position", "of the clean run to the spliced one, nats per token"),
)


def write_eval_report(path: Path, out: Path) -> Path:
    """Write the page about `path`, which `saehook eval --json` or `EvalResult.to_json` made, to `out`.

    Raises:
        FileError: a file that cannot be read or written. FormatError: one that is no evaluation.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {error}. Name the file that `saehook eval --json` wrote.") from None
    result = EvalResult.from_json(text)
    atomic_write(out, report_of(result, json.loads(text).get("suite")))
    return out


def report_of(result: EvalResult, suite: Mapping[str, Any] | None = None) -> str:
    """The page as HTML; `suite` are the slow metrics as `SuiteResult.to_dict` gives them.

    Raises:
        FormatError: `suite` is something else.
    """
    try:
        slow = list(suite_sections(suite)) if suite is not None else []
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(
            f"its slow metrics are none ({error!r}). Write them with `saehook eval --suite full --json`."
        ) from None
    rows = result.results
    lm = result.provenance.get("lm", {})
    n = sum(row.site != "all" for row in rows)
    title = escape(f"{counted(n, 'SAE')} on {lm.get('id', 'a language model')}")
    _, *rest = result.notes()
    parts = [
        f"<header><p>Evaluation on held-out text</p><h1>{title}</h1>{_facts(result)}</header>",
        *(f'<p class="note">{escape(note)}</p>' for note in rest),
        section("Losses and reconstruction", _numbers(rows)),
        section("What the splice costs", grid([*_frontier(rows), *_positions(rows)])),
        section("Latents that fire on a token (L0)", grid(_l0(rows))),
        section("How often the latents fire", grid(_densities(rows))),
        section("Tokens that do not count", _special(rows)),
        *_other_blocks(rows),
        *slow,
        section("How it was measured", _provenance(result)),
    ]
    return page(title, parts, len(rows))


def _facts(result: EvalResult) -> str:
    lm, text = (result.provenance.get(name, {}) for name in ("lm", "text"))
    facts = {
        "Tokens": " / ".join(dict.fromkeys(f"{row.tokens:,}" for row in result.results)),
        "Windows": " / ".join(dict.fromkeys(f"{row.windows:,}" for row in result.results if row.windows is not None)),
        "Tokens a window": text.get("window"),
        "Revision": lm.get("revision"),
        "Dtype": lm.get("dtype"),
    }
    shown = {name: value for name, value in facts.items() if value}
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{escape(value)}</dd></div>' for name, value in shown.items())}</dl>"


def _numbers(rows: list[EvalRow]) -> str:
    """Every number with its interval, and the line of each SAE in the pictures; numbers that no row has are left out."""
    known = [name for name in (rows[0].numbers() if rows else {}) if name not in ("sae", "site")]
    names = [name for name in known if any(getattr(row, name) is not None for row in rows)]
    body = []
    for i, row in enumerate(rows):
        first = "<br/>".join(dict.fromkeys(map(escape, (row.sae, row.site))))
        body.append((Curve(row.sae, i, []).key + first, [_with_interval(row, name) for name in names]))
    note = "Losses in nats per token; in brackets 95 % intervals over windows. Dead: fired on none of the tokens."
    return table(["sae, site", *(name.replace("_", " ") for name in names)], body) + f"<p>{note}</p>"


def _with_interval(row: EvalRow, name: str) -> str:
    share = name.endswith("_share") or name == "top1"
    value = human(getattr(row, name), share)
    if name not in row.intervals:
        return value
    low, high = row.intervals[name]
    return f"{value} [{human(low, share)}, {human(high, share)}]"


def _frontier(rows: list[EvalRow]) -> Iterator[str]:
    """Loss against sparsity, where there are SAEs to compare."""
    points = [Curve(row.sae, i, [(row.l0, row.delta_ce)]) for i, row in enumerate(rows) if math.isfinite(row.delta_ce)]
    if len(points) > 1:
        chart = curve_chart("Loss added against L0", points, below="latents that fire on a token (L0)")
        yield figure("Loss added against L0", "each SAE a point; lower and further left is better", chart)


def _positions(rows: list[EvalRow]) -> Iterator[str]:
    for key, title, note in _CURVES:
        curves = []
        for i, row in enumerate(rows):
            block = row.extra.get("positions", {})
            if block.get("position"):
                values = block["kl"]
                if key == "delta_ce":
                    values = [a - b for a, b in zip(block["ce_spliced"], block["ce_clean"], strict=True)]
                curves.append(Curve(row.sae, i, list(zip(block["position"], values, strict=True))))
        if curves:
            yield figure(title, note, curve_chart(title, curves, below="position in the window"))


def _l0(rows: list[EvalRow]) -> Iterator[str]:
    for row in rows:
        if block := row.extra.get("l0"):
            quantiles = ", ".join(f"{float(level):.0%}: {value}" for level, value in block["quantiles"].items())
            note = f"mean {human(block['mean'])}, sd {human(block['sd'])}; {quantiles}"
            chart = bars(
                row.sae, block["edges"], block["counts"], below="latents that fire on a token", tooltip=_tokens
            )
            yield figure(row.sae, note, chart)


def _tokens(n: int, left: float, right: float) -> str:
    return f"{n:,} tokens: {left:.0f}" + (f" to {right - 1:.0f}" if right - left > 1 else "")


def _densities(rows: list[EvalRow]) -> Iterator[str]:
    for row in rows:
        if block := row.extra.get("density"):
            total = block["never"] + sum(block["counts"])
            note = f"{block['never']:,} of {total:,} latents never fired on {human(block['tokens'])} tokens"
            below = "log10 of the share of tokens on which a latent fires"
            what = "latents fire on this share of tokens"
            yield figure(row.sae, note, density_bars(row.sae, block["counts"], block["low"], below=below, what=what))


def _special(rows: list[EvalRow]) -> str:
    """Special tokens and sinks, which keep their activation in every run: what the SAE would do there."""
    blocks = [(row, row.extra["special"]) for row in rows if row.extra.get("special", {}).get("tokens")]
    if not blocks:
        return ""
    names = list(dict.fromkeys(name for _, block in blocks for name in block))
    body = [(escape(row.sae), [human(block.get(name)) for name in names]) for row, block in blocks]
    return table(["sae", *(name.replace("_", " ") for name in names)], body)


def _other_blocks(rows: list[EvalRow]) -> Iterator[str]:
    """A table for each block that other measurements added."""
    names = dict.fromkeys(name for row in rows for name in row.extra if name not in _DRAWN)
    for name in names:
        found = [(row.sae, dict(flat(row.extra[name]))) for row in rows if name in row.extra]
        keys = list(dict.fromkeys(key for _, values in found for key in values))
        body = [(escape(sae), [values.get(key, "–") for key in keys]) for sae, values in found]
        yield section(escape(name.replace("_", " ").capitalize()), table(["sae", *keys], body))


def _provenance(result: EvalResult) -> str:
    rows: list[tuple[str, list[Any]]] = [(escape(key), [value]) for key, value in flat(result.provenance)]
    return f"<details><summary>Versions, model, text, rules</summary>{table(['setting', 'value'], rows)}</details>"
