"""One lane: what the model writes under one program, and what its edits did."""

from __future__ import annotations

from typing import Any

import gradio as gr

from saehook.results import Report

STRONG_DOSE = 0.5
"""‖Δ‖/‖x‖ above which text usually falls apart."""

JS = """
const lane = element.querySelector('.lane');
const part = name => lane.querySelector('.' + name);
const draw = () => {
  const value = props.value || {};
  const before = lane.dataset.state;
  lane.dataset.state = value.state || 'idle';
  part('prompt').textContent = value.prompt || '';
  part('text').textContent = value.text || '';
  part('end').textContent = value.end || '';
  part('status').textContent = value.status || '';
  if (value.state === 'running') part('written').scrollTop = part('written').scrollHeight;
  else if (before === 'running') part('written').scrollTop = 0;
  part('notes').replaceChildren(...(value.notes || []).map(note => {
    const item = document.createElement('li'); item.className = note.kind; item.textContent = note.text; return item; }));
};
draw();
watch('value', draw);
"""
CSS = """
.lane { display: flex; flex-direction: column; border: 1px solid var(--border-color-primary); border-radius: 8px;
  border-top: 3px solid var(--lane-color); background: var(--background-fill-primary); color: var(--body-text-color);
  height: 100%; }
.lane .head { padding: 8px 12px 4px; }
.lane .name { font-weight: 600; }
.lane .what { color: var(--body-text-color-subdued); font-size: 13px; }
.lane .written { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; padding: 6px 12px; min-height: 9em; max-height: 26em;
  overflow-y: auto; font: 13px/1.6 var(--font-mono); }
.lane .prompt { color: var(--body-text-color-subdued); }
.lane .end { font-style: italic; color: var(--body-text-color-subdued); }
.lane[data-state=running] .end::after { content: '▍'; }
.lane .foot { margin-top: auto; padding: 6px 12px 8px; border-top: 1px solid var(--border-color-primary); font-size: 13px; }
.lane .status { color: var(--body-text-color-subdued); min-height: 1.4em; }
.lane .notes { list-style: none; margin: 0; padding: 0; }
.lane .notes li { margin: 4px 0 0; padding: 0; overflow-wrap: anywhere; }
.lane .notes li.dose { font-variant-numeric: tabular-nums; }
.lane .notes li.note { border-left: 3px solid #7a7a85; padding-left: 8px; }
.lane .notes li.warning { border-left: 3px solid #D41159; padding-left: 8px; font-weight: 600; }
"""


def make_lane(name: str, what: str, color: str, **component: Any) -> gr.HTML:
    """A component whose value is what `lane_value` returns.

    Args:
        name, what, color: the developer's texts, never a visitor's: they become part of the template.
    """
    return gr.HTML(
        lane_value(),
        label=name,
        html_template=f'<section class="lane" style="--lane-color:{color}" aria-label="{name}">'
        f'<div class="head"><div class="name">{name}</div><div class="what">{what}</div></div>'
        '<div class="written" tabindex="0" aria-label="text"><span class="prompt"></span><span class="text"></span>'
        '<span class="end"></span></div>'
        '<div class="foot"><div class="status" role="status"></div><ul class="notes"></ul></div></section>',
        css_template=CSS,
        js_on_load=JS,
        apply_default_css=False,
        **component,
    )


def lane_value(
    prompt: str = "", text: str = "", *, end: str = "", status: str = "", state: str = "idle", notes: list | None = None
) -> dict[str, Any]:
    """`state`: idle, running, done or stopped. `end`: the special token that ended the text, or nothing."""
    return {"prompt": prompt, "text": text, "end": end, "status": status, "state": state, "notes": notes or []}


def report_notes(report: Report) -> list[dict[str, str]]:
    """What a report says, one line each: doses, edits without effect, and a warning where a dose is large."""
    lines = [
        {"kind": "dose", "text": f"edit {i}: {edit.edit}: {_dose(edit.tokens, edit.dose)}"}
        for i, edit in enumerate(report.edits, 1)
    ]
    if not report.edits or len(report.edits) > 1:
        lines += [{"kind": "dose", "text": f"change at {s.site}: {_dose(s.tokens, s.dose)}"} for s in report.sites]
    lines += [{"kind": "note", "text": note[0].upper() + note[1:]} for note in report.notes()]
    largest = max([d.dose for d in (*report.edits, *report.sites)], default=0.0)
    if report.edits and not largest <= STRONG_DOSE:
        lines.append(
            {
                "kind": "warning",
                "text": f"The change is {largest:.2f} × the activation; text usually falls apart above about {STRONG_DOSE}. "
                "Lower the strength.",
            }
        )
    return lines


def _dose(tokens: int, dose: float) -> str:
    return f"dose ‖Δ‖/‖x‖ {dose:.3f} on {tokens} token{'' if tokens == 1 else 's'}"
