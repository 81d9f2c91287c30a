"""`demos/REPRODUCTION.md` from the stored JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reproduction.data import SEQUENCE, Places
from reproduction.laboratory import Lab
from reproduction.outcome import (
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    UNTESTED,
    VERDICT_RULE,
    Finding,
    Outcome,
    counted_findings,
    why,
)
from reproduction.registry import Claim
from reproduction.runner import work

FOLDER = Path(__file__).resolve().parent
RESULTS, PLOTS = FOLDER / "results", FOLDER / "plots"
PAGE = FOLDER.parent / "REPRODUCTION.md"

HEAD = """# The papers' claims, reproduced by this program

Made by `python demos/reproduce.py --page` from `demos/reproduction/results/`; generated file.

For each claim: what the paper says, what was run, what came out, and a verdict that a rule in code
(`demos/reproduction/outcome.py`) reads off the numbers. {rule}

Unless a table says otherwise, intervals are 95 % of a bootstrap over sequences ({sequence} tokens) and over seeds, paired: every
draw takes the same sequences and seeds for both sides of a comparison, and all SAEs saw the same tokens in the same order.
"From seed to seed" means mean, smallest and largest of the seeds. Metrics of `saehook.suite` are means over seeds, from the
lowest end of a seed's interval to the highest.

All runs are small. What fails here can hold at the paper's scale, and the reverse; "measured on" says what a verdict rests on.
SAEs of the bundled model with 4,096 latents are those of `demos/compare_methods.py` (`--methods-run`), all others were trained for
this page. Findings on different data may come from different runs, each with its date and machine. No accelerator was at hand:
what the full forms would take is said below each claim.
"""


def stored(folder: Path = RESULTS) -> dict[str, Outcome]:
    """Outcomes by the name of their claim."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        found[file.stem] = Outcome.from_dict(json.loads(file.read_text(encoding="utf-8")))
    return found


def page(claims: Mapping[str, Claim], outcomes: Mapping[str, Outcome], full: Mapping[str, Outcome]) -> str:
    """Markdown, of the small and the full forms."""
    lab = Lab(Path(), Places(stories_lm=Path()), full=True, planning=True)
    parts = [HEAD.format(rule=VERDICT_RULE, sequence=SEQUENCE), _overview(claims, outcomes)]
    for name, claim in claims.items():
        parts += [_section(claim, outcomes.get(name)), _full_form(claim, full.get(name), lab)]
    return "\n".join(parts)


def _overview(claims: Mapping[str, Claim], outcomes: Mapping[str, Outcome]) -> str:
    verdicts = {name: outcomes[name].verdict if name in outcomes else NOT_RUN for name in claims}
    counts = [(v, sum(x == v for x in verdicts.values())) for v in (REPRODUCED, NOT_REPRODUCED, UNTESTED, NOT_RUN)]
    lines = [
        "## All of them",
        "",
        ", ".join(f"{n} {v}" for v, n in counts if n) + ".",
        "",
        "| claim | verdict | findings that hold | measured on |",
        "|---|---|---|---|",
    ]
    for name, claim in claims.items():
        counted = counted_findings(outcomes[name].findings) if name in outcomes else []
        hold = f"{sum(finding.state == 'holds' for finding in counted)} of {len(counted)}" if counted else ""
        lines.append(f"| [{name}](#{name}): {claim.says} | {verdicts[name]} | {hold} | {_places(counted)} |")
    return "\n".join(lines) + "\n"


def _places(counted: Sequence[Finding]) -> str:
    """Which kinds of data the verdict rests on, and at how many sites of a model."""
    data = {finding.data.removesuffix(", held-out") for finding in counted}
    found = []
    for kind in ("planted", "bundled model", "stories260K"):
        if n := sum(kind in words for words in data):
            found.append(kind if n == 1 or kind == "planted" else f"{kind} ({n} sites)")
    return ", ".join(found)


def _section(claim: Claim, outcome: Outcome | None) -> str:
    lines = [f"## {claim.name}", "", f"**{claim.says}** ({claim.source})", "", f"Shown if: {claim.shown}", ""]
    command = f"python demos/reproduce.py {claim.name}"
    if outcome is None:
        return "\n".join([*lines, f"Verdict: **{NOT_RUN}** (`{command}`).", ""])
    lines += [f"Verdict: **{outcome.verdict}**. {why(outcome)}", ""]
    if outcome.findings:
        lines += [*_table(outcome), ""]
    if outcome.plots:
        lines += [f"![{outcome.plots[0].title}](reproduction/plots/{claim.name}.svg)", ""]
    lines += [*(f"{note}\n" for note in outcome.notes)]
    if claim.remark:
        lines += [f"Seen afterwards: {claim.remark}", ""]
    lines += [f"Run: `{command}`, {_runs(outcome.runs)}", ""]
    return "\n".join(lines)


def _table(outcome: Outcome) -> list[str]:
    head = ["| data | quantity | value | 95 % | expected | |", "|---|---|---|---|---|---|"]
    return head + [_row(finding) for finding in outcome.findings]


def _row(f: Finding) -> str:
    interval = "" if f.low == f.high else f"{f.low:.4g} … {f.high:.4g}"
    state = f"condition {f.state}" if f.condition else f.state
    return f"| {f.data} | {f.quantity} | {f.value:.4g} | {interval} | {f.expected} | {state} |"


def _runs(runs: Sequence[Mapping[str, Any]]) -> str:
    """When, where and on what; those of one day together."""
    by_day: dict[str, list[str]] = {}
    for run in runs:
        trained = by_day.setdefault(f"{run['date']}, {run['machine']}", [])
        for data, used in run["trained"].items():
            tokens = ", ".join(f"{n:,}" for n in used["tokens"])
            widths = ", ".join(f"{n:,}" for n in used["d_sae"])
            seeds = f"{len(run['seeds'])} seeds"
            trained.append(f"{used['runs']} SAEs on {data}, {tokens} tokens each, {widths} latents, {seeds}")
    return " ".join(f"{day}: {'; '.join(trained or ['no SAE of its own'])}." for day, trained in by_day.items())


def _full_form(claim: Claim, outcome: Outcome | None, lab: Lab) -> str:
    """What is known of the form for an accelerator, or what it would take."""
    command = f"`python demos/reproduce.py {claim.name} --full`"
    runs = claim.trains(lab)
    if outcome is None:
        return f"Full form: not run. {command} trains {work(runs)}.\n" if runs else ""
    lines = [f"Full form: **{outcome.verdict}**. {why(outcome)}", "", *_table(outcome), ""]
    return "\n".join([*lines, f"Run: {command}, {_runs(outcome.runs)}", ""])
