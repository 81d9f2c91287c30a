"""One page about a training run: curves, densities of the latents, evaluation, settings.

A single HTML file without script or request. It is made from what a run leaves, whole or not; what is left out (a line
cut short, an SAE that cannot be read) is said at the top of the page.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saehook.charts import Curve, curve_chart, histogram, human, spans_decade
from saehook.checkpoint import CONFIG, load_sae
from saehook.errors import FileError, SaehookError
from saehook.files import atomic_write
from saehook.metrics_log import METRICS
from saehook.page import counted, figure, flat, grid, page, section, table
from saehook.sae import SAE
from saehook.token_html import escape

EVALUATION, REPORT = "eval.json", "report.html"
Log = dict[str, list[dict[str, Any]]]
"""The lines of each SAE by its name in the log; their tokens ascend."""


class Metric(NamedTuple):
    """A key of the log, and how to show it."""

    key: str
    title: str
    note: str
    log: bool = False
    """Logarithmic where that is possible and worth it."""


CHARTS = (
    Metric("loss", "Loss", "what training makes small", log=True),
    Metric("fvu", "FVU", "fraction of variance unexplained", log=True),
    Metric("l0", "L0", "latents that fire on a token"),
    Metric("kl", "KL", "nats per token, clean to spliced, where the language model has a say", log=True),
    Metric("dead_share", "Dead latents", "share of all latents"),
    Metric("threshold", "Threshold", "in the units of the activations"),
    Metric("lr", "Learning rate", "of the optimiser"),
)


def write_report(run: Path) -> Path:
    """Write `report.html` into the folder of a training run, from what `train_saes` or a `Trainer` left there.

    Returns:
        The file; an earlier one is replaced at once.

    Raises:
        FileError: the folder holds no `metrics.jsonl`, or cannot be read or written.
    """
    notes: list[str] = []
    log = read_log(run / METRICS, notes)
    saes = _read_saes(run, notes)
    rows = _read_evaluation(run / EVALUATION, notes)
    lms = _distinct(_lookup(sae, "lm", "id") for sae in saes.values())
    title = escape(f"{counted(len(log) or len(saes), 'SAE')} {f'on {lms}' if lms else 'in training'}")
    parts = [
        f"<header><p>Training run {escape(run.resolve().name)}</p><h1>{title}</h1>{_facts(saes)}</header>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        section("Training", _legend(log) + grid(_curves(metric, log) for metric in CHARTS)),
        section("How often the latents fire", grid(_densities(saes))),
        section("Evaluation on held-out text", _evaluation(rows)),
        section("Settings", "".join(_settings(name, sae) for name, sae in saes.items())),
    ]
    atomic_write(run / REPORT, page(title, parts, len(log)))
    return run / REPORT


def read_log(path: Path, notes: list[str]) -> Log:
    """Of lines that a later run took again, the later ones."""
    try:
        rows = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise FileError(
            f"{path.parent} holds no {METRICS}, so there is no training to report. Name the folder that `saehook train "
            "--out` or train_saes wrote to."
        ) from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error}.") from None
    log: Log = {}
    damaged, replaced = [], 0
    for number, row in enumerate(rows, 1):
        try:
            line = json.loads(row.decode())
            if not _finite(line["tokens"]) >= 0:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
            continue
        lines = log.setdefault(str(line.get("sae", "(without name)")), [])
        while lines and lines[-1]["tokens"] >= line["tokens"]:
            lines.pop()
            replaced += 1
        lines.append(line)
    if damaged:
        which = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        end = " The last one was probably cut short when training was stopped." if damaged[-1] == len(rows) else ""
        notes.append(f"Left out of {METRICS}: {counted(len(damaged), 'damaged line')} (number {which}).{end}")
    if replaced:
        notes.append(f"{METRICS} goes back in tokens: left out {counted(replaced, 'line')} that a later run replaced.")
    if not log:
        notes.append(f"{METRICS} holds no line that can be shown.")
    return log


def _read_saes(run: Path, notes: list[str]) -> dict[str, SAE]:
    """The SAEs below the run by the names of their folders, 2 before 10; without their weights."""
    saes = {}
    folders = [path.parent for path in run.glob(f"*/{CONFIG}")]
    for folder in sorted(folders, key=lambda f: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", f.name)]):
        try:
            saes[folder.name] = load_sae(folder, device="meta")
        except SaehookError as error:
            notes.append(f"Left out {folder.name}: {error}")
    if not folders:
        notes.append("No SAE has been written to this folder yet, so the page shows the log only.")
    return saes


def _read_evaluation(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        return [dict(row) for row in json.loads(path.read_bytes())["results"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        notes.append(f"Left out {EVALUATION}, which is damaged: {error!r}. Write it again with `saehook eval --json`.")
        return []


def _facts(saes: Mapping[str, SAE]) -> str:
    """What was trained, in a few words each."""
    facts: dict[str, Callable[[SAE], Any]] = {
        "Sites": lambda sae: sae.site,
        "Reconstructed": lambda sae: sae.site_out,
        "Activation": lambda sae: sae.config.activation,
        "Latents (d_sae)": lambda sae: f"{sae.d_sae:,}",
        "Tokens": lambda sae: _lookup(sae, "tokens_seen"),
        "Documents": lambda sae: _lookup(sae, "text", "documents"),
    }
    shown = {name: _distinct(fact(sae) for sae in saes.values()) for name, fact in facts.items()}
    return (
        f"<dl>{''.join(f'<div><dt>{n}</dt><dd>{escape(value)}</dd></div>' for n, value in shown.items() if value)}</dl>"
    )


def _legend(log: Log) -> str:
    """Which line is whose, with its last values."""
    metrics = [metric for metric in CHARTS if any(metric.key in line for lines in log.values() for line in lines)]
    rows = []
    for number, (name, lines) in enumerate(log.items()):
        last = [human(lines[-1].get(metric.key), _is_share(metric.key)) for metric in metrics]
        rows.append((Curve(name, number, []).key + escape(name), [human(lines[-1]["tokens"]), *last]))
    return table(["At the end of the log", "Tokens", *(metric.title for metric in metrics)], rows) if rows else ""


def _curves(metric: Metric, log: Log) -> str:
    """One chart; nothing where the log has no value for it. A line without the key is passed over, NaN is a gap."""
    points = ([(line["tokens"], _finite(line[metric.key])) for line in s if metric.key in line] for s in log.values())
    curves = [Curve(name, i, p) for i, (name, p) in enumerate(zip(log, points, strict=True))]
    if all(math.isnan(value) for curve in curves for _, value in curve.points):
        return ""
    as_log = metric.log and spans_decade(curves)
    chart = curve_chart(metric.title, curves, below="tokens", log=as_log, share=_is_share(metric.key))
    return figure(metric.title, metric.note + ("; log scale" if as_log else ""), chart)


def _densities(saes: Mapping[str, SAE]) -> Iterator[str]:
    """A histogram for each SAE, all on the same axis."""
    densities = {name: sae.stats.density.tolist() for name, sae in saes.items() if sae.stats is not None}
    logs = {name: [round(math.log10(density), 6) for density in d if density > 0] for name, d in densities.items()}
    everything = [value for values in logs.values() for value in values]
    low, high = math.floor(min(everything, default=-1)), math.ceil(max(everything, default=0))
    for name, sae in saes.items():
        if sae.stats is None:
            yield figure(name, "no statistics were stored; saehook stats measures them", "")
            continue
        silent = sae.d_sae - len(logs[name])
        note = f"{silent:,} of {sae.d_sae:,} latents ({human(silent / sae.d_sae, share=True)}) never fired"
        below = "log10 of the share of tokens on which a latent fires"
        chart = histogram(name, logs[name], low, max(0, high), below=below, what="latents fire on this share of tokens")
        yield figure(name, f"{note} on {human(sae.stats.tokens)} tokens", chart)


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
    """The numbers of `eval.json`; columns that hold text share the first."""
    if not rows:
        return f"<p>There is none in this folder ({EVALUATION}). <code>saehook eval --json</code> makes one.</p>"
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (dict, list))))
    words = [key for key in keys if any(isinstance(row.get(key), str) for row in rows)]
    numbers = [key for key in keys if key not in words]
    body = [
        (
            "<br/>".join(dict.fromkeys(escape(row.get(key, "")) for key in words)),
            [human(row.get(k), _is_share(k)) for k in numbers],
        )
        for row in rows
    ]
    cells = table([key.replace("_", " ") for key in (", ".join(words), *numbers)], body)
    return f"{cells}<p>Cross-entropy (ce) and KL in nats per token; dead: fired on none of the tokens.</p>"


def _settings(name: str, sae: SAE) -> str:
    """What the file says about how the SAE was made, folded away."""
    values = {
        "site": sae.site,
        "activation": sae.config.activation,
        "d_in": sae.d_in,
        "mask": sae.mask_rule,
        **sae.metadata,
    }
    values.pop("evaluation", None)  # has a table of its own
    rows = [(escape(key), [value]) for key, value in flat(values)]
    summary = f"<summary>{escape(name)} <small>{escape(sae.config.activation)}, {sae.d_sae:,} latents</small></summary>"
    return f"<details>{summary}{table(['setting', 'value'], rows)}</details>"


def _lookup(sae: SAE, *keys: str) -> Any:
    """An entry of nested metadata; None where there is none."""
    found: Any = sae.metadata
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(human(value) for value in values if value is not None))


def _is_share(key: str) -> bool:
    return key.endswith("_share")


def _finite(value: Any) -> float:
    """The number; NaN for what is none, and for one too large to draw."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else math.nan
