"""The rows in which a visitor writes edits: their controls, and the `Program` that they mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gradio as gr

from saehook.app.limits import Limits
from saehook.errors import ArgumentError, SaehookError
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import Edit, Program
from saehook.where import EVERYWHERE, Where, generation, prompt

OPS = [("add (steer)", "add"), ("set (clamp)", "set"), ("scale", "scale"), ("ablate", "ablate")]
UNITS = [("× ‖x‖ (norm)", "norm"), ("× its max", "max"), ("raw", "raw")]
WHERE = {"everywhere": EVERYWHERE, "prompt": prompt(), "generation": generation()}
DEFAULT_STRENGTH = 0.4
"""In units of the activation's norm: enough to see, too little to break the text."""
MAX_NUMBERS = 64
"""In one field."""
NO_UNIT = {"scale", "ablate"}


class EditRow(NamedTuple):
    """The controls of one edit, or their values: a row is the same tuple on both sides."""

    on: Any
    site: Any
    latent: Any
    op: Any
    strength: Any
    unit: Any
    where: Any


def edit_row(number: int, sites: list[str], limits: Limits) -> EditRow:
    """The controls of edit `number` (from 1); the style sheet shows the labels of the first row only."""

    def named(name: str, hint: str = "") -> dict[str, Any]:
        return {"label": f"{name}{hint}" if number == 1 else f"{name} of edit {number}", "container": False}

    def elem(name: str) -> str:
        return f"edit-{number}-{name}"

    with gr.Row(elem_id=f"edit-{number}", elem_classes="edit-row"):
        on = gr.Checkbox(False, label=f"Edit {number}", container=False, min_width=80, scale=0, elem_id=elem("on"))
        site = gr.Dropdown(
            sites, value=sites[0], **named("Site"), min_width=150, scale=3, elem_id=elem("site"), visible=len(sites) > 1
        )
        latent = gr.Textbox(
            "", **named("Latent"), placeholder="none", max_lines=1, max_length=60, min_width=80, scale=2,
            elem_id=elem("latent"),
        )  # fmt: skip
        op = gr.Dropdown(OPS, value="add", **named("Operation"), min_width=110, scale=2, elem_id=elem("op"))
        strength = gr.Number(
            DEFAULT_STRENGTH, **named("Strength"), step=0.1, min_width=80, scale=2, elem_id=elem("strength"),
            minimum=-limits.strength, maximum=limits.strength,
        )  # fmt: skip
        unit = gr.Dropdown(UNITS, value="norm", **named("Unit"), min_width=110, scale=2, elem_id=elem("unit"))
        where = gr.Dropdown(
            list(WHERE), value="everywhere", **named("Where", ", or tokens such as 0, 3, -1"), allow_custom_value=True,
            min_width=140, scale=3, elem_id=elem("where"),
        )  # fmt: skip
    op.change(
        lambda op: (gr.update(interactive=op != "ablate"), gr.update(interactive=op not in NO_UNIT)),
        op, [strength, unit], queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    return EditRow(on, site, latent, op, strength, unit, where)


def rows_of(values: Sequence[Any]) -> Iterator[EditRow]:
    """Values of the controls of all rows, one after another, as rows."""
    width = len(EditRow._fields)
    for start in range(0, len(values), width):
        yield EditRow(*values[start : start + width])


def first_free(rows: Sequence[EditRow]) -> int:
    """Index of the first row without a latent, else of the first that is off.

    Raises:
        ArgumentError: every row is in use.
    """
    for free in (lambda row: not _text(row.latent), lambda row: not row.on):
        for i, row in enumerate(rows):
            if free(row):
                return i
    raise ArgumentError(f"All {len(rows)} edits are in use. Switch one off, or clear them.")


def program_of(hooked: HookedSAEs, rows: Sequence[EditRow], error: str, n_prompt: int, limits: Limits) -> Program:
    """What the rows that are on mean, checked against the attached SAEs and a prompt of `n_prompt` tokens.

    Raises:
        SaehookError: a row that cannot be meant; the message names it.
    """
    edits = []
    for number, row in enumerate(rows, 1):
        if not row.on:
            continue
        try:
            edits.append(_edit(row, len(hooked.sites) > 1))
            check_program(hooked, Program(edits=tuple(edits[-1:])), n_prompt, limits)
        except SaehookError as problem:
            raise ArgumentError(f"Edit {number}: {problem}") from None
    if error not in ("keep", "drop"):
        raise ArgumentError(f"The error is to be {error!r}; expected 'keep' or 'drop'.")
    return Program(edits=tuple(edits), error="drop" if error == "drop" else None)


def check_program(hooked: HookedSAEs, program: Program, n_prompt: int, limits: Limits) -> None:
    """Refuse what a run would refuse, before anything runs, and what this page does not allow.

    Raises:
        SaehookError: unknown site, latent or token, a missing statistic, a strength beyond the limit, too many edits.
    """
    if len(program.edits) > limits.edits:
        raise ArgumentError(f"{len(program.edits)} edits were given; this page allows {limits.edits}. Leave some out.")
    for edit in program.edits:
        if edit.value is not None and abs(edit.value) > limits.strength:
            raise ArgumentError(f"the strength {edit.value:g} is beyond ±{limits.strength:g}, what this page allows.")
        for token in edit.where.tokens or ():
            if not -n_prompt <= token < n_prompt:
                raise ArgumentError(
                    f"token {token} is outside the {n_prompt} tokens of the prompt: expected {-n_prompt}..{n_prompt - 1}."
                )
    hooked.plan(program)


def _edit(row: EditRow, name_site: bool) -> Edit:
    if not _text(row.latent):
        raise ArgumentError("it is on but names no latent. Write its number, or switch the edit off.")
    if row.strength is None and row.op != "ablate":
        raise ArgumentError("it has no strength. Write a number.")
    return Edit(
        op=row.op,
        latents=whole_numbers(row.latent, "latent"),
        value=None if row.op == "ablate" else row.strength,
        unit="raw" if row.op in NO_UNIT else row.unit,
        site=row.site if name_site else None,
        where=parse_where(row.where),
    )


def parse_where(text: Any) -> Where:
    """`everywhere`, `prompt`, `generation`, or the numbers of tokens of the prompt: `0, 3, -1`.

    Raises:
        ArgumentError: anything else.
    """
    if _text(text) in {"", *WHERE}:
        return WHERE[_text(text) or "everywhere"]
    return Where(
        tokens=whole_numbers(text, "place", "everywhere, prompt, generation, or numbers of tokens such as 0, 3, -1")
    )


def whole_numbers(text: Any, what: str, expected: str = "a whole number, or several such as 3, 14") -> tuple[int, ...]:
    """The numbers in `3, 14`.

    Raises:
        ArgumentError: anything else.
    """
    words = _text(text).replace(",", " ").split()
    if not words or not all(re.fullmatch(r"-?[0-9]{1,9}", word) for word in words):
        raise ArgumentError(f"the {what} {_text(text)[:40]!r} is unknown; expected {expected}.")
    if len(words) > MAX_NUMBERS:
        raise ArgumentError(f"{len(words)} numbers are given as {what}; at most {MAX_NUMBERS} are expected.")
    return tuple(int(word) for word in words)


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
