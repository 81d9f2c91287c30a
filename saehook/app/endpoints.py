"""The page for programs: named endpoints with plain data, for `gradio_client`, HTTP, or MCP. They hold the page's limits, too."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

from saehook.app.attribution_tab import METHODS, attribute
from saehook.app.lanes import stream_program
from saehook.app.limits import Limits
from saehook.app.messages import told_to_the_visitor
from saehook.app.program_rows import MAX_CHARS, check_program
from saehook.app.reading import SHOWN, prompt_of, read
from saehook.app.sampling import sampling_of
from saehook.app.sweep_tab import numbers
from saehook.app.uploads import Uploads
from saehook.dashboards import latent_card
from saehook.errors import ArgumentError
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import Program
from saehook.latent_search import latents_for_token, latents_here_not_there
from saehook.results import LatentHit


def endpoints(uploads: Uploads, limits: Limits) -> dict[str, Callable[..., Any]]:
    """All of them, by name."""
    every = _Endpoints(uploads, limits)
    names = (
        "read",
        "inspect",
        "generate",
        "sweep",
        "attribute",
        "latent",
        "latents_for_token",
        "latents_here_not_there",
    )
    return {name: _told(getattr(every, name)) for name in names}


def _told(method: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function that tells the visitor what is wrong; Gradio reads its signature and its docstring."""
    if inspect.isgeneratorfunction(method):

        @functools.wraps(method)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with told_to_the_visitor(), contextlib.closing(method(*args, **kwargs)) as parts:
                yield from parts

        return stream

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with told_to_the_visitor():
            return method(*args, **kwargs)

    return call


