"""The rows in which a visitor writes edits, as the page's editor sends them, and the `Program` that they mean.

    {"rows": [{"on": true, "edit": {"op": "add", "latents": [3], ...}}, {"on": false, "text": "{...}"}],
     "error": "keep", "norm": null, "splice": false, "parallel": false}

An `edit` is that of a program's JSON, but what the visitor typed and the editor could not read stays a string there; a row
with `text` is JSON as typed. `sites` and `most` beside them tell the editor what to offer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from saehook.app.limits import Limits
from saehook.errors import ArgumentError, FormatError, SaehookError
from saehook.fields import from_json
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import NO_VALUE, AnyEdit, Edit, Program, VectorEdit

DEFAULT_STRENGTH = 0.3
"""In units of the activation's norm: enough to see, too little to break the text."""
MAX_NUMBERS = 64
"""In one field."""
MAX_CHARS = 100_000
"""Of a program."""
WHOLE = ("error", "norm", "splice", "parallel")
"""What belongs to all edits together."""
KINDS = {
    "add 0.3 × ‖x‖": {"op": "add", "value": DEFAULT_STRENGTH, "unit": "norm"},
    "set to its max": {"op": "set", "value": 1.0, "unit": "max"},
    "scale × 2": {"op": "scale", "value": 2.0},
    "ablate": {"op": "ablate"},
    "keep only it": {"op": "keep_only"},
}
"""What can be done with a chosen latent at once."""


def editor_value(
    hooked: HookedSAEs, limits: Limits, program: Program | None = None, rows: Sequence[Any] | None = None
) -> dict[str, Any]:
    """A program as the editor shows it; `rows` stand in for its edits."""
    program = program or Program()
    data = json.loads(program.to_json())
    if rows is None:
        rows = [{"on": True, "edit": edit} for edit in data["edits"]]
    return {
        "rows": list(rows),
        "error": program.error or "keep",
        "norm": data.get("norm"),
        "splice": program.splice,
        "parallel": program.parallel,
        "sites": hooked.sites,
        "most": limits.edits,
    }


