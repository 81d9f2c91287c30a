"""The lanes of a generation, one after another: base, spliced, edited, and a control of the same size."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from saehook.app.lane import lane_value, report_notes
from saehook.app.limits import Limits
from saehook.app.reading import Prompt
from saehook.app.sampling import Sampling
from saehook.continuation import control_program, judge
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import Program
from saehook.results import Generation
from saehook.streaming import Streamed, stream
from saehook.tokenization import special_ids
from saehook.visible_text import REPLACEMENT, visible

LANES = ("Base", "Spliced", "Edited", "Control")
UNCHOSEN = "This lane is not chosen."
SECONDS_BETWEEN_UPDATES = 0.1
"""A browser needs about 40 ms to draw one."""


def run_lanes(
    hooked: HookedSAEs,
    prompt: Prompt,
    program: Program,
    sampling: Sampling,
    limits: Limits,
    chosen: Sequence[str] = (*LANES[:3],),
    control: Prompt | None = None,
) -> Generator[list[dict[str, Any]], None, None]:
    """Values of all `LANES`, again and again until those that are chosen are done.

    Args:
        control: what the control lane continues, unedited; None: the prompt, under `control_program`.
    """
    lanes = [
        lane_value(visible(hooked.tokenizer.decode(prompt.ids)), status="waits for its turn", state="waiting")
        if name in chosen
        else lane_value(status=UNCHOSEN)
        for name in LANES
    ]
    ended: dict[str, Generation] = {}
    for i, name in enumerate(LANES):
        if name not in chosen:
            continue
        own = control if name == "Control" and control is not None else prompt
        try:
            lane_program = Program() if own is not prompt else _program(hooked, name, program, ended, sampling.seed)
        except ArgumentError as problem:
            lanes[i] = lane_value(status=str(problem))
            yield list(lanes)
            continue
        with contextlib.closing(
            run_lane(hooked, own, lane_program, sampling, limits, prompt.ids, ended.get("Base"))
        ) as values:
            for value in values:
                if isinstance(value, Generation):
                    ended[name] = value
                else:
                    lanes[i] = value
                    yield list(lanes)


def _program(hooked: HookedSAEs, lane: str, program: Program, ended: Mapping[str, Generation], seed: int) -> Program:
    """What a lane runs.

    Raises:
        ArgumentError: it would show nothing new; the message says why.
    """
    if lane == "Edited" and not (program.edits or program.splice):
        raise ArgumentError("No edit is on, so this lane would repeat the first. Add one in the sidebar.")
    if lane == "Control":
        if "Edited" not in ended:
            raise ArgumentError("There is no edited lane to be compared with. Choose it, too, and add an edit.")
        return control_program(hooked, program, ended["Edited"].report, seed)
    return {"Base": Program(), "Spliced": Program(splice=True)}.get(lane, program)


def run_lane(
    hooked: HookedSAEs,
    prompt: Prompt,
    program: Program,
    sampling: Sampling,
    limits: Limits,
    judged_behind: Sequence[int],
    base: Generation | None,
) -> Generator[dict[str, Any] | Generation, None, None]:
    """Values of one lane while the model writes, about ten a second, and last what it wrote.

    Args:
        judged_behind: the ids behind which the unedited model judges the text, the same for all lanes.
    """
    text = visible(hooked.tokenizer.decode(prompt.ids))
    yield lane_value(text, status=f"0 of {sampling.new_tokens} tokens", state="running")
    began = shown = time.monotonic()
    with contextlib.closing(stream_program(hooked, prompt, program, sampling, limits)) as parts:
        for part in parts:
            now = time.monotonic()
            if part.generation is not None:
                judged = _judged(hooked, judged_behind, part, base)
                yield _finished(hooked, text, part, sampling, now - began, limits, judged)
                yield part.generation
            elif now - shown >= SECONDS_BETWEEN_UPDATES:
                shown = now
                status = f"{len(part.new_ids)} of {sampling.new_tokens} tokens"
                yield lane_value(text, visible(_text(hooked, part.new_ids)), status=status, state="running")


def stream_program(
    hooked: HookedSAEs, prompt: Prompt, program: Program, sampling: Sampling, limits: Limits
) -> Generator[Streamed, None, None]:
    """`stream` under a program, within the page's time."""
    return stream(hooked, prompt.given, edits=program, max_time=limits.seconds, **sampling.arguments())


def _finished(
    hooked: HookedSAEs, prompt: str, part: Streamed, sampling: Sampling, seconds: float, limits: Limits, judged: str
) -> dict[str, Any]:
    assert part.generation is not None
    new_ids, end = part.new_ids, ""
    if new_ids and new_ids[-1] in special_ids(hooked.tokenizer):
        new_ids, end = new_ids[:-1], visible(hooked.tokenizer.decode([new_ids[-1]]))
    status = f"{len(part.new_ids)} tokens in {seconds:.1f} s"
    if end:
        status += ", ended by the model"
    elif len(part.new_ids) < sampling.new_tokens:
        status += f", ended by the time limit of {limits.seconds:g} s; {sampling.new_tokens} were asked for"
    status += judged
    notes = report_notes(part.generation.report)
    text = visible(hooked.tokenizer.decode(list(new_ids)))
    return lane_value(prompt, text, end=end, status=status, state="done", notes=notes)


def _judged(hooked: HookedSAEs, ids: Sequence[int], part: Streamed, base: Generation | None) -> str:
    """What the unedited model thinks of a text, and where it leaves the base lane's."""
    if not part.new_ids:
        return ""
    found = judge(hooked, ids, part.new_ids)
    says = f" · loss {found.loss:.2f} nats a token · repeats {found.repetition:.0%}"
    if base is not None:
        pairs = enumerate(zip(part.new_ids, base.new_ids.tolist(), strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        says += " · the base text" if first is None else f" · leaves the base text at token {first}"
    return says


def _text(hooked: HookedSAEs, ids: Sequence[int]) -> str:
    """All new tokens as text, special ones included; a character that is not whole yet is held back."""
    return hooked.tokenizer.decode(list(ids)).rstrip(REPLACEMENT)
