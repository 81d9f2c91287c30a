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

from saehook.charts import Curve, curve_chart, curve_css, escape, histogram, human, spans_decade
from saehook.checkpoint import CONFIG, load_sae
from saehook.errors import FileError, SaehookError
from saehook.files import atomic_write
from saehook.metrics_log import METRICS
from saehook.sae import SAE

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
    log = _read_log(run / METRICS, notes)
    saes = _read_saes(run, notes)
    rows = _read_evaluation(run / EVALUATION, notes)
    lms = _distinct(_lookup(sae, "lm", "id") for sae in saes.values())
    title = escape(f"{_counted(len(log) or len(saes), 'SAE')} {f'on {lms}' if lms else 'in training'}")
    parts = [
        f"<header><p>Training run {escape(run.resolve().name)}</p><h1>{title}</h1>{_facts(saes)}</header>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        _section("Training", _legend(log) + _grid(_curves(metric, log) for metric in CHARTS)),
        _section("How often the latents fire", _grid(_densities(saes))),
        _section("Evaluation on held-out text", _evaluation(rows)),
        _section("Settings", "".join(_settings(name, sae) for name, sae in saes.items())),
    ]
    atomic_write(run / REPORT, PAGE.format(title=title, css=CSS + curve_css(len(log)), body="\n".join(parts)))
    return run / REPORT


def _read_log(path: Path, notes: list[str]) -> Log:
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
        notes.append(f"Left out of {METRICS}: {_counted(len(damaged), 'damaged line')} (number {which}).{end}")
    if replaced:
        notes.append(f"{METRICS} goes back in tokens: left out {_counted(replaced, 'line')} that a later run replaced.")
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
        key = f'<svg class="key" viewBox="0 0 36 8"><path class="{Curve(name, number, []).path_class}" d="M2 4H34"/></svg>'
        last = [human(lines[-1].get(metric.key), _is_share(metric.key)) for metric in metrics]
        rows.append((key + escape(name), [human(lines[-1]["tokens"]), *last]))
    return _table(["At the end of the log", "Tokens", *(metric.title for metric in metrics)], rows) if rows else ""


def _curves(metric: Metric, log: Log) -> str:
    """One chart; nothing where the log has no value for it. A line without the key is passed over, NaN is a gap."""
    points = ([(line["tokens"], _finite(line[metric.key])) for line in s if metric.key in line] for s in log.values())
    curves = [Curve(name, i, p) for i, (name, p) in enumerate(zip(log, points, strict=True))]
    if all(math.isnan(value) for curve in curves for _, value in curve.points):
        return ""
    as_log = metric.log and spans_decade(curves)
    chart = curve_chart(metric.title, curves, below="tokens", log=as_log, share=_is_share(metric.key))
    return _figure(metric.title, metric.note + ("; log scale" if as_log else ""), chart)


def _densities(saes: Mapping[str, SAE]) -> Iterator[str]:
    """A histogram for each SAE, all on the same axis."""
    densities = {name: sae.stats.density.tolist() for name, sae in saes.items() if sae.stats is not None}
    logs = {name: [round(math.log10(density), 6) for density in d if density > 0] for name, d in densities.items()}
    everything = [value for values in logs.values() for value in values]
    low, high = math.floor(min(everything, default=-1)), math.ceil(max(everything, default=0))
    for name, sae in saes.items():
        if sae.stats is None:
            yield _figure(name, "no statistics were stored; saehook stats measures them", "")
            continue
        silent = sae.d_sae - len(logs[name])
        note = f"{silent:,} of {sae.d_sae:,} latents ({human(silent / sae.d_sae, share=True)}) never fired"
        below = "log10 of the share of tokens on which a latent fires"
        chart = histogram(name, logs[name], low, max(0, high), below=below, what="latents fire on this share of tokens")
        yield _figure(name, f"{note} on {human(sae.stats.tokens)} tokens", chart)


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
    """All columns of `eval.json`; those that hold text share the first."""
    if not rows:
        return f"<p>There is none in this folder ({EVALUATION}). <code>saehook eval --json</code> makes one.</p>"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    words = [key for key in keys if any(isinstance(row.get(key), str) for row in rows)]
    numbers = [key for key in keys if key not in words]
    body = [
        (
            "<br>".join(dict.fromkeys(escape(row.get(key, "")) for key in words)),
            [human(row.get(k), _is_share(k)) for k in numbers],
        )
        for row in rows
    ]
    table = _table([key.replace("_", " ") for key in (", ".join(words), *numbers)], body)
    return f"{table}<p>Cross-entropy (ce) and KL in nats per token; dead: fired on none of the tokens.</p>"


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
    rows = [(escape(key), [value]) for key, value in _flat(values)]
    summary = f"<summary>{escape(name)} <small>{escape(sae.config.activation)}, {sae.d_sae:,} latents</small></summary>"
    return f"<details>{summary}{_table(['setting', 'value'], rows)}</details>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and len(value) > 8:
            yield prefix + key, f"{len(value):,} values"
        else:
            yield prefix + key, f"{value:,}" if type(value) is int else str(value)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _grid(figures: Iterable[str]) -> str:
    inside = "".join(figures)
    return f'<div class="grid">{inside}</div>' if inside else ""


def _figure(title: str, note: str, picture: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>{picture}</figure>"


def _table(head: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """The first cell of a row is HTML, the others are text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>" for first, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _lookup(sae: SAE, *keys: str) -> Any:
    """An entry of nested metadata; None where there is none."""
    found: Any = sae.metadata
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(human(value) for value in values if value is not None))


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _is_share(key: str) -> bool:
    return key.endswith("_share")


def _finite(value: Any) -> float:
    """The number; NaN for what is none, and for one too large to draw."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else math.nan


# The policy lets nothing run and nothing load, whatever a file says.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
CSS = """
:root { color-scheme: light dark; --ground: #f5f6f8; --card: #fff; --ink: #1c1f24; --soft: #59606b; --rule: #dfe2e7;
  --bar: #1f5fa8; --hover: #1c1f2414; --note: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ground: #121418; --card: #1b1e24; --ink: #e8eaed; --soft: #a3abb8;
  --rule: #343a44; --bar: #4787c6; --hover: #ffffff16; --note: #3d3318; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 80rem; margin: auto; padding: 1.5rem clamp(.75rem, 2vw, 1.5rem) 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
p, dl, dd, figure { margin: 0; }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2.25rem; }
dd { font-weight: 600; }
dt, header p, section > p, figcaption, small, thead { color: var(--soft); font-size: .88rem; }
.note { background: var(--note); border-radius: 8px; padding: .5rem .9rem; margin-top: 1rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.scroll + .grid, details + details { margin-top: 1rem; }
.scroll + p { margin-top: .5rem; }
figure, .scroll, details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
figure { padding: .8rem .8rem .4rem; min-width: 0; }
figcaption { margin-bottom: .4rem; }
figcaption b { color: var(--ink); font-size: .95rem; margin-right: .3em; }
summary { padding: .6rem .9rem; cursor: pointer; font-weight: 600; }
.scroll { overflow-x: auto; }
details .scroll { border-width: 1px 0 0; border-radius: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
tbody { font-size: .88rem; }
th, td { padding: .4rem .8rem; text-align: right; font-weight: inherit; overflow-wrap: normal; }
td { white-space: nowrap; }
th:first-child, details td, details th { text-align: left; overflow-wrap: anywhere; min-width: 10rem; }
details td { white-space: normal; width: 75%; }
details th { min-width: 12.5rem; }
tbody tr { border-top: 1px solid var(--rule); }
tbody tr:hover { background: var(--hover); }
"""