def with_row(value: Any, row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """The editor's value with one more row, or, where it is full, with this one instead of the first that is off.

    Raises:
        ArgumentError: every row is on.
    """
    rows = checked_rows(value)
    if len(rows) < limits.edits:
        return {**value, "rows": [*rows, row]}
    for i, other in enumerate(rows):
        if not other.get("on"):
            return {**value, "rows": [*rows[:i], row, *rows[i + 1 :]]}
    raise ArgumentError(f"All {len(rows)} edits are in use. Switch one off, or remove it.")


def latent_row(latent: int, site: str | None, kind: str) -> dict[str, Any]:
    """A row that does with a latent what `KINDS` says.

    Raises:
        ArgumentError: no such kind.
    """
    if kind not in KINDS:
        raise ArgumentError(f"There is no edit {kind!r}; expected one of {', '.join(KINDS)}.")
    edit = {**KINDS[kind], "latents": [latent]}
    return {"on": True, "edit": edit if site is None else {**edit, "site": site}}


def checked_rows(value: Any) -> list[dict[str, Any]]:
    """The rows of what a browser sent.

    Raises:
        ArgumentError: not the editor's value.
    """
    rows = value.get("rows") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ArgumentError("The edits are not as the page's editor sends them. Reload the page.")
    if len(json.dumps(value)) > MAX_CHARS:
        raise ArgumentError(f"The edits have more than {MAX_CHARS} characters. Leave some out.")
    return rows


def program_of(hooked: HookedSAEs, value: Any, limits: Limits, n_prompt: int | None = None) -> Program:
    """What the rows that are on mean, checked against the attached SAEs and a prompt of `n_prompt` tokens.

    Raises:
        SaehookError: a row that cannot be meant; the message names it by its place among all rows.
    """
    edits = []
    for number, row in enumerate(checked_rows(value), 1):
        if not row.get("on"):
            continue
        edits.append(edit_of(row, number))
        try:
            check_program(hooked, Program(edits=edits[-1:]), limits, n_prompt)
        except SaehookError as problem:
            raise ArgumentError(f"Edit {number}: {problem}") from None
    program = Program(edits=edits, **_whole(value))
    check_program(hooked, program, limits, n_prompt)
    return program


def problems_of(hooked: HookedSAEs, value: Any, limits: Limits) -> list[str]:
    """Why rows that are on cannot be meant: one message each."""
    problems = []
    rows = checked_rows(value)
    for i in range(len(rows)):
        alone = [{**other, "on": other.get("on") and i == j} for j, other in enumerate(rows)]
        try:
            program_of(hooked, {"rows": alone}, limits)
        except SaehookError as problem:
            problems.append(str(problem))
    if not problems:
        try:
            program_of(hooked, value, limits)
        except SaehookError as problem:
            problems.append(str(problem))
    return problems


def check_program(hooked: HookedSAEs, program: Program, limits: Limits, n_prompt: int | None = None) -> None:
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
            if n_prompt is not None and not -n_prompt <= token < n_prompt:
                raise ArgumentError(
                    f"token {token} is outside the {n_prompt} tokens of the prompt: expected {-n_prompt}..{n_prompt - 1}."
                )
    hooked.plan(program)


def edit_of(row: Mapping[str, Any], number: int) -> AnyEdit:
    """The edit that a row means.

    Raises:
        SaehookError: none is meant; the message names the edit.
    """
    path = f"Edit {number}"
    data = from_json(str(row["text"]), f"text of edit {number}") if "text" in row else row.get("edit")
    if not isinstance(data, dict):
        raise FormatError(f'{path} is no object; for example {{"op": "ablate", "latents": [3]}} is expected.')
    if "vector" in data:
        return VectorEdit.from_data(data, path)
    try:
        return Edit.from_data(_read(data), path)
    except ArgumentError as problem:
        raise ArgumentError(f"{path}: {problem}") from None


def _read(data: Mapping[str, Any]) -> dict[str, Any]:
    """An edit with numbers in place of what was typed."""
    data = dict(data)
    if isinstance(data.get("latents"), str):
        if not data["latents"].strip():
            raise ArgumentError("it is on but names no latent. Write its number, or switch the edit off.")
        data["latents"] = list(whole_numbers(data["latents"], "latent"))
    if data.get("value") is None and data.get("op") not in NO_VALUE:
        raise ArgumentError("it has no strength. Write a number.")
    where = data.get("where")
    if isinstance(where, dict) and isinstance(where.get("tokens"), str):
        tokens = list(whole_numbers(where["tokens"], "place", "numbers of tokens such as 0, 3, -1"))
        data["where"] = {**where, "tokens": tokens}
    return data


def _whole(value: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to all edits together, as fields of a `Program`."""
    fields = {name: value[name] for name in WHOLE if value.get(name) is not None}
    if fields.get("error") == "keep":
        del fields["error"]  # what a program does by itself; said aloud, it contradicts `splice`
    return fields


def program_to_rows(hooked: HookedSAEs, text: Any, limits: Limits) -> dict[str, Any]:
    """The editor's value for a program's JSON, or that of a list of edits.

    Raises:
        SaehookError: no program, or one that this page does not run.
    """
    text = str(text or "")
    if not text.strip():
        raise ArgumentError('There is no JSON. Paste a program: {"schema": 1, "edits": [...]}.')
    if len(text) > MAX_CHARS:
        raise ArgumentError(f"The program has {len(text)} characters; at most {MAX_CHARS} are read.")
    data = from_json(text, "program")
    if isinstance(data, dict) and isinstance(data.get("program"), dict):
        data = data["program"]  # a program file
    program = Program.from_data(data)
    check_program(hooked, program, limits)
    return editor_value(hooked, limits, program)


def whole_numbers(text: Any, what: str, expected: str = "a whole number, or several such as 3, 14") -> tuple[int, ...]:
    """The numbers in `3, 14`.

    Raises:
        ArgumentError: anything else.
    """
    text = "" if text is None else str(text).strip()
    words = text.replace(",", " ").split()
    if not words or not all(re.fullmatch(r"-?[0-9]{1,9}", word) for word in words):
        raise ArgumentError(f"the {what} {text[:40]!r} is unknown; expected {expected}.")
    if len(words) > MAX_NUMBERS:
        raise ArgumentError(f"{len(words)} numbers are given as {what}; at most {MAX_NUMBERS} are expected.")
    return tuple(int(word) for word in words)
