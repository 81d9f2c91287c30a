"""The three lanes of a generation, one after another: base, spliced, edited."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from typing import Any

from saehook.app.lane import lane_value, report_notes
from saehook.app.limits import Limits
from saehook.app.sampling import Sampling
from saehook.app.visible_text import REPLACEMENT, visible
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import Program
from saehook.streaming import Streamed, stream
from saehook.tokenization import special_ids

SECONDS_BETWEEN_UPDATES = 0.1
"""A browser needs about 40 ms to draw one."""


def run_lanes(
    hooked: HookedSAEs, ids: Sequence[int], program: Program, sampling: Sampling, limits: Limits
) -> Generator[list[dict[str, Any]], None, None]:
    """Values of the three lanes, again and again until all are done."""
    prompt = visible(hooked.tokenizer.decode(list(ids)))
    lanes = [lane_value(prompt, status="waits for its turn", state="waiting") for _ in range(3)]
    for i, lane_program in enumerate((Program(), Program(splice=True), program)):
        if i == 2 and not program.edits:
            lanes[i] = lane_value(status="No edit is on, so this lane would repeat the first. Switch an edit on below.")
            yield list(lanes)
            return
        with contextlib.closing(run_lane(hooked, prompt, ids, lane_program, sampling, limits)) as values:
            for lanes[i] in values:
                yield list(lanes)


def run_lane(
    hooked: HookedSAEs, prompt: str, ids: Sequence[int], program: Program, sampling: Sampling, limits: Limits
) -> Generator[dict[str, Any], None, None]:
    """Values of one lane while the model writes; about ten a second."""
    yield lane_value(prompt, status=f"0 of {sampling.new_tokens} tokens", state="running")
    began = shown = time.monotonic()
    with contextlib.closing(stream_program(hooked, ids, program, sampling, limits)) as parts:
        for part in parts:
            now = time.monotonic()
            if part.generation is not None:
                yield _finished(hooked, prompt, part, sampling, now - began, limits)
            elif now - shown >= SECONDS_BETWEEN_UPDATES:
                shown = now
                status = f"{len(part.new_ids)} of {sampling.new_tokens} tokens"
                yield lane_value(prompt, visible(_text(hooked, part.new_ids)), status=status, state="running")


def stream_program(
    hooked: HookedSAEs, ids: Sequence[int], program: Program, sampling: Sampling, limits: Limits
) -> Generator[Streamed, None, None]:
    """`stream` under a program, within the page's time."""
    return stream(
        hooked, list(ids), edits=program, max_time=limits.seconds, **sampling.arguments(),
    )  # fmt: skip


def _finished(
    hooked: HookedSAEs, prompt: str, part: Streamed, sampling: Sampling, seconds: float, limits: Limits
) -> dict[str, Any]:
    assert part.generation is not None
    new_ids, end = part.new_ids, ""
    if new_ids and new_ids[-1] in special_ids(hooked.tokenizer):
        new_ids, end = new_ids[:-1], visible(hooked.tokenizer.decode([new_ids[-1]]))
    status = f"{len(part.new_ids)} tokens in {seconds:.1f} s"
    if end:
        status += ", ended by the model"
    elif len(part.new_ids) < sampling.new_tokens:
        status += f", ended by the time limit of {limits.seconds:g} s"
    notes = report_notes(part.generation.report)
    text = visible(hooked.tokenizer.decode(list(new_ids)))
    return lane_value(prompt, text, end=end, status=status, state="done", notes=notes)


def _text(hooked: HookedSAEs, ids: Sequence[int]) -> str:
    """All new tokens as text, special ones included; a character that is not whole yet is held back."""
    return hooked.tokenizer.decode(list(ids)).rstrip(REPLACEMENT)
