"""Work that a visitor can end: it runs in a thread of its own, and nothing of it is left when its reader has gone."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")
SECONDS_BETWEEN_UPDATES = 0.2


class Cancelled(Exception):
    """Raised inside the work, where it asks, once nobody waits for it."""


class Progress:
    """What the work and its reader share."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.said: Any = None
        """What the work has said last."""

    def __call__(self, said: Any = None) -> None:
        """Say how far it is.

        Raises:
            Cancelled: nobody waits any more.
        """
        if self.ended.is_set():
            raise Cancelled
        self.said = said


class Done(Generic[Result]):
    """What the work gives back."""

    def __init__(self, result: Result) -> None:
        self.result = result


def in_background(work: Callable[[Progress], Result]) -> Generator[Any | Done[Result], None, None]:
    """What `work(progress)` says, again and again, and last a `Done` with what it gives back.

    Closing the generator ends the work the next time that it calls `progress`, and waits for that.

    Raises:
        Whatever the work raises.
    """
    progress = Progress()
    results: queue.SimpleQueue[Done[Result] | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(Done(work(progress)))
        except BaseException as error:
            results.put(error)

    worker = threading.Thread(target=run, name="saehook-work", daemon=True)
    worker.start()
    try:
        while True:
            try:
                item = results.get(timeout=SECONDS_BETWEEN_UPDATES)
            except queue.Empty:
                yield progress.said
                continue
            if isinstance(item, BaseException):
                raise item
            yield item
            return
    finally:
        progress.ended.set()
        worker.join()
