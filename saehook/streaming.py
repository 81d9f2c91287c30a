"""Generation token by token, which the reader can end at any token. The model runs in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from saehook.errors import ArgumentError
from saehook.hooked_model import lock_of
from saehook.interventions import AnyEdit, Program
from saehook.results import Generation
from saehook.runs import Runs

LOCK_POLL_SECONDS = 0.05
"""How often a stream that waits for the model looks whether it has been ended."""


@dataclass(frozen=True)
class Streamed:
    """A generation so far."""

    text: str
    """The new text so far, special tokens left out; a character whose bytes are not all there yet is held back."""
    new_ids: tuple[int, ...]
    """The new tokens so far."""
    generation: Generation | None = None
    """What `generate` returns, with the report; only in the last one."""


def stream(
    hooked: Runs,
    x: Any,
    *,
    edits: Program | AnyEdit | Iterable[AnyEdit] = (),
    splice: bool = False,
    error: str | None = None,
    seed: int | None = None,
    stop: threading.Event | None = None,
    **hf: Any,
) -> Generator[Streamed, None, None]:
    """Continue one row, token by token; arguments and results are those of `generate`.

    The model starts with the first `next()`. Tokens that came while the reader was busy are delivered together. Closing
    the generator ends the model within one token, and nothing runs any more when `close()` returns. An edit that did
    nothing is told by `generation.report.notes()`, not by a warning.

    Args:
        stop: set it, from any thread, to end the model within one token; what is there until then becomes the last
            `Streamed`. Set before the model has begun, nothing is yielded.

    Raises:
        ArgumentError: several rows, or a streamer of one's own. What `generate` raises is raised here.
    """
    if not hooked._batch(x).single:
        raise ArgumentError("stream() takes one row: a text, or one list of ids. For several rows call generate().")
    if "streamer" in hf:
        raise ArgumentError("stream() brings its own streamer; leave out streamer=, or call generate().")
    run = _Run(hooked, stop)
    work = (x, Program.of(edits, splice, error), seed, hf)
    worker = threading.Thread(target=run.work, args=work, name="saehook-stream", daemon=True)
    worker.start()
    try:
        yield from run.results()
    finally:
        run.closed.set()
        worker.join()


class _Run:
    """One stream: what its worker and its reader share."""

    def __init__(self, hooked: Runs, stop: threading.Event | None) -> None:
        self.hooked, self.stop = hooked, stop
        self.closed = threading.Event()
        self.items: queue.SimpleQueue[list[int] | Generation | BaseException | None] = queue.SimpleQueue()

    def ended(self) -> bool:
        return self.closed.is_set() or (self.stop is not None and self.stop.is_set())

    def work(self, x: Any, program: Program, seed: int | None, hf: dict[str, Any]) -> None:
        """In the worker: tokens, then a `Generation`, an exception, or None if the model never began."""
        lock = lock_of(self.hooked.lm)
        try:
            # Waiting in `generate` could not be ended. Under the lock, no other run uses up this run's random numbers.
            while not lock.acquire(timeout=LOCK_POLL_SECONDS):
                if self.ended():
                    return self.items.put(None)
            try:
                if self.ended():
                    return self.items.put(None)
                criteria = StoppingCriteriaList([*(hf.pop("stopping_criteria", None) or ()), _Ended(self.ended)])
                streamer = _Streamer(self.items.put)
                result = self.hooked.generate_quietly(
                    x, program, seed, **hf, streamer=streamer, stopping_criteria=criteria
                )
            finally:
                lock.release()
            self.items.put(result)
        except BaseException as error:
            self.items.put(error)

    def results(self) -> Iterator[Streamed]:
        """In the reader: what the worker puts, tokens that wait already in one piece."""
        ids: list[int] = []
        while True:
            item = self.items.get()
            while isinstance(item, list):
                ids += item
                try:
                    item = self.items.get_nowait()
                except queue.Empty:
                    break
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Generation):
                yield Streamed(item.text, tuple(item.new_ids.tolist()), item)
                return
            text = self.hooked.tokenizer.decode(ids, skip_special_tokens=True)
            yield Streamed(text.rstrip("\N{REPLACEMENT CHARACTER}"), tuple(ids))


class _Ended(StoppingCriteria):
    """Ends the model at the next token once `ended()` is true."""

    def __init__(self, ended: Callable[[], bool]) -> None:
        self.ended = ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.full((input_ids.shape[0],), self.ended(), dtype=torch.bool, device=input_ids.device)


class _Streamer:
    """What Hugging Face calls with the prompt, and then with each token."""

    def __init__(self, put: Callable[[list[int]], None]) -> None:
        self._put = put
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self._put(value.reshape(-1).tolist())
        self._prompt = False

    def end(self) -> None:
        pass