class _Endpoints:
    """The docstrings are what a caller reads: Gradio publishes them."""

    def __init__(self, uploads: Uploads, limits: Limits) -> None:
        self.uploads, self.limits = uploads, limits

    @property
    def hooked(self) -> HookedSAEs:
        """The model with the SAEs that the caller has."""
        return self.uploads.hooked

    def read(self, prompt: str, site: str = "") -> dict:
        """Strongest latents of a text and of each of its tokens at one site.

        Args:
            prompt: the text.
            site: where the SAE is attached; "" where only one is.
        """
        reading = read(self.hooked, prompt_of(self.hooked, prompt, self.limits), site or None)
        facts = reading.facts
        top, n_active = facts.strongest(SHOWN)
        return {
            "site": facts.site,
            "tokens": reading.tokens,
            "ids": facts.ids,
            "n_active": n_active,
            "top": [_hit(hit) for hit in top],
            "top_at": [[_hit(hit) for hit in facts.strongest(SHOWN, i, i + 1)[0]] for i in range(len(facts.ids))],
        }

    def inspect(self, prompt: str, site: str = "", program: str = "") -> dict:
        """Numbers of each token of a text: loss and KL, spliced and under a program; the likeliest next tokens after the last.

        Args:
            prompt: the text.
            site: where the SAE is attached; "" where only one is.
            program: what `Program.to_json()` writes; "" edits nothing.
        """
        text = prompt_of(self.hooked, prompt, self.limits)
        reading = read(self.hooked, text, site or None, self._program(program, len(text.ids)))
        names = ("l0", "error", "loss", "loss_spliced", "loss_edited", "kl_spliced", "kl_edited")
        numbers_of = {name: [_finite(v) for v in getattr(reading.facts, name).tolist()] for name in names}
        next_tokens = [token._asdict() for token in reading.facts.next_tokens[-1]]
        return {"site": reading.site, "tokens": reading.tokens, **numbers_of, "next_tokens": next_tokens}

    def generate(
        self,
        prompt: str,
        program: str = "",
        max_new_tokens: int = 40,
        sample: bool = True,
        temperature: float = 0.8,
        seed: int = 0,
        top_p: float = 1.0,
        chat: bool = False,
    ) -> Iterator[dict]:
        """Continue a text under a program: the text so far, again and again.

        Args:
            prompt: the text.
            program: what `Program.to_json()` writes; "" edits nothing.
            max_new_tokens: most new tokens.
            sample: draw from the distribution; else always the likeliest token.
            temperature: of the distribution.
            seed: of the random numbers.
            top_p: only the likeliest tokens that together have this probability.
            chat: the prompt is a user's message, put into the model's chat template.
        """
        sampling = sampling_of(sample, temperature, max_new_tokens, seed, self.limits, top_p)
        text = prompt_of(self.hooked, prompt, self.limits, sampling.new_tokens, chat=chat)
        parsed = self._program(program, len(text.ids))
        with contextlib.closing(stream_program(self.hooked, text, parsed, sampling, self.limits)) as parts:
            for part in parts:
                report = None if part.generation is None else part.generation.report.to_data()
                yield {"text": part.text, "tokens": len(part.new_ids), "done": report is not None, "report": report}

    def sweep(
        self, prompt: str, program: str, strengths: str, target: str = "", max_new_tokens: int = 30, seed: int = 0
    ) -> dict:
        """Continue a text, always by the likeliest token, at many strengths of one edit.

        Args:
            prompt: the text.
            program: a program with one edit, as `Program.to_json()` writes it; its value is replaced.
            strengths: numbers such as "0.5, 1, 2".
            target: the token whose log-probability is measured; "": the one that the edit promotes most.
            max_new_tokens: new tokens of each text.
            seed: of the random numbers.
        """
        sampling = sampling_of(False, 1.0, max_new_tokens, seed, self.limits)
        ids = prompt_of(self.hooked, prompt, self.limits, sampling.new_tokens).ids
        parsed = self._program(program, len(ids))
        if len(parsed.edits) != 1:
            raise ArgumentError(f"The program has {len(parsed.edits)} edits; one is swept at a time.")
        values = numbers(strengths, self.limits.strengths)
        result = self.hooked.sweep(
            ids, parsed.edits[0], values, target=target or None, max_time=self.limits.seconds, **sampling.arguments()
        )
        return json.loads(result.to_json())

    def attribute(self, prompt: str, token: str = "", minus: str = "", method: str = "") -> dict:
        """What each latent that fires is worth to the logit of a next token: ablated, the logit would lose that.

        Args:
            prompt: the text.
            token: the token that may come next; "": the likeliest.
            minus: another token, whose logit is taken off; "": none.
            method: as the page names it; "": the gradient, to first order.
        """
        _, result = attribute(self.hooked, prompt, token, minus, method or next(iter(METHODS)), self.limits)
        effects = {
            name: [one._asdict() for one in result.top(SHOWN, sign=sign)]
            for name, sign in (("raise", 1), ("lower", -1))
        }
        return {"logit": result.metric, **effects}

    def latent(self, latent: int, site: str = "") -> dict:
        """What is known of a latent without a text: statistics, tokens that it raises and lowers, nearest latents.

        Args:
            latent: its number.
            site: where the SAE is attached; "" where only one is.
        """
        return latent_card(self.hooked, latent, site or None).to_data()

    def latents_for_token(self, token: str, site: str = "") -> list:
        """Latents whose direction raises a token most.

        Args:
            token: a single token; a space before it counts.
            site: where the SAE is attached; "" where only one is.
        """
        return [one._asdict() for one in latents_for_token(self.hooked, token, site or None, SHOWN)]

    def latents_here_not_there(self, here: str, there: str, site: str = "") -> list:
        """Latents whose mean activation is higher in one text than in another.

        Args:
            here: the first text.
            there: the second.
            site: where the SAE is attached; "" where only one is.
        """
        ids, other = (prompt_of(self.hooked, text, self.limits).ids for text in (here, there))
        return [one._asdict() for one in latents_here_not_there(self.hooked, ids, other, site or None, SHOWN)]

    def _program(self, text: str, n_prompt: int) -> Program:
        """Raises SaehookError where it is no program, or none for this page."""
        if len(text) > MAX_CHARS:
            raise ArgumentError(f"The program has {len(text)} characters; at most {MAX_CHARS} are read.")
        program = Program.from_json(text) if text else Program()
        check_program(self.hooked, program, self.limits, n_prompt)
        return program


def _hit(hit: LatentHit) -> dict[str, Any]:
    return {"latent": hit.latent, "activation": hit.activation, "position": hit.position}


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
