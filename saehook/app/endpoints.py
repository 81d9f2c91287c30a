"""The page for programs: two endpoints with plain data, for `gradio_client` or HTTP. They hold the page's limits, too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from saehook.app.edit_rows import check_program
from saehook.app.lanes import stream_program
from saehook.app.limits import Limits
from saehook.app.messages import told_to_the_visitor
from saehook.app.reading import prompt_ids, read
from saehook.app.sampling import sampling_of
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import Program
from saehook.results import LatentHit

MAX_PROGRAM_CHARS = 20_000


def read_endpoint(hooked: HookedSAEs, limits: Limits) -> Callable[..., dict]:
    """`read(prompt, site)`."""

    def read_text(prompt: str, site: str = "") -> dict:
        """Strongest latents of a text and of each of its tokens at one site ("" where only one SAE is attached)."""
        with told_to_the_visitor():
            reading = read(hooked, prompt, site or None, limits)
            return {
                "site": reading.site,
                "tokens": reading.tokens,
                "ids": reading.ids,
                "n_active": reading.n_active,
                "top": [_hit(hit) for hit in reading.top],
                "top_at": [[_hit(hit) for hit in hits] for hits in reading.top_at],
            }

    return read_text


def generate_endpoint(hooked: HookedSAEs, limits: Limits) -> Callable[..., Iterator[dict]]:
    """`generate(prompt, program, ...)`."""

    def generate_text(
        prompt: str,
        program: str = "",
        max_new_tokens: int = 40,
        sample: bool = True,
        temperature: float = 0.8,
        seed: int = 0,
    ) -> Iterator[dict]:
        """One lane: the text so far, again and again. `program` is what `Program.to_json()` writes; "" edits nothing."""
        with told_to_the_visitor():
            sampling = sampling_of(sample, temperature, max_new_tokens, seed, limits)
            ids = prompt_ids(hooked, prompt, limits, sampling.new_tokens)
            if len(program) > MAX_PROGRAM_CHARS:
                raise ArgumentError(f"The program has {len(program)} characters; at most {MAX_PROGRAM_CHARS} are read.")
            parsed = Program.from_json(program) if program else Program()
            check_program(hooked, parsed, len(ids), limits)
            with contextlib.closing(stream_program(hooked, ids, parsed, sampling, limits)) as parts:
                for part in parts:
                    report = None if part.generation is None else part.generation.report.to_data()
                    yield {"text": part.text, "tokens": len(part.new_ids), "done": report is not None, "report": report}

    return generate_text


def _hit(hit: LatentHit) -> dict[str, Any]:
    return {"latent": hit.latent, "activation": hit.activation, "position": hit.position}
